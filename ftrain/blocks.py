"""What a layer's block may do. What it may not is an error that names the layer, and the line where one is to blame.

A block runs several times where a reader sees one: it is looked at and captured, and its backward may compute it again.
So it is to be a function: of its arguments and of what it takes from around itself.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound
from torch.overrides import TorchFunctionMode


def held(
    block: Callable, layer: int, key: str, names: Sequence[str], read: set[str]
) -> Callable[..., tuple[Tensor, Any]]:  # fmt: skip
    """`block(parameters, x, layer)` as a function of x and the layer's parameters, in the order of `names`.

    read: the names of parameters, without the layer's, that a block has read: what this one reads is added.
    Raises ValueError where it changes in place what its backward needs, or puts a hook on what is not its own;
    TypeError where it does not return two.
    """

    def run(x: Tensor, *params: Tensor) -> tuple[Tensor, Any]:
        given = _Reads({name[len(key) + 1 :]: t for name, t in zip(names, params, strict=True)}, read)
        with naming_changes(key), _HooksOnItsOwn(key):
            out = block(given, x, layer)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"the block of {key} must return (x, y), not {type(out).__name__}; y may be None")
        return out

    return run


class _Reads(Mapping):
    """A layer's parameters, which notes what is read."""

    def __init__(self, of: Mapping[str, Tensor], read: set[str]):
        self.of, self.read = of, read

    def __getitem__(self, name: str) -> Tensor:
        found = self.of[name]
        self.read.add(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)

    def __contains__(self, name: object) -> bool:
        return name in self.of  # to ask is not to read


class _HooksOnItsOwn(TorchFunctionMode):
    """Refuses a hook on a tensor from outside: it would be put on once more whenever the block runs."""

    def __init__(self, key: str):
        super().__init__()
        self.key = key
        self.first = torch.autograd._get_sequence_nr()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            made = args[0].grad_fn
            if made is None or made._sequence_nr() < self.first:
                raise ValueError(
                    f"{self.key}: a hook on a tensor that the layer did not make would be put on as often as the layer "
                    "runs, which may be more than once: use an autograd.Function"
                )
        return function(*args, **(kwargs or {}))


@contextmanager
def naming_changes(key: str) -> Iterator[None]:
    """Turns torch's complaints about changes in place into a ValueError that says where."""
    try:
        yield
    except RuntimeError as error:
        if "has been mutated" in str(error):
            why = "its result is changed in place, but the backward needs it as it was"
        elif "a leaf Variable that requires grad" in str(error):
            why = "an input or a parameter of the layer is changed in place"
        else:
            raise
        raise ValueError(
            f"{key}: {line_of(error)}: {why}: use operators without a trailing _; F.rms_norm has such inside, "
            "F.layer_norm has none"
        ) from error


@contextmanager
def naming_values() -> Iterator[None]:
    """Turns torch's complaints about what a capture does not know into a ValueError that says where."""
    try:
        yield
    except (GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound, AssertionError) as error:
        if isinstance(error, GuardOnDataDependentSymNode):
            why = "Python asks for a tensor's values, which a step that is captured does not know: use torch.where"
        elif isinstance(error, PendingUnbackedSymbolNotFound) or "Mixing fake modes" in str(error):
            why = "a tensor is kept from one call to another: make it anew in each"
        else:
            raise
        raise ValueError(f"{line_of(error)}: {why}") from error


def line_of(error: BaseException) -> str:
    """Where an error comes from: the innermost line that is neither torch's nor this package's own."""
    of_torch, ours = str(Path(torch.__file__).parent), str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    others = [f for f in frames if not f.filename.startswith(of_torch)]
    at = [f for f in others if str(Path(f.filename).parent) != ours] or others or frames
    return f"{at[-1].filename}, line {at[-1].lineno} ({at[-1].line})"
