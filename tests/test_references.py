"""Requests by reference: allowed and forbidden paths and hosts, and bounded downloads."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle
from pimc_client import Client, Reference
from service.api.schemas.request_bodies import ItemBody
from service.errors import BodyTooLarge, ForbiddenReference, UnreachableReference
from service.read.connect import MAX_REDIRECTS, Patience
from service.read.geotiff import SourceFile
from service.read.references import Local, check_again, fetch_items, location_of
from service.settings import HostRule, Settings, SettingsError, read_settings
from tests.kits import rasters
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import waited
from tests.kits.patience import PATIENCE
from tests.kits.programs import self_signed
from tests.kits.sockets import HTTPServer

TIFF = b"II*\0 and the rest"


@dataclass
class Host:
    """A web server of this machine, and the requests that it got."""

    pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """The Host header and the path of each request."""
    port: int = 0

    def gives(self, path: str, content: bytes = TIFF, status: int = 200) -> None:
        def page(to: BaseHTTPRequestHandler) -> None:
            to.send_response(status)
            to.send_header("Content-Length", str(len(content)))
            to.end_headers()
            to.wfile.write(content)

        self.pages[path] = page

    def leads(self, path: str, location: str, status: int = 302) -> None:
        def page(to: BaseHTTPRequestHandler) -> None:
            to.send_response(status)
            to.send_header("Location", location)
            to.send_header("Content-Length", "0")
            to.end_headers()

        self.pages[path] = page

    def drips(self, path: str, *, header: bool = False) -> None:
        """Send a byte now and then, until the client leaves."""

        def page(to: BaseHTTPRequestHandler) -> None:
            if not header:
                to.send_response(200)
                to.end_headers()
            else:
                to.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while True:
                to.wfile.write(b"x")
                time.sleep(0.05)

        self.pages[path] = page


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Host]:
    host = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.requests.append((self.headers["Host"], self.path))
            page = host.pages.get(self.path.partition("?")[0])
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has gone
                page(self) if page else self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    host.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def host() -> Iterator[Host]:
    with serving() as host:
        host.gives("/a.tif")
        yield host


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "request").mkdir()
    return tmp_path / "request"


def names(*known: tuple[str, Sequence[str]]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """A name server that knows these, and the names that it was queried for."""

    async def resolver(host: str, port: int) -> Sequence[str]:
        requested.append(host)
        found = dict(known).get(host)
        if found is None:
            raise OSError("no such host")
        return found

    requested: list[str] = []
    resolver.queries = requested  # type: ignore[attr-defined]
    return resolver


def fetch(hrefs: str | Sequence[str], folder: Path, **options: object) -> tuple[SourceFile, ...]:
    given_settings = Settings(
        **{k: options.pop(k) for k in list(options) if k.startswith(("allowed", "max"))}
    )
    items = [ItemBody(href=href) for href in ([hrefs] if isinstance(hrefs, str) else hrefs)]
    return anyio.run(lambda: fetch_items(items, folder, given_settings, **options))


# Off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("href", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/a.tif"])
def test_references_are_off_until_allowed(folder: Path, href: str) -> None:
    with pytest.raises(ForbiddenReference, match="by reference"):
        fetch(href, folder)


# This machine's files ---------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "2021-01-05.tif").write_bytes(TIFF)
    (tmp_path / "secret.tif").write_bytes(TIFF)
    (root / "out").symlink_to(tmp_path)
    (root / "out.tif").symlink_to(tmp_path / "secret.tif")
    (root / "within.tif").symlink_to(root / "in" / "2021-01-05.tif")
    os.mkfifo(root / "pipe.tif")
    return root


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_file_under_a_root_is_read_where_it_lies(root: Path, folder: Path, form: str) -> None:
    path = root / "in" / "2021-01-05.tif"
    (file,) = fetch(form.format(path), folder, allowed_roots=(root,))
    assert file.path == path.resolve()
    # The folders stay: one of them may hold the date.
    assert file.name.endswith("root/in/2021-01-05.tif")
    assert not file.name.startswith("/")
    assert list(folder.iterdir()) == []


def test_links_within_a_root_and_roots_that_are_links_are_followed(
    root: Path, folder: Path
) -> None:
    linked = root.parent / "linked"
    linked.symlink_to(root)
    hrefs = [str(linked / "within.tif"), str(root / "within.tif")]
    for file in fetch(hrefs, folder, allowed_roots=(linked,)):
        assert file.path == (root / "in" / "2021-01-05.tif").resolve()


def test_a_percent_in_a_url_is_decoded_and_in_a_path_is_not(root: Path, folder: Path) -> None:
    (root / "a b.tif").write_bytes(TIFF)
    (file,) = fetch(f"file://{root}/a%20b.tif", folder, allowed_roots=(root,))
    assert file.name.endswith("root/a b.tif")
    with pytest.raises(ForbiddenReference):
        fetch(f"{root}/a%20b.tif", folder, allowed_roots=(root,))


@pytest.mark.parametrize(
    "href",
    [
        "{tmp}/secret.tif",  # outside
        "{tmp}/not-there.tif",
        "{root}/not-there.tif",
        "{root}/../secret.tif",
        "{root}/in/../in/2021-01-05.tif",
        "file://{root}/%2e%2e/secret.tif",
        "{root}/out.tif",  # a link that leads out
        "{root}/out/secret.tif",  # through a folder that leads out
        "{root}/out/not-there.tif",
        "{root}/pipe.tif",
        "{root}/in",
        "{root}",
        "{tmp}/root-and-more/a.tif",
        "/dev/zero",
        "/proc/self/environ",
    ],
)
def test_every_other_path_is_rejected_with_the_same_message(
    root: Path, folder: Path, href: str
) -> None:
    with pytest.raises(ForbiddenReference) as caught:
        fetch(href.format(root=root, tmp=root.parent), folder, allowed_roots=(root,))
    assert caught.value.detail == (
        "items.0.href: the path does not name a file in the folders of PIMC_ALLOWED_ROOTS: check "
        "the path on the server's machine, or send the file"
    )
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "href",
    [
        "relative.tif",
        "file://elsewhere{root}/in/2021-01-05.tif",
        "file:in/2021-01-05.tif",
        "file://{root}/in/2021-01-05.tif?x",
        "/vsicurl/http://127.0.0.1/a.tif",
        "{root}/in/2021-01-05.tif\0",
        "s3://bucket/a.tif",
        "ftp://127.0.0.1/a.tif",
        "GTIFF_DIR:1:{root}/in/2021-01-05.tif",
        "zip://{root}/in/2021-01-05.tif",
        "data:image/tiff;base64,SUkqAA==",
        "http://[::1",
        "",
    ],
)
def test_other_schemes_are_rejected(root: Path, folder: Path, href: str) -> None:
    item = ItemBody.model_construct(href=href.format(root=root))
    rules = Settings(allowed_roots=(root,), allowed_hosts="127.0.0.1")
    with pytest.raises(ForbiddenReference) as caught:
        anyio.run(lambda: fetch_items([item], folder, rules))
    assert str(root) not in caught.value.detail


def test_a_file_is_checked_again(root: Path, folder: Path) -> None:
    path = root / "in" / "2021-01-05.tif"
    mine = SourceFile(name="x", path=folder / "0000.tif")
    files = (mine, *fetch(str(path), folder, allowed_roots=(root,)))
    check_again(files, folder, (root,))
    with pytest.raises(ForbiddenReference, match=r"items\.1"):
        check_again(files, folder, (folder,))
    path.unlink()
    path.symlink_to(root.parent / "secret.tif")
    with pytest.raises(ForbiddenReference, match=r"items\.1"):
        check_again(files, folder, (root,))


RULES = Settings(allowed_roots=("/usr/lib",), allowed_hosts="127.0.0.1")


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.builds("{}{}".format, st.sampled_from(["/", "file:", "file://", "http://"]), st.text()),
        st.builds("http://127.0.0.1{}".format, st.text(max_size=20)),
        st.builds("http://{}@127.0.0.1:9/".format, st.text(max_size=20)),
        st.builds("http://127.0.0.1:{}/".format, st.integers(-1, 99999)),
    )
)
def test_any_text_is_parsed_or_rejected(href: str) -> None:
    with contextlib.suppress(ForbiddenReference):
        location = location_of(href, "items.0.href", RULES)
        if isinstance(location, Local):
            location.find(RULES.allowed_roots)
        else:
            assert (location.url.scheme, location.host, location.url.userinfo) in {
                ("http", "127.0.0.1", b""),
                ("https", "127.0.0.1", b""),
            }


# Hosts ------------------------------------------------------------------------------------------


def test_an_address_that_is_allowed_is_fetched(host: Host, folder: Path) -> None:
    href = f"http://127.0.0.1:{host.port}/a.tif?signature=s%2Fecret"
    (file,) = fetch(href, folder, allowed_hosts="127.0.0.1")
    assert file.name == "a.tif"
    assert file.path == folder / "0000.tif"
    assert file.path.read_bytes() == TIFF
    assert host.requests == [(f"127.0.0.1:{host.port}", "/a.tif?signature=s%2Fecret")]


def test_a_name_is_resolved_once_and_that_address_is_used(host: Host, folder: Path) -> None:
    resolver = names(("data.example", ["127.0.0.1"]))
    fetch(
        f"http://Data.Example.:{host.port}/a.tif",
        folder,
        allowed_hosts=f"data.example:{host.port}, 127.0.0.0/8",
        resolver=resolver,
    )
    assert resolver.queries == ["data.example"]  # type: ignore[attr-defined]
    assert host.requests[0][0].lower().startswith("data.example")


def test_the_next_address_is_tried(host: Host, folder: Path) -> None:
    resolver = names(("data.example", ["::1", "127.0.0.1"]))
    (file,) = fetch(
        f"http://data.example:{host.port}/a.tif",
        folder,
        allowed_hosts="data.example, 127.0.0.1, ::1",
        resolver=resolver,
    )
    assert file.path.read_bytes() == TIFF


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["192.168.0.1"],
        ["172.16.0.1"],
        ["169.254.169.254"],
        ["100.64.0.1"],
        ["0.0.0.0"],  # noqa: S104 - an address to refuse
        ["224.0.0.1"],
        ["255.255.255.255"],
        ["::1"],
        ["::"],
        ["::ffff:127.0.0.1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1%eth0"],
        ["fd00::1"],
        ["ff02::1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::1"],
        ["2001:0:7f00:1::"],
        ["93.184.215.14", "127.0.0.1"],  # one of several is enough
        ["not an address"],
    ],
)
def test_a_name_with_a_private_address_is_rejected_without_a_request(
    host: Host, folder: Path, addresses: list[str]
) -> None:
    resolver = names(("data.example", addresses))
    with pytest.raises(ForbiddenReference, match=r"'data\.example' has an address") as caught:
        fetch(
            f"http://data.example:{host.port}/a.tif",
            folder,
            allowed_hosts="data.example",
            resolver=resolver,
        )
    assert addresses[0] not in caught.value.detail
    assert host.requests == []


def test_localhost_is_not_a_public_host(host: Host, folder: Path) -> None:
    """With the system's own resolver."""
    with pytest.raises(ForbiddenReference, match="localhost"):
        fetch(f"http://localhost:{host.port}/a.tif", folder, allowed_hosts="localhost")
    assert host.requests == []
    (file,) = fetch(
        f"http://localhost:{host.port}/a.tif", folder, allowed_hosts="localhost,127.0.0.1,::1"
    )
    assert file.path.read_bytes() == TIFF


