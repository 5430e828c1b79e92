"""What the docs say is what the code has: settings, routes, error codes, models, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.registry import ZOO, Registry
from service.app import create_app
from service.errors import STATUS
from service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
ALL = README + "".join(DOCS.values())


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_each_setting_is_documented(name: str) -> None:
    assert f"`PIMC_{name.upper()}`" in DOCS["configuration.md"]


def test_the_docs_name_no_setting_that_is_not_there() -> None:
    named = set(re.findall(r"`PIMC_([A-Z_]+)`", DOCS["configuration.md"]))
    assert named == {name.upper() for name in Settings.model_fields}


def test_each_route_is_documented() -> None:
    paths = create_app().openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    assert {r for r in routes if f"`{r}`" not in DOCS["api.md"]} == set()


def test_each_error_code_is_documented_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", DOCS["api.md"], re.MULTILINE))
    assert {code: int(status) for code, status in rows.items()} == dict(STATUS)


def test_each_model_stands_in_the_readme() -> None:
    for bundle in Registry.load(ZOO).bundles.values():
        assert f"`{bundle.card.name}`" in README


def test_the_readme_tree_has_a_line_for_each_file() -> None:
    packages = ("models", "service", "training", "pimc_client")
    files = [
        path.relative_to(ROOT)
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    assert [str(f) for f in files if not re.search(rf"^\s*{f.name}\s", README, re.MULTILINE)] == []


def test_links_lead_somewhere() -> None:
    for name, text in {"README.md": README, **{f"docs/{n}": t for n, t in DOCS.items()}}.items():
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (folder / target).exists(), f"{name} links to {target}"


def test_nothing_names_a_machine() -> None:
    assert not re.search(r"/(work|root|home)/[a-z]", ALL)
