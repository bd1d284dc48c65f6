"""Janus (arXiv 2410.13848, 2501.17811): images seen by one encoder, and drawn as discrete codes with another, on llama.

Checked against transformers' `JanusForConditionalGeneration`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..items import Item, seat
from ..loss import IGNORE
from ..ops import Ops, Output, fill_batch, layer_params, plain
from ..specs import ParamSpec
from . import decoder, fields, llama, vq
from .decoder import DecoderConfig
from .decoders import codes as head
from .drawing import draw, next_codes
from .encoders import codes, siglip

AT, HEAD, VQ = "model", "model.generation_head", "model.vqmodel"  # where the parts' parameters are


@dataclass(frozen=True, kw_only=True)
class JanusConfig(DecoderConfig):
    visual: siglip.SiglipConfig
    codes: codes.CodesConfig
    image: head.CodesConfig
    vq: vq.VqConfig
    image_token: int  # the placeholder of images seen and drawn
    bos: int | None

    @property
    def image_tokens(self) -> int:
        """Placeholders of one image, seen or drawn."""
        return self.visual.patches


def config(hf: Mapping) -> JanusConfig:
    text = fields.read(hf, "text_config")
    if fields.read(text, "model_type", "llama") != "llama":
        fields.refuse("text_config.model_type", text["model_type"], "'llama'")
    base = vars(llama.config(text))
    # transformers 4 left it to the text's config, 5 writes it for the whole.
    tied = fields.flag(hf, "tie_word_embeddings", base["tied"])
    seen, drawn = fields.read(hf, "vision_config", {}), fields.read(hf, "vq_config", {})
    cfg = JanusConfig(
        **{**base, "tied": tied, "prefix": "model.language_model"},
        visual=siglip.config(seen),
        codes=codes.config(drawn),
        image=head.config(drawn),
        vq=vq.vq_config(drawn),
        image_token=fields.size(hf, "image_token_id", 100581),
        bos=text.get("bos_token_id"),
    )
    widths = {
        "vision_config.projection_dim": cfg.visual.width,
        "vq_config.projection_dim": cfg.codes.width,
        "vq_config.image_token_embed_dim": fields.size(drawn, "image_token_embed_dim", 2048),
    }
    for key, width in widths.items():
        if width != cfg.hidden:
            fields.refuse(key, width, f"text_config.hidden_size = {cfg.hidden}")
    if cfg.image_token >= cfg.vocab:
        fields.refuse("image_token_id", cfg.image_token, f"below text_config.vocab_size = {cfg.vocab}")
    return cfg


def specs(cfg: JanusConfig) -> dict[str, ParamSpec]:
    return {
        **siglip.specs(cfg.visual, AT),
        **codes.specs(cfg.codes, AT),
        **head.specs(cfg.image, HEAD, cfg.hidden),
        **vq.specs(cfg.vq, VQ),
        **decoder.specs(cfg),
    }


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: JanusConfig, ops: Ops) -> Output:
    seen = siglip.encode(p, AT, layer_params(batch, "visual"), cfg.visual, ops)
    drawn = codes.encode(p, AT, layer_params(batch, "codes"), cfg.codes, ops)
    embeddings = ops.place(seen, batch, "visual") + ops.place(drawn, batch, "codes")
    placed = (batch["visual.source"] >= 0) | (batch["codes.source"] >= 0)
    out = decoder.forward(p, {**batch, "embeddings": embeddings, "placed": placed}, cfg, ops)
    _, loss = head.decode(p, HEAD, out.hidden, layer_params(batch, "image"), cfg.image, ops)
    return out._replace(losses={"image": loss})


def blanks(cfg: JanusConfig) -> dict[str, Item]:
    return {"visual": siglip.blank(cfg.visual), "codes": codes.blank(cfg.codes)}


def targets(batch: Mapping[str, Tensor], cfg: JanusConfig) -> dict[str, Tensor]:
    return {"loss": (batch["labels"] != IGNORE).sum(), "image": (batch["image.labels"] != IGNORE).sum()}


def prepare(inputs: Mapping[str, Tensor], cfg: JanusConfig) -> dict:
    """The processor's output (input_ids, attention_mask, pixel_values [images seen, C, H, W]), and labels.

    Of images to be drawn, which the processor has no inputs for: generated_codes [images drawn, n] (`image_codes`), and
    image_generated [images], for each image in the order of their placeholder tokens whether it is drawn; it may be
    left out where all or none are. An image has n placeholder tokens in a run, and one token at least before them.
    -> besides the text's and "items", image.labels [B, S]: the code that comes next, or -100.
    Raises ValueError where images and placeholder tokens do not match.
    """
    batch = fill_batch(inputs)
    batch = {n: batch[n] for n in ("input_ids", "labels", "segment_ids", "position_ids") if batch.get(n) is not None}
    ids, n = batch["input_ids"], cfg.image_tokens
    at = ((ids == cfg.image_token) & (batch["segment_ids"] >= 0)).flatten().nonzero()[:, 0]
    if len(at) % n:
        raise ValueError(f"{len(at)} placeholder tokens of images: an image has {n} of them")
    at = at.view(-1, n)
    if ((at[:, -1] - at[:, 0] != n - 1) | (at[:, 0] // ids.shape[1] != at[:, -1] // ids.shape[1])).any():
        raise ValueError(f"an image's {n} placeholder tokens are not in one run")
    found = inputs.get("generated_codes")
    found = torch.zeros(0, n, dtype=torch.long) if found is None else torch.as_tensor(found).long()
    if found.ndim != 2 or found.shape[1] != n:
        raise ValueError(f"generated_codes are {list(found.shape)}: they must be [images, {n}]")
    pixels = inputs.get("pixel_values")
    drawn = _drawn(inputs.get("image_generated"), len(at), len(found), pixels is not None)
    seen = [] if pixels is None else siglip.from_processor(pixels, cfg.visual)
    items = {"visual": seat(seen, at[~drawn].flatten(), "pixel_values")}
    if len(found) != drawn.sum():
        raise ValueError(f"generated_codes of {len(found)} images, for {int(drawn.sum())} that are drawn")
    items["codes"] = [
        item._replace(slots=tokens)
        for of_image, tokens in zip(found, at[drawn], strict=True)
        for item in codes.items(of_image, cfg.codes)
    ]
    batch["image.labels"] = next_codes(batch["segment_ids"], items["codes"])
    if "labels" in batch:  # the next token of these is no token of text
        batch["labels"] = batch["labels"].masked_fill(batch["image.labels"] != IGNORE, IGNORE)
    return {**batch, "items": items}


def _drawn(given: Tensor | None, images: int, drawn: int, any_seen: bool) -> Tensor:
    """Which images are drawn, bool [images]."""
    if given is None:
        if any_seen and drawn:
            raise ValueError("image_generated [images] must say which images are drawn, where only some are")
        return torch.full((images,), drawn > 0)
    given = torch.as_tensor(given).bool().flatten()
    if len(given) != images:
        raise ValueError(f"image_generated says it of {len(given)} images: the tokens have {images}")
    return given


def image_codes(p: Mapping[str, Tensor], pixel_values: Tensor, cfg: JanusConfig, cosine: bool = True) -> Tensor:
    """Images as the processor gives them [images, C, H, W] -> codes [images, n] to learn to draw (`vq.encode`)."""
    with torch.no_grad():
        return vq.encode(p, VQ, pixel_values.to(p[f"{VQ}.quant_conv.weight"].dtype), cfg.vq, cosine)


def image_pixels(p: Mapping[str, Tensor], drawn: Tensor, cfg: JanusConfig) -> Tensor:
    """Codes [images, n] -> images [images, C, H, W], normalised as the processor's are."""
    with torch.no_grad():
        return vq.decode(p, VQ, drawn, cfg.vq)


