"""Load tests: open-loop load, faults, checks and a report per shard."""
