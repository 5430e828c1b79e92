"""Admission control: bounded requests, uploads and runs, shared fairly between callers.

    arrival → place → body, spooled → run slot, in turn → run → response
                │          │
           Overloaded   BodyStalled, if it is slow and another needs its place

A request takes a place before its body is read, so that nothing is uploaded in vain. Its place
counts as a queue slot while it waits or runs, and while its upload keeps the minimum rate: an
upload that falls behind goes on, but holds no slot, so that clients who send slowly shut nobody
out. A caller has twice as many queue slots as there are run slots, all callers together eight times
that. There may be twice as many uploads as queue slots; then one that is behind makes room.

A request takes a run slot only for the run. Free run slots go to the waiting caller with the fewest
runs, callers with equally many take turns: a caller with a hundred requests delays another by one
run, not by a hundred. A request with a place is never rejected for load afterwards, unless its body
is larger than the room left for bodies.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from service.errors import BodyStalled, Overloaded, TooManyRequests

REQUESTS = "requests"
"""Name of the quota of requests at once."""

_QUEUE_SLOTS_PER_RUN_SLOT = 2
_CALLERS = 8
"""Queue slots of all callers together, in those of one caller."""
_UPLOADS_PER_QUEUE_SLOT = 2
_RETRY_SECONDS = 5
_FRESH_SECONDS = 1.0
"""Seconds that an upload has before it can be behind."""
_JSON_BYTES_PER_QUEUE_SLOT = 32 * 2**20


class Place:
    """The place of one request, from its arrival to its response, and the pace of its upload.

    Args:
        caller: whose request it is.
        rate: bytes per second that its upload must keep.
        disk: room for bodies in files.
        memory: room for bodies in memory.
    """

    def __init__(self, caller: str, rate: float, disk: Room, memory: Room) -> None:
        self.caller = caller
        self.uploading = True
        """Whether its body has not arrived whole."""
        self.given_up = False
        """Whether it had to make room for another."""
        self._rate = rate
        self._rooms = (disk, memory)
        self._taken = [0, 0]
        self._received = 0
        self._begun = anyio.current_time()
        self.waiting = anyio.CancelScope()
        """The scope in which the next bytes are waited for."""

    @property
    def lag(self) -> float:
        """Seconds by which its upload is behind the minimum rate; negative if it is ahead."""
        elapsed = anyio.current_time() - self._begun
        return elapsed - _FRESH_SECONDS - self._received / self._rate

    @property
    def holds_slot(self) -> bool:
        """Whether it counts as a queue slot: it waits, runs, or its upload keeps the rate."""
        return not self.uploading or self.lag <= 0

    def received(self, count: int, *, in_memory: bool = False) -> None:
        """Count bytes of the body.

        Raises:
            Overloaded: there is no room for them.
        """
        self._received += count
        self._rooms[in_memory].take(self.caller, count)
        self._taken[in_memory] += count

    def paused(self, seconds: float) -> None:
        """Do not count seconds for which the server, not the client, was slow."""
        self._begun += seconds

    def uploaded(self) -> None:
        """The body has arrived whole."""
        self.uploading = False

    def give_up(self) -> None:
        """End the upload, because another request needs its place."""
        self.given_up = True
        self.waiting.cancel()

    def too_slow(self, seconds: float) -> BodyStalled:
        """The error of an upload that is ended.

        Args:
            seconds: over which it had to keep the rate.
        """
        why = (
            "another request needed its place"
            if self.given_up
            else f"fewer than {self._rate * seconds:g} in the last {seconds:g} s"
        )
        return BodyStalled(
            f"the upload stalled: {self._received} bytes arrived in "
            f"{anyio.current_time() - self._begun:.1f} s, {why}; at least {self._rate:g} bytes per "
            "second are needed (PIMC_UPLOAD_RATE): send fewer files at once, or use a faster "
            "connection"
        )

    def free_room(self) -> None:
        """Give back the room of its body."""
        for room, count in zip(self._rooms, self._taken, strict=True):
            room.give_back(self.caller, count)
        self._taken = [0, 0]


class Room:
    """Bytes of bodies, bounded for all callers together; one caller may take half.

    Args:
        name: of what is filled, for errors.
        most: bytes for all callers.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self.taken = 0
        """Bytes in use."""
        self._by_caller: Counter[str] = Counter()

    def take(self, caller: str, count: int) -> None:
        """Take bytes.

        Raises:
            Overloaded: that many are not free.
        """
        mine = self._by_caller[caller]
        if self.taken + count > self._most or mine + count > self._most // 2:
            raise Overloaded(
                f"server at capacity: bodies of requests in flight use {self.taken} of "
                f"{self._most} bytes {self._name}, {mine} of them by this caller, which may use "
                f"half; nothing was started, retry after {_RETRY_SECONDS} s",
                retry_after=_RETRY_SECONDS,
            )
        self.taken += count
        self._by_caller[caller] = mine + count

    def give_back(self, caller: str, count: int) -> None:
        """Give bytes back."""
        self.taken -= count
        self._by_caller[caller] -= count
        if not self._by_caller[caller]:
            del self._by_caller[caller]


