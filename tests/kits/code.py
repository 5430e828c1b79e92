"""Runs the text of a program, as `python -c` does: a module for `tests.kits.forks`.

python -m tests.kits.code TEXT [ARGUMENT ...]
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    text = sys.argv.pop(1)
    exec(text, {"__name__": "__main__"})  # noqa: S102 - the program is a test's own
