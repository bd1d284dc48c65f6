"""The host beside its device: what is sent ahead, what is read late, and what a step asks of the host."""

import math
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from runs import command, steps, tensors, write_model, write_text
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ftrain import __main__ as cli
from ftrain import data, launch, loop, transfer
from ftrain.equivalence import RECIPE, random_batch, shrink, values
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.plan import find_plan
from ftrain.ranks import run_ranks
from ftrain.state import make_state
from ftrain.step import make_train_step

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Runs whose train step is watched


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    return root, {"model": write_model(root / "tiny"), "data": write_text(root / "text.jsonl", 10)}


@pytest.fixture
def watched(ground, tmp_path, monkeypatch, capsys):
    """`run(before, **flags)`: a run on this process, which calls before(step, state) as it issues a step and
    after(step, state) when it has. -> its exit status, stderr, directory, and in order (what, step): `issued`, and
    `read` where its metrics were asked for."""
    root, flags = ground
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "FTRAIN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setattr(launch, "accelerator", lambda: None)
    real_step, real_fetch = loop.make_train_step, loop.fetch

    def run(before=lambda *_: None, after=lambda *_: None, **more):
        seen, at = [], 0

        def make(*args):
            step = real_step(*args)

            def issue(state, parts, *more):
                nonlocal at
                at += 1
                before(at, state)
                result = step(state, parts, *more)
                after(at, state)
                seen.append(("issued", at))
                return result

            return issue

        def fetch(metrics):
            wait, step = real_fetch(metrics), at
            return lambda: ("finite" in metrics and seen.append(("read", step))) or wait()

        monkeypatch.setattr(loop, "make_train_step", make)
        monkeypatch.setattr(loop, "fetch", fetch)
        own = {"out": tmp_path / "out", "nproc": 1, "compile": "off", "seq_len": 32, "batch_size": 4, "eval_batches": 1}
        status = cli.main(command(**flags | own | more)[3:])
        return SimpleNamespace(status=status, err=capsys.readouterr().err, out=tmp_path / "out", seen=seen)

    return run


