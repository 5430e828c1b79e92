"""Settings: read from the environment, validated and documented; bind addresses are checked."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from service.api.auth import check_binding
from service.settings import Settings, SettingsError, read_settings, short_keys, unknown_variables

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PIMC_"):
            monkeypatch.delenv(name)


def test_the_default_address_is_loopback() -> None:
    settings = read_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.api_keys == ()
    assert settings.providers == "auto"


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIMC_PORT", "8765")
    monkeypatch.setenv("PIMC_MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("PIMC_MAX_BODY_BYTES", "2MiB")
    monkeypatch.setenv("PIMC_MAX_RASTER_BYTES", "1000")
    monkeypatch.setenv("PIMC_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("PIMC_API_KEYS", " one, two ,")
    settings = read_settings()
    assert settings.port == 8765
    assert settings.model_dir == tmp_path
    assert settings.max_body_bytes == 2 * 1024 * 1024
    assert settings.max_raster_bytes == 1000
    assert settings.log_level == "debug"
    hashes = [f"sha256:{hashlib.sha256(key).hexdigest()}" for key in (b"one", b"two")]
    assert [key.get_secret_value() for key in settings.api_keys] == hashes


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMC_MAX_CONCURRENCY", "")
    monkeypatch.setenv("PIMC_API_KEYS", "")
    settings = read_settings()
    assert settings.max_concurrency == Settings.model_fields["max_concurrency"].default
    assert settings.api_keys == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIMC_PROVIDERS", "tpu"),
        ("PIMC_PORT", "70000"),
        ("PIMC_MAX_BODY_BYTES", "0"),
        ("PIMC_MAX_BODY_BYTES", "many"),
        ("PIMC_MAX_CONCURRENCY", "0"),
        ("PIMC_MAX_SPOOL_BYTES", "3GiB"),
        ("PIMC_UPLOAD_RATE", "0"),
        ("PIMC_SYNC_MAX_PIXELS", "-1"),
        ("PIMC_MODEL_DIR", "/no/such/folder"),
        ("PIMC_LOG_LEVEL", "loud"),
        ("PIMC_API_KEYS", "good,bad key"),
        ("PIMC_API_KEYS", "clé"),
        ("PIMC_API_KEYS", "sha256:c0ffee"),
        ("PIMC_EXPLORER_TILES", "tiles.example.org/{z}/{x}/{y}.png"),
        ("PIMC_EXPLORER_TILES", "https://tiles.example.org/{z}/{x}.png"),
        ("PIMC_EXPLORER_TILES", "https://anna@tiles.example.org/{z}/{x}/{y}.png"),
        ("PIMC_EXPLORER_TILES", "https://tiles.example.org/{z}/{x}/{y}.png; script-src *"),
    ],
)
def test_an_invalid_value_is_named_in_the_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as caught:
        read_settings()
    assert name != "PIMC_API_KEYS" or value not in str(caught.value)


def test_tiles_need_an_attribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PIMC_EXPLORER_TILES", "https://tiles.example.org:8443/a/{z}/{x}/{y}.png?k=1"
    )
    with pytest.raises(SettingsError, match="PIMC_EXPLORER_ATTRIBUTION"):
        read_settings()
    monkeypatch.setenv("PIMC_EXPLORER_ATTRIBUTION", "© Example")
    assert read_settings().explorer_origin == "https://tiles.example.org:8443"


def test_keys_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMC_API_KEYS", "swordfish")
    assert "swordfish" not in repr(read_settings())
    assert "swordfish" not in read_settings().model_dump_json()


def test_a_hashed_key_is_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMC_API_KEYS", "swordfish")
    plain = read_settings().api_keys
    digest = hashlib.sha256(b"swordfish").hexdigest().upper()
    monkeypatch.setenv("PIMC_API_KEYS", f"sha256:{digest}")
    assert read_settings().api_keys == plain


def test_no_key_is_stored_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMC_API_KEYS", "swordfish")
    assert "swordfish" not in str([key.get_secret_value() for key in read_settings().api_keys])


def test_misspelt_variables_are_found() -> None:
    environment = {"PIMC_PORT": "1", "PIMC_MAX_BODY": "1", "PATH": "/bin"}
    assert unknown_variables(environment) == ["PIMC_MAX_BODY"]


def test_short_keys_are_counted_and_hashed_ones_are_not() -> None:
    assert short_keys({}) == 0
    keys = ["swordfish", "x" * 15, "x" * 16, "sha256:" + "0" * 64, ""]
    assert short_keys({"PIMC_API_KEYS": ", ".join(keys)}) == 2


def test_every_setting_is_documented_with_its_default() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    rows = dict(re.findall(r"^\| `(PIMC_\w+)` \| (`[^`]*`|none) \|", page, re.MULTILINE))
    fields = {f"PIMC_{name.upper()}": field for name, field in Settings.model_fields.items()}
    assert set(rows) == set(fields)
    for name, shown in rows.items():
        default = fields[name].default
        if shown == "none":
            assert default in (None, ())
        else:
            name_of_field = name.removeprefix("PIMC_").lower()
            assert getattr(Settings(**{name_of_field: shown.strip("`")}), name_of_field) == default


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    check_binding(Settings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])  # noqa: S104 - refused
def test_a_public_address_needs_a_key_or_allow_anonymous(host: str) -> None:
    with pytest.raises(SettingsError, match="PIMC_ALLOW_ANONYMOUS"):
        check_binding(Settings(host=host))
    check_binding(Settings(host=host, allow_anonymous=True))
    check_binding(Settings(host=host, api_keys=("k",)))
    check_binding(Settings(host=host, api_keys_file=Path("keys")))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])  # noqa: S104 - refused
def test_allow_anonymous_false_applies_to_loopback_too(host: str) -> None:
    with pytest.raises(SettingsError, match="PIMC_ALLOW_ANONYMOUS is 0"):
        check_binding(Settings(host=host, allow_anonymous=False))
    check_binding(Settings(host=host, allow_anonymous=False, api_keys=("k",)))
