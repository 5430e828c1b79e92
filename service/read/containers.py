"""Containers: zips, which are unpacked within limits on members and bytes.

    files → zips unpacked → rasters and the metadata beside them (`service.read.metadata`)

Python's zipfile reads zips, not GDAL, and the service chooses the names of the unpacked files.
"""

from __future__ import annotations

import re
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, BinaryIO

from service.errors import BodyTooLarge, Cancelled, InvalidRequest, NotAGeoTIFF, shown
from service.read.band_names import band_in_name, band_of, quality_of, stem
from service.read.dates import date_of
from service.read.geotiff import ZARR, SourceFile, is_of_zarr, label, side_file
from service.read.jp2_guard import SIGNATURE
from service.read.metadata import MAX_METADATA_BYTES, PRODUCT_FILE, is_json, is_metadata

ZIP_MAGIC = b"PK\x03\x04"
_MAX_MEMBERS = 20_000
_MAX_DIRECTORY_BYTES = 8 * 2**20
_CHUNK_BYTES = 2**20
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_RASTER = re.compile(r"\.(tiff?|g(eo)?tiff?|cog|jp2)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """The files of a request, after its zips were unpacked."""

    files: tuple[SourceFile, ...]
    left_out: tuple[tuple[str, str], ...]
    """Members that were not unpacked, each with the reason."""


def unpacked_bytes(files: Sequence[SourceFile], *, max_bytes: int) -> int:
    """Size of the members that `unpack` writes, as the directories of the zips state it, bytes.

    Python's zipfile reads no more of a member than its directory states.

    Args:
        files: the files of the request.
        max_bytes: largest size, bytes.

    Raises:
        BodyTooLarge: the members have more bytes.
        InvalidRequest: a zip is damaged, or has too many members.
    """
    total = 0
    for file in files:
        if not _is_a_zip(file):
            continue
        with _opened(file) as archive:
            total += sum(one.file_size for one in archive.infolist() if _why_not(one) is None)
        if total > max_bytes:
            raise _too_large(file.name, max_bytes)
    return total


def unpack(
    files: Sequence[SourceFile],
    folder: Path,
    *,
    max_bytes: int,
    max_files: int,
    jp2: bool = True,
    cancelled: threading.Event | None = None,
) -> Unpacked:
    """Unpack the zips among files.

    Args:
        files: the files of the request.
        folder: folder for the members, whose names the service chooses.
        max_bytes: largest size of all members together, bytes.
        max_files: largest number of rasters.
        jp2: whether JPEG 2000 files may be read.
        cancelled: event that is set once the client has disconnected.

    Raises:
        Cancelled: the client disconnected.
        BodyTooLarge: the members have more bytes, also if the zip declares fewer.
        InvalidRequest: a zip is damaged, or has too many members.
        NotAGeoTIFF: a file is JPEG 2000, and `jp2` is False.
    """
    found: list[SourceFile] = []
    left_out: list[tuple[str, str]] = []
    zips: list[tuple[SourceFile, list[SourceFile]]] = []
    room = max_bytes
    for number, file in enumerate(files):
        if not _is_a_zip(file):
            found.append(file)
            continue
        members, others, used = _members(file, folder, f"{number:04d}", room, max_bytes, cancelled)
        if file.path.is_relative_to(folder):  # an upload, which is not needed any more
            file.path.unlink()
        zips.append((file, members))
        left_out += others
        room -= used
    times = Counter(one.name for one in (*found, *(one for _, own in zips for one in own)))
    for file, members in zips:
        found += _below_the_zip(file, members, times)
    if len(found) > max_files:
        raise InvalidRequest.of(
            "files",
            f"the request has {len(found)} files, members of zips included, and at most "
            f"{max_files} are allowed: send fewer files",
        )
    forbidden = next((f for f in found if not jp2 and _begins(f.path, SIGNATURE)), None)
    if forbidden is not None:
        raise NotAGeoTIFF(
            f"'{forbidden.name}' is JPEG 2000, which this service does not read (PIMC_JP2); "
            "convert it with gdal_translate -of COG"
        )
    return Unpacked(files=tuple(found), left_out=tuple(left_out))


def _below_the_zip(
    source: SourceFile, members: list[SourceFile], times: Mapping[str, int]
) -> list[SourceFile]:
    """The members of a zip, in a folder with its name if that adds what their names lack.

    People download one zip per date, with the same names in each: S2_2021-01-05.zip with B04.tif.

    Args:
        source: the zip.
        members: its files.
        times: how often each name occurs in the request.
    """
    own = stem(source.name)
    names = [member.name for member in members if _RASTER.search(member.name)]
    adds = (
        any(times[name] > 1 for name in names)
        or (date_of(own) is not None and not any(map(date_of, names)))
        or (band_of(own) is not None and not any(map(band_in_name, names)))
    )
    if not adds:
        return members
    return [replace(member, name=label(f"{own}/{member.name}", 0)) for member in members]


def _is_a_zip(file: SourceFile) -> bool:
    """Whether a file is a zip to unpack, and not a document in a zip, such as a QGIS project."""
    return _begins(file.path, ZIP_MAGIC) and side_file(file) is None


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def _members(
    source: SourceFile,
    folder: Path,
    prefix: str,
    room: int,
    limit: int,
    cancelled: threading.Event | None,
) -> tuple[list[SourceFile], list[tuple[str, str]], int]:
    """The extracted rasters and metadata of a zip, the members left out, and the bytes written."""
    found: list[SourceFile] = []
    left_out: list[tuple[str, str]] = []
    used = 0
    with _opened(source) as archive:
        for number, member in enumerate(archive.infolist()):
            reason = _why_not(member)
            if member.is_dir() or reason == "":
                continue
            name = label(member.filename, number)
            if reason is not None:
                left_out.append((name, reason))
                continue
            path = folder / f"{prefix}-{number:05d}.member"
            with archive.open(member) as content:
                used += _write(content, path, room - used, source.name, limit, cancelled)
            written = SourceFile(name=name, path=path)
            if is_json(name) and not is_metadata(written):
                path.unlink()
                left_out.append((name, "not a raster (.tif or .jp2)"))
                continue
            found.append(written)
    if not any(_RASTER.search(file.name) for file in found):
        raise InvalidRequest.of("files", _holds_none(source.name, left_out))
    if any("/" not in f.name and not _RASTER.search(f.name) for f in found):
        # Metadata without a folder is that of this zip's files, and not of another zip's.
        found = [replace(f, name=label(f"{stem(source.name)}/{f.name}", 0)) for f in found]
    return found, left_out, used


@contextmanager
def _opened(source: SourceFile) -> Iterator[zipfile.ZipFile]:
    """A zip whose directory fits into memory.

    Raises:
        InvalidRequest: the zip is damaged, or has too many members.
    """
    _check_directory(source)
    try:
        with zipfile.ZipFile(source.path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InvalidRequest.of(
            "files",
            f"the zip '{source.name}' cannot be unpacked ({type(error).__name__}): write the zip "
            "again, or send the files without it",
        ) from error


def _holds_none(name: str, left_out: Sequence[tuple[str, str]]) -> str:
    """The message that no file of a zip is read."""
    rasters = [f"'{shown(member)}': {why}" for member, why in left_out if _RASTER.search(member)]
    if rasters:
        return (
            f"no raster in the zip '{name}' can be read ({rasters[0]}): write the zip again with "
            "deflate and without a password"
        )
    zarr = next((shown(member) for member, _ in left_out if is_of_zarr(member)), None)
    if zarr:
        return f"the zip '{name}' holds no .tif or .jp2 file, and '{zarr}' is {ZARR}"
    zips = [shown(member) for member, _ in left_out if member.lower().endswith(".zip")]
    inner = f", but the zip '{zips[0]}': send that zip itself" if zips else ": add the rasters"
    return f"the zip '{name}' holds no .tif or .jp2 file{inner}"


def _why_not(member: zipfile.ZipInfo) -> str | None:
    """The reason for not unpacking a member; None to unpack it, empty for a reason not reported."""
    name = member.filename
    last = name.rpartition("/")[2]
    if last.startswith("._") or name.startswith("__MACOSX/") or last == ".DS_Store":
        return ""
    if PRODUCT_FILE.search(name):
        return None
    if is_json(last) and member.file_size <= MAX_METADATA_BYTES:
        return None
    if last.lower().endswith(".zip"):
        return "a zip inside the zip, which is not unpacked: send it itself"
    if not _RASTER.search(name):
        return "not a raster (.tif or .jp2)"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in _METHODS:
        return "compressed by a method other than deflate"
    own = stem(name)
    if last.lower().endswith(".jp2") and not (band_of(own) or quality_of(own)):
        return "its name contains no band"
    return None


def _write(
    content: IO[bytes],
    path: Path,
    room: int,
    name: str,
    limit: int,
    cancelled: threading.Event | None,
) -> int:
    """Write the content of a member, up to a limit; returns its size.

    Raises:
        BodyTooLarge: the member is larger than the limit.
        Cancelled: the client disconnected.
    """
    size = 0
    with path.open("xb") as file:
        while chunk := content.read(_CHUNK_BYTES):
            if cancelled is not None and cancelled.is_set():
                raise Cancelled("the client disconnected while a zip was unpacked")
            size += len(chunk)
            if size > room:
                raise _too_large(name, limit)
            file.write(chunk)
    return size


def _too_large(name: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the zip '{name}' unpacks to more than the {limit} bytes that the zips of a request may "
        "hold: send fewer files, or cut the area into parts"
    )


def _check_directory(source: SourceFile) -> None:
    """Reject a zip whose directory is too large for memory, because Python reads it at once.

    Raises:
        InvalidRequest: the zip is damaged, or its directory is too large.
    """
    damaged = InvalidRequest.of(
        "files", f"the zip '{source.name}' is incomplete or damaged: download or write it again"
    )
    with source.path.open("rb") as file:
        size = file.seek(0, 2)
        tail_at = max(0, size - _END.size - 2**16)
        file.seek(tail_at)
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END.size:
            raise damaged
        _, _, _, _, members, bytes_, _, _ = _END.unpack_from(tail, at)
        if members == 0xFFFF or bytes_ == 0xFFFFFFFF:
            members, bytes_ = _of_zip64(file, tail_at + at) or (members, bytes_)
    if members > _MAX_MEMBERS or bytes_ > _MAX_DIRECTORY_BYTES:
        raise InvalidRequest.of(
            "files",
            f"the zip '{source.name}' has {members} members and a directory of {bytes_} bytes; at "
            f"most {_MAX_MEMBERS} members and {_MAX_DIRECTORY_BYTES} bytes are allowed: divide the "
            "files into several zips",
        )


def _of_zip64(file: BinaryIO, end: int) -> tuple[int, int] | None:
    """Members and bytes of a directory by the 64-bit record."""
    if end < _LOCATOR_64.size:
        return None
    file.seek(end - _LOCATOR_64.size)
    signature, _, at, _ = _LOCATOR_64.unpack(file.read(_LOCATOR_64.size))
    if signature != b"PK\x06\x07":
        return None
    file.seek(at)
    record = file.read(_END_64.size)
    if len(record) < _END_64.size or record[:4] != b"PK\x06\x06":
        return None
    unpacked = _END_64.unpack(record)
    return unpacked[7], unpacked[8]
