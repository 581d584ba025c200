"""What a real etcd 3.5.1 answered, byte for byte, and how to record it again:

    python -m tests.store.recording

Left out of the record: who answered and raft's term. Errors in the JSON itself are not in it: their text is Go's.
"""

import base64
import http.client
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from tests.support.etcd import etcd_server

Json = dict[str, Any]
FILE: Final = Path(__file__).with_name("etcd_3_5_1_answers.json")
WATCH_TIMEOUT_S: Final = 5.0


def _b(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _put(key: str, **more: str) -> Json:
    return {"request_put": {"key": _b(key), "value": _b("v"), **more}}


def _claim(shard: int) -> Json:
    key = _b(f"s{shard}")
    guard = {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
    taken, lost = [_put(f"s{shard}", lease="70")], [{"request_range": {"key": key}}]
    return {"request_txn": {"compare": [guard], "success": taken, "failure": lost}}


_A_TO_Z: Final = {"key": _b("a"), "range_end": _b("z")}

REQUESTS: Final[Sequence[tuple[str, Json]]] = (
    ("/v3/kv/range", {"key": _b("a")}),
    ("/v3/kv/put", {"key": _b("a"), "value": _b("1")}),
    ("/v3/kv/put", {"key": _b("b")}),
    ("/v3/kv/range", _A_TO_Z),
    ("/v3/kv/range", {**_A_TO_Z, "limit": "1"}),
    ("/v3/kv/range", {**_A_TO_Z, "keys_only": True}),
    ("/v3/kv/range", {**_A_TO_Z, "count_only": True}),
    ("/v3/kv/range", {"key": _b("a"), "revision": "99"}),
    ("/v3/kv/range", {}),
    ("/v3/kv/deleterange", {"key": _b("b")}),
    ("/v3/kv/deleterange", {"key": _b("b")}),
    ("/v3/kv/txn", {}),
    ("/v3/kv/txn", {"success": [_put("c"), {"request_delete_range": {"key": _b("none")}}]}),
    ("/v3/kv/txn", {"success": [_put("c"), _put("c")]}),
    ("/v3/kv/txn", {"compare": [{"key": _b("a"), "target": "MOD", "mod_revision": "1"}], "failure": [_put("d")]}),
    ("/v3/kv/txn", {"success": [_put("c", lease="71")]}),
    ("/v3/kv/txn", {"success": [_put(f"k{n}") for n in range(129)]}),
    ("/v3/lease/grant", {"ID": "70", "TTL": "600"}),
    ("/v3/lease/grant", {"ID": "72", "TTL": 1}),
    ("/v3/lease/grant", {"ID": "70", "TTL": "600"}),
    ("/v3/lease/grant", {"TTL": "9000000001"}),
    ("/v3/kv/txn", {"success": [_claim(1), _claim(2)]}),
    ("/v3/kv/txn", {"success": [_claim(2), _claim(3)]}),
    ("/v3/lease/keepalive", {"ID": "70"}),
    ("/v3/lease/keepalive", {"ID": "71"}),
    ("/v3/lease/timetolive", {"ID": "71", "keys": True}),
    ("/v3/lease/revoke", {"ID": "71"}),
    ("/v3/kv/lease/revoke", {"ID": "72"}),
    ("/v3/lease/leases", {}),
    ("/v3/lease/revoke", {"ID": "70"}),
    ("/v3/kv/range", {"key": _b("s1"), "revision": "8"}),
    ("/v3/kv/compaction", {"revision": "4"}),
    ("/v3/kv/compaction", {"revision": "4"}),
    ("/v3/kv/compaction", {"revision": "99"}),
    ("/v3/kv/range", {"key": _b("a"), "revision": "3"}),
    ("/v3/auth/authenticate", {"name": "n", "password": "p"}),
)

WATCHES: Final[Sequence[tuple[Json, int]]] = (
    ({"create_request": {**_A_TO_Z, "start_revision": "5"}}, 2),
    ({"create_request": {**_A_TO_Z, "start_revision": "5", "watch_id": "7"}}, 2),
    ({"create_request": {"key": _b("a")}}, 1),
    ({"create_request": {"key": _b("a"), "start_revision": "2"}}, 2),
    ({"create_request": {"key": _b("z"), "range_end": _b("a")}}, 1),
    ({"progress_request": {}}, 1),
)
"""Requests and how many lines their answers have before they fall silent."""

_WHO: Final = re.compile(rb'"(cluster_id|member_id)":"\d+",|,?"raft_term":"\d+"')


def without_names(answer: bytes) -> str:
    """An answer without what differs between servers."""
    return _WHO.sub(b"", answer).decode()


def answers(ask: Callable[[str, bytes], tuple[int, bytes]]) -> list[list[Any]]:
    """[status, body] for each of REQUESTS."""
    return [[status, without_names(body)] for status, body in (ask(path, orjson.dumps(raw)) for path, raw in REQUESTS)]


def watch_lines(url: str) -> list[list[str]]:
    """The lines of each of WATCHES."""
    return [_lines(url, orjson.dumps(raw), count) for raw, count in WATCHES]


def _lines(url: str, body: bytes, count: int) -> list[str]:
    parts = urlsplit(url)
    head = f"POST /v3/watch HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((parts.hostname, parts.port), WATCH_TIMEOUT_S) as connection:
        connection.sendall(head + body)
        with connection.makefile("rb") as file:
            found: list[str] = []
            while len(found) < count:
                line = file.readline()
                assert line, "the watch has ended"
                if line.startswith(b"{"):
                    found.append(without_names(line))
            return found


def over_http(url: str) -> Callable[[str, bytes], tuple[int, bytes]]:
    """Ask a server."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    host = parts.hostname

    def ask(path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, parts.port, timeout=5)
        try:
            connection.request("POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    return ask


def record() -> Json:
    """Ask a real etcd 3.5.1."""
    with etcd_server("3.5") as etcd:
        return {"answers": answers(over_http(etcd.url)), "watches": watch_lines(etcd.url)}


if __name__ == "__main__":
    FILE.write_bytes(orjson.dumps(record(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
