"""Buffer pool: owner of the memory of windows, which later windows reuse."""

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
    """Memory of finished windows for reuse; a context manager that frees it.

    Reuse saves time: the operating system fills new memory with zeros, which takes as long as
    scaling the pixels. Thread-safe.
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
        """An uninitialised array, see `spaced`, in recycled memory if a large enough one exists."""
        with self._lock:
            spare = self._spare[kind].pop() if self._spare[kind] else None
        return spaced(planes, plane, kind, spare)

    def give_back(self, *arrays: NDArray[Any]) -> None:
        """Recycle arrays from `take`; neither they nor views of them may be used afterwards."""
        with self._lock:
            for array in arrays:
                # `base` is the whole buffer: the arrays of a window at an edge are smaller.
                self._spare[array.dtype.type].append(array if array.base is None else array.base)


def spaced(
    planes: tuple[int, ...],
    plane: tuple[int, ...],
    kind: type[np.generic],
    memory: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """An uninitialised array whose planes lie an odd number of cache lines apart.

    A pixel has a value in each plane. If the distance between planes is a power of two, as with
    windows of 256 x 256 pixels, the values of a pixel map to the same few cache sets, and
    transposing planes into rows of pixels takes two to ten times as long.

    Args:
        planes: the first axes, such as (T, C).
        plane: the other axes, such as (h, w); each plane is one block of memory.
        kind: NumPy type of the numbers.
        memory: flat array of that type, used if it is large enough; else new memory is used.

    Returns:
        The array (*planes, *plane); its attribute `base` is the flat array of its memory.
    """
    pixels, line = math.prod(plane), _CACHE_LINE // np.dtype(kind).itemsize
    pitch = line * (-(-pixels // line) | 1)
    size = math.prod(planes) * pitch
    flat = memory if memory is not None and memory.size >= size else np.empty(size, kind)
    return flat[:size].reshape(-1, pitch)[:, :pixels].reshape(*planes, *plane)
