"""Compositions: all of them train on every mesh as on one device; what is frozen stays; errors say what is wrong."""

import json
from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import yaml
from compositions import DECODERS, ENCODERS, FOUNDATIONS, TINY, compositions, omni, part
from hypothesis import HealthCheck, assume, given, settings
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import ftrain
from ftrain import check
from ftrain.equivalence import TOLERANCE, deviations, mixed_batch, run_mesh, run_plain, values
from ftrain.items import on_one_device, pack
from ftrain.job import make_job
from ftrain.loss import IGNORE
from ftrain.mesh import Mesh
from ftrain.model import find_model, param_counts, presets
from ftrain.models import qwen3_moe_omni
from ftrain.models.omni import forward, raw_items
from ftrain.ops import Output, layer_params, plain
from ftrain.plan import find_plan
from ftrain.pretrained import init_from_sources
from ftrain.ranks import run_ranks
from ftrain.safetensors_io import write_file
from ftrain.specs import trainable
from ftrain.state import initial, whole

pytestmark = pytest.mark.usefixtures("one_thread")
ONE, TWO = Mesh(), Mesh(2, 1, 1)
SIZES = [
    (mesh, replica) for mesh in check.meshes(8) for replica in (1, 2)
    if 1 < mesh.size * replica <= 8 and mesh.sp in (1, 2, 4) and mesh.ep in (1, 2, 4)
]  # fmt: skip
slowly = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def held(model, plan, mesh, data, **how):
    expected, runs = run_plain(model, data), run_mesh(model, find_plan(plan), mesh, data, **how)
    found = deviations(runs, expected, model)
    assert not [str(d) for d in found if not d.error <= TOLERANCE][:3]
    return expected, runs[0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return {name: values(name, spec) for name, spec in model.specs.items()}


def ids(*pieces):
    return torch.tensor([[token for piece in pieces for token in (piece if isinstance(piece, list) else [piece])]])


# --- By discovery: each encoder, each decoder


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_does_as_it_is_asked(name):
    """Items fit the blank one; an item's outputs are its own, whoever is packed with it; there are as many as slots."""
    module = ENCODERS[name]
    cfg = module.config(part(module)["config"])
    specs, blank = module.specs(cfg, "at.some.place"), module.blank(cfg)
    assert all(n.startswith("at.some.place.") for n in specs) and (blank.slots == -1).all()
    raws = [module.example(cfg, seeded(seed)) for seed in range(3)]
    found = [item for raw in raws for item in module.items(raw, cfg)]
    assert found
    for item in found:
        kept = item.slots[item.slots >= 0]
        assert len(kept.unique()) == len(kept) and len(item.slots) * blank.units == item.units * len(blank.slots)
    numbered = raw_items(SimpleNamespace(module=module, cfg=cfg), raws)
    slots = torch.cat([item.slots for item in numbered])
    assert sorted(slots[slots >= 0].tolist()) == list(range(sum(item.outputs for item in found)))
    p = {n: values(n, spec) for n, spec in specs.items()}

    def encoded(items):
        x, _ = pack("it", items, blank, (1, len(slots)))
        return plain().place(module.encode(p, "at.some.place", layer_params(x, "it"), cfg, plain()), x, "it")[0]

    together = encoded(numbered)
    assert together.shape[-1] == cfg.width and together.isfinite().all()
    for item in numbered:
        at = item.slots[item.slots >= 0]
        torch.testing.assert_close(together[at], encoded([item])[at], rtol=1e-4, atol=1e-4)
        assert together[at].any(-1).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_trains_on_a_mesh_as_alone(name):
    model = find_model(omni("qwen3", {"it": part(ENCODERS[name])}))
    moved = set()
    for mesh, kinds in ((Mesh(1, 2, 1), [1]), (Mesh(3, 1, 1), [1, 0, 0])):
        expected, _ = held(model, "fsdp_sp", mesh, [mixed_batch(model, 3, 1, kinds)])
        moved |= {name for name, gradient in expected.gradients.items() if gradient.any()}
    # What is added to all keys alike, softmax does not see.
    still = [n for n in trainable(model.specs) if n not in moved and not n.endswith("k_proj.bias")]
    assert not still, "the loss does not depend on these"


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_trains_on_a_mesh_as_alone(name):
    """Also behind another of its kind, whose stream it reads."""
    module = DECODERS[name]
    heads = {"first": part(module), "second": part(module, input="first", weight=0.5)}
    model = find_model(omni("llama", {}, heads))
    nothing = module.blank(model.cfg.decoders["first"].cfg, (2, 3))
    some = module.example(model.cfg.decoders["first"].cfg, seeded(), (2, 3))
    assert nothing.keys() == some.keys() and all(nothing[f].shape == some[f].shape for f in some)
    none = model.targets(on_one_device(model.prepare({"input_ids": ids(1, 2), "labels": ids(2, 3)}), {}))
    assert none["first"] == none["second"] == 0 and none["loss"] == 2
    expected, _ = held(model, "fsdp_sp", Mesh(2, 2, 1), [mixed_batch(model, 3, 1)])
    assert all(g.any() for g in expected.gradients.values())


# --- Whatever is composed


@settings(slowly, max_examples=8)
@given(st.data())
def test_any_composition_is_one_device(data):
    config = data.draw(compositions())
    model = find_model(config)
    assume(trainable(model.specs))
    mesh, replica = data.draw(st.sampled_from(SIZES), "mesh, replica")
    plan = data.draw(st.sampled_from(["ddp", "fsdp", "fsdp_sp", "fsdp_sp_ep"]), "plan")
    kinds = range(len(model.examples(seeded())))
    chosen = data.draw(st.sampled_from([[0], [1], [0, 0, kinds[-1]], None]), "kinds")
    batch = mixed_batch(model, data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(0, 99), "seed"), chosen)
    accumulate = data.draw(st.sampled_from([1, 2]), "accumulate")
    expected, _ = held(model, plan, mesh, [batch], replica=replica, accumulate=accumulate)
    frozen = model.specs.keys() - trainable(model.specs).keys()
    assert not frozen & {*expected.gradients, *expected.mu, *expected.nu}


