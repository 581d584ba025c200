"""How bytes get to one endpoint and back: the seam at which a simulator or a gRPC transport takes the place of HTTP.

Law: a transport makes one attempt on one endpoint and never tries again by itself. What fails says with `is_sent`
whether a byte of the request may have left; everything above decides from that what may be sent twice.
"""

import asyncio
import io
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

import aiohttp

from shardlead.config import StoreSettings
from shardlead.errors import ConfigError, Problem

RENEWAL_CONNECTIONS_MAX: Final = 2  # per endpoint: one stuck, one that goes on
BYTES_AT_ONCE_MAX: Final = 1_048_576  # larger bodies (a ring of 32,768 shards) go in pieces, or aiohttp warns
CALL_CONNECTIONS_MAX: Final = 64  # per endpoint; a call that waits for one has not been sent


class Channel(Enum):
    """Calls of one channel share connections; none waits for those of another (protocol.md C, last line)."""

    CALL = "call"
    RENEWAL = "renewal"
    WATCH = "watch"


class TransportError(Exception):
    """An attempt that brought no answer. Translated to a StoreError or Unknown by `store.etcd`."""

    def __init__(self, reason: str, *, is_sent: bool) -> None:
        self.reason = reason
        self.is_sent = is_sent
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: HTTP's status and the body."""

    status: int
    body: bytes


class Stream(Protocol):
    """An answer that goes on for as long as it is not closed."""

    @property
    def status(self) -> int: ...

    async def read(self) -> bytes:
        """The next bytes, as they come; b"" at the end. Raises TransportError. Not bounded in time: the caller is."""
        ...

    def close(self) -> None:
        """Give up the connection at once. Idempotent."""
        ...


class Transport(Protocol):
    """One attempt on one endpoint. Both calls raise TransportError, after `timeout_s` at the latest."""

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        """Send a request and read the whole answer."""
        ...

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        """Send a request on a connection of its own and return when the answer begins."""
        ...

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        ...


@dataclass(slots=True)
class _Progress:
    """How far one attempt has come; set by the session's trace."""

    has_connection: bool = False


class HttpTransport:
    """aiohttp, with a connection pool for each channel. Made outside a loop; opens sessions at first use."""

    def __init__(self, settings: StoreSettings) -> None:
        self._ssl = _ssl_context(settings)
        self._sessions: dict[Channel, aiohttp.ClientSession] = {}

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        progress = _Progress()
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session(channel).post(
                    endpoint + path,
                    data=_payload(body),
                    headers=headers,
                    trace_request_ctx=progress,
                    allow_redirects=False,
                ) as response,
            ):
                return Answer(response.status, await response.read())
        except TimeoutError as exc:
            raise TransportError(_late(progress, timeout_s), is_sent=progress.has_connection) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise TransportError(_reason(exc), is_sent=progress.has_connection) from exc

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        progress = _Progress()
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._session(Channel.WATCH).post(
                    endpoint + path,
                    data=_payload(body),
                    headers=headers,
                    trace_request_ctx=progress,
                    allow_redirects=False,
                )
        except TimeoutError as exc:
            raise TransportError(_late(progress, timeout_s), is_sent=progress.has_connection) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise TransportError(_reason(exc), is_sent=progress.has_connection) from exc
        return _HttpStream(response)

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    def _session(self, channel: Channel) -> aiohttp.ClientSession:
        session = self._sessions.get(channel)
        if session is None:
            session = self._sessions[channel] = self._opened(channel)
        return session

    def _opened(self, channel: Channel) -> aiohttp.ClientSession:
        limit_per_host = {
            Channel.CALL: CALL_CONNECTIONS_MAX,
            Channel.RENEWAL: RENEWAL_CONNECTIONS_MAX,
            Channel.WATCH: 0,  # one for each watch, and a process has two of them
        }[channel]
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                limit_per_host=limit_per_host,
                ssl=self._ssl if self._ssl is not None else True,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # bounded by asyncio.timeout at each call
            trace_configs=[_trace()],
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )


class _HttpStream:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    @property
    def status(self) -> int:
        return self._response.status

    async def read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as exc:
            raise TransportError(_reason(exc), is_sent=True) from exc

    def close(self) -> None:
        self._response.close()  # not `release`, which would wait for the rest of an answer that never ends


def _trace() -> aiohttp.TraceConfig:
    """Marks the moment from which on a byte may leave: the request has got a connection."""

    async def mark(_session: aiohttp.ClientSession, context: object, _params: object) -> None:
        progress = getattr(context, "trace_request_ctx", None)
        if isinstance(progress, _Progress):
            progress.has_connection = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(mark)
    trace.on_connection_reuseconn.append(mark)
    return trace


def _late(progress: _Progress, timeout_s: float) -> str:
    what = "no answer" if progress.has_connection else "no connection"
    return f"{what} within {timeout_s:.3g} s"


def _reason(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


def _ssl_context(settings: StoreSettings) -> ssl.SSLContext | None:
    if not any(endpoint.startswith("https:") for endpoint in settings.endpoints):
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            [Problem("store", "store.ca_file", settings.ca_file, f"a readable PEM file of authorities ({exc})")]
        ) from exc
    if settings.cert_file:
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file or None)
        except (OSError, ssl.SSLError) as exc:
            allowed = f"a readable PEM certificate with its key in store.key_file ({exc})"
            raise ConfigError([Problem("store", "store.cert_file", settings.cert_file, allowed)]) from exc
    return context


def _payload(body: bytes) -> bytes | io.BytesIO:
    return body if len(body) <= BYTES_AT_ONCE_MAX else io.BytesIO(body)
