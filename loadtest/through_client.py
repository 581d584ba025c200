"""Requests through the smart client: straight to each key's leader, one task each.

Law: as `wire`: a request is begun exactly once; what the client does with it then (hold it, send it again where that is
safe) is what is measured. What the client raises is a failure with its problem as the reason.
"""

import asyncio
import contextlib
from typing import Any, Final

import shardlead
from loadtest.wire import Ending, Request

NAME: Final = "Client"


def is_there() -> bool:
    """Whether this build has the smart client."""
    return hasattr(shardlead, NAME)


class ClientRoute:
    """One client of the cluster, on its own connections to the workers."""

    def __init__(self, store: str, cluster: str, path: str, ending: Ending) -> None:
        self._ending = ending
        self._path = path
        self._client: Any = getattr(shardlead, NAME)(store.split(","), cluster=cluster)
        self._exit = contextlib.AsyncExitStack()
        self._tasks: dict[Request, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<ClientRoute, {len(self._tasks)} under way, {self._client!r}>"

    @property
    def connections(self) -> int:
        """As many as requests are under way, about; the client does not say."""
        return len(self._tasks)

    async def open(self) -> None:
        await self._exit.enter_async_context(self._client)

    def send(self, request: Request) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(request))
        self._tasks[request] = task
        task.add_done_callback(lambda _task: self._tasks.pop(request, None))

    def give_up(self, request: Request) -> None:
        task = self._tasks.get(request)
        if task is not None:
            task.cancel()

    def sweep(self) -> None:
        """The client closes what is idle by itself."""

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._exit.aclose()

    async def _ask(self, request: Request) -> None:
        method = "POST" if request.is_post else "GET"
        headers = {"Idempotency-Key": request.idempotency_key} if request.idempotency_key else {}
        data = bytes(request.payload_bytes) if request.is_post else None
        try:
            asking = self._client.request(
                method, self._path.replace("{key}", request.key), key=request.key, data=data, headers=headers
            )
            async with asking as answer:
                status, body = answer.status, await answer.read()
        except shardlead.ShardleadError as exc:
            self._ending.failed(request, _reason(exc))
        else:
            self._ending.answered(request, status, body)


def _reason(exc: shardlead.ShardleadError) -> str:
    """The error's stable kind, as a router's problem is named; else its class."""
    return str(getattr(exc, "kind", "")) or type(exc).__name__
