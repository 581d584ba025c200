"""The tests of shardlead; `python -m tests` is the whole check."""
