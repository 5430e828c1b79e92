"""The code samples of the documentation run as they are printed, against a service.

Shell samples run in a folder that looks like the checkout of a reader who has run `make demo`.
Commands that need what a test machine may lack (GDAL's programs, Docker, a browser) are left out;
training commands are parsed, not run.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from rasterio.windows import Window

from benchmarks.serving import served
from tests.kits.programs import require
from tests.kits.rasters import crop
from training.__main__ import app as training

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.ipynb")),
]
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language on a page, or of Python in a notebook, in order."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        return code if language == "python" else []
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The shell commands of a page, lines that continue joined, comments left out."""
    found = []
    for block in blocks(page, "sh"):
        # A quoted argument may span lines: a command ends where its quotes are closed.
        command = ""
        for line in block.replace("\\\n", " ").splitlines():
            command = f"{command}\n{line}" if command else line
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                continue
            if words:
                found.append(command)
            command = ""
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as http:
        yield str(http.base_url).rstrip("/")


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, demo: ModuleType, romania: tuple[Path, Path]
) -> Path:
    """A folder with `demo/stack`, and a reader's own stack of one year in `my-stack`.

    Both hold one patch of the demo's area, as most samples compute on the whole stack. The whole
    area is in `whole`, for the page whose places of labels lie all over it.
    """
    folder = tmp_path_factory.mktemp("checkout")
    whole = demo.to_geotiffs(romania[0], folder / "whole" / "demo" / "stack")
    stack = folder / "demo" / "stack"
    stack.mkdir(parents=True)
    paths = [crop(path, Window(20, 20, 64, 64), stack / path.name) for path in whole]
    (folder / "my-stack").mkdir()
    for path in paths:
        if path.stem.startswith("S2_2018"):
            day = path.stem[3:]
            name = f"S2_{day[:4]}-{day[4:6]}-{day[6:]}.tif"
            shutil.copy(path, folder / "my-stack" / name)
    return folder


WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and "sdk.md" not in page.name]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_samples_run(page: Path, checkout: Path, url: str) -> None:
    """All blocks of a page, one after the other, as in a notebook."""
    program = "\n".join(blocks(page, "python")).replace(ADDRESS, url)
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", program],
        cwd=checkout / "whole" if page.stem == "own-classes" else checkout,
        env={"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def sends(command: str) -> bool:
    """Whether a command is a request to the service."""
    return bool(re.match(r"(curl|(\.venv/bin/)?pimc)\s", command))


REQUESTS = [(page, command) for page in PAGES for command in commands(page) if sends(command)]


@pytest.mark.parametrize(
    ("page", "command"),
    REQUESTS,
    ids=[f"{name_of(page)}-{number}" for number, (page, _) in enumerate(REQUESTS)],
)
def test_requests_of_the_shell_succeed(page: Path, command: str, checkout: Path, url: str) -> None:
    if command.startswith("curl"):
        require(shutil.which("curl"), "curl", "curl")
    pimc = Path(sys.executable).with_name("pimc")
    program = re.sub(r"^(\.venv/bin/)?pimc\s", f"{pimc} ", command).replace(ADDRESS, url)
    done = subprocess.run(
        ["bash", "-c", program],  # noqa: S607
        cwd=checkout,
        env={"PYTHONPATH": str(ROOT), "PIMC_URL": url, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{program}\n{done.stderr}"


TRAINING = [
    (page, command)
    for page in PAGES
    for command in commands(page)
    if command.startswith("python -m training ")
]


@pytest.mark.parametrize(
    ("page", "command"),
    TRAINING,
    ids=[f"{name_of(page)}-{number}" for number, (page, _) in enumerate(TRAINING)],
)
def test_training_commands_have_the_options_shown(page: Path, command: str) -> None:
    words = shlex.split(command, comments=True)[3:]
    group = typer.main.get_group(training)
    subcommand = group.commands[words[0]]
    with subcommand.make_context(words[0], words[1:]):
        pass


def test_samples_are_found() -> None:
    """The patterns above find samples on the pages that exist for them."""
    assert {name_of(page) for page in WITH_PYTHON} >= {
        "README.md",
        "docs/how-to/notebook.ipynb",
        "docs/how-to/python.md",
    }
    pages = {name_of(page) for page, _ in REQUESTS}
    assert pages >= {"README.md", "docs/how-to/curl.md", "docs/tutorial.md"}
    assert {name_of(page) for page, _ in TRAINING} >= {"docs/how-to/train.md"}
