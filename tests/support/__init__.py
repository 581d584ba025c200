"""What several tests need: real servers, load, ways to wait."""
