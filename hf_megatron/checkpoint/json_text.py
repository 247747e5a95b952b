"""Parse JSON from files that anybody may have written: within limits, and without what readers take differently.

``strict`` is JSON as Rust's serde_json reads it, by which the header of a safetensors file is defined. Otherwise it is
JSON as Python reads it, which has NaN and infinity.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from hf_megatron.checkpoint.budgets import (
    MAX_INTEGER_BITS,
    MAX_JSON_NESTING,
    MAX_JSON_VALUES,
    BudgetError,
    is_64_bit,
    require_within,
)
from hf_megatron.errors import shown

_MAX_DIGITS = 20  # of 64 bits, without the sign
# In an escape, half of a pair that stands for one character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class ObjectWithDuplicates(dict[str, Any]):
    """An object of a strict text in which names occur more than once; the last value of each counts."""

    duplicates: frozenset[str] = frozenset()


def parse_json(raw: bytes, *, strict: bool = False) -> Any:
    """The value of a JSON text in UTF-8.

    ValueError if it is no such text, or not strict and a name occurs twice in an object; BudgetError if it is nested
    too deeply, has too many values, or an integer is beyond 64 bits.
    """
    require_within(MAX_JSON_VALUES, sum(map(raw.count, (b",", b"[", b"{"))), "commas and opening brackets")
    text = raw.decode()  # no other encoding; json refuses a mark of byte order
    try:
        value = json.loads(
            text,
            parse_int=_integer_or_float if strict else _integer,
            parse_float=_finite if strict else float,
            parse_constant=_refused if strict else float,
            object_pairs_hook=_with_duplicates if strict else _without_duplicates,
        )
    except RecursionError:
        raise BudgetError(f"it is nested more than {MAX_JSON_NESTING} levels deep, which is the limit") from None
    _check(value, has_surrogates=_SURROGATE.search(text) is not None)
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS or not is_64_bit(int(digits)):
        raise BudgetError(f"it has an integer of {len(digits)} digits, and the limit is {MAX_INTEGER_BITS} bits")
    return int(digits)


def _integer_or_float(digits: str) -> int | float:
    # Zero with a sign is a float, and so is what does not fit.
    is_integer = len(digits.lstrip("-")) <= _MAX_DIGITS and digits != "-0" and is_64_bit(int(digits))
    return int(digits) if is_integer else _finite(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is out of range")
    return number


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _with_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        result = ObjectWithDuplicates(result)
        result.duplicates = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return result


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)} occurs twice in one object")
    return result


def _check(value: Any, *, has_surrogates: bool) -> None:
    """Check the depth, and that texts are text, without recursion."""
    level, depth = [value], 0
    while level:
        if has_surrogates:
            for item in level:
                for text in item if isinstance(item, dict) else (item,):
                    if isinstance(text, str):
                        text.encode()  # ValueError for half of a pair
        containers = [item for item in level if isinstance(item, (dict, list))]
        depth += bool(containers)
        require_within(MAX_JSON_NESTING, depth, "levels of nesting")
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
