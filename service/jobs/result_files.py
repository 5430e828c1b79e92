"""Results of jobs: published once, read, and the files derived from them on request.

A result is complete or absent: its description is written last. Files derived from it (zips,
tables, other formats) are made at the first request, kept in `ready/` and count for the quota of
the job's caller.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

from service.errors import ResultNotReady
from service.jobs.database import Database
from service.jobs.files import remove
from service.jobs.job import Job, removed
from service.jobs.job_files import READY, REQUEST, UNFINISHED, JobFiles, key_of, result_name
from service.jobs.serialise import StoredResult, document_bytes, result_head, stored_result
from service.jobs.storage import RemoteFile, Storage
from service.run.execute import Result

_RESULT = "reply.json"  # as earlier releases named it, whose results stay readable
_DOCUMENT = "document.json"
_RESULT_COPY = "result"
_MOST_DERIVED = 32
"""Number of files derived from one result beyond which the earlier ones are removed."""
_LOCKS = 16


class ResultFiles:
    """The results of jobs. Thread-safe.

    Args:
        database: of the job store.
        files: where the jobs' files are.
        copies: folder for copies of results, if the storage is not a folder.
    """

    def __init__(self, database: Database, files: JobFiles, copies: Path) -> None:
        self._db = database
        self._files = files
        self._storage = files.storage
        self._copies = copies
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._makers = WeakValueDictionary[str, threading.Lock]()  # by the key of a derived file
        self._making_lock = threading.Lock()

    def read(self, job: Job) -> StoredResult:
        """A finished job's result.

        Raises:
            ResultNotReady: the job has no result, or it was removed.
        """
        if job.status != "successful":
            raise ResultNotReady(
                f"job {job.id} has no result: its status is '{job.status}', its progress "
                f"{job.progress} %; the result exists once the status is 'successful'"
            )
        key = key_of(job.id, result_name(job.lease))
        try:
            head = json.loads(self._storage.read(f"{key}/{_RESULT}"))
            if "document" in head:
                with self.lock(job.id):
                    head = _split_result(self._storage, key)
        except FileNotFoundError as error:
            raise removed(job) from error
        return stored_result(head, self._storage.file(f"{key}/{_RESULT}"), _DOCUMENT)

    @contextmanager
    def on_disk(self, job: Job, result: StoredResult) -> Iterator[StoredResult]:
        """A job's result with its files on this machine, for as long as the context lasts.

        Args:
            job: a successful job.
            result: its result.

        Raises:
            ResultNotReady: the result was removed.
        """
        if self._storage.local:
            yield result
            return
        with TemporaryDirectory(prefix=f"{job.id}-", dir=self._copies) as parent:
            folder = Path(parent) / _RESULT_COPY
            try:
                self._storage.fetch(key_of(job.id, result_name(job.lease)), folder)
                head = json.loads((folder / _RESULT).read_text("utf-8"))
            except FileNotFoundError as error:
                raise removed(job) from error
            yield stored_result(head, folder / _RESULT, _DOCUMENT)

    @contextmanager
    def copied(self, file: Path | RemoteFile) -> Iterator[Path]:
        """A file of a result on this machine, for as long as the context lasts."""
        if isinstance(file, Path):
            yield file
            return
        with TemporaryDirectory(dir=self._copies) as folder:
            self._storage.fetch(file.key, Path(folder) / file.name)
            yield Path(folder) / file.name

    def derived(self, job: Job, name: str, make: Callable[[Path], object]) -> Path | RemoteFile:
        """A file derived from a result, made at the first request and kept for later ones.

        Args:
            job: a successful job.
            name: name of the file.
            make: writes the file to the path that it receives.

        Returns:
            Path of the file.

        Raises:
            ResultNotReady: the result was removed.
        """
        key = key_of(job.id, READY, name)
        file = self._storage.file(key)
        with self._making(key):
            if not file.exists():
                self._make(job, key, make)
        return file

    def publish(self, job: Job, work: Path, result: Result) -> None:
        """Publish a finished run's files as the job's result, complete or not at all.

        Args:
            job: a running job.
            work: folder that holds the files of the result and nothing else.
            result: result of the run.
        """
        (work / _DOCUMENT).write_bytes(document_bytes(result.document))
        (work / _RESULT).write_text(json.dumps(result_head(result)), encoding="utf-8")
        self._storage.put(key_of(job.id, result_name(job.lease)), work, last=_RESULT)

    def published(self, job: Job) -> bool:
        """Whether a run before published the result, but ended before it could record this.

        Then the result is this run's.
        """
        names = self._storage.names(key_of(job.id))
        for lease in range(job.lease):
            if result_name(lease) in names:
                here = key_of(job.id, result_name(lease))
                try:
                    self._storage.move(here, key_of(job.id, result_name(job.lease)), last=_RESULT)
                except FileNotFoundError:  # it is not complete, or was removed
                    continue
                return True
        return False

    def _make(self, job: Job, key: str, make: Callable[[Path], object]) -> None:
        """Make a file derived from a result, and keep it.

        The job may be removed meanwhile: making a file may take a minute, and no removal waits.
        """
        result = self._storage.file(key_of(job.id, result_name(job.lease), _RESULT))
        folder = self._files.folder(job) / READY if self._storage.local else self._copies
        # Another replica may make the same file.
        path = folder / f"{UNFINISHED}{uuid.uuid4()}-{key.rpartition('/')[2]}"
        try:
            if result.exists():
                folder.mkdir(exist_ok=True)
                make(path)
            with self.lock(job.id):
                if result.exists():
                    self._keep_derived(job, key, path)
                    return
        except Exception:
            if result.exists():
                raise
        finally:
            path.unlink(missing_ok=True)
        remove(self._files.folder(job))  # what was made after the removal
        raise removed(job)

    def _keep_derived(self, job: Job, key: str, path: Path) -> None:
        """Keep a file derived from a result; it counts for the quota of the job's caller.

        A client may have as many maps derived as `min_area` has values. If there are too many
        files, the others are removed; they are made again when a client requests them.
        """
        ready = key_of(job.id, READY)
        names = self._storage.names(ready)
        unfinished = [name for name in names if name.startswith(UNFINISHED)]
        if len(names) - len(unfinished) >= _MOST_DERIVED:
            self._storage.keep_only(ready, *unfinished)
        self._storage.put(key, path)
        size = self._storage.size(
            *(key_of(job.id, n) for n in (result_name(job.lease), REQUEST)), ready
        )
        with self._db.transaction() as db:
            db.execute(
                "UPDATE jobs SET bytes = ? WHERE number = ? AND status = 'successful'",
                (size, job.number),
            )

    @contextmanager
    def _making(self, key: str) -> Iterator[None]:
        """Hold the lock of one file derived from a result, so that it is made once."""
        with self._making_lock:
            lock = self._makers.setdefault(key, threading.Lock())
        with lock:
            yield

    def lock(self, name: str) -> threading.Lock:
        """The lock under which files derived from a job's result are kept and removed."""
        return self._locks[hash(name) % _LOCKS]


def _split_result(storage: Storage, key: str) -> Any:  # noqa: ANN401 - JSON
    """Split a result of an earlier release, which kept description and document in one file.

    Returns:
        The description.
    """
    head = json.loads(storage.read(f"{key}/{_RESULT}"))
    if "document" in head:  # another reader may have split it meanwhile
        storage.write(f"{key}/{_DOCUMENT}", document_bytes(head.pop("document")))
        storage.write(f"{key}/{_RESULT}", json.dumps(head).encode())
    return head
