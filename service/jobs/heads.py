"""Store of the callers' own models: folders in the state directory, whole or not there.

    PIMC_STATE_DIR/heads/
        <owner>/<name>/    card.json and model.onnx, as a bundle of `models/zoo`
        .new-…, .old-…     being made or removed; emptied at each start

A bundle is written elsewhere, synced, and gets its name by one rename; so a kill leaves the model
or nothing.
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
"""Folder of the models in a state directory."""
_NOBODY = "_"
"""Folder of the owner without a name, if no keys are set."""


def copy_heads(state: Path, target: Path) -> None:
    """Copy every complete model of a state directory, while a service may use it.

    A model does not change once it has its name; one that is removed meanwhile is left out.

    Args:
        state: the state directory.
        target: the copy's.
    """
    for folder in sorted((state / HEADS).glob("[!.]*/*")):
        place = target / HEADS / folder.parent.name / folder.name
        try:
            shutil.copytree(folder, place)
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(place, ignore_errors=True)


class HeadStore:
    """The callers' own bundles, on disk and in the engine. Thread-safe.

    Args:
        state: the state directory, locked by this service.
        engine: serves them.
        most: models that one caller may have.
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
        """Serve a stored bundle; one that is damaged is logged and left where it is."""
        owner = folder.parent.name
        try:
            model = self._engine.load(load_bundle(folder))
        except BundleError as error:
            _LOG.error("rejected bundle", extra={"bundle": folder.name, "reason": str(error)})
            return
        self._engine.add("" if owner == _NOBODY else owner, model)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """An empty folder for a bundle in the making; removed if it was not published."""
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
        try:
            yield folder
        except OSError as error:
            full = no_room(error)
            raise full or error from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def check_free(self, owner: str, name: str) -> None:
        """Check that a caller may have one more model of a name.

        Raises:
            NameTaken: there is one, built in or the caller's.
            InvalidRequest: the caller has as many as are allowed.
        """
        if name in self._engine.registry.bundles:
            raise NameTaken(f"'{name}' is a model of this server: choose another name")
        place = self._place(owner, name)
        if place.exists():
            raise NameTaken(
                f"you have a model '{name}': choose another name, or delete it first "
                f"(DELETE /heads/{name})"
            )
        there = sum(1 for _ in place.parent.glob("*"))
        if there >= self._most:
            raise InvalidRequest.of(
                "name",
                f"you have {there} models of your own, and {self._most} are allowed "
                "(PIMC_MAX_HEADS): delete one first",
            )

    def publish(self, owner: str, folder: Path, model: LoadedModel) -> None:
        """Give a bundle its name and serve it; after the return no kill loses it.

        Args:
            owner: the caller.
            folder: of `draft`, with the complete bundle.
            model: loaded from it.

        Raises:
            NameTaken: another of that name was published meanwhile.
            InsufficientStorage: the disk is full.
        """
        name = model.card.name
        place = self._place(owner, name)
        with self._mutex:
            self.check_free(owner, name)
            place.parent.mkdir(mode=0o700, exist_ok=True)
            for file in folder.iterdir():
                sync_file(file)
            sync_folder(folder)
            folder.rename(place)
            sync_folder(place.parent)
            sync_folder(self._root)
            self._engine.add(owner, model)

    def remove(self, owner: str, name: str) -> None:
        """Remove a caller's model; after the return no kill brings it back.

        Raises:
            UnknownModel: the caller has none of that name.
        """
        with self._mutex:
            gone = self._root / f".old-{os.urandom(8).hex()}"
            try:
                self._place(owner, name).rename(gone)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise UnknownModel(f"you have no model '{name[:64]}' of your own") from error
            sync_folder(self._root / (owner or _NOBODY))
            self._engine.remove(owner, name)
        shutil.rmtree(gone, ignore_errors=True)

    def adopt(self, names: Mapping[str, str]) -> None:
        """Give the models of former owners to new ones.

        A model whose name the new owner uses already is logged and stays where it is.

        Args:
            names: new owner by former owner.
        """
        with self._mutex:
            for former, owner in names.items():
                for name, model in self._engine.own(former).items():
                    place = self._place(owner, name)
                    if place.exists():
                        _LOG.error("model cannot change its owner", extra={"bundle": name})
                        continue
                    place.parent.mkdir(mode=0o700, exist_ok=True)
                    self._place(former, name).rename(place)
                    sync_folder(place.parent)
                    sync_folder(self._root)
                    self._engine.add(owner, model)
                    self._engine.remove(former, name)

    def _place(self, owner: str, name: str) -> Path:
        return self._root / (owner or _NOBODY) / name
