"""`python -m loadtest …`: a scenario, or a measurement without a cluster. Each is imported when it is asked for."""

import importlib
import importlib.util
import sys
from typing import Final

MEASUREMENTS: Final = {
    "cost": "loadtest.cost",
    "route": "loadtest.route",
    "client": "loadtest.client_cost",
    "memory": "loadtest.memory",
}


def main(arguments: list[str]) -> int:
    """Run what the first argument names. The exit code: 1 for a broken promise, 2 for a wrong command line."""
    if arguments and (home := MEASUREMENTS.get(arguments[0])):
        if importlib.util.find_spec(home) is None:
            print(f"loadtest: {arguments[0]!r} is not part of this build", file=sys.stderr)
            return 2
        return int(importlib.import_module(home).main(arguments[1:]) or 0)
    from loadtest import command  # what it imports takes longer than the measurements need to begin

    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
