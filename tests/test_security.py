"""API keys, callers, addresses and security headers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle
from service.api import openapi
from service.api.app import create_app
from service.api.auth import ApiKeys, check_reached_address
from service.api.middleware import page_policy
from service.errors import Unauthorized
from service.settings import Settings
from tests.kits.patience import PATIENCE


def keys(*plain: str) -> ApiKeys:
    return ApiKeys(key.get_secret_value() for key in Settings(api_keys=plain).api_keys)


def bearer(key: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}"})


class TestKeys:
    def test_without_keys_every_client_is_served_anonymously(self) -> None:
        assert keys().check(Headers()) is None
        assert keys().check(bearer("anything")) is None

    def test_a_caller_is_the_same_for_each_header_of_the_key(self) -> None:
        first = keys("key-of-one", "key-of-two").check(bearer("key-of-one"))
        again = keys("key-of-two", "key-of-one").check(Headers({"x-api-key": "key-of-one"}))
        digest = hashlib.sha256(b"key-of-one").hexdigest()
        hashed = keys(f"sha256:{digest}").check(bearer("key-of-one"))
        assert first == again == hashed is not None

    def test_two_keys_are_two_callers(self) -> None:
        both = keys("key-of-one", "key-of-two")
        assert both.check(bearer("key-of-one")) != both.check(bearer("key-of-two"))

    def test_a_callers_id_reveals_neither_the_key_nor_its_hash(self) -> None:
        caller = keys("key-of-one").check(bearer("key-of-one"))
        assert caller is not None
        assert len(caller) == 16
        assert caller not in "key-of-one"
        assert caller not in hashlib.sha256(b"key-of-one").hexdigest()

    @pytest.mark.parametrize("given", ["", "key-of-on", "key-of-one ", "KEY-OF-ONE", "clé"])
    def test_any_other_key_is_rejected(self, given: str) -> None:
        with pytest.raises(Unauthorized):
            keys("key-of-one").check(Headers({"x-api-key": given}))
        with pytest.raises(Unauthorized):
            keys("key-of-one").check(Headers())

    def test_the_hash_of_a_key_is_not_accepted_as_a_key(self) -> None:
        digest = hashlib.sha256(b"key-of-one").hexdigest()
        for given in (digest, f"sha256:{digest}"):
            with pytest.raises(Unauthorized):
                keys("key-of-one").check(bearer(given))


class TestReached:
    @pytest.mark.parametrize(
        "address", ["192.168.1.5", "10.0.0.1", "2001:db8::1", "::ffff:10.0.0.1"]
    )
    def test_a_public_address_needs_keys_or_allow_anonymous(self, address: str) -> None:
        scope = {"server": (address, 8000)}
        with pytest.raises(Unauthorized, match="PIMC_ALLOW_ANONYMOUS"):
            check_reached_address(scope, Settings())
        check_reached_address(scope, Settings(allow_anonymous=True))
        check_reached_address(scope, Settings(api_keys=("k",)))

    @pytest.mark.parametrize(
        "server",
        [("127.0.0.1", 80), ("::1", 80), ("::ffff:127.0.0.1", 80), ("/run/pimc.sock", None), None],
    )
    def test_loopback_needs_no_key(self, server: tuple[str, int | None] | None) -> None:
        check_reached_address({"server": server}, Settings())
        with pytest.raises(Unauthorized, match="PIMC_ALLOW_ANONYMOUS=0"):
            check_reached_address({"server": server}, Settings(allow_anonymous=False))


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = tmp_path_factory.mktemp("zoo")
    write_bundle(zoo, "embed-pixel", "embed", "pixel")
    with served(model_dir=zoo, api_keys="swordfish") as client:
        yield client


def policy(response: httpx.Response) -> dict[str, list[str]]:
    rules = [rule.split() for rule in response.headers["Content-Security-Policy"].split(";")]
    return {rule[0]: rule[1:] for rule in rules}


class TestHeaders:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 200),
            ("GET", "/docs", 200),
            ("GET", "/openapi.json", 200),
            ("GET", "/health/live", 200),
            ("GET", "/metrics", 200),
            ("GET", "/models", 401),
            ("POST", "/embed", 401),
            ("GET", "/nowhere", 404),
            ("PUT", "/models", 405),
        ],
    )
    def test_every_response_has_security_headers(
        self, api: httpx.Client, method: str, path: str, status: int
    ) -> None:
        response = api.request(method, path)
        assert response.status_code == status
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in response.headers
        rules = policy(response)
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == ["'none'"]
        assert "'unsafe-inline'" not in rules.get("script-src", [])
        assert "'unsafe-eval'" not in response.headers["Content-Security-Policy"]

    @pytest.mark.parametrize("path", ["/", "/docs"])
    def test_a_pages_policy_lets_the_page_itself_run_and_nothing_else(
        self, api: httpx.Client, path: str
    ) -> None:
        response = api.get(path, headers={"Accept": "text/html"})
        rules = policy(response)
        for tag, rule in (("script", "script-src"), ("style", "style-src")):
            for inline in re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL):
                digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
                assert f"'sha256-{digest}'" in rules[rule]
        sources = re.findall(r"(?:src|href)=\"(https?://[^/\"]+)", response.text)
        for source in sources:
            assert source in rules["script-src"]
            assert source in rules["style-src"]
        assert path == "/docs" or not sources
        assert not re.search(r"\son\w+=", response.text)  # no handler written into the page
        if path == "/":
            assert "'unsafe-inline'" not in rules["style-src"]

    def test_a_changed_script_has_another_policy(self) -> None:
        assert page_policy("<script>a()</script>") != page_policy("<script>b()</script>")


def test_the_documentation_needs_no_other_host(api: httpx.Client) -> None:
    page = api.get("/docs")
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [name for name in sources if name.startswith(("http:", "https:", "//"))] == []
    for name in sources:
        if name.startswith("/"):
            assert api.get(name).status_code == 200, name
    assert "http" not in page.headers["Content-Security-Policy"]
    assert api.get("/docs/../openapi.py").status_code == 404
    assert api.get("/docs/VERSION").status_code == 404


def test_the_description_is_built_once_while_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    building, goes = threading.Semaphore(0), threading.Event()

    def held(*given: Any, **options: Any) -> Any:
        building.release()
        assert goes.wait(PATIENCE)
        return models_json_schema(*given, **options)

    monkeypatch.setattr(openapi, "models_json_schema", held)
    app = create_app(Settings(providers="cpu"))
    assert isinstance(app, openapi.DocumentedApp)
    made = []

    async def ask() -> None:
        made.append(await app.description_of(""))

    async def ask_twice() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            group.start_soon(ask)
            # The event loop still runs while a thread builds it.
            with anyio.fail_after(PATIENCE):
                while not building.acquire(blocking=False):
                    await anyio.sleep(0.01)
            goes.set()

    anyio.run(ask_twice)
    assert not building.acquire(blocking=False)
    assert made[0] is made[1]
    assert json.loads(made[0])["info"]["title"] == "PIMC"
    assert app.openapi() is app.openapi()