@pytest.mark.parametrize(
    "href",
    [
        "http://example.org:{port}/a.tif",
        "http://allowed@127.0.0.2:{port}/a.tif",
        "http://127.0.0.1@example.org/a.tif",
        "http://user:password@127.0.0.1:{port}/a.tif",  # a password has no business here
        "http://127.0.0.1.example.org:{port}/a.tif",
        "http://example.org#@127.0.0.1:{port}/a.tif",
        "http://example.org\\@127.0.0.1:{port}/a.tif",
        "http://2130706433:{port}/a.tif",
        "http://0x7f000001:{port}/a.tif",
        "http://127.1:{port}/a.tif",
        "http://[::1]:{port}/a.tif",
        "http:///a.tif",
        "http://127.0.0.1:{other}/a.tif",
    ],
)
def test_no_other_host_or_port_by_any_spelling(host: Host, folder: Path, href: str) -> None:
    resolver = names()
    with pytest.raises(ForbiddenReference) as caught:
        fetch(
            href.format(port=host.port, other=host.port + 1),
            folder,
            allowed_hosts=f"127.0.0.1:{host.port}",
            resolver=resolver,
        )
    assert resolver.queries == []  # type: ignore[attr-defined]
    assert host.requests == []
    assert "password" not in caught.value.detail


