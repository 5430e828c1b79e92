"""Passes: what a run does with each window of a raster, as values that another process can open.

    Pass ──open──▶ Stages: read a window → infer → the arrays to store

A `Pass` holds no open file and no session, so that it can be sent to the workers of a cluster. Work
that needs the process of the run, such as its scratch rasters in memory, is given as `Stages`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.grid import Window
from service.read.geotiff import BlockCache
from service.run.windows import Arrays


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The three functions of a pass, over open files."""

    read: Callable[[Window], Any]
    """Reads a window; called ahead of `infer`, from one thread at a time."""
    infer: Callable[[Any], Any]
    """Predicts from the result of `read`; called from several threads at once."""
    to_arrays: Callable[[Window, Any], Arrays]
    """Converts the result of `infer` to the arrays that the journal stores."""


class Pass(Protocol):
    """One pass over the windows of a raster. `pickle` copies it, but for its model."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that `open` opens."""
        ...

    def open(
        self, cache: BlockCache, cancelled: threading.Event | None
    ) -> AbstractContextManager[Stages]:
        """Open the files that the pass reads, until the end of the context.

        Args:
            cache: GDAL's block cache of this process.
            cancelled: an event that cancels the pass when it is set; None never cancels it.
        """
        ...
