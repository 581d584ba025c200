"""Who we are to the store: user and password turned into a token, again whenever the store has forgotten it.

Law: a refused token is never taken for a lost lease. Getting a token sends nothing of the request that needs it, so
what fails here was not sent.

etcd checks a password slowly on purpose (bcrypt), and goes on with it though nobody waits any more. So a question once
asked is left to be answered for longer than a call waits, and calls join it: a fleet that comes back all at once would
otherwise ask again and again, faster than the store can answer.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from shardlead.config import StoreSettings
from shardlead.store import gateway
from shardlead.store.faults import Faulted, Verdict, fault_of, judge
from shardlead.store.jsonfields import parse
from shardlead.store.transport import Channel, Transport, TransportError

_log = logging.getLogger("shardlead.store.credentials")

CLOSE_TIMEOUT_S: Final = 1.0


class Credentials:
    """A token for all endpoints: etcd's members share them. `close` ends what is under way."""

    def __init__(self, settings: StoreSettings, transport: Transport) -> None:
        self._username = settings.username
        self._password = settings.password
        self._patience_s = settings.call_timeout_s
        self._young_s = self._patience_s / 2  # then another endpoint is asked as well: this one may be dead
        self._transport = transport
        self._asking: dict[str, _Question] = {}  # at most one for each endpoint
        self._is_auth_off = False  # we have a user, but the store has no authentication
        self._last = ""
        self.token = ""

    @property
    def can_renew(self) -> bool:
        """Whether a refused token may be replaced by a better one."""
        return bool(self._username) and not self._is_auth_off

    def forget(self, headers: Mapping[str, str]) -> None:
        """The token in these headers was refused. Of many calls that are told so at once, one gets a new one."""
        if self.token == headers.get("Authorization"):
            self.token = ""

    def shown(self, headers: Mapping[str, str]) -> Mapping[str, str] | None:
        """`headers` with the token that was valid last, whatever became of it: for a request that the store may let
        pass without looking. None if there has not been any."""
        return {**headers, "Authorization": self._last} if self._last and self.can_renew else None

    async def authorized(self, headers: Mapping[str, str], endpoint: str, timeout_s: float) -> Mapping[str, str]:
        """`headers` with the token, if there are credentials. Raises TransportError, and Faulted if the store
        refuses the user."""
        if not self.can_renew:
            return headers
        if not self.token:
            await self._obtain(endpoint, timeout_s)
        return {**headers, "Authorization": self.token} if self.token else headers

    async def close(self) -> None:
        """End what is under way. Idempotent."""
        tasks = [question.task for question in self._asking.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)

    async def _obtain(self, endpoint: str, timeout_s: float) -> None:
        """Wait until there is a token, or no more use in waiting."""
        question = self._question(endpoint)
        await asyncio.wait({question.task}, timeout=timeout_s)
        if self.token or self._is_auth_off:
            return  # from this endpoint or from another one meanwhile
        if not question.task.done() or question.task.cancelled():
            raise TransportError(f"no token within {timeout_s:.3g} s", is_sent=False)
        failure = question.task.result()
        if isinstance(failure, Faulted):
            raise Faulted(failure.fault)
        raise TransportError("no token" if failure is None else str(failure), is_sent=False)

    def _question(self, endpoint: str) -> "_Question":
        """The newest, unless it is old and this endpoint has not been asked; else a new one."""
        now_s = asyncio.get_running_loop().time()
        young = [each for each in self._asking.values() if now_s - each.begun_s < self._young_s]
        question = young[-1] if young else self._asking.get(endpoint)
        if question is None:
            task = asyncio.create_task(self._authenticate(endpoint), name=f"authenticate at {endpoint}")
            question = self._asking[endpoint] = _Question(task, now_s)
            task.add_done_callback(lambda _: self._asking.pop(endpoint, None))
        return question

    async def _authenticate(self, endpoint: str) -> Exception | None:
        """Ask one endpoint for a token; what stands against it."""
        body = gateway.authenticate_body(self._username, self._password)
        try:
            answer = await self._transport.post(
                Channel.CALL, endpoint, gateway.AUTHENTICATE, body, gateway.HEADERS, self._patience_s
            )
            if answer.status == 200:
                self.token = self._last = gateway.token_of(parse(answer.body))
                return None
        except TransportError as exc:
            return TransportError(f"no token: {exc.reason}", is_sent=False)
        except ValueError as exc:
            return TransportError(f"no token: {exc}", is_sent=False)
        fault = fault_of(answer.status, answer.body)
        if "authentication is not enabled" in fault.message:
            self._is_auth_off = True
            _log.warning("store has no authentication; user and password are not used")
            return None
        if judge(fault) in (Verdict.NOT_NOW, Verdict.UNCERTAIN):
            return TransportError(f"no token: {fault}", is_sent=False)
        return Faulted(fault)


class _Question:
    """A token that was asked for."""

    __slots__ = ("begun_s", "task")

    def __init__(self, task: "asyncio.Task[Exception | None]", begun_s: float) -> None:
        self.task = task
        self.begun_s = begun_s
