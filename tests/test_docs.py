"""The documentation agrees with the code: settings, endpoints, parameters, codes, models, links."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from models.registry import ZOO, Registry
from service.api.app import create_app
from service.api.schemas.forms import FORMS
from service.errors import STATUS
from service.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
HTTP_API = PAGES["docs/reference/http-api.md"]
SETTINGS = PAGES["docs/reference/settings.md"]
ERRORS = PAGES["docs/reference/errors.md"]
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]


def test_settings_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `PIMC_([A-Z0-9_]+)` \|", SETTINGS, re.MULTILINE)
    assert sorted(rows) == sorted(name.upper() for name in Settings.model_fields)


def test_endpoints_are_those_of_the_application() -> None:
    paths = create_app().openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    rows = set(re.findall(r"^\| `([A-Z]+ /[^`]*)` \|", HTTP_API, re.MULTILINE))
    assert routes - rows == set()
    assert {row for row in rows - routes if row != "GET /"} == set()  # the home page has no schema


def test_parameters_are_those_of_the_request_models() -> None:
    section = HTTP_API.split("## Raster requests")[1].split("## Series requests")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
    for task, fields in FORMS.items():
        named = {name for name, tasks in rows if tasks.strip() == "all" or task in tasks}
        assert named == set(fields.model_fields), task


def test_warnings_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "service").rglob("*.py")))
    codes = set(re.findall(r'StackWarning\(\s*code="(\w+)"', source))
    section = HTTP_API.split("### Warnings")[1].split("## Jobs")[0]
    assert codes <= set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_error_codes_are_those_of_the_code_with_their_status() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", ERRORS, re.MULTILINE))
    assert {code: int(status) for code, status in rows.items()} == dict(STATUS)


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_generated_pages_are_current(name: str) -> None:
    assert PAGES[f"docs/{name}"] == GENERATED[name](), "run `python docs/generate.py`"


def test_every_form_of_input_names_an_existing_test() -> None:
    page = PAGES["docs/reference/inputs.md"]
    tables = re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(rows) > 90
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row)
        assert named, row
        for file, test in named:
            content = (ROOT / "tests" / file).read_text()
            assert not test or f"def {test}(" in content, f"{file}::{test}"


def test_the_readme_lists_every_model() -> None:
    for bundle in Registry.load(ZOO).bundles.values():
        assert f"`{bundle.card.name}`" in README


def test_the_readme_is_short_and_has_one_picture() -> None:
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"!\[", README)) == 1


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tutorial.html").exists()


def test_links_lead_to_files() -> None:
    for name, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_no_page_names_a_path_of_a_machine() -> None:
    for name, text in PAGES.items():
        assert not re.search(r"/(work|root|home)/[a-z]", text), name
