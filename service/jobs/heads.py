"""Store of the callers' own models: folders in the state directory, complete or absent.

    PIMC_STATE_DIR/heads/
        <owner>/<name>/    card.json and model.onnx, a bundle as in `models/zoo`
        .new-…, .old-…     models being made or removed; deleted at each start

A bundle is written to a temporary folder, synced, and published by one rename, so that a kill
leaves either the complete model or none.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


class HeadStore:
    """The callers' own bundles, on disk and in the engine. Thread-safe.

    Args:
        state: the state directory, locked by this service.
        engine: engine that serves the models.
        most: largest number of models of one caller.
    """

    def __init__(self, state: Path, engine: Engine, *, most: int) -> None:
        self._root = state / HEADS
        self._engine = engine
        self._most = most
        self._mutex = threading.Lock()
        self._root.mkdir(mode=0o700, exist_ok=True)
        for left in self._root.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

        for folder in sorted(self._root.glob("[!.]*/*")):
            self._load(folder)

    def _load(self, folder: Path) -> None:
        """Serve a stored bundle; a damaged one is logged and stays on disk, not served."""
        owner = folder.parent.name
        try:
            model = self._engine.load(load_bundle(folder))
        except BundleError as error:
            _LOG.error("rejected bundle", extra={"bundle": folder.name, "reason": str(error)})
            return
        self._engine.add("" if owner == _NO_OWNER else owner, model)

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
        with self._mutex:
            self.check_free(owner, name)
            bundle_folder.parent.mkdir(mode=0o700, exist_ok=True)
            for file in folder.iterdir():
                sync_file(file)
            sync_folder(folder)
            folder.rename(bundle_folder)
            sync_folder(bundle_folder.parent)
            sync_folder(self._root)
            self._engine.add(owner, model)

    def remove(self, owner: str, name: str) -> None:
        """Remove a caller's model; once this returns, a kill does not restore it.

        Raises:
            UnknownModel: the caller has no model of that name.
        """
        with self._mutex:
            gone = self._root / f".old-{os.urandom(8).hex()}"
            try:
                self._folder(owner, name).rename(gone)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise UnknownModel(
                    f"you have no model '{name[:64]}' of your own; GET /heads lists those you have"
                ) from error
            sync_folder(self._root / (owner or _NO_OWNER))
            self._engine.remove(owner, name)
        shutil.rmtree(gone, ignore_errors=True)

    def adopt(self, names: Mapping[str, str]) -> None:
        """Move the models of former owners to new owners.

        If the new owner has a model of the same name, the former owner's model stays where it is
        and an error is logged.

        Args:
            names: new owner by former owner.
        """
        with self._mutex:
            for former, owner in names.items():
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

    def _folder(self, owner: str, name: str) -> Path:
        return self._root / (owner or _NO_OWNER) / name
