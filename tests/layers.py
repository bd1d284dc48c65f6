"""Small models of three layers, given as what a layer does; run plainly, and captured."""

import torch

from ftrain.experts import grouped_mm
from ftrain.graph import one_graph
from ftrain.mesh import Mesh, device_mesh
from ftrain.ops import plain
from ftrain.parallel import Gathered, parallel_ops, shard_model
from ftrain.plan import ask, find_plan
from ftrain.specs import ParamSpec, normal
from ftrain.state import initial

H, LAYERS = 4, 3


def specs_of(frozen=(), extra=(), layers=LAYERS):
    names = [f"l.{i}.{k}" for i in range(layers) for k in "ab"] + list(extra)
    return {n: ParamSpec((H, H), normal(0.5), lr=float(n not in frozen)) for n in names}


def batches(**other):
    """Two, with other numbers in each."""
    found = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        of_seed = {name: values[seed] for name, values in other.items()}
        found.append({"x": torch.randn(3, H, generator=generator), "c": torch.randn(H, generator=generator)} | of_seed)
    return found


def sharding_of(specs, plan=find_plan("fsdp"), mesh=Mesh()):
    """Needs a process group."""
    return shard_model(specs, ask(plan, specs, mesh), device_mesh(mesh, 1, "cpu"), torch.float32)


def gradients(forward, specs, sharding=None, remat="none"):
    """-> (params, batch) -> (loss, gradients of what is trained), plainly or as on a mesh."""
    ops = parallel_ops(plain(), sharding, remat, grouped_mm) if sharding else plain()
    trained = [name for name, spec in specs.items() if spec.lr]

    def run(params, batch):
        leaves = {name: t.detach().requires_grad_(name in trained) for name, t in params.items()}
        loss = forward(Gathered(leaves, sharding.buckets) if sharding else leaves, batch, ops)
        found = torch.autograd.grad(loss, [leaves[name] for name in trained], allow_unused=True)
        zeros = [torch.zeros_like(params[n]) if g is None else g for n, g in zip(trained, found)]
        return {"loss": loss.detach(), **dict(zip(trained, zeros))}

    return run


def wrong(forward, specs=None, data=None, remat="none", mode="aot_eager"):
    """What the captured function gets wrong on any of the batches: (which batch, of what the gradient)."""
    specs, data = specs or specs_of(), data or batches()
    params = {name: initial(name, spec, 0) for name, spec in specs.items()}
    expected = gradients(forward, specs)
    captured = one_graph(gradients(forward, specs, sharding_of(specs), remat), mode)
    found = []
    for i, batch in enumerate(data):
        ours, theirs = captured(params, batch), expected(params, batch)
        same = {n: torch.allclose(ours[n], t, rtol=1e-4, atol=1e-5, equal_nan=True) for n, t in theirs.items()}
        found += [(i, name) for name, is_so in same.items() if not is_so]
    return found


def of_blocks(block, end=lambda x, ys: x.tanh().square().sum()):
    """The model whose layers are `block(q, x, layer, batch)`."""

    def forward(p, batch, ops):
        return end(*ops.scan(lambda q, x, layer: block(q, x, layer, batch), p, "l", LAYERS, batch["x"]))

    return forward


def base(q, x):
    return (x @ q["a"]).tanh() @ q["b"]
