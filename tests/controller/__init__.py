"""Tests of the controller's loop against real stores."""
