"""Clients that send each operation once and write down what they know of its outcome.

`ok`: done, with what it was told. `fail`: surely not done: refused before a handler ran (503, 421, 4xx), or never sent.
`info`: nobody told them; it may happen yet, and stays open to the end of the history.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from shardlead.clock import SystemClock
from shardlead.core.contract import IDEMPOTENCY_KEY
from tests.support import linearizable

TIMEOUT_S: Final = 15.0
NOT_DONE: Final = frozenset({400, 404, 421, 503})
READS: Final = 0.35
THINKS: Final = 0.15
HAS_KEY: Final = 0.3
IMPATIENT: Final = 0.04
"""Share of the operations whose client leaves before an answer may come."""


@dataclass(slots=True)
class Record:
    """One operation, as its client lived it. Times are of the boot-time clock, which all processes here share."""

    number: int
    client: str
    name: str
    """"lists/…" or "counts/…"."""
    what: str
    word: str
    began_ns: int
    ended_ns: int = 0
    outcome: str = "info"
    status: int = 0
    seen: Any = None
    worker: str = ""
    shard: int = -1
    epoch: int = -1
    detail: str = ""
    has_key: bool = False

    def operation(self) -> linearizable.Operation:
        """As the checker wants it."""
        is_ok = self.outcome == "ok"
        seen = tuple(self.seen) if isinstance(self.seen, list) else self.seen
        return linearizable.Operation(
            what=self.what,
            began_ns=self.began_ns,
            ended_ns=self.ended_ns if is_ok else None,
            word=self.word,
            seen=seen if is_ok else None,
            name=f"#{self.number} {self.client} [{self.status} {self.worker} epoch {self.epoch}] {self.detail}".strip(),
        )


class Workload:
    """Some clients, each one operation after the other, on the keys of the moment."""

    def __init__(self, addresses: Sequence[str], seed: int, *, clients: int, pause_s: float) -> None:
        self.records: list[Record] = []
        self.keys: list[str] = []
        self._addresses = addresses
        self._clock = SystemClock()
        self._is_over = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._run(f"c{number}", random.Random(f"{seed}-{number}"), pause_s))
            for number in range(clients)
        ]

    def set_keys(self, prefix: str, lists: int, counts: int) -> None:
        """From now on these keys."""
        self.keys = [f"lists/{prefix}-l{number}" for number in range(lists)]
        self.keys += [f"counts/{prefix}-c{number}" for number in range(counts)]

    async def finish(self) -> None:
        """Let what is under way end."""
        self._is_over.set()
        if not self._tasks:
            return
        await asyncio.wait(self._tasks, timeout=TIMEOUT_S + 5)
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _run(self, client: str, rng: random.Random, pause_s: float) -> None:
        async with aiohttp.ClientSession() as session:
            while not self._is_over.is_set():
                await asyncio.sleep(rng.expovariate(1.0 / pause_s))
                if self.keys:
                    await self.act(session, client, rng.choice(self.keys), rng)

    async def act(self, session: aiohttp.ClientSession, client: str, name: str, rng: random.Random) -> Record:
        """Any operation, to any router."""
        is_read = rng.random() < READS
        what = "read" if is_read else "append" if name.startswith("lists/") else "add"
        return await self.send(
            session,
            client,
            name,
            what,
            router=rng.randrange(len(self._addresses)),
            is_stored=is_read and rng.random() < 0.5,
            has_key=not is_read and rng.random() < HAS_KEY,
            think_s=rng.uniform(0.0, 0.3) if not is_read and rng.random() < THINKS else 0.0,
            patience_s=rng.uniform(0.01, 0.5) if rng.random() < IMPATIENT else TIMEOUT_S,
        )

    async def send(
        self,
        session: aiohttp.ClientSession,
        client: str,
        name: str,
        what: str,
        *,
        router: int = 0,
        is_stored: bool = False,
        has_key: bool = False,
        think_s: float = 0.0,
        patience_s: float = TIMEOUT_S,
    ) -> Record:
        """One operation; never raises for what the world does."""
        number = len(self.records)
        record = Record(number, client, name, what, f"w{number}" if what == "append" else "", self._clock.now_ns())
        record.has_key = has_key
        self.records.append(record)
        headers = {IDEMPOTENCY_KEY: f"op-{number}"} if has_key else {}
        url = f"http://{self._addresses[router]}/{name}" + (
            f"?think={think_s:.3f}" if think_s else "?stored=" if is_stored else ""
        )
        try:
            async with session.request(
                "GET" if what == "read" else "POST",
                url,
                data=record.word or None,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=patience_s),
            ) as answer:
                body = await answer.read()
                record.status = answer.status
                if answer.status == 200:
                    told = orjson.loads(body)
                    record.seen, record.worker = told["value"], told["worker"]
                    record.shard, record.epoch, record.outcome = told["shard"], told["epoch"], "ok"
                else:
                    record.detail = body.decode(errors="replace")[:200]
                    record.outcome = "fail" if answer.status in NOT_DONE else "info"
        except aiohttp.ClientConnectorError as exc:
            record.outcome, record.detail = "fail", str(exc)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            record.detail = f"{type(exc).__name__}: {exc}"
        record.ended_ns = self._clock.now_ns()
        return record

    def counts(self) -> dict[str, int]:
        """How many operations came to which outcome."""
        return {kind: sum(1 for each in self.records if each.outcome == kind) for kind in ("ok", "fail", "info")}

    def write(self, file: Path) -> None:
        """Keep the history, one operation a line."""
        file.write_bytes(b"".join(orjson.dumps(asdict(record)) + b"\n" for record in self.records))


def read_history(file: Path) -> list[Record]:
    """What `write` kept."""
    return [Record(**orjson.loads(line)) for line in file.read_bytes().splitlines()]
