"""A web server of a folder, with ranges."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

from tests.kits.sockets import HTTPServer


@dataclass
class RangeServer:
    """A web server of a folder, with ranges, and the requests that it got."""

    folder: Path
    url: str = ""
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, first byte and the one behind the last, of each request that got a response."""
    before: Callable[[BaseHTTPRequestHandler], bool] = lambda _: False
    """Called with each request; True if it has sent the response."""
    tag: str = ""
    """ETag of each file; empty for none."""
    handler: type[BaseHTTPRequestHandler] = BaseHTTPRequestHandler

    def bytes_of(self, path: str) -> int:
        """How many bytes of a file were sent."""
        return sum(end - begin for name, begin, end in self.requests if name == path)


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder=folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if not server.before(self):
                    self._send()

        def do_HEAD(self) -> None:
            path = folder / unquote(self.path.partition("?")[0]).lstrip("/")
            self.send_response(200 if path.is_file() else 404)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
            self.end_headers()

        def _send(self) -> None:
            name = unquote(self.path.partition("?")[0]).lstrip("/")
            path = folder / name
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            given = self.headers.get("Range")
            begin, end = 0, size
            if given:
                first, last = given.removeprefix("bytes=").split("-")
                begin, end = int(first), min(int(last) + 1, size)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
            server.requests.append((name, begin, end))
            self.send_response(206 if given else 200)
            if given:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            if server.tag:
                self.send_header("ETag", server.tag)
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server.handler = Handler
    web = HTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{web.server_address[1]}"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
