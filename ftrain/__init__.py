"""ftrain: a functional trainer for large models.

Nothing here imports torch until it is used: `python -m ftrain --help` stays fast.
"""

__version__ = "0.1.0"


def load_pretrained(directory):
    """Load a Hugging Face directory: -> (model, params), on one device, in the checkpoint's own dtype.

    `params` maps Hugging Face's names to tensors (experts stacked along dimension 0).
    Raises FileNotFoundError for what is no directory, ValueError naming missing, extra or mis-shaped tensors.
    """
    from .pretrained import load_pretrained

    return load_pretrained(directory)


def logits(model, params, batch):
    """Logits [B, S, V] of `batch`, a dict with Hugging Face's names (`input_ids`, `attention_mask`,
    `position_ids`, ...), on one device. Differentiable in `params`."""
    from .model import logits

    return logits(model, params, batch)
