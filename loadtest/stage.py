"""The cluster under load, as a scenario sees it: time, what may be done to it, and a note of what was done.

Law: every wait here is bounded, and what is done to the cluster is marked with its time before it is done.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from loadtest.gate import Gate
from loadtest.result import Mark
from shardlead.testing import LocalCluster

EVEN_TIMEOUT_S: Final = 40.0
LED_MARGIN_S: Final = 10.0
DO_TIMEOUT_S: Final = 120.0


class Stage:
    """`own` is the cluster if it was started here; scenarios that need one use `cluster`."""

    def __init__(
        self,
        own: LocalCluster | None,
        *,
        duration_s: float,
        ttl_s: int,
        now_s: Callable[[], float],
        choose: Callable[[str], None],
        on_mark: Callable[[Mark], None],
        gates: dict[str, list[Gate]],
        do: str = "",
    ) -> None:
        self.own, self.duration_s, self.ttl_s, self.now_s, self.choose = own, duration_s, ttl_s, now_s, choose
        self.gates = gates
        """The gates between a worker and its store, of workers that have some."""
        self.do = do
        self.marks: list[Mark] = []
        self.losses: list[tuple[float, str]] = []
        """When which worker was taken away; "" where it is not known which."""
        self._on_mark = on_mark

    @property
    def cluster(self) -> LocalCluster:
        """The cluster that was started here."""
        assert self.own is not None, "this scenario needs a cluster of its own"
        return self.own

    async def until(self, share: float) -> None:
        """Return when that share of the duration has passed; at once if it has."""
        await asyncio.sleep(max(0.0, share * self.duration_s - self.now_s()))

    def mark(self, text: str, *, is_fault: bool = False) -> None:
        """Note what happens now."""
        mark = Mark(round(self.now_s(), 3), text, is_fault)
        self.marks.append(mark)
        self._on_mark(mark)

    def lose(self, worker: str, text: str) -> None:
        """Note that `worker` is taken away now, with all that it leads."""
        self.losses.append((self.now_s(), worker))
        self.mark(text, is_fault=True)

    async def led_elsewhere(self, worker: str, within_s: float) -> None:
        """Every shard has a leader, and it is not `worker`. Raises ProcessFailed."""
        await self.cluster.wait_map(
            lambda seen: seen.is_led and not seen.counts().get(worker), f"led without {worker}", within_s + LED_MARGIN_S
        )

    async def back(self, worker: str) -> None:
        """Start `worker` again under its name, and wait until leadership is even."""
        await self.cluster.wait_gone(worker, self.ttl_s + LED_MARGIN_S)
        self.mark(f"{worker} starts again")
        await self.cluster.add_worker(worker)
        await self.cluster.wait_even(EVEN_TIMEOUT_S)

    async def run_command(self) -> None:
        """Run the operator's command (`--do`), which makes the fault of a cluster that was not started here."""
        self.losses.append((self.now_s(), ""))
        self.mark(self.do, is_fault=True)
        process = await asyncio.create_subprocess_shell(self.do, stdin=asyncio.subprocess.DEVNULL)
        try:
            async with asyncio.timeout(DO_TIMEOUT_S):
                code = await process.wait()
        except BaseException:  # cancelled, too: the command must not outlive the run that it was made for
            process.kill()
            await process.wait()
            raise
        self.mark(f"the command ended with code {code}")
