"""Store of the callers' own models: folders in the state directory, complete or absent.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from models.registry import BundleError, load_bundle
from service.errors import InvalidRequest, NameTaken, UnknownModel, no_room
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.jobs.files import sync_file, sync_folder

_LOG = logging.getLogger(__name__)
HEADS = "heads"
"""Name of the models' folder in a state directory."""
_NO_OWNER = "_"
"""Folder name of the empty owner, which all callers share if no API keys are set."""


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
_Versions = Mapping[str, tuple[int, int]]
"""Inode and time of change in ns of a caller's models, by name."""


class HeadStore:
    """The callers' own bundles, on disk and in the engine. Thread-safe.

    Args:
        state: the state directory, locked by this service.
        engine: engine that serves the models.
        most: largest number of models of one caller.
        shared: whether replicas use the directory at the same time.
    """

    def __init__(self, state: Path, engine: Engine, *, most: int, shared: bool = False) -> None:
        self._root = state / HEADS
        self._engine = engine
        self._most = most
        self.shared = shared
        self._mutex = threading.Lock()
        # Replaced, never changed, so that requests read it without a lock.
        self._known: Mapping[str, _Versions] = {}
        self._root.mkdir(mode=0o700, exist_ok=True)
        for left in self._root.glob(".*-*"):
            if not shared or time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        for folder in sorted(self._root.glob("[!.]*")):
            self._update("" if folder.name == _NO_OWNER else folder.name)

    def refresh(self, owner: str) -> None:
        """Serve what other replicas have made of a caller's models, and nothing that they removed.

        Args:
            owner: the caller.
        """
        if self.shared and _versions(self._owner_folder(owner)) != self._known.get(owner, {}):
            with self._mutex:
                self._update(owner)

    def _update(self, owner: str) -> None:
        """Serve the models that a caller's folder has now."""
        found, known = _versions(self._owner_folder(owner)), self._known.get(owner, {})
        for name in known.keys() - found.keys():
            self._engine.remove(owner, name)
        for name in sorted(found):
            if found[name] != known.get(name):
                self._load(owner, self._folder(owner, name))
        self._known = {**self._known, owner: found}

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
        """Nobody else gives or takes names, in this process and among replicas."""
        with self._mutex:
            if not self.shared:
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
        bundle_folder = self._folder(owner, name)
        if bundle_folder.exists():
            raise NameTaken(
                f"you have a model '{name}': choose another name, or delete it first "
                f"(DELETE /heads/{name})"
            )
        owned = sum(1 for _ in bundle_folder.parent.glob("*"))
        if owned >= self._most:
            raise InvalidRequest.of(
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
            bundle_folder.parent.mkdir(mode=0o700, exist_ok=True)
            for file in folder.iterdir():
                sync_file(file)
            sync_folder(folder)
            _rename(folder, bundle_folder)
            sync_folder(bundle_folder.parent)
            sync_folder(self._root)
            self._engine.add(owner, model)
            self._learn(owner)

    def _learn(self, owner: str) -> None:
        """Take the models of a caller's folder as served."""
        self._known = {**self._known, owner: _versions(self._owner_folder(owner))}

    def remove(self, owner: str, name: str) -> None:
        """Remove a caller's model; once this returns, a kill does not restore it.

        Raises:
            UnknownModel: the caller has no model of that name.
        """
        with self._alone():
            gone = self._root / f".old-{os.urandom(8).hex()}"
            try:
                self._folder(owner, name).rename(gone)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise UnknownModel(
                    f"you have no model '{name[:64]}' of your own; GET /heads lists those you have"
                ) from error
            sync_folder(self._owner_folder(owner))
            self._engine.remove(owner, name)
            self._learn(owner)
        shutil.rmtree(gone, ignore_errors=True)

    def adopt(self, names: Mapping[str, str]) -> None:
        """Move the models of former owners to new owners.

        If the new owner has a model of the same name, the former owner's model stays where it is
        and an error is logged.

        Args:
            names: new owner by former owner.
        """
        with self._alone():
            for former, owner in names.items():
                self._update(former)  # another replica may have done this
                self._update(owner)
                for name, model in self._engine.own(former).items():
                    bundle_folder = self._folder(owner, name)
                    if bundle_folder.exists():
                        _LOG.error(
                            "model not moved to its new owner, who has one of the same name",
                            extra={"bundle": name},
                        )
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
        return self._root / (owner or _NO_OWNER)

    def _folder(self, owner: str, name: str) -> Path:
        return self._owner_folder(owner) / name


def _versions(folder: Path) -> _Versions:
    """What is in a caller's folder; a model that was replaced by one of its name is another."""
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
