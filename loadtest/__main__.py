"""`python -m loadtest WHAT`: see --help."""

import sys

from loadtest import cost

if __name__ == "__main__":
    sys.exit(cost.main(sys.argv[2:]))