def test_with_one_forbidden_href_nothing_is_downloaded(host: Host, folder: Path) -> None:
    hrefs = [f"http://127.0.0.1:{host.port}/a.tif", "http://example.org/b.tif"]
    with pytest.raises(ForbiddenReference, match=r"items\.1.*'example\.org'"):
        fetch(hrefs, folder, allowed_hosts="127.0.0.1")
    assert host.requests == []


# Redirects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_what_is_allowed_is_followed(
    host: Host, folder: Path, status: int
) -> None:
    host.leads("/old.tif", "/a.tif", status)
    (file,) = fetch(f"http://127.0.0.1:{host.port}/old.tif", folder, allowed_hosts="127.0.0.1")
    assert (file.name, file.path.read_bytes()) == ("old.tif", TIFF)


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://other.example/a.tif",
        "//other.example/a.tif",
        "http://127.0.0.2:{port}/a.tif",
        "http://u@127.0.0.1:{port}/a.tif",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.tif",
    ],
)
def test_a_redirect_to_a_forbidden_target_is_rejected(
    host: Host, folder: Path, location: str
) -> None:
    host.leads("/a.tif", location.format(port=host.port))
    redirected = r"items\.0\.href: '127\.0\.0\.1' redirects"
    with pytest.raises(ForbiddenReference, match=redirected) as caught:
        fetch(f"http://127.0.0.1:{host.port}/a.tif", folder, allowed_hosts="127.0.0.1")
    assert "169.254" not in caught.value.detail
    assert len(host.requests) == 1


