"""`python -m shardlead` and the `shardlead` script: the command line, once it is loaded."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Load the command line and run it. Ctrl-C while it loads ends the process, without a traceback."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not if whoever started us has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from shardlead import cli

    signal.signal(signal.SIGINT, usual)
    cli.main()


if __name__ == "__main__":
    main()
