"""Admission control: bounded requests, uploads and runs, shared fairly between callers.

    arrival → admitted → body, spooled → run slot, in turn → run → response
                 │            │
            Overloaded    BodyStalled, if the upload is slow and another request needs its capacity

The server admits or rejects a request before it reads the body, so that no body is uploaded in
vain. An admitted request holds a queue slot while it waits or runs, and during its upload as long
as the upload keeps the minimum rate. A slower upload continues without a queue slot, so that slow
clients do not block others. A caller has twice as many queue slots as there are run slots; all
callers together have eight times as many queue slots as one caller. At most twice as many uploads
as queue slots are in flight; beyond that, the slowest upload is ended.

A request takes a run slot only to plan and to run. A free run slot goes to the waiting caller that
holds the fewest; callers that hold equally many take turns. So a caller with a hundred requests
delays another caller by one run. An admitted request is not rejected for load afterwards, unless
its body exceeds the space that is left for bodies.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio

from service.errors import BodyStalled, BodyTooLarge, Overloaded, TooManyRequests

PATIENCE = 30.0
"""Longest time for which a request that holds a run slot waits for memory, seconds."""
REQUESTS = "requests"
"""Name of the quota of requests at once."""

_QUEUE_SLOTS_PER_RUN_SLOT = 2
_CALLERS = 8
"""Queue slots of all callers together, as a multiple of those of one caller."""
_UPLOADS_PER_QUEUE_SLOT = 2
_RETRY_SECONDS = 5
_FRESH_SECONDS = 1.0
"""Seconds at the start of an upload in which it cannot be behind the minimum rate."""
_INTAKE_THREADS = 2
"""Number of threads that receive bodies. Python runs one thread at a time, and the event loop waits
for its turn behind each of them: forty such threads delay health checks by hundreds of
milliseconds, and receive no faster."""


class Admitted:
    """One admitted request, from its arrival to its response, and the rate of its upload.

    Args:
        caller: the caller's id, or the client's address without API keys.
        rate: bytes per second that the upload must keep.
        disk: space for bodies on disk.
        memory: space for bodies in memory.
        intake: see `Admission.intake`.
        parsers: the turn to parse a long body.
    """

    def __init__(
        self,
        caller: str,
        rate: float,
        *,
        disk: Room,
        memory: Room,
        intake: anyio.CapacityLimiter,
        parsers: FairSlots,
    ) -> None:
        self.caller = caller
        self.intake = intake
        """Threads for short work on bodies."""
        self._parsers = parsers
        self.uploading = True
        """Whether a part of the body has not arrived yet."""
        self.given_up = False
        """Whether the upload was ended because another request needed its capacity."""
        self._rate = rate
        self._rooms = (disk, memory)
        self._taken = [0, 0]
        self._received = 0
        self._begun = anyio.current_time()
        self.waiting = anyio.CancelScope()
        """The scope in which the server waits for the next bytes; cancelled to end the upload."""

    @property
    def lag(self) -> float:
        """Seconds by which the upload is behind the minimum rate; negative if it is ahead."""
        elapsed = anyio.current_time() - self._begun
        return elapsed - _FRESH_SECONDS - self._received / self._rate

    @property
    def holds_slot(self) -> bool:
        """Whether the request holds a queue slot: it waits, runs, or its upload keeps the rate."""
        return not self.uploading or self.lag <= 0

    def turn(self) -> AbstractAsyncContextManager[None]:
        """The context of the caller's turn to parse a long body."""
        return self._parsers.slot(self.caller)

    def received(self, count: int, *, in_memory: bool = False) -> None:
        """Count bytes of the body.

        Args:
            count: number of bytes.
            in_memory: whether they are kept in memory instead of on disk.

        Raises:
            Overloaded: the bytes exceed the space for bodies.
        """
        self._received += count
        self._rooms[in_memory].take(self.caller, count)
        self._taken[in_memory] += count

    def reserve(self, count: int, *, in_memory: bool = True) -> None:
        """Reserve space for what the body is parsed or unpacked to, until the request ends.

        Args:
            count: number of bytes.
            in_memory: whether they are in memory; else they are on disk.

        Raises:
            BodyTooLarge: one caller may never use so much.
            Overloaded: the bytes exceed the space that is left.
        """
        self._rooms[in_memory].take(self.caller, count, held=self._taken[in_memory])
        self._taken[in_memory] += count

    def paused(self, seconds: float) -> None:
        """Leave out of the upload's time the seconds in which the server did not read."""
        self._begun += seconds

    def uploaded(self) -> None:
        """Record that the whole body has arrived."""
        self.uploading = False

    def give_up(self) -> None:
        """End the upload because another request needs its capacity."""
        self.given_up = True
        self.waiting.cancel()

    def too_slow(self, seconds: float) -> BodyStalled:
        """The error of an upload that was ended because it was too slow.

        Args:
            seconds: period over which the upload must keep the rate.
        """
        reason = (
            "and another request needed its capacity"
            if self.given_up
            else f"fewer than {self._rate * seconds:g} of them in the last {seconds:g} s"
        )
        return BodyStalled(
            f"the upload stalled: {self._received} bytes arrived in "
            f"{anyio.current_time() - self._begun:.1f} s, {reason}; at least {self._rate:g} bytes "
            "per second are required (PIMC_UPLOAD_RATE): send fewer files at once, or use a faster "
            "connection"
        )

    def free_room(self) -> None:
        """Give back the space that the body takes."""
        for room, count in zip(self._rooms, self._taken, strict=True):
            room.give_back(self.caller, count)
        self._taken = [0, 0]


