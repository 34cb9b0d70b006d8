"""What arguments may be: each function returns the plain value, or raises an error that names the argument.

A wrong kind of value raises TypeError, a wrong value ValueError.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

MOST = 2**63 - 1
_LONGEST = 1e9  # seconds


def integer(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """A count as a Python integer.

    Args:
        name: of the argument.
        value: an integer of Python or NumPy, or an integer tensor of one element. Booleans and floats are none.
        least: the smallest that is allowed.
        most: the largest that is allowed.
    """
    if type(value) is not int:
        # Booleans of Python, NumPy and torch are integers to operator.index.
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
    """A count as in ``integer``, or None."""
    return None if value is None else integer(name, value, least, most)


def integers(name: str, value: Any, count: int, least: int = 0) -> list[int]:
    """Counts for several things: one in a list for all of them, or one for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name} must be one number or one for each of {count} sequences, not {len(value)}")
        return [integer(name, each, least) for each in value]
    return [integer(name, value, least)]


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that is merely taken for it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of some names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {_either(choices)}, not {shown(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be {_either(choices)}, not {shown(value)}")
    return value


def seconds(name: str, value: Any) -> float:
    """A time, more than nothing and not endless."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be seconds, not {shown(value)}")
    if not 0 < value <= _LONGEST:
        raise ValueError(f"{name} must be more than 0 and at most {_LONGEST:g} seconds, not {shown(value)}")
    return float(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids of the tokens of one sequence.

    Args:
        name: of the argument.
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
    if len(ids) == 1 and _holds_several(ids[0]):
        return token_ids(name, ids[0])
    if any(map(_holds_several, ids)):
        raise ValueError(f"{name} must be of one sequence, [n] or [1, n], not of {len(ids)}")
    if set(map(type, ids)) <= {int}:
        return ids
    return tuple(integer(name, each, -MOST) for each in ids)


def _holds_several(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def _either(choices: Iterable[str]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last


def shown(value: Any) -> str:
    """A value for an error, of which only the beginning is shown where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
