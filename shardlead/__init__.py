"""shardlead: one leader per shard by lease, requests routed to it by key, and epochs to fence with."""
