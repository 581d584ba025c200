"""Real processes, real sockets, real signals: the whole of shardlead seen from outside."""