def test_a_redirect_is_checked_after_dns_too(host: Host, folder: Path) -> None:
    host.leads("/a.tif", f"http://inside.example:{host.port}/b.tif")
    with pytest.raises(ForbiddenReference, match=r"'inside\.example' has an address"):
        fetch(
            f"http://127.0.0.1:{host.port}/a.tif",
            folder,
            allowed_hosts="127.0.0.1,inside.example",
            resolver=names(("inside.example", ["127.0.0.2"])),
        )
    assert len(host.requests) == 1


def test_circular_redirects_end(host: Host, folder: Path) -> None:
    host.leads("/a.tif", "/a.tif")
    with pytest.raises(UnreachableReference, match=str(MAX_REDIRECTS)):
        fetch(f"http://127.0.0.1:{host.port}/a.tif", folder, allowed_hosts="127.0.0.1")
    assert len(host.requests) == MAX_REDIRECTS + 1


# Bodies -----------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_rejected_by_its_length(host: Host, folder: Path) -> None:
    host.gives("/big.tif", b"x" * 5000)
    with pytest.raises(BodyTooLarge, match="4000"):
        fetch(
            f"http://127.0.0.1:{host.port}/big.tif",
            folder,
            allowed_hosts="127.0.0.1",
            max_body_bytes=4000,
        )


