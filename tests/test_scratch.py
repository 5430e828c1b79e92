"""Temporary files of requests: removed with the request, or by the next start after a kill."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from benchmarks.tiny_zoo import write_zoo
from service.api.scratch import Scratch
from tests.kits.jobs import running
from tests.kits.patience import soon


def test_folders_of_ended_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    living = Scratch(tmp_path)
    (living.folder / "request-a").mkdir()
    left = tmp_path / "pimc-left"
    (left / "request-b").mkdir(parents=True)
    (left / "request-b" / "0000.tif").write_bytes(b"x")
    (left / "lock").touch()
    # A folder of something else, and one whose lock is a link to elsewhere.
    (tmp_path / "pimc-other").mkdir()
    (tmp_path / "elsewhere").touch()
    (tmp_path / "pimc-link").mkdir()
    (tmp_path / "pimc-link" / "lock").symlink_to(tmp_path / "elsewhere")
    next_one = Scratch(tmp_path)
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {
        living.folder.name, next_one.folder.name, "pimc-other", "pimc-link", "elsewhere",
    }  # fmt: skip
    assert (living.folder / "request-a").is_dir()
    living.close()
    next_one.close()
    assert {path.name for path in tmp_path.iterdir()} == {"pimc-other", "pimc-link", "elsewhere"}


@pytest.mark.slow
def test_an_upload_cut_by_a_kill_is_removed_by_the_next_start(tmp_path: Path) -> None:
    zoo, state, temporary = write_zoo(tmp_path / "zoo"), tmp_path / "state", tmp_path / "tmp"
    temporary.mkdir()
    head = (
        "POST /classify-pixels HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="files"; filename="a.tif"\r\n\r\n'
    )
    with running(state, zoo, TMPDIR=str(temporary)) as service:
        url = service.api.base_url
        with socket.create_connection((url.host, url.port or 0)) as client:
            client.sendall(head.encode() + bytes(8 * 2**20))
            assert soon(lambda: any(path.stat().st_size for path in temporary.rglob("0000.tif")))
            service.process.send_signal(signal.SIGKILL)
            service.end()
    assert list(temporary.glob("pimc-*/request-*/0000.tif"))
    with running(state, zoo, TMPDIR=str(temporary)) as service:
        assert list(temporary.rglob("0000.tif")) == []
        assert len(list(temporary.glob("pimc-*"))) == 1
        service.process.terminate()
        assert service.end() == 0
    assert list(temporary.glob("pimc-*")) == []
