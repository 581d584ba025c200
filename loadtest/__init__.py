"""Load tests: open-loop load, faults, checks and a report per shard.

    python -m loadtest SCENARIO [--rate 1000] [--duration 30] [--report FILE.html] [--json FILE.json]

`python -m loadtest --help` names the scenarios, each with what it promises; the exit code is 1 if that is broken.

Law: requests leave on schedule whatever the answers do, and a request's latency counts from the moment it was due, so
that a stalled system counts against itself (no coordinated omission). Nothing is sent twice. This package measures
shardlead from outside: it imports the front door and `shardlead.testing` alone, and finds a key's shard by itself.
"""
