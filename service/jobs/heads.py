"""Store of the callers' own models: folders in the state directory, complete or absent.

With a bucket as storage, `heads/<version>` there holds a model, a row of the database states its
owner and name, and the state directory has a copy for this replica.

    PIMC_STATE_DIR/heads/
        <owner>/<name>/    card.json and model.onnx, a bundle as in `models/zoo`
        .lock              locked while a replica publishes or removes a model
        .new-…, .old-…     models being made or removed; deleted at each start

A bundle is written to a temporary folder, synced, and published by one rename, so that a kill
leaves either the complete model or none.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from models.registry import BundleError, load_bundle
from service.errors import InvalidRequest, NameTaken, Overloaded, UnknownModel, no_room, shown
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.jobs.database import DuplicateRow
from service.jobs.files import sync_folder, sync_tree
from service.jobs.head_rows import HEADS
from service.jobs.store import JobStore

_LOG = logging.getLogger(__name__)
_NO_OWNER = "_"
"""Folder name of the empty owner, which all callers share if no API keys are set."""


def head_folder(heads: Path, owner: str) -> Path:
    """Folder of a caller's models in the folder of all models."""
    return heads / (owner or _NO_OWNER)


def head_owner(name: str) -> str:
    """The caller whose models are in a folder of this name."""
    return "" if name == _NO_OWNER else name


def copy_heads(state: Path, target: Path) -> None:
    """Copy every complete model of a state directory, while a service may use it.

    A published model does not change; one that is removed during the copy is left out.

    Args:
        state: the state directory.
        target: the copy of the state directory.
    """
    for folder in sorted((state / HEADS).glob("[!.]*/*")):
        bundle_folder = target / HEADS / folder.parent.name / folder.name
        try:
            shutil.copytree(folder, bundle_folder)
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(bundle_folder, ignore_errors=True)


_LEFT_SECONDS = 24 * 3600.0
"""Age at which replicas remove a folder that was being made or removed."""
_Versions = Mapping[str, object]
"""Identity of one of a caller's models of a name: inode and time of change in ns, or the row's."""


