"""Behind real proxies: the configurations of docs/how-to/proxy.md, run in front of the service."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.settings import SettingsError, read_settings
from tests.kits.jobs import ASYNC, SERIES, Files, stack, waited
from tests.kits.patience import PATIENCE, soon
from tests.kits.programs import require, self_signed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "proxy.md").read_text()
KEY = {"X-API-Key": "the-key-of-this-test"}
PREFIX = "/pimc"


def sample(language: str, **changes: tuple[str, str]) -> str:
    """The page's configuration, with addresses and certificates of the test."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    for old, new in changes.values():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def free_port() -> int:
    """A port below those that systems give away, so that nothing takes it before the proxy does."""
    for port in range(20_000 + os.getpid() % 10_000, 2**15):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is free")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cert.pem` and `key.pem` for localhost."""
    return self_signed(tmp_path_factory.mktemp("tls"), "localhost")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def service(zoo: Path, state: Path) -> Iterator[httpx.Client]:
    """The service, with the settings of the page."""
    with served(
        model_dir=zoo,
        state_dir=state,
        api_keys=(KEY["X-API-Key"],),
        root_path=PREFIX,
        trusted_proxies=("127.0.0.1",),
    ) as client:
        yield client


@contextmanager
def nginx(folder: Path, upstream: str, port: int, tls: Path) -> Iterator[None]:
    program = shutil.which("nginx")
    require(program, "nginx", "nginx-light")
    servers = sample(
        "nginx",
        upstream=("127.0.0.1:8000", upstream),
        listen=("listen 443", f"listen 127.0.0.1:{port}"),
        name=("pimc.example.org", "localhost"),
        certificate=("/etc/ssl/pimc/certificate.pem", str(tls / "cert.pem")),
        key=("/etc/ssl/pimc/key.pem", str(tls / "key.pem")),
    )
    spools = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{spools}{servers}}}\n"
    )
    command = [str(program), "-p", str(folder), "-c", "nginx.conf", "-e", f"{folder}/error.log"]
    with running(command, port, folder):
        yield


@contextmanager
def caddy(folder: Path, upstream: str, port: int, tls: Path) -> Iterator[None]:
    program = shutil.which("caddy")
    require(program, "caddy", "caddy")
    text = sample(
        "caddyfile",
        upstream=("127.0.0.1:8000", upstream),
        admin=("{\n\tservers", "{\n\tadmin off\n\tauto_https disable_redirects\n\tservers"),
        site=(
            "pimc.example.org {",
            f"https://localhost:{port} {{\n\tbind 127.0.0.1\n\ttls {tls}/cert.pem {tls}/key.pem",
        ),
    )
    (folder / "Caddyfile").write_text(text)
    with running([str(program), "run", "--config", "Caddyfile"], port, folder):
        yield


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except OSError:
        return False
    return True


@contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A program, from when it listens to its end."""
    homes = {name: str(folder) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **homes}, stdout=file, stderr=file
        )
    try:
        assert soon(lambda: process.poll() is not None or listens(port)), log.read_text()
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


PROXIES = {"nginx": nginx, "caddy": caddy}


@pytest.fixture(scope="module", params=PROXIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a proxy's files."""
    return tmp_path_factory.mktemp(request.param)


