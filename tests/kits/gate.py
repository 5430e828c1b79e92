"""A gate at which runs of one model wait before they read a window.

Tests whose premise is that work is still running hold it here, instead of trusting that it takes
long enough. A gate is a file, so that one process can hold the runs of another:

    python -m tests.kits.gate FILE    runs the service with a gate
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from service.run.pixels import PixelStages

HELD = "pixels-held"
"""The model whose runs wait at a gate: the tiny land-cover model under another name."""
_PAUSE = 0.005


def zoo_with_a_held_model(root: Path) -> Path:
    """The tiny zoo and `pixels-held`."""
    from benchmarks.tiny_zoo import write_zoo  # imports onnx, which the service does not

    return held_model(write_zoo(root))


def held_model(root: Path) -> Path:
    """Only `pixels-held`, for a service with the built-in bundles."""
    from benchmarks.tiny_zoo import write_bundle  # as above

    write_bundle(root, HELD, "classify-pixels", "pixel", default=False)
    return root


class Gate:
    """Holds runs of `HELD` while its file exists.

    Args:
        file: contains the number of windows that each run may read, and exists while runs are held.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def hold(self, *, after: int = 0) -> None:
        """Stop each run after it has read `after` windows.

        Two windows are inferred at once, so all but the last two of them are finished; a job's
        progress is that of the window before the last finished one.
        """
        new = self.file.with_name(f"{self.file.name}.new")
        new.write_text(str(after))
        new.replace(self.file)

    def open(self) -> None:
        """Let all runs continue."""
        self.file.unlink(missing_ok=True)

    @contextmanager
    def held(self, *, after: int = 0) -> Iterator[None]:
        """Hold runs within the context."""
        self.hold(after=after)
        try:
            yield
        finally:
            self.open()

    @contextmanager
    def installed(self, *, leave: bool = False) -> Iterator[Gate]:
        """A context in which runs of this process wait at the gate.

        Args:
            leave: whether the gate keeps its state when the context ends.
        """
        read, gate = PixelStages.read, self

        def waits(stages: Any, window: Any) -> Any:
            done = vars(stages).setdefault("windows_read", 0)
            while _is_held(stages) and gate._closed(done):
                time.sleep(_PAUSE)
            stages.windows_read = done + 1
            return read(stages, window)

        with patch.object(PixelStages, "read", waits):
            try:
                yield self
            finally:
                if not leave:
                    self.open()

    def _closed(self, done: int) -> bool:
        try:
            return done >= int(self.file.read_text())
        except FileNotFoundError:
            return False


def _is_held(stages: Any) -> bool:
    """Whether a run waits at a gate: a run of `HELD` that was not cancelled."""
    cancelled = stages._cancelled is not None and stages._cancelled.is_set()
    return stages._model.card.name == HELD and not cancelled


if __name__ == "__main__":
    from service.__main__ import main

    with Gate(Path(sys.argv.pop())).installed():
        main()
