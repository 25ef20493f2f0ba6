"""`python -m bnlab`, and the program `bnlab`."""

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from bnlab.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
