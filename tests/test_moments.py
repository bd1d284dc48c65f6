"""Moments in less than fp32: what is rounded, how, where it lies, and that a run is as good and goes on as it was."""

import math

import pytest
import runs
import torch
from checkpoints import META, MODEL, placed
from torch.utils._python_dispatch import TorchDispatchMode

from ftrain import __main__ as cli
from ftrain import launch, moments, optim
from ftrain.checkpoint import restore, save
from ftrain.data import batch_at, heldout_batches, prepare
from ftrain.equivalence import RECIPE, random_batch, run_mesh, run_plain, values
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.moments import BLOCK, Coded, blocks, dtypes, encode, noise, read, rounded, size, write_
from ftrain.optim import AdamW, Schedule, update_
from ftrain.plan import find_plan
from ftrain.ranks import run_ranks
from ftrain.specs import ParamSpec, ones
from ftrain.state import init_state, make_state, whole
from ftrain.step import Recipe, make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("one_thread")
LESS = ("bf16", "8bit")
DTYPES = (torch.bfloat16, torch.int8, torch.uint8)


@pytest.fixture
def all_small(monkeypatch):
    """The moments of the smallest parameters too are kept in less than fp32."""
    monkeypatch.setattr(moments, "SMALLEST", 0)


def zeros(shape, dtype):
    codes = torch.zeros(shape, dtype=dtype)
    return codes if dtype.is_floating_point else Coded(codes, torch.zeros(blocks(codes.numel())))


def kept(found):
    """What `rounded` gives, as a moment."""
    return found if isinstance(found, Coded) else found[0]


