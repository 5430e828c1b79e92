"""Requests to a PIMC service through QGIS's own network settings (proxies, authentication)."""

from __future__ import annotations

import json
import mimetypes
import uuid
from pathlib import Path

from qgis.core import QgsBlockingNetworkRequest, QgsFeedback
from qgis.PyQt.QtCore import QFile, QIODevice, QTemporaryFile, QUrl
from qgis.PyQt.QtNetwork import QNetworkRequest

CHUNK = 2**20
ZIP = "application/zip"


class ServiceError(Exception):
    """A request failed; the message is the service's own explanation if there is one."""


class Service:
    """A PIMC service.

    Args:
        url: its address.
        auth: id of a QGIS authentication configuration; "" for none.
        feedback: cancels requests.
    """

    def __init__(self, url: str, auth: str = "", feedback: QgsFeedback | None = None) -> None:
        self.url = url.rstrip("/")
        self.auth = auth
        self.feedback = feedback

    def models(self) -> tuple[list[dict], dict[str, str]]:
        """The model cards, and each task's default model."""
        found = json.loads(self._get("models"))
        return found["models"], found["defaults"]

    def submit(
        self, task: str, files: list[Path], fields: dict[str, str], places: bytes | None = None
    ) -> str:
        """Send files as a job.

        Args:
            task: such as `classify-pixels`.
            files: of the stack.
            fields: further parameters.
            places: GeoJSON that is sent as the file `fields`.

        Returns:
            The job's id.

        Raises:
            ServiceError: the service rejects them, or cannot be reached.
        """
        boundary = uuid.uuid4().hex
        body = QTemporaryFile()
        body.open()  # an upload may be larger than memory
        for name, value in fields.items():
            body.write(_head(boundary, name) + value.encode() + b"\r\n")
        for file in files:
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            body.write(_head(boundary, "files", file.name, kind))
            _copy(file, body)
            body.write(b"\r\n")
        if places is not None:
            head = _head(boundary, "fields", "places.geojson", "application/geo+json")
            body.write(head + places + b"\r\n")
        body.write(f"--{boundary}--\r\n".encode())
        body.seek(0)
        request = self._request(task, f"multipart/form-data; boundary={boundary}")
        request.setRawHeader(b"Prefer", b"respond-async")
        sender = self._sender()
        sender.post(request, body, False, self.feedback)
        return str(json.loads(_content(sender, self.url))["jobID"])

    def job(self, job: str) -> dict:
        """A job's status document."""
        return json.loads(self._get(f"jobs/{job}"))

    def result(self, job: str) -> bytes:
        """A job's rasters and styles as a zip."""
        return self._get(f"jobs/{job}/result", ZIP)

    def problem(self, job: str) -> str:
        """The reason that a job failed."""
        try:
            self._get(f"jobs/{job}/result", ZIP)
        except ServiceError as error:
            return str(error)
        return ""

    def dismiss(self, job: str) -> None:
        """Stop a job."""
        sender = self._sender()
        sender.deleteResource(self._request(f"jobs/{job}"))

    def _get(self, path: str, accept: str = "application/json") -> bytes:
        request = self._request(path)
        request.setRawHeader(b"Accept", accept.encode())
        sender = self._sender()
        sender.get(request, True, self.feedback)
        return _content(sender, self.url)

    def _request(self, path: str, kind: str = "") -> QNetworkRequest:
        request = QNetworkRequest(QUrl(f"{self.url}/{path}"))
        if kind:
            request.setHeader(QNetworkRequest.ContentTypeHeader, kind)
        return request

    def _sender(self) -> QgsBlockingNetworkRequest:
        sender = QgsBlockingNetworkRequest()
        if self.auth:
            sender.setAuthCfg(self.auth)
        return sender


def _content(sender: QgsBlockingNetworkRequest, url: str) -> bytes:
    """The content of a reply.

    Raises:
        ServiceError: it is an error, or there is none.
    """
    reply = sender.reply()
    status = reply.attribute(QNetworkRequest.HttpStatusCodeAttribute)
    content = bytes(reply.content())
    if status is not None and 200 <= int(status) < 300:
        return content
    if status is None:
        raise ServiceError(f"{url} cannot be reached: {sender.errorMessage()}")
    try:
        document = json.loads(content)
        raise ServiceError(f"{document['title']}: {document['detail']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{url} returned status {status}") from error


def _head(boundary: str, name: str, file: str = "", kind: str = "") -> bytes:
    quoted = file.replace("\\", "%5C").replace('"', "%22")
    filename = f'; filename="{quoted}"' if file else ""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n'
    return (head + (f"Content-Type: {kind}\r\n" if kind else "") + "\r\n").encode()


def _copy(path: Path, to: QIODevice) -> None:
    source = QFile(str(path))
    if not source.open(QIODevice.ReadOnly):
        raise ServiceError(f"{path} cannot be read: {source.errorString()}")
    while chunk := source.read(CHUNK):
        to.write(chunk)
    source.close()
