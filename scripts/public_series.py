"""Fetch the series of public repositories that forecasts are trained and evaluated on, with git.

    python scripts/public_series.py ../public

Each part is read at one commit, so that a training can be repeated after the repository has
changed. Parts whose target exists are skipped. Together they have about 400 MB, most of them in
small files. `training/datasets/public.py` reads the folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_WORLDCEREAL = "WorldCereal/worldcereal-classification"
_WORLDCROPS = "ESA-PhiLab/WorldCrops"
_MOWING = "simonopravil/gee-mowing-detection"
_RESOURCES = "tests/worldcerealtests/testresources"
_CHIP = f"{_RESOURCES}/worldcerealtraining/0000280849BAC91C"
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
_STATISTICS = "data/cropdata/FIS_Request"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file or a folder of a repository at one commit, and where it goes."""

    repository: str
    commit: str
    path: str
    target: str


PARTS = (
    Part(
        repository=_WORLDCEREAL,
        commit="eed4f948f0f4a4a620fbe37b8df665ba7eb622ab",
        path=f"{_RESOURCES}/test_public_extractions.parquet",
        target="worldcereal/test_public_extractions.parquet",
    ),
    Part(
        repository=_WORLDCEREAL,
        commit="62ec10e7dda6987ab0bc9d8a593457b559259e18",
        path=(
            f"{_RESOURCES}/worldcereal_private_extractions_dummy.parquet/"
            "ref_id=2021_BEL_LPIS-Flanders_POLY_110/data_0.parquet"
        ),
        target="worldcereal/data_0.parquet",
    ),
    # Later commits of the repository do not have these files.
    *(
        Part(
            repository=_WORLDCEREAL,
            commit="5db1e24d918f99e5b2471b826fbcb8fd2afea252",
            path=f"{_CHIP}/{name}_0000280849BAC91C_32631_2018-08-01_2019-11-30.nc",
            target=f"worldcereal/{name}_0000280849BAC91C_32631_2018-08-01_2019-11-30.nc",
        )
        for name in ("S2_L2A_10m", "S2_L2A_20m")
    ),
    # Later commits of the repository do not have these files.
    *(
        Part(
            repository=_WORLDCROPS,
            commit="cd3e75796d606a071912c9537386b8405b3bafef",
            path=f"{_STATISTICS}/{name}/jsondata",
            target=f"worldcrops/{name}",
        )
        for name in ("kenya", "centralasia")
    ),
    Part(
        repository="EOAfrica/GEOMaize",
        commit="8a34f9178c92fb05216da1ba4f9899611cb77803",
        path="data/extractions/month",
        target="geomaize",
    ),
    *(
        Part(
            repository=_MOWING,
            commit="ab7c3be1eb38838942b0b6184de3ff4e7be692ac",
            path=f"data/test/{name}",
            target=f"mowing/{name}",
        )
        for name in ("SK_poly", "CH_poly")
    ),
)


def fetch(part: Part, folder: Path, base: str) -> None:
    """Put a part under the folder; nothing is left there if git fails.

    Args:
        part: the part.
        folder: folder of all parts.
        base: address that the repository's name is appended to.

    Raises:
        subprocess.CalledProcessError: git failed; it has written the reason.
    """
    with tempfile.TemporaryDirectory(dir=folder) as clone:

        def git(*words: str) -> None:
            subprocess.run(["git", "-C", clone, *words], check=True, env=_outside())

        git("init", "--quiet")
        git("remote", "add", "origin", f"{base}/{part.repository}")
        # Only the files of the part are transferred, all at once.
        git("config", "remote.origin.promisor", "true")
        git("config", "remote.origin.partialclonefilter", "blob:none")
        git("fetch", "--quiet", "--depth=1", "--filter=blob:none", "origin", part.commit)
        git("sparse-checkout", "set", "--no-cone", f"/{part.path}")
        git("checkout", "--quiet", "FETCH_HEAD")
        target = folder / part.target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(clone) / part.path, target)


def _outside() -> dict[str, str]:
    """The environment without what names another repository, as in a hook of git."""
    return {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}


def main() -> None:
    """Fetch the missing parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="https://github.com", help="address of the repositories")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if (chosen.folder / part.target).exists():
            continue
        print(f"{part.target}: {part.repository} at {part.commit[:8]}")
        fetch(part, chosen.folder, chosen.base)


if __name__ == "__main__":
    main()
