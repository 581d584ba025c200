"""Who we are to the store: user and password turned into a token, again whenever the store has forgotten it.

Law: a refused token is never taken for a lost lease. Getting a token sends nothing of the request that needs it, so
what fails here was not sent.
"""

import asyncio
import logging
from collections.abc import Mapping

from shardlead.config import StoreSettings
from shardlead.store import gateway
from shardlead.store.faults import Faulted, Verdict, fault_of, judge
from shardlead.store.jsonfields import parse
from shardlead.store.transport import Channel, Transport, TransportError

_log = logging.getLogger("shardlead.store.credentials")


class Credentials:
    """A token for all endpoints: etcd's members share them."""

    def __init__(self, settings: StoreSettings, transport: Transport) -> None:
        self._username = settings.username
        self._password = settings.password
        self._transport = transport
        self._lock = asyncio.Lock()
        self._is_auth_off = False  # we have a user, but the store has no authentication
        self.token = ""

    @property
    def can_renew(self) -> bool:
        """Whether a refused token may be replaced by a better one."""
        return bool(self._username) and not self._is_auth_off

    def forget(self, headers: Mapping[str, str]) -> None:
        """The token in these headers was refused. Of many calls that are told so at once, one gets a new one."""
        if self.token == headers.get("Authorization"):
            self.token = ""

    async def authorized(self, headers: Mapping[str, str], endpoint: str, timeout_s: float) -> Mapping[str, str]:
        """`headers` with the token, if there are credentials. Raises TransportError, and Faulted if the store
        refuses the user."""
        if not self.can_renew:
            return headers
        if not self.token:
            await self._authenticate(endpoint, timeout_s)
        return {**headers, "Authorization": self.token} if self.token else headers

    async def _authenticate(self, endpoint: str, timeout_s: float) -> None:
        body = gateway.authenticate_body(self._username, self._password)
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                if self.token or self._is_auth_off:
                    return
                answer = await self._transport.post(
                    Channel.CALL, endpoint, gateway.AUTHENTICATE, body, gateway.HEADERS, timeout_s
                )
                if answer.status == 200:
                    self.token = gateway.token_of(parse(answer.body))
                    return
        except TimeoutError as exc:
            raise TransportError(f"no token within {timeout_s:.3g} s", is_sent=False) from exc
        except TransportError as exc:
            raise TransportError(f"no token: {exc.reason}", is_sent=False) from exc
        except ValueError as exc:
            raise TransportError(f"no token: {exc}", is_sent=False) from exc
        fault = fault_of(answer.status, answer.body)
        if "authentication is not enabled" in fault.message:
            self._is_auth_off = True
            _log.warning("store has no authentication; user and password are not used")
            return
        if judge(fault) in (Verdict.NOT_NOW, Verdict.UNCERTAIN):
            raise TransportError(f"no token: {fault}", is_sent=False)
        raise Faulted(fault)
