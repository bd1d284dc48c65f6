"""VeOmni as a witness: its FSDP2, expert parallelism and Ulysses, its optimizer and clipping, under torchrun."""

from functools import partial

import torch
import torch.distributed as dist
import veomni_cpu  # noqa: F401  (before the rest of veomni)
from setting import ADAM, SEQ, arguments, batches, next_tokens, own_rows, parse, train, write
from torch import Tensor
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


def build(args) -> torch.nn.Module:
    """The checkpoint, sharded. Flash attention under sp, since VeOmni's "sdpa" ignores sequence parallelism."""
    ops = OpsImplementationConfig(
        attn_implementation="flash_attention_4" if args.sp > 1 else "sdpa",
        moe_implementation="fused_cpu" if args.ep > 1 else "eager",
        **{f"{op}_implementation": "eager" for op in EAGER},
    )
    path = str(args.model)
    model = build_foundation_model(
        config_path=path, weights_path=path, torch_dtype="float32", init_device="meta", ops_implementation=ops
    )
    return build_parallelize_model(
        model, init_device="meta", weights_path=path, mixed_precision=MixedPrecisionConfig(enable=False),
        enable_gradient_checkpointing=False, basic_modules=list(model._no_split_modules), enable_forward_prefetch=False,
    ).train()  # fmt: skip


def inputs(args, ids: Tensor) -> dict[str, Tensor]:
    """This rank's part of the global batch. Labels are shifted inside the loss, but not under sequence parallelism."""
    state = get_parallel_state()
    ids = own_rows(ids, state.dp_rank, state.dp_size)
    if args.sp == 1:
        return {"input_ids": ids, "labels": ids}
    whole = {"input_ids": ids, "labels": next_tokens(ids), "position_ids": torch.arange(SEQ).expand_as(ids)}
    return {name: t.chunk(args.sp, dim=1)[state.sp_rank].contiguous() for name, t in whole.items()}


def total(x: Tensor) -> Tensor:
    """The sum over ranks."""
    dist.all_reduce(x)
    return x


def main() -> None:
    args = parse(arguments(__doc__))
    if args.router_aux:
        raise SystemExit("--router-aux: VeOmni balances each rank's own batch: there is nothing to compare it with")
    dist.init_process_group("gloo")
    if args.fsdp * args.sp * args.ep != dist.get_world_size():
        raise SystemExit(f"--fsdp, --sp and --ep must multiply to the {dist.get_world_size()} ranks")
    init_parallel_state(
        dp_size=args.fsdp * args.ep, ulysses_size=args.sp, dp_mode="fsdp2", device_type="cpu",
        extra_parallel_sizes=(args.ep,), extra_parallel_names=("ep",), extra_parallel_placement_innermost=(False,),
    )  # fmt: skip
    model = build(args)
    optimizer = build_optimizer(model, optimizer_type="adamw", **ADAM)

    def loss(ids: Tensor) -> Tensor:
        found = model(**inputs(args, ids), use_cache=False).loss
        return found["foundation_loss"] if isinstance(found, dict) else found

    losses = [partial(loss, ids) for ids in batches(args)]
    seen = train(model, optimizer, lambda: veomni_clip_grad_norm(model, args.clip), losses, total)
    if dist.get_rank() == 0:
        write(args, "veomni", seen)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
