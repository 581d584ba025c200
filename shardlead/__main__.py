"""`python -m shardlead`: the same as the `shardlead` script."""

from shardlead.cli import main

if __name__ == "__main__":
    main()
