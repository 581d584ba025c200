"""One page of metrics for several processes that do one job.

Law: pure. What counts (counters, histograms, connections, bytes) is summed, and stays in the sum when its process has
ended, so that a counter never goes back; of what each process sees for itself, the worst is shown.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

LARGEST: Final = frozenset(
    {"shardlead_view_age_seconds", "shardlead_view_led_shards", "shardlead_view_shards", "shardlead_view_workers",
     "shardlead_build_info", "process_max_fds"}
)  # fmt: skip
SMALLEST: Final = frozenset({"shardlead_view_fresh", "shardlead_view_revision", "process_start_time_seconds"})
_LASTING: Final = frozenset({"counter", "histogram", "summary"})

Families = Sequence[Metric]


def read_page(page: str) -> Families:
    """The families of a page in Prometheus' text format. Raises ValueError."""
    return tuple(text_string_to_metric_families(page))


def lasting(families: Families) -> Families:
    """What is left of a process that has ended: all that only grows."""
    return tuple(family for family in families if family.type in _LASTING)


def joined(pages: Iterable[Families]) -> Families:
    """All of them as one."""
    found: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for page in pages:
        for family in page:
            if family.name not in found:
                found[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
            known = values.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                known[key] = _together(family.name, known[key], sample.value) if key in known else sample.value
    for name, family in found.items():
        family.samples = [Sample(each, dict(labels), value) for (each, labels), value in values[name].items()]
    return tuple(found.values())


def _together(family: str, one: float, other: float) -> float:
    if family in LARGEST:
        return max(one, other)
    if family in SMALLEST:
        return min(one, other)
    return one + other


def write_page(families: Families) -> bytes:
    """The page in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Given(families))
    return generate_latest(registry)


class _Given(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
