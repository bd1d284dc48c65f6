"""VeOmni: its FSDP2, expert parallelism (EP) or Ulysses, with its optimizer, clipping and MixedPrecisionConfig.

`tools/witness/veomni_cpu.py` has what it lacks on CPUs.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "witness"))

import shared
import torch
import torch.distributed as dist
import veomni_cpu  # noqa: F401  (before the rest of veomni)
from veomni.arguments.arguments_types import MixedPrecisionConfig, OpsImplementationConfig
from veomni.distributed.clip_grad_norm import veomni_clip_grad_norm
from veomni.distributed.parallel_state import get_parallel_state, init_parallel_state
from veomni.distributed.torch_parallelize import build_parallelize_model
from veomni.models import build_foundation_model
from veomni.optim import build_optimizer

# Every kernel in plain PyTorch; attention's and the experts' follow from the mesh.
EAGER = (
    "cross_entropy_loss", "rms_norm", "swiglu_mlp", "rotary_pos_emb", "load_balancing_loss",
    "rms_norm_gated", "causal_conv1d", "chunk_gated_delta_rule",
)  # fmt: skip


def build(work: shared.Work) -> torch.nn.Module:
    """The checkpoint, sharded. Flash attention under sp, since VeOmni's "sdpa" ignores sequence parallelism."""
    init_parallel_state(
        dp_size=work.fsdp * work.ep, ulysses_size=work.sp, dp_mode="fsdp2", device_type="cpu",
        extra_parallel_sizes=(work.ep,), extra_parallel_names=("ep",), extra_parallel_placement_innermost=(False,),
    )  # fmt: skip
    ops = OpsImplementationConfig(
        attn_implementation="flash_attention_4" if work.sp > 1 else "sdpa",
        moe_implementation="fused_cpu" if work.ep > 1 else "eager",
        **{f"{op}_implementation": "eager" for op in EAGER},
    )
    weights = {"weights_path": work.model, "init_device": "meta"}
    model = build_foundation_model(
        config_path=work.model, torch_dtype="float32", ops_implementation=ops, **weights
    )  # fmt: skip
    return build_parallelize_model(
        model, mixed_precision=MixedPrecisionConfig(enable=work.dtype == "bf16"), enable_gradient_checkpointing=False,
        basic_modules=list(model._no_split_modules), enable_forward_prefetch=False, **weights,
    ).train()  # fmt: skip


def inputs(work: shared.Work, ids) -> dict[str, torch.Tensor]:
    """This rank's part of the global batch. Labels are shifted inside the loss, but not under sequence parallelism."""
    state = get_parallel_state()
    own = torch.from_numpy(shared.own_rows(ids, state.dp_rank, state.dp_size))
    if work.sp == 1:
        return {"input_ids": own, "labels": own}
    labels = torch.from_numpy(shared.next_tokens(own.numpy()))
    whole = {"input_ids": own, "labels": labels, "position_ids": torch.arange(own.shape[1]).expand_as(own)}
    return {name: t.chunk(work.sp, dim=1)[state.sp_rank].contiguous() for name, t in whole.items()}


def main() -> None:
    work = shared.read()
    dist.init_process_group("gloo")
    model = build(work)
    optimizer = build_optimizer(
        model, optimizer_type="adamw", fused=True,
        lr=work.lr, betas=(work.beta1, work.beta2), eps=work.eps, weight_decay=0.0,
    )  # fmt: skip

    def step(ids) -> tuple[float, float]:
        loss = model(**inputs(work, ids), use_cache=False).loss
        loss = loss["foundation_loss"] if isinstance(loss, dict) else loss
        loss.backward()
        norm = veomni_clip_grad_norm(model, work.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        return float(loss) / work.ranks, float(norm)

    shared.write(work, shared.train(work, step))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
