"""A tiny model's train state with known values, saved and restored on any mesh: for the tests of checkpoints."""

from dataclasses import replace
from pathlib import Path

import torch

from ftrain.checkpoint import restore, save
from ftrain.mesh import Mesh, device_mesh
from ftrain.model import find_model
from ftrain.plan import ask, find_plan, over_replicas
from ftrain.ranks import run_ranks
from ftrain.specs import normal
from ftrain.state import initial, make_state, whole

HF = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "tie_word_embeddings": True,
}
MODEL = find_model(HF)
META = {"sequences_seen": 40, "seed": 7, "mesh": [1, 2, 1]}
EMBED, GATES = "model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_proj.weight"


def expected(kind, name, spec):
    """Distinct values for every element, so that a tensor in another's place cannot hide."""
    return initial(f"{kind} {name}", replace(spec, init=normal(1.0)), 0)


def placed(plan, sizes, replica=1, model=MODEL):
    mesh = Mesh(*sizes)
    return over_replicas(ask(find_plan(plan), model.specs, mesh), replica), device_mesh(mesh, replica, "cpu")


def filled(plan="ddp", sizes=(1, 1, 1), replica=1, step=3, model=MODEL):
    placements, mesh = placed(plan, sizes, replica, model)
    kinds = {
        kind: make_state(model.specs, placements, mesh, lambda n, s, at, kind=kind: expected(kind, n, s)[at]).params
        for kind in ("model", "mu", "nu")
    }
    state = make_state(model.specs, placements, mesh, lambda n, s, at: torch.zeros(s.shape)[at])
    return state._replace(params=kinds["model"], mu=kinds["mu"], nu=kinds["nu"], step=torch.tensor(step))


def assert_expected(state, step=3, model=MODEL):
    for kind, tensors in (("model", state.params), ("mu", state.mu), ("nu", state.nu)):
        for name, spec in model.specs.items():
            assert torch.equal(whole(tensors[name]), expected(kind, name, spec)), (kind, name)
    assert int(state.step) == step and state.step.dtype == torch.int64


def saved(out, step=3, world=1, plan="ddp", sizes=(1, 1, 1), replica=1, **options):
    run_ranks(world, lambda rank: save(out, filled(plan, sizes, replica, step), MODEL, META, **options))
    return Path(out) / "checkpoints" / f"step-{step}"


def restored(directory, world=1, plan="ddp", sizes=(1, 1, 1), replica=1, step=3, model=MODEL):
    def on_rank(rank):
        state, meta = restore(directory, model.specs, *placed(plan, sizes, replica, model))
        assert_expected(state, step, model)
        return meta

    return run_ranks(world, on_rank)


def flip(path, at=-9):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def names_in(directory):
    return sorted(path.name for path in Path(directory).iterdir())
