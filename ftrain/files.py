"""Python files of the user's own: plans, optimizers, encoders, decoders."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def import_file(path: str, what: str) -> ModuleType:
    """The module in a file. Raises FileNotFoundError and ValueError, beginning with `what`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}: there is no file {Path(path).absolute()}")
    spec = importlib.util.spec_from_file_location(f"ftrain_user_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{what}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def import_function(path: str, function: str, what: str) -> Callable:
    """A function of a file. Raises as `import_file`, and ValueError naming the functions that the file has."""
    module = import_file(path, what)
    found = getattr(module, function, None)
    if not callable(found):
        own = [n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__]
        raise ValueError(f"{what}: {path} has no function {function!r}; it has {', '.join(own) or 'none'}")
    return found
