"""The command ``pyrodiff``, also as ``python -m pyrodiff``."""

import os
import signal
import sys

from .command.stopping import leave


def main() -> int:
    """Run the command of this process.

    Returns:
        The exit code.
    """
    signal.signal(signal.SIGINT, leave)  # imports take seconds; Ctrl-C must not raise in the middle of one
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, whatever a notebook has set for the screen
    from .command.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
