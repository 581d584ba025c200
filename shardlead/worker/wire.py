"""The contract's words on the wire: what a router says about a request, and the answers that are the runtime's own.

Law: design.md, "The contract between router and worker"; RFC 9457 for problems. Pure: it reads a request's head and
makes responses; it sends nothing and asks nobody. No word of an application's failure stands in an answer.
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import HttpVersion11, web
from multidict import istr

from shardlead.core import contract
from shardlead.core.contract import Refused
from shardlead.core.model import SHARDS_MAX
from shardlead.errors import RequestError
from shardlead.worker.admission import Turned

_KEY: Final = re.compile(r"(?:[!-$&-~]|%[0-9A-Fa-f]{2})+")  # visible ASCII; each % begins an escape
_DIGITS_MAX: Final = 16  # an epoch is below 2**53
_NONE: Final[list[str]] = []

_SHARD: Final = istr(contract.SHARD)  # an istr is lowered once, not at every look
_EPOCH: Final = istr(contract.EPOCH)
_SPELLED_KEY: Final = istr(contract.KEY)
_EXPECT: Final = istr("Expect")

_ROUTER_HINT: Final = (
    "this is a worker: it takes requests from a shardlead router or the smart client, which say shard and epoch in "
    "Shardlead-* headers. Send yours to the router's port."
)

_TITLES: Final[Mapping[str, str]] = {
    contract.Problem.BAD_REQUEST: "Request cannot be used",
    contract.Problem.KEY_TOO_LONG: "Key is too long",
    contract.Problem.TOO_LARGE: "Body is too large",
    contract.Problem.MISDIRECTED: "Shard is not led here",
    contract.Problem.SUSPENDED: "Shard cannot be served at this moment",
    contract.Problem.OUTCOME_UNKNOWN: "Outcome is not known",
    contract.Problem.APPLICATION_ERROR: "Application failed",
}

_REASONS: Final[Mapping[Refused, str]] = {
    Refused.STALE: "this worker does not lead the shard under that epoch",
    Refused.DRAINING: "this worker is handing the shard over",
    Refused.UNKNOWN: "this worker knows nothing of the shard",
    Refused.SUSPENDED: "the shard cannot be served at this moment; ask again",
}


# --- what is said ----------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the router says about a request. Whether the key belongs to the shard is for the ring to say."""

    shard: int
    epoch: int
    key: bytes | None
    expects_continue: bool


def read_call(request: web.BaseRequest) -> Call:
    """The router's words; the key may be missing, where a router sends requests without one to the shards in turn.

    Raises RequestError where they are missing, doubled or malformed."""
    headers = request.headers
    shard = headers.getall(_SHARD, _NONE)
    epoch = headers.getall(_EPOCH, _NONE)
    key = headers.getall(_SPELLED_KEY, _NONE)
    if not shard and not epoch and not key:
        raise RequestError(contract.Problem.BAD_REQUEST, _ROUTER_HINT)
    if len(shard) != 1 or len(epoch) != 1 or len(key) > 1:
        raise RequestError(contract.Problem.BAD_REQUEST, "each of the Shardlead-* headers must stand there once")
    number = _number(contract.SHARD, shard[0])
    if number >= SHARDS_MAX:
        raise RequestError(contract.Problem.BAD_REQUEST, f"there is no shard {number}")
    return Call(
        number,
        _number(contract.EPOCH, epoch[0]),
        key_of(key[0]) if key else None,
        _expects_continue(request),
    )


def key_of(text: str) -> bytes:
    """The key that `Shardlead-Key` spells. Raises RequestError if it spells none, or one that is too long."""
    if _KEY.fullmatch(text) is None:
        raise RequestError(contract.Problem.BAD_REQUEST, f"{contract.KEY} is empty or not percent-encoded")
    key = unquote_to_bytes(text) if "%" in text else text.encode()
    if len(key) > contract.KEY_BYTES_MAX:
        detail = f"the key has {len(key)} bytes; {contract.KEY_BYTES_MAX} are allowed"
        raise RequestError(contract.Problem.KEY_TOO_LONG, detail)
    return key


def _number(name: str, text: str) -> int:
    if len(text) > _DIGITS_MAX or not text.isdigit() or not text.isascii():
        raise RequestError(contract.Problem.BAD_REQUEST, f"{name} is not a number")
    return int(text)


def announces_body(request: web.BaseRequest) -> bool:
    """Whether the peer asked for a 100 before it sends its body."""
    return _EXPECT in request.headers


def body_length(request: web.BaseRequest) -> int | None:
    """Content-Length; None without one. Raises RequestError for one of more digits than Python converts."""
    try:
        return request.content_length
    except ValueError as exc:
        raise RequestError(contract.Problem.BAD_REQUEST, "Content-Length is not one number") from exc


def _expects_continue(request: web.BaseRequest) -> bool:
    """As above, and the expectation is one that can be met. Raises RequestError (417) for another."""
    expected = request.headers.get(_EXPECT)
    if expected is None or request.version < HttpVersion11:
        return False
    if expected.strip().lower() != "100-continue":
        raise RequestError(contract.Problem.BAD_REQUEST, "Expect can only be 100-continue", status=417)
    return True


# --- what is answered ------------------------------------------------------------------------------------------------


def problem(
    status: int, kind: str, detail: str, *, shard: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """An answer of the runtime itself (RFC 9457)."""
    body: dict[str, object] = {
        "type": contract.PROBLEM_BASE + kind,
        "title": _TITLES[kind],
        "status": status,
        "detail": detail,
    }
    if shard is not None:
        body["shard"] = shard
    content = orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE)  # as the router's
    return web.Response(status=status, body=content, content_type=contract.PROBLEM_JSON, headers=headers)


def refusal(shard: int, turned: Turned) -> web.Response:
    """The refusal that the router understands; the handler has not run, or may safely run again."""
    headers = {contract.REFUSED: turned.reason.value, contract.EPOCH: str(turned.epoch)}
    if turned.leader:
        headers[contract.LEADER] = turned.leader
    detail = _REASONS[turned.reason]
    if turned.reason is Refused.SUSPENDED:
        headers["Retry-After"] = "1"
        return problem(503, contract.Problem.SUSPENDED, detail, shard=shard, headers=headers)
    return problem(contract.STATUS_MISDIRECTED, contract.Problem.MISDIRECTED, detail, shard=shard, headers=headers)


def application_error(shard: int) -> web.Response:
    """The application failed and its leadership stands. Nothing of the failure is told to a client."""
    return problem(500, contract.Problem.APPLICATION_ERROR, "the application failed; its log says why", shard=shard)


def unreadable_body(shard: int) -> web.Response:
    """The client's body is not what its head announces: a content coding that it has not, or broken chunks."""
    detail = "the body cannot be read as its Content-Encoding and length say"
    return problem(400, contract.Problem.BAD_REQUEST, detail, shard=shard)


def outcome_unknown(shard: int, *, is_idempotent: bool) -> web.Response:
    """The handler ran, and its leadership ended before its answer could leave."""
    advice = "send it again with the same Idempotency-Key" if is_idempotent else "look before you repeat"
    return problem(
        502,
        contract.Problem.OUTCOME_UNKNOWN,
        f"the leadership ended while the request was handled, so its effect is not known: {advice}",
        shard=shard,
        headers={contract.OUTCOME: contract.OUTCOME_IS_UNKNOWN},
    )