class Admission:
    """Counts the requests that are uploaded, queued or running, on one event loop.

    Args:
        run_slots: requests that may run at once.
        upload_rate: bytes per second that an upload must keep.
        spool_bytes: bytes of all bodies in flight that lie on disk.
        most_requests: requests of one caller at once; None bounds them by its queue slots alone.
        given_up: called for each upload that had to make room for another.
    """

    def __init__(
        self,
        run_slots: int,
        *,
        upload_rate: float,
        spool_bytes: int,
        most_requests: int | None = None,
        given_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.runs = FairSlots(run_slots)
        """The run slots."""
        self._upload_rate = upload_rate
        self._most_requests = most_requests
        self._given_up = given_up
        self._slots = _QUEUE_SLOTS_PER_RUN_SLOT * run_slots
        self._disk = Room("on disk (PIMC_MAX_SPOOL_BYTES)", spool_bytes)
        self._memory = Room("in memory", self._slots * _JSON_BYTES_PER_QUEUE_SLOT)
        self._places: dict[Place, None] = {}

    @property
    def held(self) -> int:
        """Requests being uploaded, waiting or running."""
        return len(self._places)

    def requests_of(self, caller: str) -> int:
        """Requests of one caller being uploaded, waiting or running."""
        return sum(place.caller == caller for place in self._places)

    @property
    def uploads(self) -> int:
        """Uploads in flight."""
        return sum(place.uploading for place in self._places)

    @property
    def spooled(self) -> int:
        """Bytes of bodies on disk."""
        return self._disk.taken

    @asynccontextmanager
    async def place(self, caller: str) -> AsyncIterator[Place]:
        """A place, for as long as the request is uploaded and run.

        Args:
            caller: an id of the key, or of the address if there are no keys.

        Raises:
            Overloaded: every queue slot of this caller, or of all, is in use.
            TooManyRequests: the caller has as many requests as it may have at once.
        """
        self._make_room(caller)
        place = Place(caller, self._upload_rate, self._disk, self._memory)
        self._places[place] = None
        try:
            yield place
        finally:
            self._places.pop(place, None)
            place.free_room()

    def _make_room(self, caller: str) -> None:
        mine = [place for place in self._places if place.caller == caller]
        if self._most_requests is not None and len(mine) >= self._most_requests:
            raise TooManyRequests(
                f"{len(mine)} requests of this caller are in flight, at most {self._most_requests} "
                f"are allowed at once (PIMC_MAX_REQUESTS_PER_CALLER); nothing was started, retry "
                f"after {_RETRY_SECONDS} s",
                policy=REQUESTS,
                retry_after=_RETRY_SECONDS,
            )
        everyone = list(self._places)
        for places, most, whose in (
            (mine, self._slots, "of this caller "),
            (everyone, _CALLERS * self._slots, ""),
        ):
            held = sum(place.holds_slot for place in places)
            if held >= most:
                raise Overloaded(
                    f"server at capacity: {held} of {most} slots {whose}in use; nothing was "
                    f"started, retry after {_RETRY_SECONDS} s",
                    retry_after=_RETRY_SECONDS,
                )
        for places, most in (
            (mine, _UPLOADS_PER_QUEUE_SLOT * self._slots),
            (everyone, _UPLOADS_PER_QUEUE_SLOT * _CALLERS * self._slots),
        ):
            uploads = [place for place in places if place.uploading and place in self._places]
            if len(uploads) >= most:
                # Fewer uploads than this hold a slot, so the slowest is one that is behind.
                slowest = max(uploads, key=lambda place: place.lag)
                del self._places[slowest]
                slowest.give_up()
                self._given_up()


class FairSlots:
    """Slots granted to the waiting caller that holds the fewest; equal callers take turns.

    Within a caller they are granted in the order of requests.

    Args:
        count: slots.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[str] = Counter()
        self._lines: dict[str, deque[anyio.Event]] = {}
        self._granted = 0
        self._last: dict[str, int] = {}  # of callers that hold or wait: number of their last slot

    @property
    def held(self) -> int:
        """Slots in use."""
        return self._held.total()

    @property
    def awaited(self) -> int:
        """Requests that wait for a slot."""
        return sum(map(len, self._lines.values()))

    @asynccontextmanager
    async def slot(self, caller: str) -> AsyncIterator[None]:
        """A slot; the wait for it ends early only if cancelled."""
        await self._acquire(caller)
        try:
            yield
        finally:
            self._release(caller)

    async def _acquire(self, caller: str) -> None:
        if self._free:  # then nobody waits
            self._take(caller)
            return
        granted = anyio.Event()
        line = self._lines.setdefault(caller, deque())
        line.append(granted)
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():  # granted and cancelled at once
                self._release(caller)
            else:
                line.remove(granted)
                self._forget(caller)
            raise

    def _take(self, caller: str) -> None:
        self._free -= 1
        self._held[caller] += 1
        self._granted += 1
        self._last[caller] = self._granted

    def _release(self, caller: str) -> None:
        self._free += 1
        self._held[caller] -= 1
        self._forget(caller)
        if self._lines:
            turn = min(self._lines, key=lambda name: (self._held[name], self._last.get(name, 0)))
            granted = self._lines[turn].popleft()
            self._take(turn)
            self._forget(turn)
            granted.set()

    def _forget(self, caller: str) -> None:
        if not self._held[caller]:
            del self._held[caller]
        if not self._lines.get(caller):
            self._lines.pop(caller, None)
        if caller not in self._held and caller not in self._lines:
            self._last.pop(caller, None)
