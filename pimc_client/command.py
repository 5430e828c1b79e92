"""The `pimc` command's door: what it needs beside the SDK, and errors as one line.

The command itself is in `cli`, which needs typer and rich; importing this module does not.
"""

from __future__ import annotations

import sys

from pimc_client.errors import PIMCError

NEEDS = (
    "the pimc command needs typer and rich, which are not installed: "
    "pip install 'pimc-client[command]'"
)


def main() -> None:
    """Run the command; exit 1 with one line where something is wrong."""
    try:
        from pimc_client.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(NEEDS)
    try:
        app()
    # What our own checks and the file system say of a path is the user's to mend as well.
    except (PIMCError, OSError, ValueError) as error:
        sys.exit(f"pimc: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
