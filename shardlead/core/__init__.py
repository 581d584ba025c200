"""Decisions: pure functions over plain values. Nothing here awaits, reads a clock, draws a random number or logs."""
