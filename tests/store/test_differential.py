"""The model against real etcds: the same random operations to both, and every answer must be the same.

Whoever changes the model runs this first. It compares at the level of JSON, so the wire's spelling is held as well;
only who answered (cluster and member) and raft's term are left out, and the seconds that a lease has left.
"""

import base64
import http.client
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import pytest

from shardlead.clock import SystemClock
from shardlead.store.answers import encode_event
from shardlead.store.embedded import EmbeddedStore
from shardlead.store.model import Model
from tests.support.etcd import KINDS, EtcdCluster, etcd_server

Json = dict[str, Any]
Request = tuple[str, Json]

SEEDS: Final = (11, 22, 33)
LONG_SEEDS: Final = tuple(range(100, 140))
STEPS: Final = 400
KEYS: Final = (b"a", b"a/1", b"a/2", b"b", b"c", b"c\x00", b"d\xff", b"\xff")
ENDS: Final = (b"a0", b"b", b"c", b"d", b"\x00", b"a", b"\xff")
LEASES: Final = (1, 2, 3, 4)
TTL_S: Final = 5_000  # far away: time is tested elsewhere


class Requests:
    """Random requests, chosen so that about half of them meet something that is there."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def next(self, revision: int) -> Request:
        """One more, for a store at about this revision."""
        choose = self._rng.choices(
            ("range", "put", "delete", "txn", "grant", "revoke", "keepalive", "ttl", "leases", "compact"),
            (20, 20, 7, 40, 4, 2, 3, 5, 1, 0.6),
        )[0]
        match choose:
            case "range":
                return "/v3/kv/range", self._range(revision)
            case "put":
                return "/v3/kv/put", self._put()
            case "delete":
                return "/v3/kv/deleterange", self._span()
            case "txn":
                return "/v3/kv/txn", self._txn(revision, 0)
            case "grant":
                return "/v3/lease/grant", {"ID": str(self._lease()), "TTL": TTL_S}
            case "revoke":
                return "/v3/lease/revoke", {"ID": self._lease()}
            case "keepalive":
                return "/v3/lease/keepalive", {"ID": self._lease()}
            case "ttl":
                return "/v3/lease/timetolive", {"ID": self._lease(), "keys": self._rng.random() < 0.8}
            case "leases":
                return "/v3/lease/leases", {}
            case _:
                return "/v3/kv/compaction", {"revision": str(revision + self._rng.randint(-30, 1))}

    def span(self) -> Json:
        """A key or a range, and not an empty one."""
        return {**self._span(), "key": _b64(self._rng.choice(KEYS[:3]))}

    def _lease(self) -> int:
        return self._rng.choice(LEASES)

    def _key(self) -> str:
        return _b64(self._rng.choice(KEYS)) if self._rng.random() < 0.99 else ""

    def _span(self) -> Json:
        span = {"key": self._key()}
        if self._rng.random() < 0.3:
            span["range_end"] = _b64(self._rng.choice(ENDS))
        return span

    def _range(self, revision: int) -> Json:
        asked: Json = self._span()
        if self._rng.random() < 0.3:
            asked["revision"] = str(revision + self._rng.randint(-20, 1))
        if self._rng.random() < 0.3:
            asked["limit"] = self._rng.randint(0, 3)
        for name in ("keys_only", "count_only"):
            if self._rng.random() < 0.15:
                asked[name] = True
        return asked

    def _put(self) -> Json:
        put: Json = {"key": self._key(), "value": _b64(b"%d" % self._rng.randint(0, 9))}
        if self._rng.random() < 0.4:
            put["lease"] = str(self._lease())
        return put

    def _compare(self, revision: int) -> Json:
        near = str(revision - self._rng.randint(0, 10))
        count = str(self._rng.randint(0, 3))
        target, operand = self._rng.choice(
            (
                ("CREATE", {"create_revision": self._rng.choice(("0", near))}),
                ("MOD", {"mod_revision": self._rng.choice(("0", near))}),
                ("VERSION", {"version": count}),
                ("VALUE", {"value": _b64(b"%d" % self._rng.randint(0, 9))}),
                ("LEASE", {"lease": self._rng.choice(("0", str(self._lease())))}),
            )
        )
        result = self._rng.choice(("EQUAL", "NOT_EQUAL", "GREATER", "LESS"))
        return {**self._span(), "target": target, "result": result, **operand}

    def _txn(self, revision: int, depth: int) -> Json:
        txn: Json = {}
        for name in ("success", "failure"):
            txn[name] = [self._op(revision, depth) for _ in range(self._rng.choice((0, 1, 1, 2, 3)))]
        txn["compare"] = [self._compare(revision) for _ in range(self._rng.choice((0, 1, 1, 2)))]
        if self._rng.random() < 0.02:
            txn["failure"] += [{"request_range": {"key": self._key()}}] * self._rng.randint(120, 130)
        return txn

    def _op(self, revision: int, depth: int) -> Json:
        kind = self._rng.choices(("range", "put", "delete", "txn"), (3, 6, 2, 3 if depth < 2 else 0))[0]
        match kind:
            case "range":
                return {"request_range": self._range(revision)}
            case "put":
                return {"request_put": self._put()}
            case "delete":
                return {"request_delete_range": self._span()}
            case _:
                return {"request_txn": self._txn(revision, depth + 1)}


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


class RealAnswers:
    """A real etcd over one kept connection."""

    def __init__(self, etcd: EtcdCluster) -> None:
        parts = urlsplit(etcd.url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        return response.status, response.read()

    def events(self, asked: Json, count: int) -> list[Json]:
        """The first `count` events of a watch."""
        self._connection.request("POST", "/v3/watch", orjson.dumps({"create_request": asked}))
        response = self._connection.getresponse()
        found: list[Json] = []
        while len(found) < count:
            found += orjson.loads(response.readline())["result"].get("events", ())
        response.close()
        self._connection.close()  # a watch has no other end; the next request connects again
        return found

    def close(self) -> None:
        self._connection.close()


def _normal(kind: str, path: str, answer: tuple[int, bytes]) -> Json:
    """An answer without what may differ."""
    status, body = answer
    raw = orjson.loads(body)
    shown: Json = raw.get("result", raw)
    for name in ("cluster_id", "member_id", "raft_term"):
        shown.get("header", {}).pop(name, None)
    if path.endswith("timetolive") and shown.get("TTL") != "-1":
        shown["TTL"] = "some"
        shown["keys"] = sorted(shown.get("keys", ()))
    if kind == "3.4" and status == 412:
        status = 400  # the one status in which 3.4 differs: a failed precondition
    return {"status": status, **raw}


@contextmanager
def _both(kind: str) -> Iterator[tuple[RealAnswers, EmbeddedStore]]:
    rng = random.Random(1)
    with etcd_server(kind) as etcd, closing(RealAnswers(etcd)) as real:
        yield real, EmbeddedStore(Model(rng=rng), clock=SystemClock(), rng=rng)


@pytest.mark.etcd
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_answers_as_etcd_does(kind: str, is_long: bool) -> None:
    """Whatever is asked, model and etcd give the same answer, the same error, the same revisions; and in the end
    the same events."""
    with _both(kind) as (real, embedded):
        for seed in LONG_SEEDS if is_long else SEEDS:
            requests = Requests(seed)
            for step in range(STEPS):
                path, asked = requests.next(embedded.model.revision)
                body = orjson.dumps(asked)
                expected = _normal(kind, path, real.answer(path, body))
                actual = _normal(kind, path, embedded.answer(path, body))
                assert expected == actual, f"seed {seed}, step {step}: {path} {body.decode()}"
            for span in (EVERYTHING, requests.span()):
                _compare_histories(real, embedded, span)
                _compare_watches(real, embedded, span)


EVERYTHING: Final[Json] = {"key": _b64(b"\x00"), "range_end": _b64(b"\x00")}


def _compare_histories(real: RealAnswers, embedded: EmbeddedStore, span: Json) -> None:
    """What both have at the revisions that are left, at most a hundred."""
    last = embedded.model.revision
    for revision in range(max(1, embedded.model.compacted, last - 100), last + 1):
        body = orjson.dumps({**span, "revision": str(revision)})
        expected = _normal("", "", real.answer("/v3/kv/range", body))
        assert expected == _normal("", "", embedded.answer("/v3/kv/range", body)), f"at {revision}"


def _compare_watches(real: RealAnswers, embedded: EmbeddedStore, span: Json) -> None:
    """What both tell a watch that begins one after the compacted revision (at it, these versions lose deletions)."""
    following = start = max(2, embedded.model.compacted + 1)
    key, range_end = (base64.b64decode(span.get(name, "")) for name in ("key", "range_end"))
    expected: list[Json] = []
    while following <= embedded.model.revision:
        batch, following = embedded.model.events_since(following, key, range_end)
        expected += [encode_event(event) for event in batch.events]
    assert expected == real.events({**span, "start_revision": str(start)}, len(expected))
