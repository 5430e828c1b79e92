"""Files of a job: their names, their keys in the storage, and their folder on this machine.

    jobs/<id>/
        request.json   the request
        input/         the uploaded files, as 0000.tif, …
        windows-<n>    bytes of the windows that were finished under lease n, appended
        work-<n>/      files of the run under lease n
        result-<n>/    the complete result, or missing
        ready/         files derived from the result at the first request for them

With a storage elsewhere, `jobs/<id>-<n>/` in the state directory has `input/` and `work-<n>/` of a
run on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from service.jobs.files import remove, sync_file, sync_folder
from service.jobs.job import Job
from service.jobs.storage import Storage

JOBS_FOLDER = "jobs"
"""Name of the folder of the jobs."""
REQUEST = "request.json"
INPUT = "input"
"""Name of the folder of a job's files, uploaded or fetched."""
READY = "ready"
"""Name of the folder of files derived from a result."""
UNFINISHED = "half-"
"""Begin of the name of such a file that is not finished."""


def windows_name(lease: int) -> str:
    """Name of the file of the windows that were finished under a lease."""
    return f"windows-{lease}"


def work_name(lease: int) -> str:
    """Name of the folder of a lease's run."""
    return f"work-{lease}"


def result_name(lease: int) -> str:
    """Name of the folder of the result that was published under a lease."""
    return f"result-{lease}"


def key_of(name: str, *parts: str) -> str:
    """Key of a job's files, or of some of them."""
    return "/".join((JOBS_FOLDER, name, *parts))


def job_of(folder: Path) -> str:
    """Id of the job whose run has this folder on this machine, with a storage elsewhere."""
    return folder.name.rpartition("-")[0]


@dataclass(frozen=True, kw_only=True)
class JobFiles:
    """Where the files of jobs are."""

    storage: Storage
    """Storage of the jobs' files."""
    jobs: Path
    """Folder of the jobs on this machine."""

    def folder(self, job: Job) -> Path:
        """Folder of a job's files on this machine; with a storage elsewhere, of one run's."""
        return self.jobs / (job.id if self.storage.local else f"{job.id}-{job.lease}")

    def work(self, job: Job) -> Path:
        """Path of the folder of the job's run."""
        return self.folder(job) / work_name(job.lease)

    def windows(self, job: Job, lease: int | None = None) -> str:
        """Key of the log of the windows that were finished under a lease; None is the job's."""
        return key_of(job.id, windows_name(job.lease if lease is None else lease))

    def prepare(self, job: Job) -> None:
        """Bring the files that a run needs to this machine.

        Args:
            job: a running job.

        Raises:
            Overloaded: the storage cannot be reached.
            OSError: the disk is full.
        """
        if not self.storage.local:
            self.folder(job).mkdir(exist_ok=True)
            self.storage.fetch(key_of(job.id, INPUT), self.folder(job) / INPUT)

    def make_room(self, job: Job) -> None:
        """Remove files of a run that can be made again."""
        remove(self.work(job))
        if self.storage.local:
            self.storage.remove(self.windows(job))


def write_request(folder: Path, document: str) -> None:
    """Write a job's request, synced to disk."""
    path = folder / REQUEST
    path.write_text(document, encoding="utf-8")
    sync_file(path)
    sync_folder(folder)