EYES = {
    "image": part(ENCODERS["vit"]),
    "other": part(ENCODERS["vit"], config={**ENCODERS["vit"].TINY, "hidden_size": 16, "num_hidden_layers": 1}),
}
NAMED = {
    "two of a kind": omni("qwen3", EYES),
    "one placeholder": omni("qwen3_moe", {name: {**eye, "placeholder": 9} for name, eye in EYES.items()}),
    "levels": omni("llama", {"image": part(ENCODERS["qwen3_vision"]), "sound": part(ENCODERS["whisper"])}),
    "decoder behind decoder": omni("qwen3", {"image": EYES["image"]}, {
        "first": part(DECODERS["codes"], weight=0.5), "second": part(DECODERS["codes"], input="first", weight=2.0)}),
}  # fmt: skip


@pytest.mark.parametrize("which", NAMED)
@pytest.mark.parametrize("kinds", ["text", "images on one rank", "mixed"])
def test_compositions_on_a_mesh(which, kinds):
    model = find_model(NAMED[which])
    last = len(model.examples(seeded())) - 1
    chosen = {"text": [0], "images on one rank": [last, 0, 0, 0], "mixed": None}[kinds]
    held(model, "fsdp_sp_ep", Mesh(2, 1, 2) if "one" in kinds else Mesh(2, 2, 1), [mixed_batch(model, 4, 3, chosen)])


def picture(rows, columns, seed=0):
    return torch.randint(256, (2 * rows, 2 * columns), generator=seeded(seed), dtype=torch.uint8)


def test_encoders_that_share_a_placeholder_are_added():
    model, eye = find_model(NAMED["one placeholder"]), picture(1, 3)
    p = weights_of(model)
    row = {"input_ids": ids(1, [9] * 3, 2)}
    cfg = replace(model.cfg, module=SimpleNamespace(forward=lambda p, batch, cfg, ops: Output(batch["embeddings"])))

    def embedded(**given):
        return forward(p, on_one_device(model.prepare({**row, **given}), model.blanks), cfg, plain()).hidden

    one, other, both = embedded(image=[eye]), embedded(other=[eye]), embedded(image=[eye], other=[eye])
    torch.testing.assert_close(both, one + other)
    assert one[0, 1:4].any(-1).all() and not torch.equal(one, other) and not both[0, [0, 4]].any()