class HeadStore:
    """The callers' own bundles, on disk and in the engine. Thread-safe.

    Args:
        state: the state directory, locked by this service.
        engine: engine that serves the models.
        most: largest number of models of one caller.
        jobs: of replicas that share the models; None if this service is alone.
    """

    def __init__(
        self, state: Path, engine: Engine, *, most: int, jobs: JobStore | None = None
    ) -> None:
        self._root = state / HEADS
        self._engine = engine
        self._most = most
        self.shared = jobs is not None
        """Whether replicas share the models."""
        self._jobs = None if jobs is None or jobs.storage.local else jobs
        """With a bucket: its rows of models, and their files."""
        shared = self.shared and self._jobs is None
        self._mutex = threading.Lock()
        # Replaced, never changed, so that requests read it without a lock.
        self._known: Mapping[str, _Versions] = {}
        if self._jobs is not None:  # copies
            shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(mode=0o700, exist_ok=True)
        for left in self._root.glob(".*-*"):
            if not shared or time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        for owner in self._owners():
            self._update(owner)

    def _owners(self) -> list[str]:
        if self._jobs is not None:
            return self._jobs.heads.owners()
        return [head_owner(folder.name) for folder in sorted(self._root.glob("[!.]*"))]

    def _versions(self, owner: str) -> _Versions:
        """The present models of a caller."""
        if self._jobs is not None:
            return self._jobs.heads.of(owner)
        return _versions(self._owner_folder(owner))

    def refresh(self, owner: str) -> None:
        """Load a caller's models that other replicas have added, and unload those they removed.

        Args:
            owner: the caller.

        Raises:
            Overloaded: the database or the storage cannot be reached.
        """
        if self.shared and self._versions(owner) != self._known.get(owner, {}):
            with self._mutex:
                self._update(owner)

    def _update(self, owner: str) -> None:
        """Serve the models that a caller has now."""
        found, known = self._versions(owner), self._known.get(owner, {})
        for name in known.keys() - found.keys():
            self._engine.remove(owner, name)
            if self._jobs is not None:
                shutil.rmtree(self._folder(owner, name), ignore_errors=True)
        for name in sorted(found):
            if found[name] != known.get(name):
                if self._jobs is not None:
                    self._bring(self._jobs, owner, name, str(found[name]))
                self._load(owner, self._folder(owner, name))
        self._known = {**self._known, owner: found}

    def _bring(self, jobs: JobStore, owner: str, name: str, version: str) -> None:
        """Copy a model from the bucket; one that was removed meanwhile leaves nothing."""
        with self.draft() as draft:
            with suppress(FileNotFoundError):
                jobs.storage.fetch(f"{HEADS}/{version}", draft)
            self._place(owner, name, draft)

    def _place(self, owner: str, name: str, draft: Path) -> None:
        """Let a folder be this replica's copy of a model."""
        bundle_folder = self._folder(owner, name)
        shutil.rmtree(bundle_folder, ignore_errors=True)
        bundle_folder.parent.mkdir(mode=0o700, exist_ok=True)
        draft.rename(bundle_folder)

    def _load(self, owner: str, folder: Path) -> None:
        """Serve a stored bundle; a damaged one is logged and stays on disk, not served."""
        try:
            model = self._engine.load(load_bundle(folder))
        except BundleError as error:
            _LOG.error("rejected bundle", extra={"bundle": folder.name, "reason": str(error)})
            self._engine.remove(owner, folder.name)
            return
        self._engine.add(owner, model)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclusive lock on the names of models, in this process and among replicas."""
        with self._mutex:
            if not self.shared or self._jobs is not None:  # the database decides
                yield
                return
            file = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
            finally:
                os.close(file)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder for a new bundle; removed afterwards unless it was published.

        Raises:
            InsufficientStorage: the disk is full.
        """
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
        try:
            yield folder
        except OSError as error:
            full = no_room(error)
            raise full or error from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def check_free(self, owner: str, name: str) -> None:
        """Check that a caller may publish one more model under a name.

        Raises:
            NameTaken: the server or the caller has a model of that name.
            InvalidRequest: the caller has the largest number of models that is allowed.
        """
        if name in self._engine.registry.bundles:
            raise NameTaken(f"'{name}' is a model of this server: choose another name")
        found = self._versions(owner)
        if name in found:
            raise _taken(name)
        if len(found) >= self._most:
            raise self._too_many(len(found))

    def _too_many(self, owned: int) -> InvalidRequest:
        return InvalidRequest.of(
            "name",
            f"you have {owned} models of your own, and at most {self._most} are allowed "
            "(PIMC_MAX_HEADS): delete one first (DELETE /heads/NAME)",
        )

    def publish(self, owner: str, folder: Path, model: LoadedModel) -> None:
        """Publish and serve a bundle; once this returns, a kill does not lose it.

        Args:
            owner: the caller.
            folder: folder from `draft` that holds the complete bundle.
            model: the model loaded from that folder.

        Raises:
            NameTaken: another model of that name was published meanwhile.
            InvalidRequest: the caller has the largest number of models that is allowed.
            OSError: the disk is full or failing; `draft` translates a full disk.
        """
        name = model.card.name
        bundle_folder = self._folder(owner, name)
        with self._alone():
            self.check_free(owner, name)
            if self._jobs is not None:
                self._upload(self._jobs, owner, name, folder)
                self._place(owner, name, folder)
                model.folder = bundle_folder
                self._engine.add(owner, model)
                self._learn(owner)
                return
            bundle_folder.parent.mkdir(mode=0o700, exist_ok=True)
            sync_tree(folder)
            _rename(folder, bundle_folder)
            sync_folder(bundle_folder.parent)
            sync_folder(self._root)
            model.folder = bundle_folder
            self._engine.add(owner, model)
            self._learn(owner)

    def _upload(self, jobs: JobStore, owner: str, name: str, folder: Path) -> None:
        """Store a model in the bucket, then record it: a model without a record is not served."""
        version = uuid.uuid4().hex
        key = f"{HEADS}/{version}"
        with self.draft() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            jobs.storage.put(key, copy)
        try:
            recorded = jobs.heads.add(owner, name, version, most=self._most)
        except DuplicateRow as error:
            self._forget(jobs, version)
            raise _taken(name) from error
        except Overloaded as error:
            if not error.uncertain:
                self._forget(jobs, version)
            raise
        if not recorded:
            self._forget(jobs, version)
            raise self._too_many(self._most)

    @staticmethod
    def _forget(jobs: JobStore, version: str) -> None:
        """Remove the files of a model that has no record."""
        with suppress(Overloaded):  # a sweep removes them
            jobs.storage.remove(f"{HEADS}/{version}")

    def _learn(self, owner: str) -> None:
        """Take the models that a caller has as served."""
        self._known = {**self._known, owner: self._versions(owner)}

    def remove(self, owner: str, name: str) -> None:
        """Remove a caller's model; once this returns, a kill does not restore it.

        Raises:
            UnknownModel: the caller has no model of that name.
        """
        if self._jobs is not None:
            self._remove_row(self._jobs, owner, name)
            return
        with self._alone():
            gone = self._root / f".old-{os.urandom(8).hex()}"
            try:
                self._folder(owner, name).rename(gone)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise _unknown(name) from error
            sync_folder(self._owner_folder(owner))
            self._engine.remove(owner, name)
            self._learn(owner)
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_row(self, jobs: JobStore, owner: str, name: str) -> None:
        with self._mutex:
            version = jobs.heads.remove(owner, name)
            if version is None:
                raise _unknown(name)
            self._update(owner)
        self._forget(jobs, version)

    def adopt(self, names: Mapping[str, str]) -> None:
        """Move the models of former owners to new owners.

        If the new owner has a model of the same name, the former owner's model stays where it is
        and an error is logged.

        Args:
            names: new owner by former owner.
        """
        with self._alone():
            for former, owner in names.items():
                if self._jobs is not None:
                    for name in self._jobs.heads.adopt(former, owner):
                        _log_kept(name)
                    self._update(former)
                    self._update(owner)
                    continue
                self._update(former)  # another replica may have done this
                self._update(owner)
                for name, model in self._engine.own(former).items():
                    bundle_folder = self._folder(owner, name)
                    if bundle_folder.exists():
                        _log_kept(name)
                        continue
                    bundle_folder.parent.mkdir(mode=0o700, exist_ok=True)
                    self._folder(former, name).rename(bundle_folder)
                    sync_folder(bundle_folder.parent)
                    sync_folder(self._root)
                    self._engine.add(owner, model)
                    self._engine.remove(former, name)
                self._learn(former)
                self._learn(owner)

    def _owner_folder(self, owner: str) -> Path:
        return head_folder(self._root, owner)

    def _folder(self, owner: str, name: str) -> Path:
        return self._owner_folder(owner) / name


def _taken(name: str) -> NameTaken:
    return NameTaken(
        f"you have a model '{name}': choose another name, or delete it first (DELETE /heads/{name})"
    )


def _unknown(name: str) -> UnknownModel:
    return UnknownModel(
        f"you have no model '{shown(name)}' of your own; GET /heads lists those you have"
    )


def _log_kept(name: str) -> None:
    _LOG.error(
        "model not moved to its new owner, who has one of the same name", extra={"bundle": name}
    )


def _versions(folder: Path) -> _Versions:
    """The models in a caller's folder; a model that replaced another has another version."""
    found = {}
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def _rename(folder: Path, target: Path) -> None:
    """Give a folder its name, unless it is taken.

    Raises:
        NameTaken: it is.
    """
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise NameTaken(f"you have a model '{target.name}': choose another name") from error
        raise
