"""Whole runs on more than text, as a user makes them: conversations with images, frozen parts, recipes of one's own."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from processors import write_model
from runs import command, environment, series, steps, tensors
from test_samples import lines, picture, turn

from ftrain import recipes
from ftrain.generate import complete, forward
from ftrain.items import on_one_device
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.ops import plain
from ftrain.plan import find_plan
from ftrain.ranks import run_ranks
from ftrain.records import read
from ftrain.samples import make_reader, parse, to_batch
from ftrain.data import collate, in_one_row
from ftrain.state import init_state, initial

# A recipe of the user's own: one image says which of two words follows it.
RECIPE = '''
"""Dark or bright."""
import torch
from ftrain.data import Data, collate

DEFAULTS = {"steps": 3, "seq_len": 12, "batch_size": 4, "lr": 2e-3, "mesh.fsdp": -1, "eval_batches": 1}

def model(cfg):
    from ftrain.model import presets
    return presets()["omni-tiny"]

def data(cfg, model, source):
    def sample(i):
        image = torch.full((4, 4), 255 * (i % 2), dtype=torch.uint8)
        ids = torch.tensor([[1, 7, 7, 7, 7, 2, 3 + i % 2]])
        labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], 1)
        labels[:, :-2] = -100
        return model.prepare({"input_ids": ids, "labels": labels, "image": [image]})

    def batch(index, batch_size, seed):
        return collate([sample(i) for i in range(index, index + batch_size)], cfg.seq_len)

    return Data(batch, lambda size, limit: iter([batch(0, size, 0)]), "ab" * 16, "an image a row")

def start(run):
    return {"right": 0.5}

def finish(run):
    from ftrain.generate import complete
    batch = run.data.batch(0, 4, 0)
    batch = {name: t if name == "items" else t[:, :6] for name, t in batch.items()}
    batch["items"] = {"image": [i._replace(slots=i.slots // 12 * 6 + i.slots % 12) for i in batch["items"]["image"]]}
    words = complete(run.job, run.state, batch, 1)
    if run.first:
        (run.out / "words.txt").write_text(str(words))
    return {"right": sum(w == [3 + i % 2] for i, w in enumerate(words)) / 4}
'''


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("omni-runs")
    write_model(root / "model")
    for i in range(3):
        picture(i, 16 + 8 * i, 24).save(root / f"{i}.png")
    records = [{"messages": turn("<image>" * (i % 3) + "?" * (i % 4), "!" * (1 + i % 5)),
                "images": ["0.png", "1.png"][: i % 3]} for i in range(40)]  # fmt: skip
    flags = {
        "model": root / "model", "data": lines(root / "chats.jsonl", *records), "precision": "fp32", "compile": "off",
        "nproc": 1, "seq_len": 96, "batch_size": 4, "eval_batches": 1, "steps": 4, "warmup": 2, "eps": 1e-3,
        "init": root / "weights",
    }  # fmt: skip
    env = environment(root / "cache")

    def attempt(name: str, flags=flags, **more) -> subprocess.CompletedProcess:
        argv = command(**{k: v for k, v in (flags | {"out": root / name} | more).items() if v is not None})
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=500)

    def run(name: str, **more):
        done = attempt(name, **more)
        assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
        return root / name, done.stdout

    # Weights to start from, as a run leaves them.
    flags["init"] = None
    return SimpleNamespace(root=root, attempt=attempt, run=run)


@pytest.fixture(scope="module")
def one(ground):
    return ground.run("one")


def test_images_are_trained_on_and_what_encoders_waste_is_told(one):
    out, said = one
    first, *_, last = steps(out)
    assert {"visual_waste", "visual_imbalance", "graphs"} < first.keys() and 0 <= first["visual_waste"] < 0.5
    assert last["graphs"] >= first["graphs"] == 1 and first["mfu"] is None and first["tokens"] <= 4 * 96
    assert "38 samples of" in said and "2 held out" in said and "visual padding" in said and "\nsample: " in said
    kept = {path.name for path in (out / "checkpoints" / "step-4").iterdir()}
    assert {"preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} < kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"nproc": 2, "mesh_fsdp": 1, "mesh_sp": 2},
        {"nproc": 4, "mesh_fsdp": 2, "mesh_sp": 2},
        {"accumulate": 2},
        {"compile": "aot_eager"},
    ],
    ids=["sp2", "fsdp2-sp2", "accumulate2", "compiled"],
)
def test_every_mesh_trains_alike(ground, one, flags, request):
    out, _ = ground.run(request.node.name, **flags)
    a, b = series(out), series(one[0])
    assert (((a - b) / b).abs() < torch.tensor([1e-6, 2e-5])).all()
    a, b = (tensors(directory / "checkpoints" / "step-4") for directory in (out, one[0]))
    for name in b:
        assert (a[name] - b[name]).abs().max() <= (2e-5 if " " in name else 2e-6) * b[name].abs().max(), name


def test_frozen_parts_stay_and_slowed_ones_move_less(ground, one):
    frozen, said = ground.run("frozen", freeze="visual", lr_factor="model.layers.0=0.01")
    assert "42.9K frozen" in said and "at 0.01 of the learning rate" in said
    start = {name: initial(name, spec, 0) for name, spec in find_model(ground.root / "model").specs.items()}
    a, b = (tensors(out / "checkpoints" / "step-4") for out in (frozen, one[0]))
    moved = {name: ((a[name] - start[name]).abs().max(), (b[name] - start[name]).abs().max()) for name in start}
    assert all((mine == 0) == name.startswith("visual") and others > 0 for name, (mine, others) in moved.items())
    slow = [mine / others for name, (mine, others) in moved.items() if name.startswith("model.layers.0")]
    assert max(slow) < 0.03
    assert not any(name.startswith("mu visual") for name in a)


def test_another_frozen_set_is_refused_on_resume(ground, one):
    done = ground.attempt("one", steps=5, freeze="visual.merger")
    assert done.returncode == 2
    assert "visual.merger.ln_q.bias, visual.merger.ln_q.weight and 4 more would be frozen from here on" in done.stderr
    done = ground.attempt("frozen", steps=5)
    assert done.returncode == 2 and "would be trained from here on" in done.stderr and "--freeze" in done.stderr


def test_a_run_goes_on_where_it_stopped(ground, one):
    whole, _ = ground.run("six", steps=6, schedule="constant")
    ground.run("parts", steps=3, schedule="constant")
    parts, _ = ground.run("parts", steps=6, schedule="constant")
    assert torch.equal(series(whole), series(parts))


def test_recipes_of_ones_own(ground):
    (ground.root / "mine.py").write_text(RECIPE)
    flags = {"recipe": ground.root / "mine.py", "compile": "off", "precision": "fp32"}
    out, said = ground.run("recipe", flags=flags | {"nproc": 1})
    assert "/mine.py (omni)" in said and "step 0: right 0.5\n" in said and "an image a row" in said
    assert [entry["right"] for entry in read(out / "metrics.jsonl") if "right" in entry][0] == 0.5
    meshed, _ = ground.run("recipe-2", flags=flags | {"nproc": 2, "steps": 3})
    assert ((series(meshed) - series(out)) / series(out)).abs().max() < 2e-5
    assert (out / "words.txt").read_text() == (meshed / "words.txt").read_text()


def test_defaults_are_read_without_running_the_file(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("import no_such_module\nDEFAULTS = {'steps': 7, 'mesh.sp': 2}\n")
    assert recipes.defaults(str(path)) == {"steps": 7, "mesh.sp": 2}
    path.write_text("DEFAULTS = {'steps': int('7')}\n")
    with pytest.raises(ValueError, match="DEFAULTS must be a literal"):
        recipes.defaults(str(path))
    path.write_text("DEFAULTS = {'steps': 7}\n")
    with pytest.raises(ValueError, match="r.py lacks data"):
        recipes.find(str(path))
    with pytest.raises(ValueError, match="--recipe vision: the recipes are"):
        recipes.file("vision")


# --- Going on from prompts


def going_on(ground, mesh, batch, model, n=5, **how):
    def on_rank(rank):
        job = make_job(model, find_plan("fsdp_sp_ep"), mesh)
        state = init_state(model.specs, job.placements, job.device_mesh, 0)
        return complete(job, state, batch, n, **how), forward(job, state, batch).hidden.shape

    return run_ranks(mesh.size, on_rank)


@pytest.fixture(scope="module")
def prompts(ground):
    model = find_model(ground.root / "model")
    # Large weights, that what is seen in the images and before the last token matters.
    model = type(model)(**{**vars(model), "specs": {
        name: type(spec)(**{**vars(spec), "init": lambda shape, g: torch.randn(shape, generator=g) * 0.3})
        for name, spec in model.specs.items()}})  # fmt: skip
    reader = make_reader(model, ground.root / "model")
    records = [("a<image>b", ["0.png"]), ("?", []), ("<image>what is<image>", ["1.png", "2.png"])]
    made = [to_batch(model, reader, parse({"messages": turn(q), "images": i}, reader.kinds), ground.root, prompt=True)
            for q, i in records]  # fmt: skip
    return model, made


def by_hand(model, made, n):
    """One row alone, one token after the other, without padding."""
    params = {name: initial(name, spec, 0) for name, spec in model.specs.items()}
    found = []
    for _ in range(n):
        out = model.forward(params, on_one_device(made, model.blanks), plain())
        found.append(int((out.hidden[0, -1] @ out.unembedding.T).argmax()))
        more = {"input_ids": found[-1], "position_ids": int(made["position_ids"].max()) + 1, "segment_ids": 0}
        made = {**made, **{k: torch.cat([made[k], torch.full_like(made[k][:, :1], v)], 1) for k, v in more.items()}}
    return found


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 1), Mesh(2, 1, 1), Mesh(1, 2, 1), Mesh(3, 1, 1), Mesh(2, 2, 1)], ids=str)
def test_rows_go_on_as_each_alone(ground, prompts, mesh, one_thread):
    model, made = prompts
    expected = [by_hand(model, row, 5) for row in made]
    assert len({tuple(row) for row in expected}) == 3
    for found, _ in going_on(ground, mesh, collate(made), model):
        assert found == expected


def test_rows_end_at_a_stop_token_and_the_others_go_on(ground, prompts, one_thread):
    model, made = prompts
    (whole, _), *_ = going_on(ground, Mesh(1, 1, 1), collate(made), model)
    ((found, _),) = going_on(ground, Mesh(1, 1, 1), collate(made), model, stop=[whole[1][2]])
    assert found[1] == whole[1][: whole[1].index(whole[1][2])]
    assert found[0] == whole[0][: whole[0].index(whole[1][2])] if whole[1][2] in whole[0] else found[0] == whole[0]


def test_a_drawn_text_is_the_same_on_every_mesh(ground, prompts, one_thread):
    model, made = prompts
    runs = [going_on(ground, m, collate(made), model, temperature=1.0, seed=3)[0][0] for m in (Mesh(1, 1, 1), Mesh(2, 2, 1))]
    other = going_on(ground, Mesh(1, 1, 1), collate(made), model, temperature=1.0, seed=4)[0][0]
    assert runs[0] == runs[1] != other


def test_a_packed_row_goes_on_from_its_last_segment(ground, prompts, one_thread):
    model, made = prompts
    ((found, _),) = going_on(ground, Mesh(1, 1, 1), in_one_row([made[2], made[0]]), model)
    assert found == [by_hand(model, made[0], 5)]
