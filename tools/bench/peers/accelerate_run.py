"""accelerate with FSDP2, which it has to be made to use: on a CPU it prepares DDP instead, and says nothing."""

import os

os.environ.update(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")

import shared
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import AutoModelForCausalLM


def accelerator(work: shared.Work) -> Accelerator:
    """Its bf16 is FSDP2's policy with fp32 reductions; its own `mixed_precision` would reduce in bf16."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False, mixed_precision_policy=bf16 if work.dtype == "bf16" else None,
    )  # fmt: skip
    made = Accelerator(cpu=True)
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return made


def main() -> None:
    work = shared.read()
    accelerate = accelerator(work)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.lr, betas=(work.beta1, work.beta2), eps=work.eps, weight_decay=0.0, fused=True
    )
    model, optimizer = accelerate.prepare(model, optimizer)
    assert isinstance(model, FSDPModule), type(model)

    def step(ids) -> tuple[float, float]:
        own = torch.from_numpy(shared.own_rows(ids, accelerate.process_index, accelerate.num_processes))
        loss = model(input_ids=own, labels=own).loss  # labels are shifted inside
        accelerate.backward(loss)
        norm = accelerate.clip_grad_norm_(model.parameters(), work.clip)
        optimizer.step()
        optimizer.zero_grad()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(accelerate.reduce(loss.detach().clone(), "mean")), float(norm)

    shared.write(work, shared.train(work, step))
    accelerate.end_training()


if __name__ == "__main__":
    main()
