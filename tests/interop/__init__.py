"""Other people's etcd clients beside ours, on the same store."""
