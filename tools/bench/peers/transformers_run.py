"""transformers' model in a plain PyTorch loop: one process, or FSDP2 (`fully_shard` of each layer), each layer
compiled or not. In bf16 one process has autocast, and FSDP2 its MixedPrecisionPolicy."""

from contextlib import nullcontext

import shared
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM


def build(work: shared.Work) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, attn_implementation="sdpa").train()
    for layer in model.model.layers:
        if work.compile:
            layer.compile()
    if work.ranks > 1:
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = bf16 if work.dtype == "bf16" else MixedPrecisionPolicy()
        for module in (*model.model.layers, model):
            fully_shard(module, mp_policy=policy)
    return model


def main() -> None:
    work = shared.read()
    if work.ranks > 1:
        dist.init_process_group("gloo")
    model = build(work)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.lr, betas=(work.beta1, work.beta2), eps=work.eps, weight_decay=0.0, fused=True
    )
    autocast = work.dtype == "bf16" and work.ranks == 1

    def step(ids) -> tuple[float, float]:
        own = torch.from_numpy(shared.own_rows(ids, shared.rank(), work.ranks))
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(input_ids=own, labels=own).loss  # labels are shifted inside
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if work.ranks > 1:
            dist.all_reduce(loss)
            norm = norm.full_tensor()
        return float(loss) / work.ranks, float(norm)

    shared.write(work, shared.train(work, step))
    if work.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