def test_metrics_are_read_when_the_next_step_is_on_its_way(watched):
    """And at once where the state is looked at after the step: at 3, for the held-out loss, and at the end."""
    done = watched(steps=6, eval_every=3, save_every=0)
    assert done.status == 0, done.err
    order = "issued 1, issued 2, read 1, issued 3, read 2, read 3, issued 4, issued 5, read 4, issued 6, read 5, read 6"
    assert ", ".join(f"{what} {step}" for what, step in done.seen) == order
    assert [entry["step"] for entry in steps(done.out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("save_every", [0, 3])
def test_after_a_bad_step_nothing_is_applied(watched, tmp_path, save_every, accumulate):
    """Step 3 has a NaN, and step 4, which is issued before that is known, has none. With a checkpoint due after
    step 3 it is known in time."""
    kept, flags = [], {"steps": 9, "eval_every": 0, "accumulate": accumulate}

    def before(step, state):
        if step == 3:
            weight = state.params["model.norm.weight"].to_local()
            kept.append(float(weight[0]))
            weight[0] = math.nan

    def after(step, state):
        if step == 3:
            state.params["model.norm.weight"].to_local()[0] = kept[0]

    done = watched(before, after, save_every=save_every, **flags)
    assert done.status == 2
    assert done.err.startswith("error: the loss is nan and the gradient norm nan at step 3 (lr ")
    assert f": the update was not made, and step 2 is saved in {done.out}; try" in done.err
    assert done.seen[-1] == ("read", 3) and (("issued", 4) in done.seen) == (save_every == 0)
    assert [entry["step"] for entry in steps(done.out)] == [1, 2]
    assert [path.name for path in (done.out / "checkpoints").iterdir()] == ["step-2"]
    other = watched(out=tmp_path / "other", save_every=2, keep=9, **flags)
    expected = tensors(tmp_path / "other" / "checkpoints" / "step-2")
    saved = tensors(done.out / "checkpoints" / "step-2")
    assert other.status == 0 and saved.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in saved.items())


def test_batches_are_sent_in_the_thread_that_makes_them(watched, monkeypatch):
    threads, received, send, receive = set(), [], loop.send, loop.receive
    monkeypatch.setattr(loop, "send", lambda *args: threads.add(threading.current_thread().name) or send(*args))
    monkeypatch.setattr(loop, "receive", lambda sent: received.append(sent) or receive(sent))
    assert watched(steps=3, eval_every=0, save_every=0).status == 0
    assert threads == {"prefetch"} and len(received) == 3


# --- What is late


def test_a_step_late():
    made = []
    late = transfer.a_step_late((made.append(i) or i for i in range(5)), lambda i: i == 2)
    assert [(i, len(made)) for i in late] == [(0, 2), (1, 3), (2, 3), (3, 5), (4, 5)]


def test_an_error_comes_after_the_step_before_it():
    def broken():
        yield 1
        raise ValueError("no second item")

    late = transfer.a_step_late(broken(), lambda _: False)
    assert next(late) == 1
    with pytest.raises(ValueError, match="no second item"):
        next(late)


class Reads(TorchFunctionMode):
    """Counts what takes numbers from a tensor to the host."""

    NAMES = ("item", "tolist", "numpy", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        self.seen.update([name] * (name in self.NAMES))
        return function(*args, **(kwargs or {}))


class DataDependent(TorchDispatchMode):
    """Counts operators whose result has a size, or is a number, that the host has to ask the device for."""

    TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.update([str(op)] * (bool(self.TAGS & {*op.tags}) and kwargs.get("output_size") is None))
        return op(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fetched_numbers_are_the_same(dtype):
    given = {
        "loss": torch.tensor(1 / 3, dtype=dtype), "finite": torch.tensor(True), "bad": torch.tensor(math.inf),
        "none": torch.tensor(0.0), "bits": torch.tensor(1 + 2**-23),
    }  # fmt: skip
    expected = {name: float(t) for name, t in given.items()}
    with Reads() as reads:
        wait = transfer.fetch(given)
        assert not reads.seen
        given["loss"].zero_()  # what comes later changes nothing
        found, _ = wait()
    assert found == expected and list(found) == list(expected)
    assert reads.seen == {"tolist": 1}


# --- What is sent


def test_a_batch_arrives_but_for_sizes():
    """`meta` stands for a device that is not the host's; the names come in one order."""
    batch = {"b": torch.zeros(2, 3), "image.splits": torch.ones(2, 2), "a": torch.tensor(1)}
    device = torch.device("meta")
    (there,) = transfer.receive(transfer.send([batch], device, transfer.copy_stream(device)))
    assert {name: t.device.type for name, t in there.items()} == {"a": "meta", "b": "meta", "image.splits": "cpu"}
    assert list(there) == sorted(batch)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_copies_ahead_of_a_busy_device():
    """Many batches, sent in a thread while the device computes, each as it was made; and numbers read late."""
    device = torch.accelerator.current_accelerator()
    stream, busy = transfer.copy_stream(device), torch.randn(2048, 2048, device=device)

    def batches():
        for i in range(40):
            yield transfer.send([{"ids": torch.full((256, 1024), i)}], device, stream)

    def issued():
        for i, sent in enumerate(data.prefetch(batches())):
            (batch,) = transfer.receive(sent)
            for _ in range(10):
                torch.mm(busy, busy)
            yield i, transfer.fetch({"least": batch["ids"].min(), "most": batch["ids"].max()})

    for i, fetched in transfer.a_step_late(issued(), lambda _: False):
        found, _ = fetched()
        assert int(found["least"]) == int(found["most"]) == i


# --- What a step asks of the host

MOE = shrink(find_model("qwen3-moe-tiny").hf) | {"hidden_size": 32, "moe_intermediate_size": 16}
DENSE = shrink(find_model("Qwen3-0.6B").hf)


@pytest.mark.parametrize(
    "hf, mesh, accumulate, reads",
    [
        (DENSE, Mesh(), 1, 0),
        (DENSE, Mesh(2, 2, 1), 2, 0),
        (MOE, Mesh(), 1, 0),
        (MOE, Mesh(2, 1, 1), 1, 0),
        (MOE, Mesh(1, 1, 2), 1, 2),  # one for each layer, whose rows it sends
        (MOE, Mesh(1, 1, 2), 2, 8),  # the forward that counts the experts' tokens sends them, too
    ],
    ids=["dense", "dense-fsdp2-sp2", "moe", "moe-fsdp2", "moe-ep2", "moe-ep2-accumulate2"],
)
def test_reads_of_the_host_in_a_step(hf, mesh, accumulate, reads):
    model = find_model(hf)

    def rank_main(rank):
        job = make_job(model, find_plan("fsdp_sp_ep"), mesh)
        state = make_state(model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
        step = make_train_step(model, job.sharding, job.ops, RECIPE, "off", accumulate)
        parts = job.microbatches(random_batch(131, 8, 12, 0), accumulate)
        with Reads() as seen, DataDependent() as asked:
            step(state, parts)
        return dict(seen.seen), dict(asked.seen)

    expected = {"tolist": reads} if reads else {}
    assert run_ranks(mesh.size, rank_main) == [(expected, {})] * mesh.size
