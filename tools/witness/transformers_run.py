"""transformers as a witness: in one process, or with `fully_shard` over the ranks of torchrun.

Its gradients are clipped by their norm as summed in fp64, so that nothing but the mathematics is
in this reference: torch's own sum on CPU, in fp32, misses up to 1e-4 of the norm of a large tensor.
"""

import os
from functools import partial

import torch
import torch.distributed as dist
from setting import ADAM, arguments, batches, own_rows, parse, train, write
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM


def total(x: Tensor) -> Tensor:
    """The sum over ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def clip(model: torch.nn.Module, largest: float) -> float:
    grads = [p.grad.to_local() if dist.is_initialized() else p.grad for p in model.parameters()]
    norm = total(sum(g.double().square().sum() for g in grads)).sqrt()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm.item()


@torch.no_grad()
def nudge(model: torch.nn.Module, seed: int) -> None:
    """What becomes of this is what becomes of round-off: the measure for all other differences."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        up = torch.rand(p.shape, generator=generator) < 0.5
        p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nudge", type=int, help="change the last bit of every weight, up or down by this seed")
    args = parse(parser)
    if args.sp > 1 or args.ep > 1 or args.fsdp != int(os.environ.get("WORLD_SIZE", 1)):
        raise SystemExit("transformers runs on --fsdp alone, as many as there are ranks")
    if args.router_aux and args.fsdp > 1:
        raise SystemExit("--router-aux: transformers balances each rank's own batch, so only one rank can be compared")
    if args.fsdp > 1:
        dist.init_process_group("gloo")
    router = {"output_router_logits": True, "router_aux_loss_coef": args.router_aux} if args.router_aux else {}
    config = AutoConfig.from_pretrained(args.model, **router)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    if args.nudge is not None:
        nudge(model, args.nudge)
    rank = 0
    if args.fsdp > 1:
        rank = dist.get_rank()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    def loss(ids: Tensor) -> Tensor:  # labels are shifted inside
        return model(input_ids=ids, labels=ids).loss

    losses = [partial(loss, own_rows(ids, rank, args.fsdp)) for ids in batches(args)]
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    seen = train(model, optimizer, lambda: clip(model, args.clip), losses, total)
    if rank == 0:
        write(args, "transformers" if args.nudge is None else f"nudged {args.nudge}", seen)
    if args.fsdp > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
