"""A process that leads shards and serves their requests."""
