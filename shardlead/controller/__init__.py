"""The loop that keeps leadership even: looks, plans, writes wishes."""
