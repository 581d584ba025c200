"""What `shardlead dev` tells of a cluster's life."""

from typing import Any

from shardlead.narrator import Narrator


def _leader(shard: int, worker: str | None, t: float, revision: int) -> dict[str, Any]:
    return {"event": "leader", "shard": shard, "worker": worker, "t": t, "revision": revision, "previous": None}


def _worker(name: str, state: str) -> dict[str, Any]:
    return {"event": "worker", "worker": name, "state": state, "t": 0.0}


def _three() -> Narrator:
    narrator = Narrator()
    narrator.begin({shard: f"w{shard % 3 + 1}" for shard in range(30)}, {"w1": "up", "w2": "up", "w3": "up"}, 100)
    return narrator


def test_many_changes_at_once_are_one_line_a_pair() -> None:
    """A graceful stop is told as who took how many shards from whom, and why."""
    narrator = _three()
    narrator.observe(_worker("w1", "draining"))
    for number, shard in enumerate(range(0, 30, 3)):
        narrator.observe(_leader(shard, "w2" if number < 6 else "w3", 1.0, 101 + number))
    assert narrator.tell() == [
        "w1 is leaving",
        "w1 -> w2: 6 shards (w1 is leaving)",
        "w1 -> w3: shards 18, 21, 24, 27 (w1 is leaving)",
    ]
    narrator.observe(_worker("w1", "gone"))
    assert narrator.tell() == ["w1 left"]
    assert narrator.counts() == {"w2": 16, "w3": 14}
    assert not narrator.has_news


def test_a_crash_names_the_time_without_a_leader() -> None:
    """Between the end of a lease and the next claim the shard had no leader; the longest such time is told."""
    narrator = _three()
    narrator.died("w1", "SIGKILL")
    narrator.observe(_worker("w1", "gone"))
    narrator.observe(_leader(0, None, 5.0, 101))
    narrator.observe(_leader(3, None, 5.0, 101))
    narrator.observe(_leader(0, "w2", 5.020, 102))
    narrator.observe(_leader(3, "w2", 5.031, 103))
    assert narrator.tell() == [
        "w1 died (SIGKILL)",
        "w1 -> w2: shards 0, 3 (w1 died), without a leader for at most 31 ms",
    ]


def test_a_death_is_told_once_whichever_news_comes_first() -> None:
    """A worker's parent revokes its lease before it ends itself: the store tells of the death before the process."""
    narrator = _three()
    narrator.observe(_worker("w1", "gone"))
    narrator.observe(_leader(0, "w2", 5.020, 102))
    narrator.died("w1", "SIGKILL")
    assert narrator.tell() == ["w1 died (SIGKILL)", "w1 -> w2: shard 0 (w1 died)"]


def test_a_shard_that_stays_alone_is_told_then_and_when_it_is_led() -> None:
    """A telling between loss and claim breaks no thread: the source and the time are remembered."""
    narrator = _three()
    narrator.observe(_worker("w1", "gone"))
    narrator.observe(_leader(0, None, 5.0, 101))
    assert narrator.tell() == ["w1 is gone: its lease ended", "w1 -> nobody: shard 0 (w1 is gone)"]
    narrator.observe(_leader(0, "w3", 7.5, 102))
    assert narrator.tell() == ["w1 -> w3: shard 0 (w1 is gone), without a leader for at most 2500 ms"]


def test_a_shard_that_is_only_tried_is_told_in_words() -> None:
    """An `open()` that fails: a claim given up at once leaves no source and no target to name."""
    narrator = Narrator()
    narrator.observe(_leader(7, "w2", 1.0, 1))
    narrator.observe(_leader(7, None, 1.1, 2))
    assert narrator.tell() == ["shard 7: claimed and given up, still nobody leads"]


def test_the_first_leaders_and_a_new_epoch_in_place() -> None:
    """A first claim has no source; a re-mint keeps the leader and says so."""
    narrator = Narrator()
    narrator.observe(_worker("w10", "up"))
    narrator.observe(_worker("w2", "up"))
    narrator.observe(_leader(7, "w2", 1.0, 1))
    assert narrator.tell() == ["w10 joined", "w2 joined", "w2 leads shard 7"]
    narrator.observe(_leader(7, "w2", 2.0, 2))
    assert narrator.tell() == ["w2 leads shard 7 again, under a new epoch"]
    assert list(narrator.counts()) == ["w2", "w10"]


def test_events_that_the_map_holds_already_are_not_told() -> None:
    """The stream may begin before the map was read; nothing is told twice."""
    narrator = _three()
    narrator.observe(_leader(0, "w2", 1.0, 100))
    assert narrator.tell() == []
    assert narrator.leaders[0] == "w1"


def test_kinds_of_a_newer_build_are_passed_over() -> None:
    """An event of an unknown kind is no error."""
    narrator = _three()
    narrator.observe({"event": "weather", "t": 1.0})
    assert not narrator.has_news
