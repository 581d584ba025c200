"""Which version this is."""

from importlib import metadata


def version_of() -> str:
    """The installed distribution's version; "0" in a tree that was never installed."""
    try:
        return metadata.version("shardlead")
    except metadata.PackageNotFoundError:
        return "0"