def wide(n, dtype, seed=0):
    """Values over many orders of magnitude; of nu, positive."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-4, 0, generator=generator)
    return x.square() if dtype is torch.uint8 else x


# --- The codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-37, 1e-43, 1e30])
def test_what_was_rounded_is_read_and_rounded_again_without_loss(dtype, scale):
    """All a checkpoint needs. Down to where fp32 itself has few bits left."""
    x = wide(5 * BLOCK + 77, dtype) * scale
    x[:BLOCK] = 0
    x[2 * BLOCK : 3 * BLOCK] *= 0.0 if dtype is torch.uint8 else -1.0
    first = kept(rounded(x, dtype, noise(0, len(x), torch.tensor(3))))
    again = zeros(x.shape, dtype)
    write_(again, read(first))
    assert torch.equal(read(again), read(first))
    if isinstance(first, Coded) and 1e-30 < scale:
        assert torch.equal(again.scales, first.scales)
        alive = first.scales.repeat_interleave(BLOCK)[: len(x)] > 0
        assert torch.equal(again.codes[alive], first.codes[alive])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_stands_for_itself(dtype):
    """Codes as integers ascend as their values do, from the smallest to the scale."""
    if dtype is torch.bfloat16:
        codes = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
        codes = codes[codes.isfinite()]
        assert torch.equal(kept(rounded(codes.float(), dtype, noise(0, len(codes), torch.tensor(1)))), codes)
        return
    every = torch.arange(-127, 128, dtype=dtype) if dtype is torch.int8 else torch.arange(256).to(dtype)
    value = read(Coded(every, torch.ones(1)))
    assert value[-1] == 1 and (value.diff() > 0).all()
    if dtype is torch.int8:
        assert torch.equal(value, -value.flip(0)) and value[127] == 0 and 1.8e-5 < value[128] < 2e-5
    else:
        assert 2.5e-10 < value[0] < 2.7e-10
    for nearest_or_not in (1 << 19, noise(0, len(every), torch.tensor(1))):
        assert torch.equal(encode(value, dtype, nearest_or_not).codes, every)


@pytest.mark.parametrize("dtype, step, smallest", list(zip(DTYPES, (2**-7, 2**-3, 2**-3), (0, 2e-5, 3e-10))))
def test_rounding_is_within_a_step_and_right_in_the_mean(dtype, step, smallest):
    x = wide(3 * BLOCK, dtype)
    magnitude = x.abs().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    normal = x.abs() > smallest * magnitude
    assert normal.float().mean() > 0.9
    nearest = zeros(x.shape, dtype)
    write_(nearest, x)
    assert ((read(nearest) - x).abs() <= step / 2 * x.abs() * 1.001)[normal].all()
    total, n = torch.zeros(len(x), dtype=torch.float64), 512
    for i in range(n):
        found = read(kept(rounded(x, dtype, noise(0, len(x), torch.tensor(i)))))
        assert ((found - x).abs() <= step * x.abs() * 1.001)[normal].all()
        total += found
    assert ((total / n - x).abs() <= 0.02 * step * x.abs())[normal].all()
    if dtype is torch.int8:  # what is below the smallest code is now and then that, else 0
        few = ~normal & (x.abs() > 0.1 * smallest * magnitude)
        assert few.any() and ((total / n - x).abs() <= 0.02 * x.abs().clamp(min=2e-5 * magnitude))[few].all()
    if dtype is torch.uint8:  # no second moment is forgotten
        assert (read(nearest)[x == 0] > 0).all() and (read(nearest) > 0).all()


def test_noise_is_even_over_places_and_over_steps():
    of_places = noise(1000, 1000 + 2**12, torch.tensor(17.0)).double() / 2**20
    of_steps = torch.stack([noise(5, 6, torch.tensor(i))[0] for i in range(2**12)]).double() / 2**20
    for found in (of_places, of_steps):
        even = torch.arange(2**12) / 2**12
        assert (found.sort().values - even).abs().max() < 2e-3  # independent draws: about 1e-2
    assert torch.equal(noise(0, 3000, torch.tensor(2))[1000:], noise(1000, 3000, torch.tensor(2)))
    far = 2**33 + 5  # places of a large piece, late steps
    assert (0 <= noise(far, far + 9, torch.tensor(10**7))).all()


# --- The update


def table(dtype):
    """Every number there is, ascending, as parts of the scale: written out, not cut out of bits."""
    up = [(1 + m / 8) * 2.0**-e for e in range(32, 0, -1) for m in range(8)] + [1.0]
    return torch.tensor(up[-256:] if dtype is torch.uint8 else [-v for v in up[:-128:-1]] + [0.0] + up[-127:]).double()


def reference_noise(place, step, seed):
    return ((place * 0xC13FA9A9 + step * 0x91E10DA5 + seed) % 2**32 >> 12) / 2**20


def reference_round(x, dtype, draws):
    """-> values [n] fp64, and which of them hang on the last bit of a comparison."""
    out, close = torch.empty_like(x), torch.zeros(len(x), dtype=torch.bool)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        scale = part.abs().max() if dtype is not torch.bfloat16 else torch.tensor(1.0)
        for i, value in enumerate(part.tolist(), start):
            if dtype is torch.bfloat16:
                ulp = 2.0 ** (math.frexp(value)[1] - 8) if value else 1.0
                low, y = math.floor(abs(value) / ulp) * ulp, abs(value)
                high = low + ulp
            elif dtype is torch.uint8:
                numbers, y = table(dtype), value / float(scale)
                at = int((numbers <= y).sum()) - 1
                low, high = float(numbers[max(at, 0)]), float(numbers[min(max(at, 0) + (at >= 0), 255)])
            else:
                numbers, y = table(dtype)[127:], abs(value) / float(scale)
                at = int((numbers <= y).sum()) - 1
                low, high = float(numbers[at]), float(numbers[min(at + 1, 127)])
            done = (y - low) / (high - low) if high > low else 0.0
            close[i] = abs(done + draws[i] - 1) < 1e-4
            out[i] = math.copysign((high if done + draws[i] >= 1 and high > low else low) * float(scale), value)
    return out, close


@pytest.mark.parametrize("kind", LESS)
@pytest.mark.parametrize("decay, clip", [(True, 1e9), (False, 0.7)])
def test_an_update_is_read_adamw_rounded(monkeypatch, all_small, kind, decay, clip):
    """Against the same in fp64, element by element, over steps, chunks and uneven shards."""
    monkeypatch.setattr(optim, "CHUNK_CPU", 2 * BLOCK)
    torch.manual_seed(0)
    adam = AdamW(lr=0.01, beta2=0.99, weight_decay=0.3, clip=clip)
    shapes = {"matrix": (23, 31), "strided": (3, 40, 7), "empty": (0, 4)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    of_both = dtypes(kind, 1)
    mu, nu = ({name: zeros(shape, dtype) for name, shape in shapes.items()} for dtype in of_both)
    specs = {name: ParamSpec(shape, ones, decay=decay, lr=0.5) for name, shape in shapes.items()}
    for step in range(4):
        grads = {name: torch.randn(shape) * torch.rand(shape) ** 8 for name, shape in shapes.items()}
        grads["strided"] = (torch.randn(3, 41, 7) * torch.rand(3, 41, 7) ** 8)[:, :40]
        before = {n: [t.double().flatten() for t in (params[n], read(mu[n]), read(nu[n]))] for n in shapes}
        given = {name: g.double().flatten() for name, g in grads.items()}
        norm = torch.stack([g.square().sum() for g in given.values()]).sum().sqrt()
        now = torch.tensor(step), norm.float(), torch.tensor(True)
        update_(adam, torch.tensor(adam.lr), specs, params, grads, mu, nu, *now)
        for name, (p, m, v) in before.items():
            g = given[name] / max(1.0, (float(norm) + 1e-6) / clip)
            m, v, lr = adam.beta1 * m + (1 - adam.beta1) * g, adam.beta2 * v + (1 - adam.beta2) * g * g, adam.lr * 0.5
            p = p * (1 - lr * (adam.weight_decay if decay else 0.0))
            at = step + 1
            p = p - lr * (m / (1 - adam.beta1**at)) / ((v / (1 - adam.beta2**at)).sqrt() + adam.eps)
            torch.testing.assert_close(params[name].flatten().double(), p, rtol=1e-5, atol=1e-6)
            for moment, value, dtype, seed in ((mu[name], m, of_both[0], 0), (nu[name], v, of_both[1], 1 << 31)):
                draws = [reference_noise(i, at, seed) for i in range(len(value))]
                expected, close = reference_round(value, dtype, draws)
                assert close.float().mean() < 0.01 or not len(close)
                torch.testing.assert_close(
                    read(moment).flatten().double()[~close], expected[~close], rtol=1e-5, atol=1e-30
                )


@pytest.mark.parametrize("kind", LESS)
@pytest.mark.parametrize("nearest", [False, True])
def test_moments_fade_as_they_should(monkeypatch, all_small, kind, nearest):
    """A gradient that was large once and is small from then on: rounded to the nearest, its square is not forgotten."""
    if nearest:
        half = lambda start, end, *_: torch.full((end - start,), 1 << 19, dtype=torch.int32)  # noqa: E731
        monkeypatch.setattr(optim, "noise", half)
    torch.manual_seed(0)
    adam, n, steps = AdamW(beta2=0.999), 4 * BLOCK, 1000
    params, specs = {"w": torch.zeros(n)}, {"w": ParamSpec((n,), ones)}
    mu, nu = ({"w": zeros((n,), dtype)} for dtype in dtypes(kind, n))
    large = torch.rand(n)
    for step in range(steps + 1):
        # The first of each block stays large, and with it the block's scale.
        grad = {"w": torch.where((torch.arange(n) % BLOCK == 0) | (step == 0), 1 + large, 0.1 * large)}
        now = torch.tensor(step), torch.tensor(0.5), torch.tensor(True)
        update_(adam, torch.tensor(0.0), specs, params, grad, mu, nu, *now)
    fading = torch.arange(n) % BLOCK != 0
    left = 0.001 * 0.999**steps * (1 + large) ** 2 + (1 - 0.999**steps) * (0.1 * large) ** 2
    error = (read(nu["w"]) / left - 1).abs()[fading]
    if nearest:
        assert error.mean() > 0.5
    else:
        assert error.max() < (0.06 if kind == "bf16" else 1) and error.mean() < (0.02 if kind == "bf16" else 0.3)


@pytest.mark.parametrize("kind", LESS)
def test_no_more_than_a_chunk_is_in_fp32(monkeypatch, kind):
    monkeypatch.setattr(optim, "CHUNK_CPU", 2 * BLOCK)
    shape = (64, 100)
    params, grads = ({"w": torch.randn(shape)} for _ in range(2))
    of_both = [{"w": zeros(shape, dtype)} for dtype in dtypes(kind, 6400)]
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in (params["w"], grads["w"])}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                seen.append(out.numel() * (out.element_size() == 4))
            return out

    monkeypatch.setattr(optim, "_adamw_rounded_", optim._adamw_rounded_._init_fn)  # to be looked into
    with Watch():
        update_(AdamW(), torch.tensor(1e-3), {"w": ParamSpec(shape, ones)}, params, grads, *of_both,
                torch.tensor(0), torch.tensor(1.0), torch.tensor(True))  # fmt: skip
    assert max(seen) == 2 * BLOCK


# --- The state


def test_bytes_of_the_state():
    """Of a parameter of a million elements, and of one that is too small to matter."""
    specs = {"large": ParamSpec((1024, 1024), ones), "small": ParamSpec((1024,), ones)}
    for kind, large in (("fp32", 8), ("bf16", 4), ("8bit", 2 + 2 * 4 / 256)):
        for mesh, world in ((Mesh(), 1), (Mesh(2, 1, 2), 4)):

            def bytes_of(rank, kind=kind, mesh=mesh):
                placements, device_mesh = placed("fsdp_sp_ep", mesh, model=MODEL)
                of_plan = {name: placements["model.embed_tokens.weight"] for name in specs}
                state = make_state(specs, of_plan, device_mesh, lambda n, s, at: torch.zeros(s.shape)[at[0]], kind)
                return [sum(size(of[name].to_local()) for of in (state.mu, state.nu)) for name in specs]

            found = torch.tensor(run_ranks(world, bytes_of)).sum(0).tolist()
            assert found == [large * 2**20, 8 * 1024]


def test_an_unknown_choice_is_refused(capsys):
    with pytest.raises(ValueError, match="--optimizer-state 4bit: must be one of fp32, bf16, 8bit"):
        dtypes("4bit", 10000)
    with pytest.raises(SystemExit):
        cli.main(["--optimizer-state", "4bit"])
    assert "fp32,bf16,8bit" in "".join(capsys.readouterr().err.split()).replace("'", "")


@pytest.mark.parametrize("kind", LESS)
@pytest.mark.parametrize(
    "plan, mesh, replica",
    [("fsdp_sp_ep", Mesh(2, 1, 2), 1), ("fsdp", Mesh(3, 1, 1), 1), ("fsdp_ep", Mesh(1, 1, 2), 2)],
)
def test_on_a_mesh_moments_lie_with_their_parameters_and_copies_agree(all_small, kind, plan, mesh, replica):
    """Uneven and empty shards. Rounding is of the place and the step alone: no copy has another bit."""
    data = [random_batch(61, 5, 11, seed) for seed in range(2)]
    found = run_mesh(MODEL, find_plan(plan), mesh, data, replica=replica, kept=kind)
    expected = run_plain(MODEL, data)
    for moment in ("mu", "nu"):
        for name, exact in getattr(expected, moment).items():
            first = getattr(found[0], moment)[name]
            assert all(torch.equal(getattr(run, moment)[name], first) for run in found), name
            assert (first - exact).abs().max() <= 0.15 * exact.abs().max(), (moment, name)
    for run in found:
        assert all(torch.equal(p, found[0].params[name]) for name, p in run.params.items())


def started(kind, mode="off", plan="fsdp_sp_ep", mesh=Mesh(), model=MODEL):
    job = make_job(model, find_plan(plan), mesh)
    state = make_state(model.specs, job.placements, job.device_mesh, lambda n, s, at: values(n, s)[at], kind)
    return job, state, make_train_step(model, job.sharding, job.ops, RECIPE, mode)


def contents(state):
    """All bits of the state: the pieces and their codes and scales."""
    found = {"step": state.step.clone()}
    for kind, of_kind in (("params", state.params), ("mu", state.mu), ("nu", state.nu)):
        for name, t in of_kind.items():
            parts = t.to_local()
            for i, part in enumerate(parts if isinstance(parts, Coded) else (parts,)):
                found[kind, name, i] = part.clone()
    return found


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", LESS)
def test_compiled_steps_are_the_same(one_rank, all_small, kind, mode):
    job, state, step = started(kind, mode)
    _, other, plain = started(kind)
    storage = [t.data_ptr() for t in contents_of(state)]
    for seed in range(3):
        batch = job.microbatches(random_batch(61, 4, 10, seed))
        state, metrics = step(state, batch)
        other, expected = plain(other, batch)
        torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-5, atol=0)
    assert [t.data_ptr() for t in contents_of(state)] == storage  # updated in place
    close = []
    for of, of_plain in ((state.mu, other.mu), (state.nu, other.nu)):
        for name, t in of.items():
            found, wanted = whole(t).flatten(), whole(of_plain[name]).flatten()
            error, floor = (found - wanted).abs(), 1e-3 * wanted.abs().max()  # gradients that are but rounding
            close.append(error <= 1e-4 * wanted.abs() + 1e-3 * floor)
            # Where a remainder and its noise make almost 1, another last bit rounds the other way: a step of the codes.
            assert (error <= (2**-7 if kind == "bf16" else 2**-3) * wanted.abs() * 1.01 + floor).all(), name
    assert torch.cat(close).float().mean() > 0.95
    for name, p in state.params.items():
        torch.testing.assert_close(whole(p), whole(other.params[name]), rtol=1e-3, atol=1e-3)


def contents_of(state):
    for of in (state.params, state.mu, state.nu):
        for t in of.values():
            parts = t.to_local()
            yield from parts if isinstance(parts, Coded) else (parts,)


@pytest.mark.parametrize("kind", LESS)
def test_what_is_not_finite_changes_no_bit(one_rank, all_small, kind):
    job, state, step = started(kind)
    for seed in range(2):
        state, metrics = step(state, job.microbatches(random_batch(61, 4, 10, seed)))
        assert metrics["finite"]
    weight = state.params["model.layers.1.self_attn.v_proj.weight"].to_local()
    good = float(weight[0, 0])
    weight[0, 0] = math.nan
    before = contents(state)
    state, metrics = step(state, job.microbatches(random_batch(61, 4, 10, 2)))
    assert not metrics["finite"]
    after = contents(state)
    assert all(torch.equal(t.nan_to_num(7.0), after[key].nan_to_num(7.0)) for key, t in before.items())
    weight[0, 0] = good
    _, metrics = step(state, job.microbatches(random_batch(61, 4, 10, 2)))
    assert metrics["finite"] and not all(torch.equal(t, contents(state)[k]) for k, t in before.items())


# --- Checkpoints


@pytest.mark.parametrize("kind", LESS)
@pytest.mark.parametrize("plan, mesh", [("fsdp_sp_ep", Mesh()), ("fsdp", Mesh(3, 1, 1))])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, all_small, kind, plan, mesh):
    def rank_main(rank):
        job, state, step = started(kind, plan=plan, mesh=mesh)
        for seed in range(2):
            state, _ = step(state, job.microbatches(random_batch(61, 5, 11, seed)))
        directory = save(tmp_path, state, MODEL, META)
        back, _ = restore(directory, MODEL.specs, job.placements, job.device_mesh, kind)
        for seed in range(2, 5):
            batch = job.microbatches(random_batch(61, 5, 11, seed))
            state, expected = step(state, batch)
            back, metrics = step(back, batch)
            assert all(torch.equal(metrics[name], value) for name, value in expected.items())
        for name in state.mu:
            for of, of_back in zip(state[:3], back[:3]):
                assert torch.equal(read(of[name].to_local()), read(of_back[name].to_local())), name

    run_ranks(mesh.size, rank_main)


@pytest.mark.parametrize("kind", LESS)
def test_from_any_mesh_and_choice_to_any_other(tmp_path, all_small, kind):
    """fp32 on two ranks, then `kind` on three, on four, and fp32 again: each within a rounding of what was saved."""
    ways = [("fp32", "fsdp", Mesh(2, 1, 1)), (kind, "fsdp", Mesh(3, 1, 1)), (kind, "fsdp_sp_ep", Mesh(2, 1, 2)),
            ("fp32", "ddp", Mesh())]  # fmt: skip
    step_of_code = 2**-7 if kind == "bf16" else 2**-3
    saved = None
    for number, (here, plan, mesh) in enumerate(ways):

        def rank_main(rank, here=here, plan=plan, mesh=mesh, number=number, saved=saved):
            job, state, step = started(here, plan=plan, mesh=mesh)
            if saved is not None:
                state, _ = restore(saved[0], MODEL.specs, job.placements, job.device_mesh, here)
            else:
                for seed in range(2):
                    state, _ = step(state, job.microbatches(random_batch(61, 5, 11, seed)))
            path = save(tmp_path / str(number), state, MODEL, META)
            return path, {(k, n): whole(t) for k in ("params", "mu", "nu") for n, t in getattr(state, k).items()}

        found = run_ranks(mesh.size, rank_main)[0]
        for (of, name), was in saved[1].items() if saved else ():
            error = (found[1][of, name] - was).abs()
            exact = of == "params" or here == "fp32" or kind == "bf16" and number > 1
            allowed = 0 if exact else step_of_code / 2 * 1.001 * was.abs() + 2e-5 * was.abs().max()
            assert (error <= allowed).all(), (number, of, name)
        saved = found


# --- Whole runs

DENSE = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip


def heldout_loss(data, kind, steps=100):
    """Before and after so many steps."""
    model = find_model(DENSE)
    job = make_job(model, find_plan("ddp"), Mesh())
    state = init_state(model.specs, job.placements, job.device_mesh, 0, kind)
    recipe = Recipe(AdamW(lr=5e-3), Schedule(steps, warmup=10))
    step = make_train_step(model, job.sharding, job.ops, recipe, "off")
    evaluate = make_eval_step(model, job.sharding, job.ops, "off")

    def loss():
        found = [evaluate(state, job.microbatches(batch)[0]) for batch in heldout_batches(data.heldout, 8, 16)]
        return float(sum(f["loss_sum"] for f in found) / sum(f["loss_targets"] for f in found))

    before = loss()
    for i in range(steps):
        state, _ = step(state, job.microbatches(batch_at(data.train, 8 * i, 8, 0)))
    return before, loss()


@pytest.mark.slow
def test_training_is_as_good(one_rank, tmp_path, monkeypatch):
    """Within 2% of the held-out loss of fp32 (seeds differ by 3%). Codes that are evenly spaced, as coarse but without
    small numbers, are not: what shows that a fault of that kind would be seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = prepare(str(runs.write_text(tmp_path / "text.jsonl", 60)), None, 512, 32)
    before, exact = heldout_loss(data, "fp32")
    found = {kind: heldout_loss(data, kind)[1] for kind in LESS}
    assert exact < 0.8 * before
    assert all(abs(loss / exact - 1) < 0.02 for loss in found.values())

    def evenly(values, dtype, noise):
        most = 255 if dtype is torch.uint8 else 127
        scales = moments._in_blocks(values.abs()).amax(1)
        parts = values.abs() / scales.clamp(min=1e-38).repeat_interleave(BLOCK)[: len(values)]
        codes = (parts * most + noise / 2**20).floor() * values.sign()
        return Coded(codes.to(dtype), scales)

    def read_evenly(moment):
        most = 255 if moment.dtype is torch.uint8 else 127
        return moment.codes.float() / most * moment.scales.repeat_interleave(BLOCK)[: moment.codes.numel()]

    monkeypatch.setattr(optim, "rounded", evenly)
    monkeypatch.setattr(optim, "read", read_evenly)
    found["evenly"] = heldout_loss(data, "8bit")[1]
    print(found)
    assert not abs(found["evenly"] / exact - 1) < 0.02


