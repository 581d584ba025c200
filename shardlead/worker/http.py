"""The worker's HTTP server: between the router and the application's objects stands the contract, and nothing else.

    head ─▸ admission ─▸ (parked ─▸) admitted ─▸ 100 Continue, if asked for ─▸ handle ─▸ guard ─▸ answer
                │ turned: 421 or 503, body unread                                        │ failed, not begun:
                ▾                                                                        ▾ safe: 421, 503; else 502
            the router sends again                                          begun: the connection is reset

Law: design.md, "The contract between router and worker", and protocol.md A.4. A refusal is given only where the handler
has not run, or where running it again is safe. What an application raises is logged here, once, and never shown to a
client. Idle connections are left for the router to close. This module decides nothing about leadership: `Host` does.
"""

import asyncio
import errno
import logging
import ssl
from contextlib import suppress
from typing import Final, assert_never

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader

from shardlead.clock import NS_PER_S, Clock
from shardlead.config import WORKER_IDLE_TIMEOUT_S, WorkerSettings
from shardlead.core import contract
from shardlead.core.contract import Refused
from shardlead.errors import CommandError, Fenced, LeadershipError, RequestError, WriteUnknown, weightiest
from shardlead.metrics import WorkerMetrics
from shardlead.worker.admission import Admitted, Parked, Turned
from shardlead.worker.application import Description, Hosted
from shardlead.worker.gate import AnswerCut, Gate, GuardedWriter
from shardlead.worker.host import Host
from shardlead.worker.serverlog import ServerLog
from shardlead.worker.tenure import Tenure
from shardlead.worker.tracebacks import Tracebacks, in_a_line
from shardlead.worker.wire import (
    Call,
    announces_body,
    application_error,
    body_length,
    outcome_unknown,
    problem,
    read_call,
    refusal,
    unreadable_body,
)

log = logging.getLogger("shardlead.http")

FIELD_BYTES_MAX: Final = 262_144  # one line or header field; a router's whole head is 32 KiB by default
HEADERS_MAX: Final = 1_024  # a router allows 100 by default and adds fewer than ten
BACKLOG: Final = 1_024  # connections that wait to be accepted when many routers come at once
UNREAD_TIMEOUT_S: Final = 2.0  # an answered peer that still sends its body is read for so long, as routers read theirs
CLOSE_TIMEOUT_S: Final = 1.0  # for answers still under way when the server closes; drained work has ended before

OUTCOMES: Final = (
    "answered",
    "application-error",
    "stale",
    "draining",
    "unknown",
    "suspended",
    "outcome-unknown",
    "cancelled",
    "bad-request",
)


