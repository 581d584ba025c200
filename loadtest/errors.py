"""What can go wrong before anything was measured."""


class CannotBegin(Exception):
    """There is nothing to measure; the text says what is missing and what to do."""