def test_a_body_that_does_not_end_is_cut_off(host: Host, folder: Path) -> None:
    def endless(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        while True:
            to.wfile.write(b"x" * 65536)

    host.pages["/endless.tif"] = endless
    with pytest.raises(BodyTooLarge, match="1000000"):
        fetch(
            f"http://127.0.0.1:{host.port}/endless.tif",
            folder,
            allowed_hosts="127.0.0.1",
            max_body_bytes=1_000_000,
        )
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 1_000_000


def test_the_limit_is_of_all_files_together(host: Host, folder: Path) -> None:
    host.gives("/half.tif", b"x" * 3000)
    href = f"http://127.0.0.1:{host.port}/half.tif"
    with pytest.raises(BodyTooLarge, match=r"items\.[01]"):  # they arrive at the same time
        fetch([href, href], folder, allowed_hosts="127.0.0.1", max_body_bytes=5000)


@pytest.mark.parametrize("header", [False, True])
def test_a_host_that_sends_slowly_is_abandoned(host: Host, folder: Path, header: bool) -> None:
    host.drips("/slow.tif", header=header)
    with pytest.raises(UnreachableReference, match=r"0 of 1 files arrived within 0\.5 s"):
        fetch(
            f"http://127.0.0.1:{host.port}/slow.tif",
            folder,
            allowed_hosts="127.0.0.1",
            patience=Patience(idle_seconds=PATIENCE, total_seconds=0.5),
        )


def test_a_host_that_sends_nothing_is_abandoned(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UnreachableReference, match=r"'127\.0\.0\.1' does not respond"):
            fetch(
                f"http://127.0.0.1:{port}/a.tif",
                folder,
                allowed_hosts="127.0.0.1",
                patience=Patience(idle_seconds=0.3),
            )


def test_an_unreachable_reference_is_an_error_that_names_only_the_host(
    host: Host, folder: Path
) -> None:
    with pytest.raises(UnreachableReference) as caught:
        fetch(f"http://127.0.0.1:{host.port}/x.tif?key=1", folder, allowed_hosts="127.0.0.1")
    assert caught.value.detail == (
        "items.0.href: '127.0.0.1' returned status 404 and not the file: check the URL, or retry "
        "later"
    )
    with pytest.raises(UnreachableReference, match=r"'gone\.example' has no address"):
        fetch("http://gone.example/a.tif", folder, allowed_hosts="gone.example", resolver=names())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnreachableReference, match="accepts no connection"):
        fetch(f"http://127.0.0.1:{port}/a.tif", folder, allowed_hosts="127.0.0.1")