class Room:
    """Space for bodies, limited for all callers together; one caller may take half of it.

    Args:
        name: name of the space, for errors.
        most: largest number of bytes of all callers.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self.taken = 0
        """Bytes in use."""
        self._by_caller: Counter[str] = Counter()

    def take(self, caller: str, count: int, held: int = 0) -> None:
        """Take bytes.

        Args:
            caller: the caller's id, or the client's address.
            count: number of bytes.
            held: bytes that the same request has taken already.

        Raises:
            BodyTooLarge: the request needs more than a caller's half.
            Overloaded: fewer bytes are free, or the caller's half is used up.
        """
        if held + count > self._most // 2:
            raise BodyTooLarge(
                f"the body needs {held + count} bytes {self._name}, and a caller may use "
                f"{self._most // 2}: send several requests, each with a part of it"
            )
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
    """Admits requests and counts those that upload, wait or run; used on one event loop.

    Args:
        run_slots: number of requests that may run at once.
        upload_rate: bytes per second that an upload must keep.
        spool_bytes: largest size on disk of all bodies in flight, bytes.
        memory_bytes: largest memory of all JSON bodies in flight, as text and parsed, bytes.
        most_requests: returns the largest number of requests of a caller at once; None limits them
            by its queue slots only.
        given_up: called for each upload that was ended because another request needed its
            capacity.
    """

    def __init__(
        self,
        run_slots: int,
        *,
        upload_rate: float,
        spool_bytes: int,
        memory_bytes: int,
        most_requests: Callable[[str], int | None] = lambda _: None,
        given_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.runs = FairSlots(run_slots)
        """The run slots."""
        self.intake = anyio.CapacityLimiter(_INTAKE_THREADS)
        """Threads for short work on bodies: their folders, parts and parameters."""
        # The turn to parse a long body: Python runs one such thread at a time anyway, and requests
        # whose client leaves meanwhile are not parsed.
        self._parsers = FairSlots(1)
        self._upload_rate = upload_rate
        self._most_requests = most_requests
        self._given_up = given_up
        self._slots = _QUEUE_SLOTS_PER_RUN_SLOT * run_slots
        self._disk = Room("on disk (PIMC_MAX_SPOOL_BYTES)", spool_bytes)
        self._memory = Room("of memory (PIMC_MEMORY_BUDGET)", memory_bytes)
        self._admitted: dict[Admitted, None] = {}

    @property
    def held(self) -> int:
        """Number of requests that upload, wait or run."""
        return len(self._admitted)

    def requests_of(self, caller: str) -> int:
        """Number of requests of one caller that upload, wait or run."""
        return sum(one.caller == caller for one in self._admitted)

    @property
    def slots(self) -> int:
        """Number of queue slots of all callers together."""
        return _CALLERS * self._slots

    @property
    def slots_held(self) -> int:
        """Number of queue slots in use."""
        return sum(one.holds_slot for one in self._admitted)

    @property
    def uploads(self) -> int:
        """Number of uploads in flight."""
        return sum(one.uploading for one in self._admitted)

    @property
    def spooled(self) -> int:
        """Bytes of bodies on disk."""
        return self._disk.taken

    @property
    def parsed(self) -> int:
        """Bytes of memory that are reserved for JSON bodies."""
        return self._memory.taken

    @asynccontextmanager
    async def admit(self, caller: str) -> AsyncIterator[Admitted]:
        """Admit a request, which counts until the context ends.

        Args:
            caller: the caller's id, or the client's address without API keys.

        Raises:
            Overloaded: every queue slot of this caller, or of all callers, is in use.
            TooManyRequests: the caller has the largest allowed number of requests at once.
        """
        self._make_room(caller)
        admitted = Admitted(
            caller,
            self._upload_rate,
            disk=self._disk,
            memory=self._memory,
            intake=self.intake,
            parsers=self._parsers,
        )
        self._admitted[admitted] = None
        try:
            yield admitted
        finally:
            self._admitted.pop(admitted, None)
            admitted.free_room()

    def _make_room(self, caller: str) -> None:
        """Check the limits for one more request, and end the slowest upload if there are too many.

        Raises:
            Overloaded: every queue slot of this caller, or of all callers, is in use.
            TooManyRequests: the caller has the largest allowed number of requests at once.
        """
        mine = [one for one in self._admitted if one.caller == caller]
        allowed = self._most_requests(caller)
        if allowed is not None and len(mine) >= allowed:
            raise TooManyRequests(
                f"{len(mine)} requests of this caller are in flight, and at most "
                f"{allowed} are allowed at once (PIMC_MAX_REQUESTS_PER_CALLER, or `requests` of "
                f"its key); nothing was started, retry after {_RETRY_SECONDS} s",
                policy=REQUESTS,
                retry_after=_RETRY_SECONDS,
            )
        everyone = list(self._admitted)
        for requests, most, whose in (
            (mine, self._slots, " of this caller"),
            (everyone, self.slots, ""),
        ):
            held = sum(one.holds_slot for one in requests)
            if held >= most:
                raise Overloaded(
                    f"server at capacity: {held} of {most} queue slots{whose} in use; nothing was "
                    f"started, retry after {_RETRY_SECONDS} s",
                    retry_after=_RETRY_SECONDS,
                )
        for requests, most in (
            (mine, _UPLOADS_PER_QUEUE_SLOT * self._slots),
            (everyone, _UPLOADS_PER_QUEUE_SLOT * self.slots),
        ):
            uploads = [one for one in requests if one.uploading and one in self._admitted]
            if len(uploads) >= most:
                # Fewer uploads than `most` hold a queue slot, so the slowest one is behind.
                slowest = max(uploads, key=lambda one: one.lag)
                del self._admitted[slowest]
                slowest.give_up()
                self._given_up()


class FairSlots:
    """Slots that go to the waiting caller that holds the fewest; equal callers take turns.

    Requests of one caller receive slots in the order in which they arrived.

    Args:
        count: number of slots.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[anyio.Event]] = {}  # by caller, in the order of requests
        self._granted = 0
        self._last: dict[
            str, int
        ] = {}  # number of the last slot of each caller that holds or waits

    @property
    def held(self) -> int:
        """Number of slots in use."""
        return self._held.total()

    @property
    def awaited(self) -> int:
        """Number of requests that wait for a slot."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def slot(self, caller: str) -> AsyncIterator[None]:
        """Hold a slot while the context is open; waits until one is free.

        Args:
            caller: the caller's id, or the client's address without API keys.
        """
        await self._acquire(caller)
        try:
            yield
        finally:
            self._release(caller)

    async def _acquire(self, caller: str) -> None:
        if self._free:  # no caller waits while a slot is free
            self._take(caller)
            return
        granted = anyio.Event()
        queue = self._waiting.setdefault(caller, deque())
        queue.append(granted)
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():  # the slot was granted and the wait cancelled at once
                self._release(caller)
            else:
                queue.remove(granted)
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
        if self._waiting:
            following = min(
                self._waiting, key=lambda name: (self._held[name], self._last.get(name, 0))
            )
            granted = self._waiting[following].popleft()
            self._take(following)
            self._forget(following)
            granted.set()

    def _forget(self, caller: str) -> None:
        """Remove the entries of a caller that are empty."""
        if not self._held[caller]:
            del self._held[caller]
        if not self._waiting.get(caller):
            self._waiting.pop(caller, None)
        if caller not in self._held and caller not in self._waiting:
            self._last.pop(caller, None)
