"""Fields of the gateway's JSON, as loosely as they come: left out where zero, numbers as strings, bytes in base64.

Pure. Each reading returns its value or raises ValueError, and nothing else.
"""

from binascii import a2b_base64
from collections.abc import Mapping
from typing import Any

import orjson


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of an answer."""
    return as_object(orjson.loads(body))


def as_object(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"not an object: {str(raw)[:100]!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return raw


def list_of(raw: Mapping[str, Any], name: str) -> list[Any]:
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def int_of(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if value is None:
        return 0
    if isinstance(value, str):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} is not a number: {value!r}")


def bool_of(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is not true or false: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def text_of(raw: Mapping[str, Any], name: str) -> str:
    value = raw.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return value


def bytes_of(raw: Mapping[str, Any], name: str) -> bytes:
    value = raw.get(name)
    return b"" if value is None else as_bytes(value)


def as_bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"not base64: {value!r}")  # noqa: TRY004 - decoders raise ValueError alone
    return a2b_base64(value)
