"""Tests of the store: its model, its embedded server, its client."""
