"""Reading a `config.json`: each field checked as it is read, each complaint naming the key and its value."""

from collections.abc import Mapping
from typing import Any

MISSING = object()


def read(hf: Mapping, key: str, default: Any = MISSING) -> Any:
    """`hf[key]`, or the default where it is absent or null. Raises ValueError when there is no default."""
    value = hf.get(key)
    if value is not None:
        return value
    if default is MISSING:
        raise ValueError(f"the model config lacks {key!r}")
    return default


def refuse(key: str, value: Any, valid: str) -> None:
    """Raises ValueError: the sentence that every bad value gets."""
    raise ValueError(f"{key} = {value!r} in the model config: it must be {valid}")


def size(hf: Mapping, key: str, default: Any = MISSING) -> int:
    """A positive integer."""
    value = read(hf, key, default)
    if type(value) is not int or value < 1:
        refuse(key, value, "a positive integer")
    return value


def number(hf: Mapping, key: str, default: Any = MISSING) -> float:
    """A positive number."""
    value = read(hf, key, default)
    if type(value) not in (int, float) or not value > 0:
        refuse(key, value, "a positive number")
    return float(value)


def flag(hf: Mapping, key: str, default: bool) -> bool:
    value = read(hf, key, default)
    if type(value) is not bool:
        refuse(key, value, "true or false")
    return value
