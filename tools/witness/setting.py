"""What every run of the comparison shares: two tiny models, their token stream, and how a run is written down.

Needs torch only, since each of the programs that are compared has an environment of its own.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

VOCAB, SEQ = 4096, 256
ROWS = 4  # rows of each stream in a batch
DRAWN = 64  # batches that a stream's generator draws at once: the draws depend on it
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}

# Hugging Face configs. No pad token: transformers would zero its embedding row, and others would not.
DENSE = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "max_position_embeddings": 2048, "tie_word_embeddings": True, "use_cache": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MODELS = {"qwen3": DENSE, "qwen3_moe": DENSE | EXPERTS}


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags of a run. Under torchrun the mesh's sizes multiply to the number of ranks."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("model", type=Path, help="directory with config.json and model.safetensors (checkpoints.py)")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    for axis in ("fsdp", "sp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"size of the mesh dimension {axis}")
    parser.add_argument("--streams", type=int, help=f"{ROWS} rows of the batch come from each (default: fsdp * ep)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
    parser.add_argument("--router-aux", type=float, default=0.0, help="weight of the load-balancing loss")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.streams = args.streams or args.fsdp * args.ep
    torch.set_num_threads(1)
    return args


def batches(args: argparse.Namespace) -> Tensor:
    """Token ids of every step's global batch: int64 [steps, streams * ROWS, SEQ].

    Each row counts upwards from a random token, by a random stride of 1 to 7, modulo the vocabulary:
    something a small model begins to learn in a few steps.
    """
    drawn = []
    for stream in range(args.streams):
        generator = torch.Generator().manual_seed(1234 + stream)
        shape = (DRAWN, ROWS, 1)
        first = torch.randint(0, VOCAB, shape, generator=generator)
        stride = torch.randint(1, 8, shape, generator=generator)
        drawn.append((first + stride * torch.arange(SEQ)) % VOCAB)
    return torch.cat(drawn, dim=1)[: args.steps]


def own_rows(ids: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows [B / ranks, S] of a global batch [B, S] that the `rank`-th of `ranks` data-parallel ranks trains on."""
    return ids.chunk(ranks)[rank]


def next_tokens(ids: Tensor) -> Tensor:
    """Labels that are shifted already: the token after each one, and -100 for a row's last."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: Callable[[], float],
    losses: Iterable[Callable[[], Tensor]], total: Callable[[Tensor], Tensor],
) -> dict[str, list[float]]:  # fmt: skip
    """Eager training of the witnesses. losses: one closure a step, giving this rank's loss.

    clip: clips the gradients in place and gives the norm they had. total: the sum over ranks.
    Besides the norm by which the witness clips, which torch sums in fp32, the same gradients' norm
    is taken in fp64, from pieces that must not overlap between ranks.
    """
    seen: dict[str, list[float]] = {"loss": [], "grad_norm": [], "grad_norm_fp64": []}
    ranks = total(torch.ones(()))
    for loss_of in losses:
        loss = loss_of()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        pieces = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        squares = total(sum(g.double().square().sum() for g in pieces))
        seen["grad_norm_fp64"].append(squares.sqrt().item())
        seen["grad_norm"].append(clip())
        seen["loss"].append((total(loss.detach().clone()) / ranks).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


def write(args: argparse.Namespace, who: str, seen: dict[str, list[float]]) -> None:
    """Write a run down: everything that decides what it should be compared with, and every step's figures."""
    record = {
        "who": who,
        "model": json.loads((args.model / "config.json").read_text())["model_type"],
        "mesh": {axis: getattr(args, axis) for axis in ("fsdp", "sp", "ep")},
        "streams": args.streams,
        "clip": args.clip,
        "router_aux": args.router_aux,
        **seen,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{args.out}: loss {seen['loss'][0]:.6f} -> {seen['loss'][-1]:.6f}")
