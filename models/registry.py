"""Registry: the verified bundles of one or more folders, without torch and ONNX Runtime.

A bundle that fails verification does not affect the others: `Registry.load` keeps the valid ones
in `bundles` and the reasons of the others in `refused`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from models.card import CARD_FILE, Modality, ModelCard, Precision, Task, Variant

ZOO = Path(__file__).parent / "zoo"
CHECKSUMS = "SHA256SUMS"
"""The list of the zoo's files, beside its folders."""
_SUM = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<path>[^/\s]+/[^/\s]+)")


class BundleError(Exception):
    """A folder that is not a usable bundle; the message names the folder and the reason."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle on disk."""

    card: ModelCard
    folder: Path

    def path(self, variant: Precision = "float32") -> Path:
        """Path of the ONNX file of a variant; KeyError if the card has no such variant."""
        files = {v.name: v.file for v in self.card.variants}
        return self.folder / files[variant]


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The bundles of one or more folders, by name; a later folder replaces earlier names."""

    bundles: Mapping[str, Bundle]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Folder name to the reason why it was rejected."""

    @classmethod
    def load(cls, *folders: Path, checksums: Mapping[str, str] | None = None) -> Registry:
        """Verify every bundle under the folders given.

        Args:
            folders: each holds a folder per bundle.
            checksums: hex sha256 of each file that is trusted, by `folder/file`; None trusts the
                cards.
        """
        bundles: dict[str, Bundle] = {}
        refused: dict[str, str] = {}
        for root in folders:
            here: dict[str, str] = {}
            for folder in _folders(root):
                try:
                    bundle = load_bundle(folder, taken=here, checksums=checksums)
                except BundleError as error:
                    refused[folder.name] = str(error)
                else:
                    bundles[bundle.card.name] = bundle
                    here[bundle.card.name] = folder.name
        return cls(bundles=bundles, refused=refused)

    def find(self, reference: str) -> Bundle | None:
        """The bundle of a `name` or `name@version`; None if the registry has no such bundle."""
        name, _, version = reference.partition("@")
        bundle = self.bundles.get(name)
        if bundle is None or (version and version != bundle.card.version):
            return None
        return bundle

    def default(self, task: Task, modality: Modality | None = None) -> Bundle | None:
        """The bundle for a request that names no model: one marked `default`, else the first."""
        fits = [
            bundle
            for _, bundle in sorted(self.bundles.items())
            if bundle.card.task == task and modality in {None, bundle.card.modality}
        ]
        return next((b for b in fits if b.card.default), fits[0] if fits else None)


def _folders(root: Path) -> list[Path]:
    """The folders that are meant as bundles: those with a card or an ONNX file."""
    return sorted(
        {path.parent for name in (CARD_FILE, "*.onnx") for path in root.glob(f"*/{name}")}
    )


def read_checksums(path: Path) -> dict[str, str]:
    """A list of files as `sha256sum` writes it, `folder/file` to hex sha256.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not of that form.
    """
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        entry = _SUM.fullmatch(line)
        if entry is None:
            raise ValueError(f"line {number} of {path.name} is not 'sha256  folder/file'")
        found[entry["path"]] = entry["sha256"]
    return found


def load_bundle(
    folder: Path,
    *,
    taken: Mapping[str, str] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> Bundle:
    """Read and verify one bundle.

    Args:
        folder: the card and the files that it names.
        taken: names already in use, each with its folder.
        checksums: as in `Registry.load`.

    Raises:
        BundleError: the card is missing or not valid, its name is in use, the folder holds a
            file that the card does not name, or a named file is missing, unreadable, a symbolic
            link, or differs from the card or from the checksums.
    """
    where = f"bundle '{folder.name}'"
    try:
        content = (folder / CARD_FILE).read_bytes()
        card = ModelCard.model_validate_json(content)
    except OSError as error:
        raise BundleError(f"{where}: {CARD_FILE} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "card"
        raise BundleError(f"{where}: {CARD_FILE} is not valid: {place}: {first['msg']}") from error
    if taken and card.name in taken:
        raise BundleError(
            f"{where}: bundle '{taken[card.name]}' has the same name '{card.name}': change the "
            f"name in one {CARD_FILE}"
        )
    if checksums is not None:
        stated = {variant.file: variant.sha256 for variant in card.variants}
        stated[CARD_FILE] = hashlib.sha256(content).hexdigest()
        for file, sha256 in stated.items():
            if checksums.get(f"{folder.name}/{file}") != sha256:
                raise BundleError(
                    f"{where}: PIMC_MODEL_CHECKSUMS does not list {file} with its sha256: "
                    "restore the file, or update the list"
                )
    try:
        _reject_others(folder, card, where)
        for variant in card.variants:
            _verify(folder / variant.file, variant, where)
    except OSError as error:
        file = Path(str(error.filename)).name
        raise BundleError(f"{where}: {file} cannot be read ({error.strerror})") from error
    return Bundle(card=card, folder=folder)


def _reject_others(folder: Path, card: ModelCard, where: str) -> None:
    """Check that a folder holds the card and the files that it names, and nothing else.

    A graph may keep weights in any file of its folder. ONNX Runtime rejects files outside the
    folder, from the lowest version that the project allows. So the card's sha256 values cover every
    file that is read.

    Raises:
        BundleError: the folder holds another file.
    """
    named = {CARD_FILE, *(variant.file for variant in card.variants)}
    others = sorted({path.name for path in folder.iterdir()} - named)
    if others:
        raise BundleError(
            f"{where}: the folder holds '{others[0]}', which {CARD_FILE} does not name: move the "
            "file elsewhere"
        )


def _verify(path: Path, variant: Variant, where: str) -> None:
    """Check that an ONNX file has the sha256 of the card.

    Raises:
        BundleError: the file is missing, a symbolic link or another file.
    """
    if path.is_symlink():
        # ONNX Runtime would allow weights beside the target of the link.
        raise BundleError(f"{where}: {path.name} is a symbolic link; copy the file instead")
    if not path.is_file():
        raise BundleError(
            f"{where}: the card names {path.name}, which is missing: copy the whole bundle again"
        )
    found = sha256_of(path)
    if found != variant.sha256:
        raise BundleError(
            f"{where}: {path.name} has sha256 {found[:12]}…, but the card states "
            f"{variant.sha256[:12]}…: copy the whole bundle again"
        )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
