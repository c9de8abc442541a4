"""``python -m pyrodiff`` is the command ``pyrodiff``."""

import sys

from .command.cli import main

if __name__ == "__main__":
    sys.exit(main())
