"""A program of somebody else's, on the stock `etcd3` package: it obeys lines of JSON and knows nothing of shardlead.

A process of its own, since `etcd3` imports only with protobuf's pure-Python implementation, which is chosen for a
whole process (PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python).
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import etcd3


def main(port: int) -> None:
    """Answer each command on stdin with one line on stdout, until stdin ends."""
    client = etcd3.client(host="127.0.0.1", port=port, timeout=5)
    lock = client.lock("somebody-else's", ttl=30)

    def read(prefix: str) -> dict[str, Any]:
        found = client.get_prefix(prefix)
        return {
            meta.key.decode(): {
                "value": value.decode("latin-1"),
                "mod_revision": meta.mod_revision,
                "create_revision": meta.create_revision,
                "lease": meta.lease_id,
            }
            for value, meta in found
        }

    def create(key: str) -> bool:
        """Take a key only if nobody has it."""
        succeeded, _answers = client.transaction(
            compare=[client.transactions.create(key) == 0],
            success=[client.transactions.put(key, "mine")],
            failure=[],
        )
        return bool(succeeded)

    commands: dict[str, Callable[..., Any]] = {
        "read": read,
        "create": create,
        "lock": lambda: lock.acquire(timeout=5),
        "holds": lock.is_acquired,
        "unlock": lock.release,
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(commands[name](*arguments)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
