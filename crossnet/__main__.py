"""`python -m crossnet` is the `crossnet` command."""

import sys

from crossnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
