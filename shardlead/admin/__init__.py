"""Health, metrics and map of a role, on a port of its own."""
