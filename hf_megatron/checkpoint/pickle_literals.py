"""How the arguments of a pickle's instructions are decoded; numbers beyond 64 bits are refused before they are made."""

from __future__ import annotations

import codecs
import re
import struct
import warnings
from collections.abc import Callable
from typing import Any

from hf_megatron.checkpoint.budgets import MAX_INTEGER_BITS, BudgetError, is_64_bit

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")


def integer(text: str) -> int:
    """The number of decimal digits; others, such as octal ones, Python reads in one place and not in another."""
    if len(text) > MAX_INTEGER_BITS:
        raise BudgetError(f"it has an integer of {len(text)} digits, and the limit is {MAX_INTEGER_BITS} bits")
    if _INTEGER.fullmatch(text) is None:
        raise ValueError("not a decimal number")
    return _checked(int(text))


def _checked(number: int) -> int:
    if not is_64_bit(number):
        raise BudgetError(f"it has an integer of {number.bit_length()} bits, and the limit is {MAX_INTEGER_BITS}")
    return number


def _long(data: bytes) -> int:
    if len(data) > MAX_INTEGER_BITS // 8 + 1:  # one more for the sign
        raise BudgetError(f"it has an integer of {8 * len(data)} bits, and the limit is {MAX_INTEGER_BITS}")
    return _checked(int.from_bytes(data, "little", signed=True))


def _int_or_bool(data: bytes) -> int:
    return data == b"01" if data in (b"00", b"01") else integer(data.decode("ascii"))


def _quoted(data: bytes) -> str:
    if len(data) < 2 or data[:1] not in (b"'", b'"') or data[:1] != data[-1:]:
        raise ValueError("text without quotes")
    # Damaged text may contain invalid escapes, about which Python warns.
    with warnings.catch_warnings(action="ignore"):
        return _python_2(codecs.escape_decode(data[1:-1])[0])


def _python_2(data: bytes) -> str:
    """Text that Python 2 wrote without saying in which encoding."""
    return data.decode("utf-8", "backslashreplace")


def _escaped(data: bytes) -> str:
    text = data.decode("raw-unicode-escape")
    text.encode()  # ValueError for half of a surrogate pair
    return text


LITERALS: dict[str, Callable[[bytes], Any]] = {
    "INT": _int_or_bool,
    "LONG": lambda data: integer(data.decode("ascii").removesuffix("L")),
    "BININT": lambda data: int.from_bytes(data, "little", signed=True),
    **dict.fromkeys(("BININT1", "BININT2"), lambda data: int.from_bytes(data, "little")),
    **dict.fromkeys(("LONG1", "LONG4"), _long),
    "FLOAT": float,
    "BINFLOAT": lambda data: struct.unpack(">d", data)[0],
    "STRING": _quoted,
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _python_2),
    "UNICODE": _escaped,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), bytes.decode),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), bytes),
}
"""Instructions of a pickle that push their argument: how it is decoded."""
