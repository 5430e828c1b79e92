"""Recycled memory for windows: the one owner of buffers that a later window takes again."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_CACHE_LINE = 64


class BufferPool:
    """Memory of windows that were read and are done with; a context manager that frees it.

    New memory comes from the system as pages of zeros, which cost as much as scaling the pixels
    does. Safe for many threads.
    """

    def __init__(self) -> None:
        self._spare: dict[type[np.generic], list[NDArray[Any]]] = defaultdict(list)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._spare.clear()

    def take(
        self, planes: tuple[int, ...], plane: tuple[int, ...], kind: type[np.generic]
    ) -> NDArray[Any]:
        """An uninitialised array as `spaced` makes it, in recycled memory if there is enough."""
        with self._lock:
            spare = self._spare[kind].pop() if self._spare[kind] else None
        return spaced(planes, plane, kind, spare)

    def give_back(self, *arrays: NDArray[Any]) -> None:
        """Recycle arrays from `take`; neither they nor views of them may be used afterwards."""
        with self._lock:
            for array in arrays:
                # The whole memory: an edge window's arrays are smaller than what they lie in.
                self._spare[array.dtype.type].append(array if array.base is None else array.base)


def spaced(
    planes: tuple[int, ...],
    plane: tuple[int, ...],
    kind: type[np.generic],
    memory: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """An uninitialised array whose planes lie an odd number of cache lines apart.

    A pixel has a value in each plane. Where planes lie a power of two bytes apart, as with windows
    of 256 x 256 pixels, a cache has the same few places for all of them, and turning planes into
    pixels' rows takes two to ten times as long.

    Args:
        planes: the first axes, as (T, C).
        plane: the others, as (h, w); each plane is one block of memory.
        kind: of the numbers.
        memory: flat, of that kind; used if it is large enough. Without, it is new.

    Returns:
        The array; `base` is its memory.
    """
    pixels, line = math.prod(plane), _CACHE_LINE // np.dtype(kind).itemsize
    pitch = line * (-(-pixels // line) | 1)
    size = math.prod(planes) * pitch
    flat = memory if memory is not None and memory.size >= size else np.empty(size, kind)
    return flat[:size].reshape(-1, pitch)[:, :pixels].reshape(*planes, *plane)
