"""Jobs: what runs on while you do something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
JobProgress = Callable[[float], object]
"""Called with the percentage done whenever it has changed."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What was last heard of a job."""

    id: str
    task: str
    """The task that runs, such as `classify-pixels`."""
    status: JobStatus
    progress: float
    """Per cent, 0 to 100."""
    created: datetime | None
    started: datetime | None
    """None while it waits for its turn."""
    finished: datetime | None
    """None while it runs."""
    message: str | None
    """What the service says of the job, if anything."""
    document: Mapping[str, Any]
    """The whole state, as it came."""

    @property
    def done(self) -> bool:
        """Whether nothing will change any more."""
        return self.status not in {"accepted", "running"}


class JobHandle(Generic[T]):
    """A job and what was last heard of it.

    Attributes:
        state: what was last heard; `refresh` and `wait` renew it.
        accept: media types to ask the result in.
        output: the single output asked for, where it is known.
    """

    def __init__(self, state: JobState, *, accept: str, output: str | None = None) -> None:
        self.state = state
        self.accept = accept
        self.output = output

    @property
    def id(self) -> str:
        """What `Client.job` finds it by again."""
        return self.state.id

    @property
    def task(self) -> str:
        """The task that runs."""
        return self.state.task

    @property
    def status(self) -> JobStatus:
        """The status last heard."""
        return self.state.status

    @property
    def progress(self) -> float:
        """Per cent done when last heard."""
        return self.state.progress

    @property
    def done(self) -> bool:
        """Whether it had ended when last heard."""
        return self.state.done

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self.task}, {self.status}>"
