"""Checks of arguments: each function returns the plain value, or raises an error that names the argument.

A value of the wrong type raises TypeError, a wrong value of the right type ValueError.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

MOST = 2**63 - 1
_LONGEST = 1e9  # the longest time, in seconds


def integer(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """Returns a count as a Python integer.

    Args:
        name: the name of the argument.
        value: an integer of Python or NumPy, or an integer tensor of one element. Booleans and floats are refused.
        least: the smallest value that is allowed.
        most: the largest value that is allowed.
    """
    if type(value) is not int:
        # operator.index would accept the booleans of Python, NumPy and torch.
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError(f"{name} must be an integer, not {shown(value)}")
        try:
            value = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be an integer, not {shown(value)}") from None
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {bound}, not {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, not {shown(value)}")
    return int(value)


def optional_integer(name: str, value: Any, least: int = 0, most: int = MOST) -> int | None:
    """Returns a count as ``integer`` does, or None."""
    return None if value is None else integer(name, value, least, most)


def integers(name: str, value: Any, count: int, least: int = 0) -> list[int]:
    """Returns counts for several sequences: a list of one number for all, or of one for each of ``count``."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} must be one number or one for each of {count} sequences, not {len(value)}")
        if set(map(type, value)) == {int} and least <= min(value) and max(value) <= MOST:  # at once, since it is often
            return list(value)
        return [integer(name, each, least) for each in value]
    return [integer(name, value, least)]


def flag(name: str, value: Any) -> bool:
    """Returns True or False; refuses other values, also if Python treats them as true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return value


def hashable(name: str, value: Any) -> Any:
    """Returns a value that equal ones can be looked up by."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"{name} must be hashable, e.g. a string or a tuple, not {shown(value)}") from None
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Returns one of the given names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {_either(choices)}, not {shown(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be {_either(choices)}, not {shown(value)}")
    return value


def seconds(name: str, value: Any) -> float:
    """Returns a time in seconds, more than 0 and at most ``_LONGEST``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be seconds, not {shown(value)}")
    if not 0 < value <= _LONGEST:
        raise ValueError(f"{name} must be more than 0 and at most {_LONGEST:g} seconds, not {shown(value)}")
    return float(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Returns the token ids of one sequence.

    Args:
        name: the name of the argument.
        value: ``[n]`` or ``[1, n]`` integers: a tensor, an array, or anything that yields integers one by one.
    """
    if hasattr(value, "tolist"):
        if "bool" in str(getattr(value, "dtype", "")):
            raise TypeError(f"{name} must be token ids, not {shown(value)}")
        value = value.tolist()
    elif isinstance(value, (str, bytes, bytearray, Mapping, Set)):
        raise TypeError(f"{name} must be token ids, not {shown(value)}")
    try:
        ids = tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be token ids, [n] or [1, n], not {shown(value)}") from None
    if set(map(type, ids)) <= {int}:  # of most callers, with thousands of ids
        return ids
    if len(ids) == 1 and _holds_several(ids[0]):
        return token_ids(name, ids[0])
    if any(map(_holds_several, ids)):
        raise ValueError(f"{name} must be of one sequence, [n] or [1, n], not of {len(ids)}")
    return tuple(integer(name, each, -MOST) for each in ids)


def _holds_several(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def _either(choices: Iterable[str]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last


def shown(value: Any) -> str:
    """Returns the text of a value for an error message; of a long text only the beginning."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
