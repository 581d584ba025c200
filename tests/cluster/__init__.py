"""Sessions, elections and letters, against real stores."""