def test_a_compressed_body_is_not_decoded(host: Host, folder: Path) -> None:
    def packed(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.send_header("Content-Encoding", "gzip")
        to.send_header("Content-Length", "3")
        to.end_headers()
        to.wfile.write(b"\x1f\x8b\x08")

    host.pages["/packed.tif"] = packed
    (file,) = fetch(f"http://127.0.0.1:{host.port}/packed.tif", folder, allowed_hosts="127.0.0.1")
    assert file.path.read_bytes() == b"\x1f\x8b\x08"


# TLS --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for data.example, in one file."""
    folder = self_signed(tmp_path_factory.mktemp("tls"), "data.example")
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


@pytest.mark.parametrize("name", ["data.example", "other.example"])
def test_a_certificate_is_checked_against_the_name(
    certificate: Path, folder: Path, name: str
) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    asked_for: list[str | None] = []
    server.sni_callback = lambda _socket, sni, _context: asked_for.append(sni)
    with serving(server) as host:
        host.gives("/a.tif")

        def ask() -> tuple[SourceFile, ...]:
            return fetch(
                f"https://{name}:{host.port}/a.tif",
                folder,
                allowed_hosts=f"{name},127.0.0.1",
                resolver=names((name, ["127.0.0.1"])),
                tls=ssl.create_default_context(cafile=str(certificate)),
            )

        if name == "data.example":
            assert ask()[0].path.read_bytes() == TIFF
        else:
            with pytest.raises(UnreachableReference):
                ask()
        assert asked_for == [name]


def test_a_redirect_from_tls_to_none_is_rejected(certificate: Path, folder: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    with serving(server) as host:
        host.leads("/a.tif", f"http://data.example:{host.port}/b.tif")
        with pytest.raises(ForbiddenReference, match="redirects"):
            fetch(
                f"https://data.example:{host.port}/a.tif",
                folder,
                allowed_hosts="data.example,127.0.0.1",
                resolver=names(("data.example", ["127.0.0.1"])),
                tls=ssl.create_default_context(cafile=str(certificate)),
            )


# Rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Data.Example.", "data.example"),
        ("data.example:8443", "data.example:8443"),
        ("127.0.0.1", "127.0.0.1/32"),
        ("127.0.0.1:80", "127.0.0.1/32:80"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("[2001:db8::1]:80", "2001:db8::1/128:80"),
    ],
)
def test_rules_are_read(text: str, shown: str) -> None:
    assert str(HostRule.read(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["http://a.example", "a.example/path", "10.0.0.1/8", "127.0.0.300", "*", "a b", "clé.example"],
)
def test_invalid_rules_are_rejected(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PIMC_ALLOWED_HOSTS", text)
    with pytest.raises(SettingsError, match="PIMC_ALLOWED_HOSTS"):
        read_settings()


@pytest.mark.parametrize("text", ["relative", "/no/such/folder"])
def test_roots_that_are_not_folders_are_rejected(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("PIMC_ALLOWED_ROOTS", text)
    with pytest.raises(SettingsError, match="PIMC_ALLOWED_ROOTS"):
        read_settings()


# The whole way ----------------------------------------------------------------------------------

DATES = ["2021-03-01", "2021-05-01", "2021-07-01"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack whose files have no date in their names or tags."""
    folder = tmp_path_factory.mktemp("scene")
    random = np.random.default_rng(3)
    for n in range(len(DATES)):
        bands = random.integers(300, 4000, (3, 8, 9)).astype(np.uint16)
        rasters.write(folder / f"{'abc'[n]}.tif", bands, descriptions=["B02", "B04", "B08"])
    return folder


@pytest.fixture(scope="module")
def web(scene: Path) -> Iterator[Host]:
    with serving() as web:
        for path in scene.iterdir():
            web.gives(f"/{path.name}", path.read_bytes())
        web.gives("/text.tif", b"<html>no raster</html>")
        yield web


@pytest.fixture(scope="module")
def api(scene: Path, web: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = tmp_path_factory.mktemp("zoo")
    write_bundle(zoo, "pixels-landcover", "classify-pixels", "pixel")
    write_bundle(zoo, "embed-pixel", "embed", "pixel")
    with served(
        model_dir=zoo, allowed_roots=(scene,), allowed_hosts=f"127.0.0.1:{web.port}"
    ) as client:
        yield client


def items(scene: Path, web: Host, kind: str) -> list[dict[str, str]]:
    start = {"path": str(scene), "file": f"file://{scene}", "http": f"http://127.0.0.1:{web.port}"}
    return [
        {"href": f"{start[kind]}/{name}.tif", "date": date}
        for name, date in zip("abc", DATES, strict=True)
    ]


@pytest.mark.parametrize("kind", ["path", "file", "http"])
@pytest.mark.parametrize("accept", ["image/tiff", "application/json"])
def test_a_stack_by_reference_gives_the_result_of_an_upload(
    api: httpx.Client, scene: Path, web: Host, kind: str, accept: str
) -> None:
    sent = api.post(
        "/classify-pixels",
        files=[("files", (f"{n}.tif", (scene / f"{n}.tif").read_bytes())) for n in "abc"],
        data={"dates": ",".join(DATES), "outputs": "class"},
        headers={"Accept": accept},
    )
    named = api.post(
        "/classify-pixels",
        json={"items": items(scene, web, kind), "outputs": ["class"]},
        headers={"Accept": accept},
    )
    assert (sent.status_code, named.status_code) == (200, 200), named.text
    assert named.content == sent.content
    # A file under a root was read in place, and still exists.
    assert sorted(path.name for path in scene.iterdir()) == ["a.tif", "b.tif", "c.tif"]


def test_options_are_the_parameters_of_a_form(api: httpx.Client, scene: Path, web: Host) -> None:
    bare = [{"href": item["href"]} for item in items(scene, web, "path")]
    place = {"type": "Point", "coordinates": [3.0, 50.54]}
    points = {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "properties": {}, "geometry": place}],
    }
    options = {"scale": 0.0002, "dates": ",".join(DATES), "bands": "B02,B04,B08"}
    named = api.post("/classify-pixels", json={"items": bare, "points": points, **options})
    sent = api.post(
        "/classify-pixels",
        files=[("files", (f"{n}.tif", (scene / f"{n}.tif").read_bytes())) for n in "abc"],
        data={**options, "points": json.dumps(points)},
    )
    assert (sent.status_code, named.status_code) == (200, 200), named.text
    assert named.json() == sent.json()


def test_the_sdk_sends_references(api: httpx.Client, scene: Path, web: Host) -> None:
    references = [Reference(**item) for item in items(scene, web, "http")]
    sent = [str(scene / f"{name}.tif") for name in "abc"]
    with Client(str(api.base_url)) as pimc:
        named = pimc.classify_pixels(references)
        by_hand = pimc.classify_pixels(sent, dates=DATES)
    assert (named.array == by_hand.array).all()


@pytest.mark.parametrize("kind", ["path", "http"])
def test_a_job_reads_its_references(api: httpx.Client, scene: Path, web: Host, kind: str) -> None:
    body = {"items": items(scene, web, kind)}
    at_once = api.post("/classify-pixels", json=body)
    job = api.post("/classify-pixels", json=body, headers={"Prefer": "respond-async"})
    assert job.status_code == 202, job.text
    name = job.json()["jobID"]
    assert waited(api, name)["status"] == "successful"
    assert api.get(f"/jobs/{name}/result").content == at_once.content
    api.delete(f"/jobs/{name}")
    assert len(list(scene.iterdir())) == 3  # a job's files are its own, and these are not


def test_a_job_resumed_under_other_roots_reads_nothing(tmp_path: Path) -> None:
    zoo, old, new = (tmp_path / name for name in ("zoo", "old", "new"))
    zoo_with_a_held_model(zoo)
    old.mkdir()
    new.mkdir()
    for month in (3, 5, 7):
        bands = np.full((3, 40, 40), 2000, np.uint16)
        path = old / f"2021-0{month}-01.tif"
        rasters.write(path, bands, descriptions=["B02", "B04", "B08"])
    body = {"model": HELD, "items": [{"href": str(path)} for path in sorted(old.iterdir())]}
    there = {"model_dir": zoo, "state_dir": tmp_path / "state"}
    gate = Gate(tmp_path / "gate")
    with gate.installed(), gate.held(), served(**there, allowed_roots=(old,)) as first:
        # One runs, one waits; neither is through when the service stops.
        requested = [
            first.post("/classify-pixels", json=body, headers={"Prefer": "respond-async"})
            for _ in range(2)
        ]
    names = [response.json()["jobID"] for response in requested]
    with served(**there, allowed_roots=(new,)) as second:
        assert [waited(second, name)["status"] for name in names] == ["failed", "failed"]
        for name in names:
            problem(second.get(f"/jobs/{name}/result"), "forbidden_reference")


def problem(response: httpx.Response, code: str) -> str:
    assert response.json()["code"] == code, response.text
    return str(response.json()["detail"])


def test_an_invalid_request_is_an_error_that_names_the_fault(
    api: httpx.Client, scene: Path, web: Host
) -> None:
    good = items(scene, web, "path")

    def post(task: str = "classify-pixels", **body: object) -> httpx.Response:
        return api.post(f"/{task}", json=body)

    half = [good[0], {"href": good[1]["href"]}]
    assert "2 items but 1 with a date" in problem(post(items=half), "invalid_request")
    assert "twice" in problem(post(items=good, dates=DATES), "invalid_request")
    problem(post(items=[]), "invalid_request")
    problem(post(items=good, horizon=2), "invalid_request")
    problem(post(items=good, series=[]), "invalid_request")
    twice = api.post(
        "/embed", params={"modality": "patch"}, json={"items": good, "modality": "pixel"}
    )
    assert "'patch' in the query, but 'pixel'" in problem(twice, "invalid_request")
    text = [{"href": f"http://127.0.0.1:{web.port}/text.tif", "date": DATES[0]}]
    assert "'text.tif' is not a TIFF" in problem(post(items=text), "not_a_geotiff")
    there, missing = ([{"href": href}] for href in ("/etc/passwd", "/etc/no-such"))
    assert problem(post(items=there), "forbidden_reference") == problem(
        post(items=missing), "forbidden_reference"
    )
    gone = [{"href": f"http://127.0.0.1:{web.port}/gone.tif"}]
    problem(post(items=gone), "unreachable_reference")
