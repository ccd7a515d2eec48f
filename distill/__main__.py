"""`python -m distill` is `turbo-distill`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