@pytest.fixture(scope="module")
def site(service: httpx.Client, certificate: Path, folder: Path) -> Iterator[httpx.Client]:
    """A client of the proxy, over TLS, from an address of its own."""
    port, upstream = free_port(), f"127.0.0.1:{service.base_url.port}"
    trust = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    transport = httpx.HTTPTransport(verify=trust, local_address="127.0.0.2")
    with (
        PROXIES[folder.name.rstrip("0123456789")](folder, upstream, port, certificate),
        httpx.Client(
            base_url=f"https://localhost:{port}{PREFIX}/",
            transport=transport,
            headers=KEY,
            timeout=PATIENCE,
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return stack(tmp_path_factory.mktemp("stack"), 20, 30)


def test_every_link_leads_back_through_the_proxy(site: httpx.Client, files: Files) -> None:
    made = site.post(
        "classify-pixels", files=files, data={"outputs": "class,confidence"}, headers=ASYNC
    )
    assert made.status_code == 202, made.text
    where = made.headers["Location"]
    assert where == f"{PREFIX}/jobs/{made.json()['jobID']}"
    status = str(made.url.join(where))
    assert status.startswith("https://")
    assert soon(lambda: site.get(status).json()["status"] == "successful")
    done = site.get(status).json()
    listed = site.get("jobs", params={"limit": 1}).json()
    links = done["links"] + listed["links"] + listed["jobs"][0]["links"]
    assert {link["rel"].rpartition("/")[2] for link in links} == {
        "self",
        "alternate",
        "results",
        "next",
    }
    for link in links:
        assert link["href"].startswith(f"{PREFIX}/jobs")
        assert site.get(urljoin(status, link["href"])).status_code == 200
    complete = site.get(f"{status}/result")
    assert complete.headers["Content-Type"] == "application/zip"
    part = site.get(f"{status}/result", headers={"Range": "bytes=2-9"})
    assert (part.status_code, part.content) == (206, complete.content[2:10])
    head = site.head(f"{status}/result")
    assert head.headers["Content-Length"] == str(len(complete.content))


def test_the_pages_find_their_parts(site: httpx.Client) -> None:
    home = site.get("", headers={"Accept": "text/html"})
    assert home.status_code == 200
    docs = site.get("docs")
    parts = re.findall(r'(?:href|src)="([^":]*)"', home.text + docs.text)
    assert {"explorer/main.js", f"{PREFIX}/docs/swagger-ui.css"} <= set(parts)
    for part in parts:
        # The page of metrics is for the scraper beside the service.
        expected = 404 if part == f"{PREFIX}/metrics" else 200
        assert site.get(str(home.url.join(part))).status_code == expected, part
    (description,) = re.findall(r"url: '([^']*)'", docs.text)
    document = site.get(str(home.url.join(description))).json()
    assert document["servers"][0]["url"] == PREFIX


@pytest.mark.parametrize("path", ["jobs/", "models/", "health/live/", "docs/"])
def test_nothing_redirects_to_the_host_of_the_request(site: httpx.Client, path: str) -> None:
    for headers in ({"X-Forwarded-Host": "evil.example"}, {"Forwarded": "host=evil.example"}):
        response = site.get(path, headers=headers)
        assert response.status_code == 404
        assert "Location" not in response.headers
        assert "evil.example" not in response.text


def test_the_client_is_who_connects_to_the_proxy_whatever_it_claims(
    site: httpx.Client, service: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.api.middleware")
    for name, value in (("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "6.6.6.6, 127.0.0.1")):
        site.get("health/live", headers={name: value, "X-Request-ID": "through"})
    assert clients(caplog, "through") == ["127.0.0.2", "127.0.0.2"]
    # Without the proxy, as a metrics scraper connects: the address of the connection.
    service.get("/health/live", headers={"X-Request-ID": "beside"})
    assert clients(caplog, "beside") == ["127.0.0.1"]


def clients(caplog: pytest.LogCaptureFixture, request_id: str) -> list[str]:
    found = [r for r in caplog.records if r.name == "service.api.middleware"]
    return [r.client for r in found if getattr(r, "request_id", None) == request_id]


def test_an_upload_streams_through(site: httpx.Client, folder: Path, files: Files) -> None:
    """More than a proxy takes by default, and none of it on the proxy's disk."""
    padded = [*files, ("files", ("notes.txt", b"x" * 3_000_000, "text/plain"))]
    response = site.post("classify-pixels", files=padded)
    assert response.status_code in {200, 422}, response.text
    assert response.headers["X-Request-ID"]
    assert [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 1_000_000] == []


def test_a_rejection_arrives_before_the_upload_ends(site: httpx.Client) -> None:
    wrong = {"X-API-Key": "not it"}
    response = site.post("classify-pixels", files=[("files", bytes(8_000_000))], headers=wrong)
    assert (response.status_code, response.json()["code"]) == (401, "unauthorized")


# Without a proxy ------------------------------------------------------------------------------


def test_an_address_that_is_not_trusted_cannot_claim_another(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.api.middleware")
    with served(model_dir=zoo, state_dir=tmp_path, trusted_proxies=("10.0.0.0/8",)) as api:
        claim = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https"}
        api.get("/health/live", headers={**claim, "X-Request-ID": "claims"})
        assert clients(caplog, "claims") == ["127.0.0.1"]
        for path in ("/jobs/", "/models/", "/health/live/"):
            response = api.get(path, headers={"Host": "evil.example"})
            assert response.status_code == 404
            assert "Location" not in response.headers
        job = api.post("/embed", json=SERIES, headers={**ASYNC, "Host": "evil.example"})
        assert job.headers["Location"] == f"/jobs/{job.json()['jobID']}"
        waited(api, job.json()["jobID"])


def test_the_service_answers_with_the_prefix_and_without(service: httpx.Client) -> None:
    for path in ("/health/live", f"{PREFIX}/health/live"):
        assert service.get(path).status_code == 200
    assert service.get(f"{PREFIX}-other/health/live").status_code == 404
    assert service.get(PREFIX).status_code == 404


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PIMC_ROOT_PATH", "pimc"),
        ("PIMC_ROOT_PATH", "/pimc/"),
        ("PIMC_ROOT_PATH", "//evil.example"),
        ("PIMC_ROOT_PATH", "/a b"),
        ("PIMC_ROOT_PATH", "/.."),
        ("PIMC_TRUSTED_PROXIES", "*"),
        ("PIMC_TRUSTED_PROXIES", "proxy.example"),
        ("PIMC_TRUSTED_PROXIES", "10.0.0.1/8"),
    ],
)
def test_settings_that_would_trust_too_much_stop_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        read_settings()


def test_a_prefix_that_is_a_path_of_the_service_stops_the_start() -> None:
    for path in ("/jobs", "/health", "/docs"):
        with pytest.raises(SettingsError, match="PIMC_ROOT_PATH"), served(root_path=path):
            pytest.fail("it started")
