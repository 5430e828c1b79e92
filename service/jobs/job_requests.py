"""Requests of jobs, as stored: read again for runs and results, and compared with repeats."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ResultNotReady
from service.jobs.job import Job, removed
from service.jobs.job_files import INPUT, REQUEST, JobFiles, key_of
from service.jobs.serialise import loaded, outline_of, request_document, request_of
from service.jobs.storage import StorageUnreachable
from service.run.plan import Plan
from service.run.request import RasterRequest, TaskRequest
from service.tracing import traceparent

# Names in stored requests, also of earlier releases.
_UPGRADE, _DELIVERY, _SUBMITTED = "upgrade", "answer", "submitted"
_OUTLINES = 128
"""Number of requests that are kept in memory without what may be long."""


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """Identification of repeated requests."""

    key: str
    """The caller's `Idempotency-Key`."""
    fingerprint: str
    """Fingerprint of the request."""


def fingerprint(
    request: TaskRequest, folder: Path, delivery: Mapping[str, Any] | None = None
) -> str:
    """SHA-256 of a request's parameters and of the content of its uploaded files, hexadecimal.

    Args:
        request: the request.
        folder: folder of the uploaded files; the path identifies any other file.
        delivery: how its results are returned; None if that is not part of the request.
    """
    document = request_document(request, folder)
    if delivery is not None:
        document[_DELIVERY] = delivery
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    files = request.sources if isinstance(request, RasterRequest) else ()
    for path in (path for file in files for path in file.paths):
        if path.is_relative_to(folder):
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def document_of(
    plan: Plan, folder: Path, *, upgrade: bool, delivery: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The document of a job's request, as it is stored.

    Args:
        plan: the request, checked against its files and its model.
        folder: the request's folder.
        upgrade: whether a later version of the model may run the job.
        delivery: how its results are returned; None if the reader of the result chooses.
    """
    # The plan's model: the default model may change before the job runs.
    document = request_document(plan.request, folder, model=plan.model.card.id)
    document[_UPGRADE] = upgrade
    document[_DELIVERY] = delivery
    document[_SUBMITTED] = traceparent()
    return document


class JobRequests:
    """The stored requests of jobs. Thread-safe.

    Args:
        files: where the jobs' files are.
    """

    def __init__(self, files: JobFiles) -> None:
        self._files = files
        self._storage = files.storage
        self._outlines: dict[str, Mapping[str, Any]] = {}  # in the order in which they were made
        self._outlining = threading.Lock()

    def read(self, job: Job) -> TaskRequest:
        """The request of a job; its uploads are where `prepare` brings them.

        Raises:
            ResultNotReady: the job was dismissed or has failed, and its files are removed.
            Overloaded: the storage cannot be reached.
        """
        try:
            document = self._document(job)
        except FileNotFoundError as error:
            raise ResultNotReady(
                f"job {job.id} is {job.status}, and its files have been removed: send the request "
                "again"
            ) from error
        return request_of(document, self._files.folder(job) / INPUT)

    def outline(self, job: Job) -> TaskRequest:
        """The request of a job without its files, items, points and series.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        return request_of(self._outline(job), self._files.folder(job) / INPUT)

    def delivery(self, job: Job) -> Mapping[str, Any] | None:
        """How a job's results are returned, as stored by `accept`.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        found: Mapping[str, Any] | None = self._outline(job).get(_DELIVERY)
        return found

    def submitted(self, job: Job) -> str | None:
        """The span of the request that submitted a job, as a `traceparent`; None if not traced."""
        try:
            found: str | None = self._outline(job).get(_SUBMITTED)
        except (ResultNotReady, StorageUnreachable):  # which ends its run soon
            return None
        return found

    def may_upgrade(self, job: Job) -> bool:
        """Whether the owner allows a later version of the model to run the job."""
        return bool(self._document(job).get(_UPGRADE))

    def _outline(self, job: Job) -> Mapping[str, Any]:
        """The document of a job's request without what may be long.

        The last ones are kept, and one request at a time is parsed for it: of a request of 31 MB
        that takes a second and hundreds of megabytes.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        found = self._outlines.get(job.id)
        if found is not None:
            return found
        with self._outlining:
            if job.id not in self._outlines:
                try:
                    self._outlines[job.id] = outline_of(self._document(job))
                except FileNotFoundError as error:
                    raise removed(job) from error
                if len(self._outlines) > _OUTLINES:
                    del self._outlines[next(iter(self._outlines))]
            return self._outlines[job.id]

    def _document(self, job: Job) -> Mapping[str, Any]:
        """The document of a job's request, as `accept` stored it.

        Raises:
            FileNotFoundError: the job's files are removed.
        """
        found: Mapping[str, Any] = loaded(self._storage.read(key_of(job.id, REQUEST)).decode())
        return found
