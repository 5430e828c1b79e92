"""Finds and verifies bundles. No torch, no ONNX Runtime: files and cards only.

A bundle is refused, with the reason, without taking the others down: `Registry.load` keeps the
good ones in `cards` and the refusals in `refused`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from models.card import CARD_FILE, Modality, ModelCard, Precision, Task

ZOO = Path(__file__).parent / "zoo"
_PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".npz"})


class BundleError(Exception):
    """A folder that is no usable bundle; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle on disk."""

    card: ModelCard
    folder: Path

    def path(self, variant: Precision = "float32") -> Path:
        """Path of the ONNX file of a variant; KeyError where the card has no such variant."""
        files = {v.name: v.file for v in self.card.variants}
        return self.folder / files[variant]


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The bundles of one or more folders, by name; the later folder wins a name."""

    bundles: Mapping[str, Bundle]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Folder name to the reason why it was refused."""

    @classmethod
    def load(cls, *folders: Path) -> Registry:
        """Verify every bundle under the folders given."""
        bundles: dict[str, Bundle] = {}
        refused: dict[str, str] = {}
        for root in folders:
            for card in sorted(root.glob(f"*/{CARD_FILE}")):
                try:
                    bundle = load_bundle(card.parent)
                except BundleError as error:
                    refused[card.parent.name] = str(error)
                else:
                    bundles[bundle.card.name] = bundle
        return cls(bundles=bundles, refused=refused)

    def find(self, reference: str) -> Bundle | None:
        """The bundle of a `name` or `name@version`, None where there is none."""
        name, _, version = reference.partition("@")
        bundle = self.bundles.get(name)
        if bundle is None or (version and version != bundle.card.version):
            return None
        return bundle

    def default(self, task: Task, modality: Modality | None = None) -> Bundle | None:
        """The bundle that answers a task where the request names none.

        One whose card says `default`, else the first by name.
        """
        fits = [
            bundle
            for _, bundle in sorted(self.bundles.items())
            if bundle.card.task == task and modality in {None, bundle.card.modality}
        ]
        return next((b for b in fits if b.card.default), fits[0] if fits else None)


def load_bundle(folder: Path) -> Bundle:
    """Read and verify one bundle.

    Raises:
        BundleError: no card, a card that does not validate, a missing file, a wrong sha256, or
            a Python pickle in the folder.
    """
    where = f"bundle '{folder.name}'"
    try:
        card = ModelCard.model_validate_json((folder / CARD_FILE).read_bytes())
    except OSError as error:
        raise BundleError(f"{where}: {CARD_FILE} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "card"
        raise BundleError(f"{where}: {CARD_FILE} is not valid: {place}: {first['msg']}") from error
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise BundleError(f"{where}: holds {pickles[0]}, and pickles are never loaded")
    for variant in card.variants:
        path = folder / variant.file
        if not path.is_file():
            raise BundleError(f"{where}: the card names {variant.file}, which is not there")
        found = sha256_of(path)
        if found != variant.sha256:
            raise BundleError(
                f"{where}: {variant.file} has sha256 {found[:12]}…, the card says "
                f"{variant.sha256[:12]}…"
            )
    return Bundle(card=card, folder=folder)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
