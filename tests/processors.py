"""Processors of transformers made from parts, with a tokenizer of single bytes: nothing is downloaded."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ftrain.model import presets

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
OF_QWEN2_VL = {"<|vision_start|>": 508, "<|vision_end|>": 509, "<|image_pad|>": 510, "<|video_pad|>": 511}
# ChatML, as Qwen's models have it.
OF_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OF_IMAGES = OF_TEXT.replace(
    "{{ m['content'] }}",
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}",
)


def bytes_tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)} | special
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def write_tokenizer(folder: Path, template: str | None = OF_TEXT, special: dict[str, int] = SPECIAL) -> Path:
    tokenizer = bytes_tokenizer(special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_qwen2_vl(folder: Path) -> Path:
    """A directory of Qwen2-VL's kind: config, tokenizer and image processor."""
    write_tokenizer(folder, OF_IMAGES, SPECIAL | OF_QWEN2_VL)
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 12).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(presets()["qwen2-vl-tiny"]))
    return folder
