"""Remote files on demand: the blocks that a window needs are fetched when it is read.

    window ──▶ its blocks in every file that are not here ──▶ fetched together ──▶ a reader's copies

Only the directories of such a file were fetched when the request was accepted, so its header and
its place are known. Each reader has local copies of its own, to which only it writes; blocks
that several readers need are found in the cache of ranges. A file that was replaced since then is
an error: only files with a strong ETag are read on demand.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from service.errors import UnreachableReference
from service.grid import Window
from service.read.blocks import RemoteFile, side_by_side, size_of
from service.read.connect import Connections, Patience, RangeCache, Remotes
from service.read.geotiff import SourceFile
from service.settings import Settings
from service.tracing import span

RANGE_CACHE_BYTES = 64 * 2**20
"""Ranges of remote files that a process keeps in memory for later reads, bytes."""
_KEPT_BYTES = 2**30
"""Size of a reader's copies from which it drops the blocks of earlier windows, bytes."""
_LOOK_SECONDS = 0.5
"""Seconds between two looks whether a run that waits for blocks was cancelled."""


class OnDemand:
    """Fetches blocks for the readers of one process, on an event loop of its own. Thread-safe.

    It shares no loop with requests: their runs wait for blocks, and blocks must not wait for them.

    Args:
        settings: allowed hosts, and the largest number of bytes that one reader fetches.
        folder: parent of the readers' copies; None takes the system's folder.
        cache: ranges that were received; None makes a cache of its own.
        received: see `Remotes`.
        patience: time limits; the total is that of one window.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        folder: Path | None = None,
        cache: RangeCache | None = None,
        received: Callable[[int], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._patience = patience or Patience()
        cache = RangeCache(RANGE_CACHE_BYTES) if cache is None else cache
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blocks", daemon=True)
        self._thread.start()

        async def made() -> Remotes:  # its limiter belongs to the loop
            return Remotes(cache=cache, received=received)

        self._remotes = asyncio.run_coroutine_threadsafe(made(), self._loop).result()

    def close(self) -> None:
        """End the event loop, after the last reader."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @contextmanager
    def copies(
        self, sources: Sequence[SourceFile], before: Callable[[], None]
    ) -> Iterator[ReaderCopies]:
        """See `RemoteBlocks`.

        Raises:
            ForbiddenReference: a host is no longer allowed.
        """
        rules = self._settings.allowed_hosts
        with tempfile.TemporaryDirectory(prefix="pimc-blocks-", dir=self._folder) as name:
            files = {
                source: RemoteFile.load(source.remote, Path(name) / f"{number}.tif", rules)
                for number, source in enumerate(dict.fromkeys(sources))
                if source.remote is not None
            }
            web = Connections(self._settings, patience=self._patience, remotes=self._remotes)
            try:
                yield ReaderCopies(self, files, web, before)
            finally:
                self.wait(web.__aexit__(), lambda: None, "the hosts")

    def wait(self, work: Coroutine[Any, Any, None], before: Callable[[], None], hosts: str) -> None:
        """Run a coroutine on the event loop, and wait for its end.

        Args:
            work: the coroutine.
            before: see `copies`.
            hosts: the hosts that it reads from, for the message.

        Raises:
            UnreachableReference: it did not end within the time limit.
        """

        async def limited() -> None:
            with anyio.move_on_after(self._patience.total_seconds):
                await work
                return
            raise UnreachableReference(
                f"{hosts} did not return the blocks of a window within "
                f"{self._patience.total_seconds:g} s: retry later, or give a smaller `bbox` or "
                "`area`",
                later=True,
            )

        future = asyncio.run_coroutine_threadsafe(limited(), self._loop)
        try:
            while not wait([future], timeout=_LOOK_SECONDS).done:
                before()
        except BaseException:
            future.cancel()
            raise
        future.result()


class ReaderCopies:
    """The `Copies` of one reader.

    Args:
        on_demand: fetches their blocks.
        files: the remote files with their copies.
        web: the reader's connections.
        before: see `OnDemand.copies`.
    """

    def __init__(
        self,
        on_demand: OnDemand,
        files: Mapping[SourceFile, RemoteFile],
        web: Connections,
        before: Callable[[], None],
    ) -> None:
        self._on_demand = on_demand
        self._files = files
        self._web = web
        self._before = before
        self._kept = 0

    def path(self, source: SourceFile) -> Path:
        """See `Copies`."""
        remote = self._files.get(source)
        return source.path if remote is None else remote.path

    def bring(self, windows: Iterable[tuple[SourceFile, Window]]) -> bool:
        """See `Copies`."""
        wanted = defaultdict(list)
        for source, window in windows:
            if source in self._files:
                wanted[source].append(window)
        needed = [(self._files[source], own) for source, own in wanted.items()]
        runs = [(remote, remote.runs(*own)) for remote, own in needed]
        if self._kept and self._kept + size_of(runs) > _KEPT_BYTES:
            for remote in self._files.values():
                remote.empty()
            self._kept = 0
            runs = [(remote, remote.runs(*own)) for remote, own in needed]
        size = size_of(runs)
        if not size:
            return False
        self._kept += size
        calls = [call for remote, own in runs for call in remote.fetches(self._web, own)]
        with span("fetch", ranges=len(calls), bytes=size):
            hosts = ", ".join(sorted({f"'{remote.remote.host}'" for remote, own in runs if own}))
            self._on_demand.wait(side_by_side(calls), self._before, hosts)
        return True
