"""Processors of transformers made from parts, with a tokenizer of single bytes: nothing is downloaded."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ftrain.model import presets

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
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


OF_SOUNDS = OF_IMAGES.replace(
    "{% elif c['type'] == 'video' %}", "{% elif c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% elif c['type'] == 'video' %}"
)


def bytes_tokenizer(special: dict[str, int], **more) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)} | special
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **more)


def write_tokenizer(folder: Path, template: str | None = OF_TEXT, special: dict[str, int] = SPECIAL, **more) -> Path:
    bytes_tokenizer(special, chat_template=template, **more).save_pretrained(folder)
    return folder


def write_model(folder: Path, preset: str = "qwen2-vl-tiny") -> Path:
    """A directory of one of Qwen's multimodal models: config, tokenizer, what sees, and what hears if it does."""
    hf = presets()[preset]
    inner = hf.get("thinker_config", hf)
    ids = {key.replace("_index", "_id").removesuffix("_token_id"): i for key, i in inner.items() if "_token_i" in key}
    names = {
        "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>",
        "video": "<|video_pad|>", "audio": "<|AUDIO|>", "audio_start": "<|audio_bos|>", "audio_end": "<|audio_eos|>",
    }  # fmt: skip
    special = SPECIAL | {token: ids[name] for name, token in names.items() if ids.get(name) is not None}
    vision, hears = inner["vision_config"], "audio_config" in inner
    extra = {f"{kind}_token": names[kind] for kind in ("image", "video", "audio")}
    extra |= {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    extra |= {"vision_bos_token": names["vision_start"], "vision_eos_token": names["vision_end"]}
    more = {"extra_special_tokens": extra} if hears else {}
    write_tokenizer(folder, OF_SOUNDS if hears else OF_IMAGES, special, **more)
    sees = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"], merge_size=vision["spatial_merge_size"], min_pixels=64, max_pixels=64 * 12,
        temporal_patch_size=vision["temporal_patch_size"],
    )  # fmt: skip
    kept = sees.to_dict()
    if hears:  # published directories have both in one file
        kept |= WhisperFeatureExtractor(feature_size=inner["audio_config"]["num_mel_bins"]).to_dict()
        kept["image_processor_type"] = "Qwen2VLImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(kept, default=str))
    (folder / "config.json").write_text(json.dumps(hf))
    return folder