def generate_image(
    p: Mapping[str, Tensor], inputs: Mapping[str, Tensor], cfg: JanusConfig, *,
    guidance: float = 5.0, temperature: float = 1.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """-> the codes [B, n] of an image for each prompt, on one device (`draw`).

    inputs: of the processor in its `generation_mode="image"`: input_ids and attention_mask (padding left), each row
    ending with the token that begins an image. guidance: 1 is none. temperature: 0 takes the likeliest code.
    Raises ValueError where guidance wants a padding token and the text's config has none.
    """
    prompt = fill_batch(inputs)
    ids, without = prompt["input_ids"], None
    if guidance != 1:
        if cfg.padding is None:
            raise ValueError("guidance needs a prompt with nothing in it: pad_token_id is missing in text_config")
        kept = ids == ids[:, -1:]
        without = torch.where(kept if cfg.bos is None else kept | (ids == cfg.bos), ids, cfg.padding)

    def embed(drawn: Tensor) -> Tensor:
        return codes.encode(p, AT, {"codes": drawn}, cfg.codes, plain())

    def logits(hidden: Tensor) -> Tensor:
        return head.logits(p, HEAD, hidden, cfg.image, plain())

    how = {"guidance": guidance, "temperature": temperature, "seed": seed}
    return draw(p, cfg, prompt, without, cfg.image_tokens, embed, logits, **how)


def examples(cfg: JanusConfig, generator: torch.Generator) -> list[dict]:
    """Text; an image seen; two of them; an image drawn; one seen and one drawn after it."""
    n = cfg.image_tokens

    def text() -> Tensor:
        length = int(torch.randint(2, 7, (), generator=generator))
        ids = torch.randint(cfg.vocab - 1, (length,), generator=generator)
        return ids + (ids >= cfg.image_token)  # any but the placeholder

    def row(images: int) -> dict:
        pieces = [text()]
        for _ in range(images):
            pieces += [torch.full((n,), cfg.image_token), text()]
        return {"input_ids": torch.cat(pieces)[None]}

    def seen(images: int) -> dict:
        return {"pixel_values": torch.stack([siglip.example(cfg.visual, generator) for _ in range(images)])}

    def drawn() -> dict:
        return {"generated_codes": codes.example(cfg.codes, generator, n)[None]}

    both = {"image_generated": torch.tensor([False, True])}
    return [row(0), row(1) | seen(1), row(2) | seen(2), row(1) | drawn(), row(2) | seen(1) | drawn() | both]


def _janus(hidden: int, inner: int, layers: int, heads: int, image_token: int, **text) -> dict:
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "image_token_id": image_token,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 102400,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "hidden_act": "silu",
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "pad_token_id": 100002,
            "tie_word_embeddings": False,
            **text,
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "mlp_ratio": 4.0,
            "image_size": 384,
            "patch_size": 16,
            "num_image_tokens": 576,
            "projection_dim": hidden,
            "depth": 2,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "num_embeddings": 16384,
            "embed_dim": 8,
            "latent_channels": 256,
            "base_channels": 128,
            "channel_multiplier": [1, 1, 2, 2, 4],
            "num_res_blocks": 2,
            "num_patches": 24,
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
            "num_hidden_layers": 2,
        },
    }


def _tiny() -> dict:
    small = {"vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 512}
    hf = _janus(32, 48, 2, 4, 299, **small, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    eye = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2.0}
    eye |= {"image_size": 8, "patch_size": 2, "num_image_tokens": 16}
    hand = {"num_embeddings": 37, "embed_dim": 6, "latent_channels": 10, "base_channels": 32, "num_patches": 4}
    hand |= {"channel_multiplier": [1, 1], "num_res_blocks": 1}
    return hf | {"vision_config": hf["vision_config"] | eye, "vq_config": hf["vq_config"] | hand}


# Sizes after the published checkpoints and transformers' defaults.
PRESETS = {
    "janus-tiny": _tiny(),
    "Janus-Pro-1B": _janus(2048, 5632, 24, 16, 100581),
    "Janus-Pro-7B": _janus(4096, 11008, 30, 32, 100594),
}
