"""What the store's errors prove about a request: applied, refused, or nothing.

Law: whatever is not known to be a refusal proves nothing, so a write that met it is Unknown. Error shapes: grpc-gateway
1 (etcd 3.4, 3.5) and 2 (3.6), unary and in a stream, and a proxy's HTML. Pure.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from shardlead.store.jsonfields import int_of, parse, shown, text_of

# gRPC status codes that decide something here
_INVALID_ARGUMENT: Final = 3
_NOT_FOUND: Final = 5
_RESOURCE_EXHAUSTED: Final = 8
_OUT_OF_RANGE: Final = 11
_UNIMPLEMENTED: Final = 12
_UNAVAILABLE: Final = 14
_UNAUTHENTICATED: Final = 16
# not found, already exists, permission denied, failed precondition, out of range, unimplemented: said before anything
# was applied. Not in it: canceled (1), unknown (2), deadline (4), aborted (10), internal (13), unavailable (14).
_REFUSALS: Final = frozenset({_INVALID_ARGUMENT, _NOT_FOUND, 6, 7, 9, _OUT_OF_RANGE, _UNIMPLEMENTED})


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that the server (or something in between) gave as its answer."""

    code: int  # gRPC status code
    message: str

    def __str__(self) -> str:
        return f"{self.message} (code {self.code})"


class Faulted(Exception):
    """The server answered with a fault. Stays within the store: translated to a StoreError or an outcome there."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(str(fault))


class Verdict(Enum):
    """What a fault proves about the request."""

    REFUSED = "refused"  # for good; nothing was applied
    LEASE_GONE = "lease gone"  # nothing was applied
    COMPACTED = "compacted"  # nothing was applied
    UNAUTHENTICATED = "unauthenticated"  # nothing was applied; a new token may help
    NOT_NOW = "not now"  # nothing was applied; the same request may succeed later
    UNCERTAIN = "uncertain"  # proves nothing


def fault_of(status: int, body: bytes) -> Fault:
    """The fault of a unary answer: 3.4 and 3.5 say {"error", "message", "code"}, 3.6 {"code", "message", "details"},
    a stream that failed at once {"error": {...}}, and a proxy in between anything."""
    try:
        raw = parse(body)
        inner = raw.get("error")
        return fault_in(inner if isinstance(inner, dict) else raw, status)
    except ValueError:
        text = body[:200].decode("utf-8", "backslashreplace").strip()
        code = _UNAVAILABLE if status >= 500 or status == 429 else _UNIMPLEMENTED
        return Fault(code, f"HTTP {status}: {text}" if text else f"HTTP {status}")


def judge(fault: Fault) -> Verdict:
    """What the fault proves. Whatever is not known to be a refusal is UNCERTAIN."""
    text = fault.message
    if fault.code == _UNAUTHENTICATED or any(sign in text for sign in _SIGNS_OF_A_BAD_TOKEN):
        return Verdict.UNAUTHENTICATED
    if fault.code == _NOT_FOUND and "lease not found" in text:
        return Verdict.LEASE_GONE
    if fault.code == _OUT_OF_RANGE and "compacted" in text:
        return Verdict.COMPACTED
    if fault.code == _RESOURCE_EXHAUSTED:
        if "too many requests" in text:  # said before the request is proposed
            return Verdict.NOT_NOW
        return Verdict.REFUSED if "space exceeded" in text else Verdict.UNCERTAIN
    return Verdict.REFUSED if fault.code in _REFUSALS else Verdict.UNCERTAIN


_SIGNS_OF_A_BAD_TOKEN: Final = (
    "invalid auth token",
    "revision of auth store is old",  # code 3: roles or users changed after the token was made
    "user name is empty",  # code 3: no token came, or one that this member has forgotten
)


def fault_in(raw: Any, status: int = 0) -> Fault:
    """The fault under an answer's `error`; `status` is HTTP's, if it has one of its own."""
    if not isinstance(raw, dict):
        return Fault(2, raw[:200] if isinstance(raw, str) else shown(raw))
    code = int_of(raw, "grpc_code") or int_of(raw, "code")
    message = text_of(raw, "message") or (text_of(raw, "error") if isinstance(raw.get("error"), str) else "")
    if not code and not message:
        raise ValueError("an error without code and message")
    return Fault(code or 2, message or f"HTTP {status}")