def test_inputs_come_in_the_order_of_their_placeholders():
    model = find_model(NAMED["two of a kind"])
    p = weights_of(model)
    text, first, second = {"input_ids": ids(1, [7] * 2, 3, [8] * 3, [7] * 4)}, picture(1, 2), picture(2, 2, 1)
    of = ftrain.logits(model, p, {**text, "image": [first, second], "other": [picture(3, 1)]})
    assert torch.isfinite(of).all() and of.shape == (1, 11, 131)
    with pytest.raises(ValueError, match="image: 4 outputs of the encoder for 6 placeholder tokens"):
        ftrain.logits(model, p, {**text, "image": [second], "other": [picture(3, 1)]})
    other = ftrain.logits(model, p, {**text, "image": [first, picture(4, 1, 1)], "other": [picture(3, 1)]})
    torch.testing.assert_close(of[:, :7], other[:, :7])  # what comes later is not seen
    assert (of[:, 7:] - other[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("foundation", FOUNDATIONS)
def test_without_input_it_is_its_foundation_bit_by_bit(foundation):
    both = {"image": part(ENCODERS["qwen3_vision"]), "sound": part(ENCODERS["whisper"])}
    model, bare = find_model(omni(foundation, both)), find_model(FOUNDATIONS[foundation])
    p = weights_of(model)
    text = {"input_ids": torch.randint(10, 131, (2, 9), generator=seeded()), "attention_mask": torch.ones(2, 9).long()}
    text["attention_mask"][1, 6:] = 0
    assert torch.equal(ftrain.logits(model, p, text), ftrain.logits(bare, {n: p[n] for n in bare.specs}, text))


# --- Frozen, slower, weighted


PARTS = {"": "lr", "encoders.image.": "lr", "projectors.image.": "projector_lr", "decoders.drawn.": "lr"}


def with_factor(prefix, factor, **other):
    image = part(ENCODERS["vit"], **({PARTS[prefix]: factor} if "image" in prefix else {}))
    drawn = part(DECODERS["codes"], **({"lr": factor} if prefix.startswith("decoders") else {}), **other)
    return find_model(omni("qwen3", {"image": image}, {"drawn": drawn}, **({} if prefix else {"lr": factor})))


def of_part(prefix, model):
    own = tuple(filter(None, PARTS))
    return {n for n in model.specs if (n.startswith(prefix) if prefix else not n.startswith(own))}


@pytest.mark.parametrize("prefix", PARTS)
def test_what_is_frozen_stays_and_costs_nothing(prefix):
    frozen, free = with_factor(prefix, 0.0), with_factor(prefix, 1.0)
    own, batch = of_part(prefix, free), [mixed_batch(free, 4, 0, [0, 1])]
    expected, run = held(frozen, "fsdp", TWO, batch)
    whole_run = run_mesh(free, find_plan("fsdp"), TWO, batch)[0]
    for kind in ("gradients", "mu", "nu"):
        assert {*getattr(run, kind)} == {*free.specs} - own
    assert all(torch.equal(run.params[n], values(n, frozen.specs[n])) for n in own)
    assert all(not torch.equal(p, values(n, frozen.specs[n])) for n, p in run.params.items() if n not in own)
    assert run.traffic["reduce_scatter"][0] < whole_run.traffic["reduce_scatter"][0]
    # Parameters are gathered again in the backward, where there is one.
    assert run.traffic["all_gather"][0] <= whole_run.traffic["all_gather"][0]
    for name, gradient in run.gradients.items():  # what is not frozen has the gradient that it always had
        torch.testing.assert_close(gradient, whole_run.gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prefix", PARTS)
def test_a_factor_on_the_learning_rate_is_one_on_the_way(prefix):
    """Of the first step: the gradients are the same, and so is Adam's direction, decay included."""
    one, half = with_factor(prefix, 1.0), with_factor(prefix, 0.25)
    batch, own = [mixed_batch(one, 4, 0, [0, 1])], of_part(prefix, one)
    [whole_way, *_], [part_way, *_] = (run_mesh(m, find_plan("fsdp_sp"), Mesh(1, 2, 1), batch) for m in (one, half))
    assert {n for n, spec in half.specs.items() if spec.lr == 0.25} == own
    for name, spec in one.specs.items():
        before = values(name, spec)
        moved, expected = part_way.params[name] - before, whole_way.params[name] - before
        factor = 0.25 if name in own else 1.0
        assert expected.any()
        torch.testing.assert_close(moved, factor * expected, rtol=0, atol=3e-7 * float(before.abs().max() + 1))


def test_losses_are_weighted():
    """The gradient is linear in the weights; 0 takes a loss out of it, and leaves it among the metrics."""
    runs = {w: run_mesh(with_factor("", 1.0, weight=w), find_plan("fsdp"), TWO, BATCH)[0] for w in (0, 1, 0.25)}
    for name, some in runs[0.25].gradients.items():
        mixed = 0.75 * runs[0].gradients[name] + 0.25 * runs[1].gradients[name]
        torch.testing.assert_close(some, mixed, rtol=1e-4, atol=1e-6)
    assert not any(g.any() for n, g in runs[0].gradients.items() if n.startswith("decoders."))
    assert runs[0].metrics["drawn_loss"] > 0 and runs[1].metrics["loss"] > 0


BATCH = [mixed_batch(with_factor("", 1.0), 4, 0, [0, 1])]


# --- Weights from elsewhere, configs in files


def write(directory, hf, names, scale):
    """A directory of weights as they are published: config and tensors [name -> shape]."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    tensors = [torch.randn(shape, generator=seeded(len(name))) * scale for name, shape in names.items()]
    write_file(directory / "model.safetensors", {n: (torch.float32, s) for n, s in names.items()}, iter(tensors))
    return dict(zip(names, tensors, strict=True))


@pytest.fixture
def published(tmp_path):
    language = write(tmp_path / "language", FOUNDATIONS["llama"],
                     {n: s.shape for n, s in find_model(FOUNDATIONS["llama"]).specs.items()}, 0.1)  # fmt: skip
    vit = ENCODERS["vit"]
    names = {f"model.eye{n.removeprefix('eye')}": s.shape for n, s in vit.specs(vit.config(vit.TINY), "eye").items()}
    eye = write(tmp_path / "eye", vit.TINY, {**names, "another.part": (3,)}, 0.1)
    return tmp_path, language, eye


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_name_directories_and_weights_begin_there(published, suffix):
    root, language, eye = published
    image = {"type": "vit", "placeholder": 7, "weights": str(root / "eye"), "weights_prefix": "model.eye."}
    hf = {"model_type": "omni", "foundation": str(root / "language"), "encoders": {"image": image}}
    path = root / f"omni.{suffix}"
    path.write_text(yaml.safe_dump(hf) if suffix == "yaml" else json.dumps(hf))
    model = find_model(path)
    assert model.hf["foundation"] == FOUNDATIONS["llama"]
    assert model.hf["encoders"]["image"]["config"] == ENCODERS["vit"].TINY

    def on_rank(rank):
        job = make_job(model, find_plan("fsdp"), TWO)
        return {n: whole(t) for n, t in init_from_sources(model, job.placements, job.device_mesh, 5).params.items()}

    for found in run_ranks(2, on_rank):
        for name, t in found.items():
            if name.startswith("encoders.image."):
                assert torch.equal(t, eye["model.eye." + name.removeprefix("encoders.image.")])
            elif name.startswith("projectors."):
                assert torch.equal(t, initial(name, model.specs[name], 5))
            else:
                assert torch.equal(t, language[name])
    again = find_model(model.hf)  # as it stands in a checkpoint
    assert again.sources == model.sources and again.specs.keys() == model.specs.keys()


def test_a_preset_is_a_foundation_without_weights(tmp_path):
    path = tmp_path / "omni.yaml"
    path.write_text(yaml.safe_dump({"model_type": "omni", "foundation": "SmolLM2-135M"}))
    model = find_model(path)
    assert model.hf["foundation"] == presets()["SmolLM2-135M"] and not model.sources
    assert model.specs.keys() == find_model("SmolLM2-135M").specs.keys()


def test_weights_that_are_not_there(published):
    root, *_ = published
    image = {**part(ENCODERS["vit"]), "placeholder": 7, "weights": str(root / "eye"), "weights_prefix": "model.ear."}
    model = find_model({"model_type": "omni", "foundation": FOUNDATIONS["llama"], "encoders": {"image": image}})

    def on_rank(rank):
        job = make_job(model, find_plan("fsdp"), ONE)
        init_from_sources(model, job.placements, job.device_mesh, 5)

    with pytest.raises(Exception, match="model.ear.patch.weight"):
        run_ranks(1, on_rank)


# --- Parts of the user's own


MINE = '''
import torch
from ftrain.items import Item
from ftrain.specs import ParamSpec, normal
from types import SimpleNamespace

def config(hf): return SimpleNamespace(width=4)
def specs(cfg, prefix):
    return {f"{prefix}.w.weight": ParamSpec((4, 3), normal(1.0)), f"{prefix}.idle": ParamSpec((5,), normal(1), lr=1.0)}
def blank(cfg): return Item({"x": torch.zeros(1, 3)}, torch.tensor([-1]))
def items(raw, cfg): return [Item({"x": raw}, torch.arange(len(raw)))]
def example(cfg, generator): return torch.randn(3, 3, generator=generator)
def encode(p, prefix, x, cfg, ops): return ops.linear(x["x"], p[f"{prefix}.w.weight"])
'''


def mine(path, text=MINE):
    path.write_text(text)
    return omni("qwen3", {"it": {"type": str(path), "config": {}}})


def test_parameters_that_do_not_matter_are_named(tmp_path):
    model = find_model(mine(tmp_path / "mine.py"))
    with pytest.raises(ValueError, match="the loss does not depend on encoders.it.idle, which the model declares"):
        run_mesh(model, find_plan("fsdp"), ONE, [mixed_batch(model, 2, 0)])
    frozen = find_model(mine(tmp_path / "frozen.py", MINE.replace("lr=1.0", "lr=0.0")))
    held(frozen, "fsdp", TWO, [mixed_batch(frozen, 2, 0)])


@pytest.mark.parametrize("text, why", [
    (MINE.replace("def blank", "def other"), "mine.py lacks blank: it must have config, specs, blank, encode"),
    (MINE + "nonsense", "mine.py cannot be imported: NameError"),
])  # fmt: skip
def test_files_that_are_no_encoders(tmp_path, text, why):
    with pytest.raises(ValueError, match=why):
        find_model(mine(tmp_path / "mine.py", text))
    with pytest.raises(FileNotFoundError, match=r"type .*gone.py: there is no file .*gone.py"):
        find_model(omni("qwen3", {"it": {"type": str(tmp_path / "gone.py")}}))


def test_a_decoder_whose_targets_nobody_counts(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("config = specs = decode = example = lambda *a: None\ndef width(cfg, into): return into\n")
    with pytest.raises(ValueError, match="mine.py lacks blank: it must have config, specs, blank, decode, width"):
        find_model(omni("qwen3", {}, {"it": {"type": str(path)}}))
    path.write_text(path.read_text() + "def blank(cfg, shape): return {'x': shape}\n")
    with pytest.raises(ValueError, match="mine.py lacks count: its targets are no labels"):
        find_model(omni("qwen3", {}, {"it": {"type": str(path)}}))


def test_more_levels_than_the_foundation_has_layers():
    deep = {**ENCODERS["qwen3_vision"].TINY, "deepstack_visual_indexes": [0, 1]}
    hf = omni({**FOUNDATIONS["qwen3"], "num_hidden_layers": 1}, {"image": part(ENCODERS["qwen3_vision"], config=deep)})
    model = find_model(hf)
    with pytest.raises(ValueError, match="has 2 levels besides its outputs: the foundation, of 1 layers"):
        ftrain.logits(model, weights_of(model), {"input_ids": ids(1, 2)})


# --- What is refused


IMAGE, HEAD = {"image": part(ENCODERS["vit"], placeholder=7)}, {"drawn": part(DECODERS["codes"])}


def image(**other):
    return omni("qwen3", {"image": {**IMAGE["image"], **other}})


REFUSED = {
    "no foundation": ({"model_type": "omni"}, "lacks 'foundation'"),
    "a foundation that is no config": ({"model_type": "omni", "foundation": 3}, "foundation = 3 .* its model_type"),
    "a foundation without a family": (omni({"vocab_size": 3}), "the config of a language model, with its model_type"),
    "a family that there is not": (omni({"model_type": "gpt9"}), "type 'gpt9': models has no module of that name"),
    "what is no family": (omni({"model_type": "moe"}), "moe.py lacks config, specs, forward"),
    "a foundation that sees": (omni(presets()["janus-tiny"]), "model_type = 'janus' .* takes text alone"),
    "a composition of one": (omni(TINY), "model_type = 'omni' .* takes text alone"),
    "an unknown key": (omni(encoder={}), "of an omni model has an unknown key 'encoder': known are .*encoders"),
    "an encoder's unknown key": (image(learning_rate=1), "of the encoder image has an unknown key 'learning_rate'"),
    "a decoder's unknown key": (
        omni("qwen3", {}, {"drawn": {**HEAD["drawn"], "placeholder": 3}}),
        "of the decoder drawn has an unknown key 'placeholder'"),
    "an unknown type": (image(type="vitt"), "type 'vitt': models/encoders has no module of that name"),
    "an empty type": (image(type=""), "type '': models/encoders has no module"),
    "no type": (omni("qwen3", {"image": {"placeholder": 7}}), "lacks 'type'"),
    "a type that is no name": (image(type=3), "type = 3 .* the name of a module, or the path of a file"),
    "a decoder's unknown type": (omni("qwen3", {}, {"it": {"type": "vit"}}), "models/decoders has no module"),
    "no placeholder": (omni("qwen3", {"image": {"type": "vit", "placeholder": None}}), "lacks 'placeholder'"),
    "a placeholder beyond": (image(placeholder=131), "encoders.image.placeholder = 131 .* below vocab_size = 131"),
    "a placeholder below": (image(placeholder=-1), "placeholder = -1"),
    "a placeholder that is no token": (image(placeholder="<image>"), "placeholder = '<image>'"),
    "a projector": (image(projector="conv"), "projector = 'conv' .* one of linear, mlp, none"),
    "widths that differ": (image(projector="none"), "have 24 elements, the foundation's embeddings 20"),
    "a negative factor": (image(lr=-1), "lr of image = -1 .* a number, at least 0"),
    "a factor that is none": (image(projector_lr="1"), "projector_lr of image = '1'"),
    "the foundation's factor": (omni(lr=float("nan")), "lr of the foundation = nan"),
    "a weight": (omni("qwen3", {}, {"drawn": {**HEAD["drawn"], "weight": -2}}), "weight of drawn = -2"),
    "a decoder's input": (
        omni("qwen3", {}, {"drawn": {**HEAD["drawn"], "input": "later"}, "later": HEAD["drawn"]}),
        "decoders.drawn.input = 'later' .* one of hidden"),
    "one name twice": (omni("qwen3", IMAGE, {"image": HEAD["drawn"]}), "'image' .* a name that no encoder has"),
    "a name of the text's": (omni("qwen3", {"labels": IMAGE["image"]}), "encoders = 'labels' .* a name other than"),
    "a name of a metric's": (omni("qwen3", {}, {"router_aux": HEAD["drawn"]}), "decoders = 'router_aux'"),
    "a name of a row's": (omni("qwen3", {}, {"row_of": HEAD["drawn"]}), "decoders = 'row_of'"),
    "names that are none": (omni("qwen3", {"an image": IMAGE["image"]}), "encoders = .*letters, digits, _"),
    "a list": ({**omni(), "encoders": [IMAGE["image"]]}, "encoders = .* a mapping from names"),
    "an encoder's config": (image(config={"hidden_size": 9}), "num_attention_heads = 4 .* a divisor of .* 9"),
    "tokens of an image": (
        omni("qwen3", {"image": part(ENCODERS["qwen3_vision"], config={"tokens": [4, 1]})}), r"tokens = \[4, 1\]"),
    "another foundation than llama": (
        {**presets()["llama-omni-tiny"], "foundation": FOUNDATIONS["qwen3"]}, "model_type = 'qwen3' .* 'llama'"),
    "nothing to draw": (
        {**presets()["qwen3-moe-omni-tiny"], "decoders": {}}, "decoders of qwen3_moe_omni lack 'drawing'"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_composed(why):
    hf, says = REFUSED[why]
    with pytest.raises(ValueError, match=says) as error:
        find_model(hf)
    assert "\n" not in str(error.value)


def test_a_module_that_lacks_a_package(monkeypatch):
    def lacking(name):
        raise ModuleNotFoundError("No module named 'lib'", name="lib")

    monkeypatch.setattr("ftrain.models.omni.importlib", SimpleNamespace(import_module=lacking))
    with pytest.raises(ValueError, match="type 'qwen3' needs lib, which is not installed"):
        find_model(omni())


INPUTS = {
    "too many tokens": ({"input_ids": ids([7] * 5), "image": [picture(2, 2)]}, "image: 4 outputs .* for 5 placeholder"),
    "too few": ({"input_ids": ids([7] * 3), "image": [picture(2, 2)]}, "image: 4 outputs .* for 3 placeholder"),
    "tokens alone": ({"input_ids": ids([7] * 3)}, "the text has 3 placeholder tokens of image, but there is no input"),
    "input alone": ({"input_ids": ids(1), "image": [picture(1, 1)]}, "image: 1 outputs .* for 0 placeholder tokens"),
    "hidden tokens": (
        {"input_ids": ids(1, [7] * 4), "attention_mask": ids([1] * 4, 0), "image": [picture(2, 2)]}, "4 outp.* for 3"),
    "another's input": (
        {"input_ids": ids(1), "sound": []}, "have 'sound', but .* the encoders image and the decoders drawn"),
    "fields of an encoder": ({"input_ids": ids(1), "image.patches": ids(1)}, "have 'image.patches'"),
    "a decoder, not its field": ({"input_ids": ids(1), "drawn": ids(1)}, "have 'drawn'"),
    "a field that it has not": ({"input_ids": ids(1), "drawn.codes": ids(1)}, "codes of drawn: they are labels"),
    "targets of another shape": (
        {"input_ids": ids(1), "drawn.labels": ids(1, 2)}, r"drawn.labels are \[1, 2\]: they must be \[1, 1\]"),
    "an image that is none": ({"input_ids": ids(7), "image": [torch.zeros(3, 2)]}, r"an image of shape \[3, 2, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("why", INPUTS)
def test_inputs_that_do_not_fit(why):
    inputs, says = INPUTS[why]
    with pytest.raises(ValueError, match=says):
        find_model(omni("qwen3", IMAGE, HEAD)).prepare(inputs)


# --- The recipes


def test_parameters_of_the_recipes():
    """The parts' own, and the projectors between them."""
    llama = find_model("Llama-3.1-8B-Omni")
    with torch.device("meta"):
        ear = WhisperEncoder(WhisperConfig(**llama.hf["encoders"]["audio"]["config"]))
    ears = sum(p.numel() for p in ear.parameters())
    total, _ = param_counts(llama.specs)
    assert total == 8_030_261_248 + ears + (5 * 1280 + 1) * 4096 + (4096 + 1) * 4096
    frozen = sum(spec.numel for spec in llama.specs.values() if not spec.lr)
    assert frozen == ears

    moe = find_model("Qwen3-30B-A3B-Omni")
    assert sum(s.numel for n, s in moe.specs.items() if n.startswith(("model.", "lm_head."))) == 30_532_122_624
    assert not any(n.startswith("projectors.drawn.") for n in moe.specs)
    towers = find_model("Qwen2.5-Omni-7B").specs
    for name, theirs in (("image", "visual"), ("audio", "audio_tower")):
        ours = sum(s.numel for n, s in moe.specs.items() if n.startswith(f"encoders.{name}."))
        assert ours == sum(s.numel for n, s in towers.items() if f".{theirs}." in f".{n}")


def test_what_is_drawn_is_the_target_of_what_stands_before_it():
    model = find_model("qwen3-moe-omni-tiny")
    row = {"input_ids": ids(1, 2, [9] * 3, 5), "labels": ids(2, [9] * 3, 5, IGNORE)}
    row["drawn"] = [torch.tensor([30, 31, 32])]
    batch = model.prepare(row)
    assert batch["drawing.labels"].tolist() == [[IGNORE, 30, 31, 32, IGNORE, IGNORE]]
    assert batch["labels"].tolist() == [[2, IGNORE, IGNORE, IGNORE, 5, IGNORE]]
    given = model.prepare({**row, "drawing.labels": torch.full((1, 6), 3)})
    assert (given["drawing.labels"] == 3).all() and torch.equal(given["labels"], row["labels"])
    assert (model.prepare({"input_ids": ids(1, 2)})["drawing.labels"] == IGNORE).all()
    with pytest.raises(ValueError, match="an image that is drawn has no token before it"):
        model.prepare({"input_ids": ids([9] * 3, 5), "drawn": row["drawn"]})
    names = {name for example in qwen3_moe_omni.examples(model.cfg, seeded()) for name in example}
    assert names == {"input_ids", "image", "audio", "drawn"}


def test_examples_have_every_kind_of_sample():
    shared = find_model(NAMED["one placeholder"]).examples(seeded())
    assert [{*example} - {"input_ids"} for example in shared] == [set(), {"image"}, {"other"}, {"image", "other"}]
    assert [len(find_model(hf).examples(seeded())) for hf in (omni(), omni("qwen3", IMAGE))] == [1, 2]