@pytest.mark.slow
def test_the_command_line_says_what_is_kept_and_when_it_changes(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "FTRAIN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "accelerator", lambda: None)
    flags = {
        "model": runs.write_model(tmp_path / "tiny"), "data": runs.write_text(tmp_path / "text.jsonl", 10),
        "out": tmp_path / "out", "nproc": 1, "compile": "off", "seq_len": 32, "batch_size": 4, "eval_batches": 1,
        "schedule": "constant",
    }  # fmt: skip

    def run(**more):
        assert cli.main(runs.command(**flags | more)[3:]) == 0
        return capsys.readouterr().out

    assert "optimizer state" not in run(steps=2, out=tmp_path / "other")
    said = run(steps=2, optimizer_state="8bit")
    assert "optimizer state  8bit, " in said and " KiB per rank" in said
    said = run(steps=4, optimizer_state="8bit")
    assert "was kept in" not in said and "step 4/4" in said
    run(steps=4, optimizer_state="8bit", out=tmp_path / "straight")  # stopped and gone on, it is the run that was not
    one, straight = (runs.tensors(tmp_path / out / "checkpoints" / "step-4") for out in ("out", "straight"))
    assert one.keys() == straight.keys() and all(torch.equal(t, straight[name]) for name, t in one.items())
    said = run(steps=5, optimizer_state="bf16")
    assert "the optimizer state was kept in 8bit, and is in bf16 from here on" in said and "step 5/5" in said
    said = run(steps=6)
    assert "the optimizer state was kept in bf16, and is in fp32 from here on" in said and "step 6/6" in said
