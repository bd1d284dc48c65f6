"""JAX on the other side: trees, plans as shardings, checkpoints, and JAX functions within models."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_devices import jax, mesh_of
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as torchs_own
from torch.utils._pytree import tree_leaves

from ftrain import checkpoint, interop
from ftrain.disk import Corrupt
from ftrain.equivalence import shrink, values
from ftrain.graph import one_graph
from ftrain.interop import checkpoints, from_jax, from_jax_fn, load_params, load_state, partition_specs, save_state, to_jax
from ftrain.job import make_job
from ftrain.mesh import AXES, Mesh
from ftrain.model import find_model
from ftrain.ops import fill_batch, plain
from ftrain.plan import find_plan, plan_names
from ftrain.specs import ParamSpec, normal, ones
from ftrain.state import State, make_state
from ftrain.step import Recipe, make_gradients

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from qwen3_in_jax import loss_of  # noqa: E402

jnp = jax.numpy
MOE = shrink(find_model("qwen3-moe-tiny").hf)
DENSE = shrink(find_model("Qwen3-0.6B").hf) | {"vocab_size": 96}
EVEN = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "head_dim": 8, "num_attention_heads": 4}


# --- Trees

KEPT = [
    torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("dtype", KEPT, ids=str)
def test_tensors_and_arrays_share_memory(dtype):
    tensor = (torch.randn(4, 3) * 4).to(dtype)
    array = to_jax({"a": [tensor]})["a"][0]
    assert array.unsafe_buffer_pointer() == tensor.data_ptr() and str(array.dtype) == str(dtype).removeprefix("torch.")
    back = from_jax((array,))[0]
    assert back.data_ptr() == tensor.data_ptr() and back.dtype is dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_trees_are_walked_by_both():
    """A State: dicts in a NamedTuple."""
    state = State({"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)}, {}, torch.zeros((), dtype=torch.int32))
    arrays = to_jax(state)
    assert type(arrays) is State and arrays.nu == {} and len(jax.tree.leaves(arrays)) == len(tree_leaves(state)) == 3
    assert jax.tree.map(jnp.shape, arrays).params == {"w": (2, 2)}
    assert to_jax([None, "a", 3, torch.ones(3, 2).t()])[3].shape == (2, 3)
    assert type(from_jax(arrays)) is State


@pytest.mark.parametrize(
    "leaf, message",
    [
        (torch.zeros(3, dtype=torch.int64), r"\['a'\]\[0\] \(torch.int64, \[3\]\) has 64 bits"),
        (torch.zeros(3, dtype=torch.float64), "jax_enable_x64"),
        (torch.zeros(3, requires_grad=True), "requires a gradient"),
        (torch.zeros(4, 4)[:, 1:3], "make it contiguous"),
        (torch.zeros(9)[1:], "copy=True"),
        (torch.zeros(2, dtype=torch.complex128), "64 bits"),
    ],
    ids=["int64", "float64", "gradient", "strided", "unaligned", "complex128"],
)
def test_what_cannot_be_shared_is_named(leaf, message):
    with pytest.raises(ValueError, match=message):
        to_jax({"a": [leaf]})


def test_copies_are_of_anything():
    strided = torch.arange(16.0).view(4, 4)[:, 1:3]
    array = to_jax(strided, copy=True)
    strided.zero_()
    assert array.sum() == 60
    spread = jax.device_put(jnp.ones((8, 2)), jax.NamedSharding(mesh_of(8), jax.P("fsdp")))
    with pytest.raises(ValueError, match="lies on 8 devices"):
        from_jax({"a": spread})


# --- Plans


@st.composite
def cut(draw):
    """A mesh of at most eight, and a tensor with placements of its own: even, as a rule."""
    sizes = draw(st.sampled_from([(a, b, c) for a in (1, 2, 3, 4, 8) for b in (1, 2, 4) for c in (1, 2, 3, 4) if a * b * c <= 8]))
    dims = draw(st.integers(1, 3))
    placements = [draw(st.sampled_from([Replicate(), *map(Shard, range(dims))])) for _ in AXES]
    shape = [draw(st.integers(1, 3)) for _ in range(dims)]
    if draw(st.integers(0, 4)):
        for size, placement in zip(sizes, placements):
            if placement.is_shard():
                shape[placement.dim] *= size
    return Mesh(*sizes), tuple(shape), placements


def held_by_torch(tensor, mesh, placements, rank):
    at = [(rank // (mesh.sp * mesh.ep)), rank // mesh.ep % mesh.sp, rank % mesh.ep]
    shape, offset = torchs_own(tensor.shape, tuple(mesh), at, placements)
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape))]


@settings(max_examples=150, deadline=None)
@given(cut())
def test_devices_hold_what_ranks_hold(case):
    """Byte for byte; or JAX refuses what torch cuts unevenly, and we say so."""
    mesh, shape, placements = case
    specs, jaxs = {"w": ParamSpec(shape, normal(1.0))}, mesh_of(*mesh)
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    ranks = {dim: 1 for dim in range(len(shape))}
    for size, placement in zip(mesh, placements):
        if placement.is_shard():
            ranks[placement.dim] *= size
    uneven = [dim for dim, n in ranks.items() if shape[dim] % n]
    if uneven:
        with pytest.raises(ValueError, match=f"dimension {uneven[0]} of w, {shape[uneven[0]]} long, over .*replicate"):
            partition_specs(lambda *_: placements, specs, jaxs)
        placements = [Replicate() if p.is_shard() and p.dim in uneven else p for p in placements]
        sharding = partition_specs(lambda *_: case[2], specs, jaxs, uneven="replicate")["w"]
    else:
        sharding = partition_specs(lambda *_: placements, specs, jaxs)["w"]
    array = jax.device_put(to_jax(tensor, copy=True), sharding)
    held = {shard.device: from_jax(shard.data) for shard in array.addressable_shards}
    for rank, device in enumerate(jaxs.devices.flat):
        assert torch.equal(held[device], held_by_torch(tensor, mesh, placements, rank)), (rank, sharding)


@pytest.mark.parametrize("plan", plan_names())
def test_plans_of_the_zoo_are_shardings(plan):
    model = find_model(MOE | EVEN)
    of_mesh = partition_specs(find_plan(plan), model.specs, mesh_of(2, 2, 2), uneven="replicate")
    assert of_mesh.keys() == model.specs.keys()
    data = jax.make_mesh((2, 4), ("data", "fsdp"))  # no sp, no ep; and one of which no plan knows
    assert all("data" not in jax.tree.leaves(tuple(s.spec)) for s in partition_specs(find_plan(plan), model.specs, data, "replicate").values())


# --- Checkpoints


@pytest.fixture
def written(tmp_path, one_rank):
    """A checkpoint of ftrain's, moments and all -> (model, its state, directory)."""
    model = find_model(MOE | EVEN)
    job = make_job(model, find_plan("fsdp_sp_ep"), Mesh())
    state = make_state(model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
    for i, of in enumerate((state.mu, state.nu)):
        for name, moment in of.items():
            moment.to_local().copy_(values(name, model.specs[name]) + i)
    state.step.fill_(3)
    path = checkpoint.save(tmp_path, state, model, {"sequences": 24, "seed": 5, "data": "x"})
    dist.destroy_process_group()
    yield SimpleNamespace(model=model, state=state, path=path, job=job, out=tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the fixture ends it


def test_devices_read_their_slices_alone(written, monkeypatch):
    read: list[int] = []
    inner = checkpoints.read_values

    def counting(*args, **how):
        values = inner(*args, **how)
        return lambda name, spec, at: read.append((piece := values(name, spec, at)).numel()) or piece

    monkeypatch.setattr(checkpoints, "read_values", counting)
    model, mesh = written.model, mesh_of(2, 2, 2)
    shardings = partition_specs(find_plan("fsdp_sp_ep"), model.specs, mesh, uneven="replicate")
    params = load_params(written.path, model, shardings)
    for name, array in params.items():
        assert array.sharding == shardings[name]
        assert torch.equal(torch.tensor(jax.device_get(array)), written.state.params[name].to_local())
    total = sum(spec.numel for spec in model.specs.values())
    whole = sum(model.specs[n].numel for n, s in shardings.items() if not any(s.spec))
    assert sum(read) <= total + 7 * whole  # of what is cut, every element once
    with pytest.raises(ValueError, match="no sharding is given for model.norm.weight"):
        load_params(written.path, model, {n: s for n, s in shardings.items() if n != "model.norm.weight"})


def test_states_go_to_jax_and_back(written):
    """Bit by bit, and torch's side goes on from what JAX wrote."""
    model = written.model
    shardings = partition_specs(find_plan("fsdp_sp_ep"), model.specs, mesh_of(2, 1, 4), uneven="replicate")
    torch.rand(3)  # where the generator is now is not what is saved
    state, meta = load_state(written.path, model, shardings)
    saved = meta
    assert int(state.step) == 3 and meta["sequences"] == 24
    assert state.mu["model.norm.weight"].sharding == shardings["model.norm.weight"]
    later = jax.tree.map(lambda x: x + 1, state)
    path = save_state(written.out, later, model, meta | {"sequences": 32})
    assert path.name == "step-4"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found, meta = checkpoint.restore(path, model.specs, written.job.placements, written.job.device_mesh)
    dist.destroy_process_group()
    assert meta["sequences"] == 32 and int(found.step) == 4 and meta["rng"] == saved["rng"]
    for kind in ("params", "mu", "nu"):
        for name, tensor in getattr(found, kind).items():
            assert torch.equal(tensor.to_local(), getattr(written.state, kind)[name].to_local() + 1), (kind, name)


def test_states_that_are_not_whole_are_named(written):
    model = written.model
    shardings = partition_specs(find_plan("fsdp"), model.specs, mesh_of(), uneven="replicate")
    state, meta = load_state(written.path, model, shardings)
    for params, message in (
        ({n: x for n, x in state.params.items() if n != "model.norm.weight"}, "has no model.norm.weight"),
        (state.params | {"model.norm.weight": jnp.ones(5)}, r"has shape \[5\], the model says"),
    ):
        with pytest.raises(ValueError, match=message):
            save_state(written.out, state._replace(params=params), model, meta)
    for changed, message in (
        ({"extra": {"optax.0.mu": {}}}, "not both"),
        ({"mu": state.mu | {"zzz": jnp.ones(1)}}, "mu of zzz"), ({"nu": {}}, "not of the same parameters"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            save_state(written.out, state._replace(**changed), model, meta)
    with pytest.raises(ValueError, match="which `optimizer`"):
        save_state(written.out, state._replace(mu={}, nu={}, extra={"optax": {"optax.0.count": jnp.ones(1)}}), model)
    with pytest.raises(ValueError, match="not JSON"):
        save_state(written.out, state, model, meta | {"sequences": jnp.ones(())})
    file = next(written.path.glob("train_state/mu-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"nope")
    with pytest.raises(Corrupt, match=file.name):
        load_state(written.path, model, shardings)


# --- A model in JAX


def test_the_twin_has_the_same_loss_and_gradients(tmp_path, one_rank):
    """docs/qwen3_in_jax.py, jitted, on eight devices by a plan of ours: from a checkpoint's files."""
    hf = DENSE | EVEN | {"num_key_value_heads": 2}
    model, plan = find_model(hf), find_plan("fsdp_sp_ep")
    job = make_job(model, plan, Mesh())
    state = make_state(model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
    path = checkpoint.save(tmp_path, state, model, {})
    ids = torch.randint(model.cfg.vocab, (4, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    batch = job.microbatches(fill_batch({"input_ids": ids, "labels": labels}))[0]
    expected = make_gradients(model, job.sharding, job.ops, Recipe())(state, batch)
    mesh = mesh_of(4, 1, 2)
    params = load_params(path, model, partition_specs(plan, model.specs, mesh))
    assert any(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in params.values())
    cfg = model.hf
    step = jax.jit(jax.value_and_grad(lambda p, ids: loss_of(p, ids, cfg, jnp.float32)))
    loss, grads = step(params, jax.device_put(to_jax(ids.int()), jax.NamedSharding(mesh, jax.P("fsdp"))))
    out = model.forward({n: t.to_local() for n, t in state.params.items()}, batch, plain())
    ours = torch.nn.functional.cross_entropy((out.hidden @ out.unembedding.T).flatten(0, 1), labels.flatten())
    assert abs(float(loss) / float(ours) - 1) < 1e-6
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        ours = expected[name].to_local()
        error = (torch.tensor(jax.device_get(grad)) - ours).abs().max() / ours.abs().max()
        assert error < 1e-5, (name, error)


# --- JAX functions in torch


def gated(x, w, gate):
    return {"y": jax.nn.gelu(x @ w) * gate[:, None], "n": gate > 0}


def test_functions_have_jaxs_gradients():
    fn = from_jax_fn(gated)
    torch.manual_seed(0)
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4).t().requires_grad_()
    gate = torch.tensor([1, 0, 2, 3, 1], dtype=torch.int32)
    out = fn(x, w, gate)
    assert out["n"].dtype is torch.bool and not out["n"].requires_grad
    expected = torch.nn.functional.gelu(x @ w, approximate="tanh") * gate[:, None]
    torch.testing.assert_close(out["y"], expected)
    above = torch.randn(5, 3)
    for found, wanted in zip(torch.autograd.grad(out["y"], [x, w], above), torch.autograd.grad(expected, [x, w], above)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        [grad] = torch.autograd.grad(fn(x, w, gate)["y"].sum(), [x], create_graph=True)
        grad.sum().backward()


def test_results_are_tensors_of_their_own():
    """JAX hands on what it was given; what torch gets may be written to."""
    same = from_jax_fn(lambda x: (x, x))
    x = torch.ones(4)
    a, b = same(x)
    a.add_(1)
    assert x.sum() == 4 and b.sum() == 4


def test_functions_are_called_by_what_they_are_given():
    scaled = from_jax_fn(lambda x, by, how: x * by if how == "times" else x + by)
    assert scaled(torch.ones(2), 3.0, "times").tolist() == [3, 3]
    assert scaled(torch.ones(2), 3.0, "plus").tolist() == [4, 4]
    assert scaled(torch.ones(2, dtype=torch.int32), 2, "times").dtype is torch.int32
    assert scaled(torch.ones(2, dtype=torch.int32), 2.0, "times").dtype is torch.float32
    with pytest.raises(ValueError, match="returns complex"):
        from_jax_fn(jnp.fft.rfft)(torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match="complex"):
        scaled(torch.ones(2, dtype=torch.complex64), 1.0, "plus")
    with pytest.raises(ValueError, match="returns no array"):
        from_jax_fn(lambda x: None)(torch.ones(2))


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_functions_run_within_a_compiled_layer(mode, remat, one_rank):
    """A norm in JAX in each layer of a model, beside the same in torch: gradients of the captured, compiled step."""

    def norm(x, w):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w

    in_jax = from_jax_fn(norm)
    specs = {f"l.{i}.{k}": ParamSpec((8, 8) if k == "a" else (8,), normal(0.5) if k == "a" else ones) for i in range(3) for k in "ab"}

    def forward(p, batch, ops, norm):
        block = lambda p, x, layer: (x + torch.tanh(norm(x @ p["a"], p["b"])), None)  # noqa: E731
        return ops.scan(block, p, "l", 3, batch["x"])[0].square().sum()

    import layers

    params = {name: values(name, spec) for name, spec in specs.items()}
    sharding, batch = layers.sharding_of(specs), {"x": torch.randn(4, 8)}
    plainly = lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w  # noqa: E731
    runs = [
        one_graph(layers.gradients(lambda p, b, ops, norm=norm: forward(p, b, ops, norm), specs, sharding, remat), how)
        for norm, how in ((in_jax, mode), (plainly, "off"))
    ]
    found, expected = (run(params, batch) for run in runs)
    assert len(runs[0].programs) == 1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_package_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    for name in [name for name in sys.modules if name.startswith("ftrain.interop")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"ftrain\[jax\]"):
        __import__("ftrain.interop")
    assert interop.to_jax is to_jax
