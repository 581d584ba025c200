"""A process that sends each request to its shard's leader."""
