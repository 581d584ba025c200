"""Tests of the smart client."""
