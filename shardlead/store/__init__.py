"""The store: guarded transactions, leases and watches over bytes. It knows no shard and no worker."""
