"""Fields of the gateway's JSON, as loosely as they come: left out where zero, numbers as strings, bytes in base64.

Pure. Each reading returns its value or raises ValueError, and nothing else.
"""

import re
from binascii import a2b_base64
from collections.abc import Mapping
from typing import Any, Final

import orjson

_SHOWN_MAX: Final = 100
_BITS: Final = 64  # etcd's numbers are int64 and uint64
_NUMBER: Final = re.compile(r"-?[0-9]{1,20}")


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of an answer."""
    return as_object(orjson.loads(body))


def shown(value: Any) -> str:
    """A value as an error shows it: short, and never looked into, for what is nested deep has no repr."""
    if isinstance(value, dict):
        return f"an object of {', '.join(sorted(value)) or 'nothing'}"[:_SHOWN_MAX]
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value)[:_SHOWN_MAX]


def as_object(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"not an object: {shown(raw)}")  # noqa: TRY004 - decoders raise ValueError alone
    return raw


def list_of(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list: {shown(value)}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def int_of(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if value is None:
        return 0
    number = as_int(value)
    if number is None:
        raise ValueError(f"{name} is not a number: {shown(value)}")
    return number


def as_int(value: Any) -> int | None:
    """A number of at most 64 bits, or the text of one in plain digits; None for anything else."""
    if isinstance(value, str):
        if _NUMBER.fullmatch(value) is None:  # int() takes more: spaces, underscores, digits of other scripts
            return None
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(1 << _BITS - 1) <= value < 1 << _BITS:
        return None
    return value


def bool_of(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is not true or false: {shown(value)}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def text_of(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text: {shown(value)}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def bytes_of(raw: Mapping[str, Any], name: str) -> bytes:
    value = raw.get(name)
    return b"" if value is None else as_bytes(value)


def as_bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"not base64: {shown(value)}")  # noqa: TRY004 - decoders raise ValueError alone
    return a2b_base64(value)
