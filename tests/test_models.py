"""The families against their transformers twins: logits and every gradient, padding, packing, presets, errors.

Every family that is found is held to its twin at its first preset, shrunk; those of FAMILIES at any config.
"""

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from twins import first_preset, gradients, our_names, twin, weights

import ftrain
from ftrain.equivalence import shrink
from ftrain.model import FAMILY, families, find_model, param_counts, presets
from ftrain.ops import fill_batch, plain
from ftrain.specs import stored

torch.set_num_threads(1)
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")  # those that `configs` and `tiny` know
# Families of more than text have files of tests of their own, with their own twins.
OF_TEXT = [family for family, module in families().items() if not hasattr(module, "examples")]
MAX_POSITIONS = 16  # tests run shorter and longer sequences than this


def close(ours, theirs, floor=0.0, tolerance=2e-5):
    """Equal to fp32 round-off, relative to the largest element (or to `floor`, where that is larger)."""
    scale = max(theirs.abs().max().item(), floor)
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance * scale, f"off by {worst} at a scale of {scale}"


@st.composite
def ropes(draw, head_dim):
    """Any rope variant, in transformers-4 or transformers-5 style: -> the config's keys."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"]))
    factor = st.sampled_from([1.0, 2.0, 4.0])
    original = st.sampled_from([{}, {"original_max_position_embeddings": 8}])
    options = {}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        options["factor"] = draw(factor)
    if kind == "yarn":
        options |= draw(original)
        extra = {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3}
        chosen = draw(st.sets(st.sampled_from([*extra, "attention_factor"])))
        options |= {key: extra.get(key, 0.8) for key in chosen}
    if kind == "llama3":
        options |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | draw(original)
    if kind == "longrope":
        factors = st.lists(st.sampled_from([1.0, 1.5, 3.0]), min_size=head_dim // 2, max_size=head_dim // 2)
        options |= {"short_factor": draw(factors), "long_factor": draw(factors)} | draw(original)
        options |= draw(st.sampled_from([{}, {"factor": 2.0}, {"attention_factor": 1.2}]))
    if kind == "proportional":
        options |= {"partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])), "factor": draw(factor)}
    theta = draw(st.sampled_from([100.0, 10_000.0]))
    top = draw(st.sampled_from([{}, {"original_max_position_embeddings": 5}]))
    if draw(st.booleans()):
        scaling = {"rope_type": kind, **options} if kind != "default" else None
        return top | {"rope_theta": theta, "rope_scaling": scaling}
    return top | {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


@st.composite
def configs(draw, family):
    kv_heads, group, head_dim = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])), 8
    heads, layers = kv_heads * group, draw(st.integers(1, 3))
    hf = {
        "model_type": family,
        "vocab_size": draw(st.sampled_from([11, 32])),
        "hidden_size": 8 * heads,
        "intermediate_size": draw(st.sampled_from([5, 16])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([None, 3])),
    }
    if family != "qwen2" and draw(st.booleans()):
        hf["head_dim"] = head_dim = 6
    elif family == "qwen3":
        hf["head_dim"] = head_dim
    if family != "qwen2":
        hf["attention_bias"] = draw(st.booleans())
    if family == "llama":
        hf["mlp_bias"] = draw(st.booleans())
    else:
        hf["use_sliding_window"] = draw(st.booleans())
        hf["sliding_window"] = draw(st.sampled_from([1, 3]))
    if family in ("qwen2", "qwen3"):
        hf["max_window_layers"] = draw(st.integers(0, layers))
        if hf["use_sliding_window"] and draw(st.booleans()):
            kinds = st.sampled_from(["full_attention", "sliding_attention"])
            hf["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    if family == "qwen3_moe":
        hf["num_experts"] = draw(st.sampled_from([2, 4]))
        hf["num_experts_per_tok"] = draw(st.integers(1, 2))
        hf["moe_intermediate_size"] = draw(st.sampled_from([3, 8]))
        hf["norm_topk_prob"] = draw(st.booleans())
        hf["decoder_sparse_step"] = draw(st.integers(1, 2))
        hf["mlp_only_layers"] = sorted(draw(st.sets(st.integers(0, layers - 1))))
    return hf | draw(ropes(head_dim))


@st.composite
def batches(draw, vocab):
    B, S = draw(st.integers(1, 2)), draw(st.integers(1, 24))
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=B * S, max_size=B * S))
    batch = {"input_ids": torch.tensor(ids).view(B, S)}
    if draw(st.booleans()):
        pads = torch.tensor(draw(st.lists(st.integers(0, S - 1), min_size=B, max_size=B)))
        left, at = draw(st.booleans()), torch.arange(S)
        batch["attention_mask"] = (at >= pads[:, None] if left else at < S - pads[:, None]).long()
    return batch


def compare(model, theirs, batch):
    """Logits where a token stands, and the gradient of a random function of them in every parameter."""
    params = weights(theirs)
    ours = ftrain.logits(model, params, batch)
    valid = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    expected = theirs(**batch).logits
    close(ours[valid], expected[valid])
    cotangent = torch.randn(ours[valid].shape, generator=torch.Generator().manual_seed(1))
    theirs.zero_grad()
    (expected[valid] * cotangent).sum().backward()
    (ours[valid] * cotangent).sum().backward()
    wanted = gradients(theirs)
    largest = max(g.abs().max().item() for g in wanted.values())
    assert params.keys() == model.specs.keys()
    for name, p in params.items():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        close(got, wanted.get(name, torch.zeros_like(p)), floor=5e-2 * largest)


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("family", OF_TEXT)
def test_every_family_at_its_first_preset_equals_transformers(family, padded):
    theirs = twin(shrink(first_preset(family)))
    batch = {"input_ids": torch.randint(131, (2, 12), generator=torch.Generator().manual_seed(0))}
    if padded:
        batch["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        batch["attention_mask"][1, slice(0, 4) if padded == "left" else slice(8, 12)] = 0
    compare(find_model(shrink(first_preset(family))), theirs, batch)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_logits_and_gradients_equal_transformers(family, data):
    hf = data.draw(configs(family))
    batch = data.draw(batches(hf["vocab_size"]))
    theirs = twin(hf, seed=data.draw(st.integers(0, 99)))
    # the config as a file would hold it, or as transformers' object
    compare(find_model(hf if data.draw(st.booleans()) else theirs.config), theirs, batch)


@pytest.mark.parametrize("style", ["segment_ids", "position_ids"])
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_packed_documents_equal_the_documents_alone(family, style, data):
    hf = data.draw(configs(family).filter(lambda hf: not _by_length(hf)))
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    model, theirs = find_model(hf), twin(hf)
    params = weights(theirs)
    documents = [torch.randint(hf["vocab_size"], (1, n)) for n in lengths]
    batch = {
        "input_ids": torch.cat(documents, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    if style == "segment_ids":
        batch["segment_ids"] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    alone = [ftrain.logits(model, params, {"input_ids": d}) for d in documents]
    close(ftrain.logits(model, params, batch), torch.cat(alone, 1))
    close(ftrain.logits(model, params, batch), torch.cat([theirs(d).logits for d in documents], 1))


def _by_length(hf):
    return find_model(hf).cfg.rope.by_length


def tiny(family, **other):
    hf = {
        "model_type": family, "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "qwen3_moe":
        hf |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    return hf | other


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_by_length_takes_the_whole_batch_from_outside(kind):
    """A rank that holds the first part of a long sequence needs the angles of the whole."""
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0, 1.0, 3.0, 1.5]} if kind == "longrope" else {}
    model = find_model(tiny("llama", max_position_embeddings=4, rope_scaling={"type": kind, "factor": 2.0, **lists}))
    params = weights(twin(model.hf))
    ids = torch.arange(12)[None]
    whole = ftrain.logits(model, params, {"input_ids": ids})[:, :4]
    part = {"input_ids": ids[:, :4]}
    close(ftrain.logits(model, params, part | {"max_position": torch.tensor(11)}), whole)
    assert (ftrain.logits(model, params, part) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_router_sums_give_transformers_balance_loss(masked):
    hf = tiny("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    model, theirs = find_model(hf), twin(hf)
    batch = {"input_ids": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    if masked:
        batch["attention_mask"] = mask
    gates = theirs(**batch, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(gates, 4, 2, batch.get("attention_mask"))
    params = weights(theirs)
    router = model.forward(params, fill_batch(batch), plain()).router
    L, T = 2, 14 if masked else 18
    assert router.counts.shape == router.prob.shape == (L, 4) and router.z.shape == (L,)
    assert not router.counts.requires_grad and router.counts.sum().item() == L * T * 2
    ours = 4 * (router.counts.sum(0) / (L * T) * router.prob.sum(0) / (L * T)).sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    valid = batch.get("attention_mask", torch.ones_like(mask)).bool().flatten()
    z = torch.stack([g[valid].logsumexp(-1).square().sum() for g in gates])
    torch.testing.assert_close(router.z, z, rtol=1e-5, atol=0)
    # and its gradient reaches the routers
    name = "model.layers.2.mlp.gate.weight"
    expected.backward()
    close(torch.autograd.grad(ours, params[name])[0], gradients(theirs)[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_stays_bf16_and_near_transformers(family):
    hf = tiny(family)
    theirs = twin(hf, dtype=torch.bfloat16)
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    ours = ftrain.logits(find_model(hf), weights(theirs), ids)
    assert ours.dtype == torch.bfloat16
    close(ours.float(), theirs(**ids).logits.float(), tolerance=0.04)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_one_graph(family):
    hf = tiny(family, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    hf |= {} if family == "llama" else {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    model, params = find_model(hf), weights(twin(hf))
    compiled = torch.compile(lambda p, b: model.forward(p, b, plain()), fullgraph=True, backend="aot_eager")
    batch = fill_batch({"input_ids": torch.arange(20).view(2, 10)})
    ours, eager = compiled(params, batch), model.forward(params, batch, plain())
    close(ours.hidden, eager.hidden)
    grads = [torch.autograd.grad(out.hidden.square().sum(), list(params.values()), allow_unused=True)
             for out in (ours, eager)]  # fmt: skip
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


# What the model cards say, to the parameter (tied tables counted once); a preset may do without.
PUBLISHED = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2-72B": 72_706_203_648,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "SmolLM2-135M": 134_515_008,
    "qwen3-moe-tiny": 8_137_216,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_its_published_size(name):
    assert param_counts(find_model(name).specs)[0] == PUBLISHED[name]


def test_active_parameters():
    # "A3B" and "A22B" count the embedding table, which one token only looks up
    for name, billions in {"Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22.2}.items():
        model = find_model(name)
        table = model.specs["model.embed_tokens.weight"].numel
        assert (param_counts(model.specs)[1] + table) / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("name", [name for family in OF_TEXT for name in families()[family].PRESETS])
def test_transformers_builds_the_same_tensors_from_a_preset(name):
    model = find_model(name)
    config = transformers.AutoConfig.for_model(**model.hf)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    expected = {n: tuple(t.shape) for n, t in our_names(dict(theirs.named_parameters())).items()}
    assert {n: spec.shape for n, spec in model.specs.items()} == expected
    assert find_model(config).specs.keys() == model.specs.keys() and find_model(config).cfg == model.cfg


# The fields of transformers' class defaults that are those of a published model.
AS_DEFAULT = {
    "Qwen3-30B-A3B": "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads "
    "num_key_value_heads num_experts num_experts_per_tok decoder_sparse_step router_aux_loss_coef rms_norm_eps "
    "initializer_range hidden_act attention_bias use_sliding_window tie_word_embeddings mlp_only_layers",
    "Qwen3-8B": "vocab_size hidden_size num_attention_heads head_dim rms_norm_eps initializer_range hidden_act "
    "attention_bias use_sliding_window tie_word_embeddings",
    "Qwen2-7B": "rms_norm_eps initializer_range hidden_act use_sliding_window tie_word_embeddings max_window_layers",
    "Llama-3.1-8B": "hidden_size num_hidden_layers num_attention_heads initializer_range hidden_act attention_bias "
    "mlp_bias tie_word_embeddings",
}


@pytest.mark.parametrize("name", AS_DEFAULT)
def test_preset_fields_are_transformers_defaults(name):
    hf = presets()[name]
    defaults = transformers.AutoConfig.for_model(hf["model_type"])
    assert {key: hf[key] for key in AS_DEFAULT[name].split()} == {
        key: getattr(defaults, key) for key in AS_DEFAULT[name].split()
    }


def test_left_out_fields_take_transformers_defaults():
    for family in FAMILIES:
        hf = tiny(family, num_attention_heads=32, hidden_size=256)
        for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "norm_topk_prob"):
            hf.pop(key, None)
        assert find_model(hf).cfg == find_model(transformers.AutoConfig.for_model(**hf)).cfg


def test_the_checkpoint_names_of_experts(tmp_path):
    """`stored(specs)` is what transformers itself writes."""
    from safetensors import safe_open

    hf = tiny("qwen3_moe", tie_word_embeddings=True)
    twin(hf).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    model = find_model(tmp_path)
    assert stored(model.specs) == written
    spec = model.specs["model.layers.0.mlp.experts.gate_proj.weight"]
    assert spec.experts and spec.active == 0.5 and spec.shape == (4, 8, 16)


def test_decay_on_matrices_only():
    for family in FAMILIES:
        specs = find_model(tiny(family, attention_bias=True, mlp_bias=True)).specs
        assert all(spec.decay == (len(spec.shape) > 1) for spec in specs.values())
        assert all(("norm" in name or name.endswith("bias")) != spec.decay for name, spec in specs.items())


ODD = [None, True, 0, -1, 3, 1.5, float("nan"), "x", [], [-1], ["x"], {}, {"a": {}}, {"rope_type": "yarn"}]


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_malformed_config_is_a_value_error(family, data):
    hf = data.draw(configs(family))
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    key = data.draw(st.sampled_from([*hf, *rope, "layer_types", "mlp_only_layers", "original_max_position_embeddings"]))
    target = rope if key in rope else hf
    if data.draw(st.booleans()) and key in target:
        del target[key]
    else:
        target[key] = data.draw(st.sampled_from(ODD))
    try:
        model = find_model(hf)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(min(spec.shape) > 0 for spec in model.specs.values())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 .* a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 .* a divisor of num_attention_heads = 2"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2}}, "rope_type = 'su' .* default, linear, .*llama3"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' .* 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 .* 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' .* true or false"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 .* at most num_experts = 4"),
        ({"model_type": "gpt2"}, f"'gpt2' is not supported: supported are {', '.join(sorted(families()))}"),
    ],
)
def test_config_errors_name_key_value_and_what_is_valid(change, words):
    with pytest.raises(ValueError, match=words):
        find_model(tiny("qwen3_moe", **change))


@pytest.mark.parametrize("lacking", FAMILY)
def test_a_family_that_lacks_a_name_says_which(lacking, monkeypatch):
    from ftrain.models import llama

    misspelt = getattr(llama, lacking)
    monkeypatch.delattr(llama, lacking)
    monkeypatch.setattr(llama, f"{lacking}_", misspelt, raising=False)
    for which in (tiny("llama"), "Llama-3.1-8B"):
        with pytest.raises(ValueError, match=rf"models/llama\.py lacks {lacking}: a family's module has PRESETS, "):
            find_model(which)


def test_the_name_of_a_module_that_is_no_family():
    with pytest.raises(ValueError, match=r"models/rope\.py lacks PRESETS, config, specs, forward: a family's module"):
        find_model(tiny("rope"))


def test_finding_a_model(tmp_path):
    with pytest.raises(ValueError, match="'Qwen3-8b' is neither .* did you mean Qwen3-8B"):
        find_model("Qwen3-8b")
    with pytest.raises(ValueError, match="presets are .*qwen3-moe-tiny"):
        find_model("zzz")
    with pytest.raises(FileNotFoundError, match="config.json"):
        find_model(tmp_path)
    path = tmp_path / "config.json"
    for text, words in [("{", "not valid JSON"), ("[]", "must hold an object"), ("{}", "model_type None")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as error:
            find_model(str(tmp_path))
        assert str(path) in str(error.value)
    path.write_text(json.dumps(tiny("qwen2")))
    assert find_model(tmp_path).family == "qwen2"