class Front:
    """The server: `start`, then serve until `stop_accepting`, `linger`, `close`, in this order."""

    def __init__(
        self,
        settings: WorkerSettings,
        host: Host,
        application: Description,
        *,
        clock: Clock,
        metrics: WorkerMetrics,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: what its port speaks; None: plain HTTP."""
        self._tls = tls
        self._settings = settings
        self._host = host
        self._application = application
        self._clock = clock
        self._tracebacks = Tracebacks(clock)
        self._outcomes = {outcome: metrics.requests.labels(outcome) for outcome in OUTCOMES}
        self._duration = metrics.request_duration
        self._failures = metrics.application_failures.labels("handle")
        self._running = 0
        self._parked = 0
        metrics.requests_running.set_function(lambda: self._running)
        metrics.requests_parked.set_function(lambda: self._parked)
        self._sent, self._sent_last = _Sent(keep_alive=True), _Sent(keep_alive=False)
        self._is_leaving = self._is_closing = False
        self._is_mismatch_logged = False
        self._server: _Server | None = None
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None

    def __repr__(self) -> str:
        connections = self._server.open_connections if self._server else 0
        leaving = " leaving" if self._is_leaving else ""
        return f"<Front {self._settings.host} connections={connections} parked={self._parked}{leaving}>"

    # --- its life ------------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Listen; returns the "host:port" that routers connect to (`advertise`, if set).

        Raises CommandError if the port is taken or the address is not this machine's.
        """
        settings = self._settings
        self._server = _Server(
            self._answer,
            request_factory=self._make_request,
            keepalive_timeout=WORKER_IDLE_TIMEOUT_S,
            lingering_time=UNREAD_TIMEOUT_S,
            access_log=None,
            logger=ServerLog(log, {}),
            max_line_size=FIELD_BYTES_MAX,
            max_field_size=FIELD_BYTES_MAX,
            max_headers=HEADERS_MAX,
        )
        self._runner = web.ServerRunner(self._server, shutdown_timeout=CLOSE_TIMEOUT_S)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, settings.host, settings.port, backlog=BACKLOG, ssl_context=self._tls)
        try:
            await self._site.start()
        except OSError as exc:
            await self._runner.cleanup()
            raise _not_listening(settings, exc) from exc
        host, port = self._runner.addresses[0][:2]
        return settings.advertise or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    async def stop_accepting(self) -> None:
        """Take no new connection; from here on answers tell the peer to close. Safe to call twice."""
        self._is_leaving = True
        if self._site is not None:
            await self._site.stop()
            self._site = None

    async def linger(self, timeout_s: float) -> bool:
        """Go on answering until every peer has closed its connections; False if `timeout_s` passed before."""
        if self._server is None:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._server.wait_empty()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Close what is still open. Answers under way get a second. Safe to call twice, or before `start`."""
        self._is_leaving = self._is_closing = True
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = self._site = None

    @property
    def open_connections(self) -> int:
        """How many peers are connected now."""
        return self._server.open_connections if self._server else 0

    # --- one request ---------------------------------------------------------------------------------------------

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        _writer: AbstractStreamWriter,  # stays unused: the gate's own writes through its guarded transport
        task: "asyncio.Task[None]",
    ) -> web.Request:
        gate = Gate(message, payload, protocol, asyncio.get_running_loop())
        return gate.request(task, body_bytes_max=self._settings.body_bytes_max)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """From head to answer. Raises nothing but CancelledError of a closing server."""
        writer = request.writer
        assert isinstance(request, web.Request)
        assert isinstance(writer, GuardedWriter)
        gate = writer.gate
        try:
            call = self._read(request)
        except RequestError as exc:
            self._outcomes["bad-request"].inc()
            return await self._refuse(request, gate, problem(exc.status, exc.kind, exc.detail))
        verdict = self._host.admission(call.shard, call.epoch)
        if isinstance(verdict, Parked):
            verdict = await self._park(call)
            if not gate.is_connected:  # nobody waits for this any more: do not begin it
                self._outcomes["cancelled"].inc()
                return self._sent_last
        match verdict:
            case Admitted(tenure=tenure):
                return await self._serve(request, gate, tenure, call)
            case Turned():
                self._outcomes[verdict.reason].inc()
                if self._host.audit is not None:
                    self._host.audit.reject(call.shard, call.epoch, verdict.reason)
                return await self._refuse(request, gate, refusal(call.shard, verdict))
            case _:
                assert_never(verdict)

    def _read(self, request: web.Request) -> Call:
        """The router's words, checked against the body's limit and this cluster's ring. Raises RequestError."""
        call = read_call(request)
        owner = call.shard if call.key is None else self._host.shard_of(call.key)
        if owner != call.shard:
            self._log_mismatch(call.shard, owner)
            raise RequestError(
                contract.Problem.BAD_REQUEST,
                f"the key belongs to shard {owner} here, the caller says {call.shard}: it has the ring of another "
                f"cluster; check its cluster name and store",
            )
        length = body_length(request)
        if length is not None and length > self._settings.body_bytes_max:
            detail = f"the body has {length} bytes, this worker takes {self._settings.body_bytes_max}"
            raise RequestError(contract.Problem.TOO_LARGE, detail, status=413)
        return call

    async def _park(self, call: Call) -> Admitted | Turned:
        """Wait until the shard is open or known to be elsewhere. Beyond the bounds: ask again, the epoch may stay."""
        turned_away = Turned(Refused.SUSPENDED, call.epoch)
        if self._parked >= self._settings.parked_max:
            return turned_away
        self._parked += 1
        try:
            async with asyncio.timeout(self._settings.park_timeout_s):
                while isinstance(verdict := self._host.admission(call.shard, call.epoch), Parked):
                    await self._host.changed(call.shard)
                return verdict
        except TimeoutError:
            return turned_away
        finally:
            self._parked -= 1

    async def _serve(self, request: web.Request, gate: Gate, tenure: Tenure, call: Call) -> web.StreamResponse:
        """Let the application answer, inside its tenure, behind the gate."""
        task = asyncio.current_task()
        assert task is not None
        started_ns = self._clock.now_ns()
        stale: Fenced | WriteUnknown | None = None
        sent: web.StreamResponse | None = None
        failure: Exception | None = None
        tenure.enter(task)
        self._running += 1
        try:
            if call.expects_continue:
                await gate.write_continue()
            gate.guard(tenure, self._settings.handle_need_s, started_ns)
            response = await self._handle(request, tenure)
            stale = self._stale_in(call, response if isinstance(response, web.HTTPException) else None)
            await self._send(response, request, gate)
        except AnswerCut:
            pass
        except LeadershipError as exc:
            stale = self._stale_in(call, exc) or stale
            if stale is None and tenure.lead.is_valid(self._settings.handle_need_s):
                failure = exc  # of another shard, or it asked for more time than a lease lasts: nothing is wrong here
        except asyncio.CancelledError as exc:
            if (
                task.cancelling() == 0 and not self._is_closing
            ):  # of the application's own making: it awaited something that was cancelled
                failure = RuntimeError("handle was cancelled from within")
                failure.__cause__ = exc
            elif tenure.is_lost and not self._is_closing:
                failure = None
                while task.uncancel() > 0:  # a drain's end and a loss may both have asked
                    pass
            else:
                raise
        except Exception as exc:  # the application's own code may raise anything; it costs it this answer
            failure = exc
            stale = self._stale_in(call, exc) or stale
        else:
            self._outcomes["answered"].inc()
            sent = self._sent if response.keep_alive else self._sent_last
        finally:
            self._running -= 1
            tenure.leave(task)
            tenure.tunnels.discard(gate)
            gate.finish()
            self._duration.observe((self._clock.now_ns() - started_ns) / NS_PER_S)
        if stale is not None:
            self._host.fenced_off(call.shard, tenure.lead.epoch, str(stale))
        if sent is not None:
            return sent
        return await self._answer_instead(request, gate, tenure, call, failure)

    def _stale_in(self, call: Call, error: BaseException | None) -> Fenced | WriteUnknown | None:
        """Why the epoch of this call must not go on, if what the application raised says so, however it was wrapped."""
        found = weightiest(error)
        return found if isinstance(found, Fenced | WriteUnknown) and found.shard == call.shard else None

    async def _handle(self, request: web.Request, tenure: Tenure) -> web.StreamResponse:
        application = tenure.application
        assert isinstance(application, Hosted), "an admitted tenure is open"
        try:
            response: object = await application.handle(request)
        except web.HTTPException as exc:
            return exc
        if not isinstance(response, web.StreamResponse):
            raise TypeError(f"handle must return an aiohttp response, not {response!r}")
        return response

    async def _send(self, response: web.StreamResponse, request: web.Request, gate: Gate) -> None:
        """Write the application's answer; a streamed one has been written by the handler, all but its end."""
        if response.prepared:
            if gate.is_cut or not gate.is_tunnel:
                gate.check()  # the end of a stream may be no more than the connection's, which no writer sees
        else:
            if self._is_leaving:
                response.force_close()
            await response.prepare(request)
        await response.write_eof()
        if not gate.has_begun:
            raise RuntimeError("a response can be sent only once: make a new one for each request")

    async def _answer_instead(
        self, request: web.Request, gate: Gate, tenure: Tenure, call: Call, failure: Exception | None
    ) -> web.StreamResponse:
        """The runtime's answer where the application's will not come: it failed, or its leadership ended."""
        if isinstance(failure, ConnectionError) and not gate.is_connected and not gate.is_cut:
            self._outcomes["cancelled"].inc()
            return self._sent_last
        facts = {"shard": call.shard, "epoch": call.epoch, "method": request.method, "path": request.path}
        is_bad_body = isinstance(failure, web.RequestPayloadError)  # the client's fault, met by whoever read on
        if failure is not None and not is_bad_body and not (gate.is_cut and isinstance(failure, ConnectionError)):
            self._failures.inc()
            exc_info = self._tracebacks.of(failure)
            log.error("application raised in handle", exc_info=exc_info, extra={**facts, "reason": in_a_line(failure)})
        asked_ns = self._clock.now_ns()
        if failure is not None and tenure.lead.is_valid(self._settings.handle_need_s):
            gate.note_accepted(asked_ns)
            self._outcomes["bad-request" if is_bad_body else "application-error"].inc()
            answer = unreadable_body(call.shard) if is_bad_body else application_error(call.shard)
        elif request.method in contract.SAFE_METHODS:
            verdict = self._host.admission(call.shard, call.epoch)
            turned = verdict if isinstance(verdict, Turned) else Turned(Refused.SUSPENDED, call.epoch)
            gate.note_refused(turned.reason)
            self._outcomes[turned.reason].inc()
            answer = refusal(call.shard, turned)
        else:
            gate.note_refused(contract.Problem.OUTCOME_UNKNOWN)
            self._outcomes["outcome-unknown"].inc()
            answer = outcome_unknown(call.shard, is_idempotent=self._application.idempotent)
        if gate.has_begun:
            log.warning("answer reset", extra=facts)
            gate.reset()
            return self._sent_last
        if self._is_leaving or not request.content.is_eof():
            answer.force_close()
        own = gate.own_request(request.task)
        with suppress(ConnectionError):
            await answer.prepare(own)
            await answer.write_eof()
        return self._sent if answer.keep_alive else self._sent_last

    async def _refuse(self, request: web.Request, gate: Gate, answer: web.Response) -> web.StreamResponse:
        """Answer without the application, before it. A body that waits for a 100 is never asked for, nor read."""
        if self._is_leaving:
            answer.force_close()
        if not announces_body(request):
            return answer
        answer.force_close()
        with suppress(ConnectionError):
            await answer.prepare(request)
            await answer.write_eof()
        gate.close()
        return self._sent_last

    def _log_mismatch(self, said: int, owner: int) -> None:
        if not self._is_mismatch_logged:
            self._is_mismatch_logged = True
            log.error("a caller has another ring; told once", extra={"shard": owner, "caller_says": said})


class _Sent(web.StreamResponse):
    """What aiohttp is given for an answer that has been written, or will not be. It has no state: one serves all."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._stays_open = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        return self._stays_open

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002 aiohttp's name
        return None

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002 aiohttp's name
        return None


class _Server(web.Server):
    """aiohttp's server, which besides says when its last connection has closed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came
        self.open_connections = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self.open_connections += 1
        self._empty.clear()
        super().connection_made(handler, transport)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.open_connections -= 1
        if self.open_connections == 0:
            self._empty.set()
        super().connection_lost(handler, exc)

    async def wait_empty(self) -> None:
        """Until no connection is open; the caller bounds it."""
        await self._empty.wait()


def _not_listening(settings: WorkerSettings, exc: OSError) -> CommandError:
    where = f"{settings.host}:{settings.port}"
    if exc.errno == errno.EADDRINUSE:
        return CommandError(f"{where} is taken: choose another port with --port or worker.port (0: any free one)")
    return CommandError(f"cannot listen on {where}: {exc.strerror or exc}; see worker.host and worker.port")
