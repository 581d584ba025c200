"""A worker's place in the fleet: its session, its elections, its view of the others. Where store and core meet."""
