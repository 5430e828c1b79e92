"""Mutated GeoTIFFs, each made from a seed: the same seed is the same case on every machine.

    seed ──▶ Case: a task, parameters, and files made from valid GeoTIFFs
                     └─ edits of directory entries, loops, splices, cuts, changed bytes

Most edits are made by the format: they write harmful numbers where a reader trusts them most
(sizes, offsets, counts, types, compression, predictor, georeference). Random changes of bytes would
almost never reach these places.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

BANDS = ("B02", "B04", "B08")
TASKS = ("classify-pixels", "forecast", "landcover", "embed")
SIDE = 70  # a patch fits, and no block divides it

# --- the format -------------------------------------------------------------------------------

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q"}

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 317, 322, 323, 324, 325
EXTRA, FORMAT, SUB_IFDS, FILL, SUBFILE, JPEG_TABLES = 338, 339, 330, 266, 254, 347
PIXEL_SCALE, TIEPOINT, MATRIX, GEO_KEYS, GEO_DOUBLES, GEO_TEXT = (
    33550,
    33922,
    34264,
    34735,
    34736,
    34737,
)
GDAL_XML, GDAL_NODATA, LERC_PARAMETERS, RPC, YCBCR = 42112, 42113, 50674, 50844, 530  # fmt: skip

NUMBERS = (0, 1, 2, 3, 7, 8, 12, 16, 63, 64, 127, 255, 256, 4095, 32767, 65535, 65536, 2**24,
           2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)  # fmt: skip
COMPRESSIONS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32908, 32946, 34661, 34676, 34677,
                34712, 34887, 34925, 50000, 50001, 50002, 52546, 65000)  # fmt: skip
TEXTS = (
    (b"<GDALMetadata><Item name='OVERVIEW_FILE' domain='OVERVIEWS'>/vsicurl/http://127.0.0.1:9/o"
     b"</Item></GDALMetadata>"),
    b"<GDALMetadata><Item name='SCALE' sample='0' role='scale'>nan</Item></GDALMetadata>",
    (b"<GDALMetadata><Item name='S' sample='99999' role='scale'>1e400</Item>"
     b"<Item name='datetime'>2021-13-45</Item></GDALMetadata>"),
    b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><GDALMetadata>&b;</GDALMetadata>",
    b"<GDALMetadata>" + b"<Item>" * 300,
    b"/vsicurl/http://127.0.0.1:9/x.tif",
    b"nan", b"inf", b"-1e999", b"0x41", b"", b"\xff\xfe\x00", b"65536", b"-9223372036854775809",
    b"%s%n%x" * 20, b"9" * 5000, b"2021-02-30", b"99999999999-01-01",
)  # fmt: skip
# Tags that readers trust most, with harmful values.
_TRUSTED: Mapping[int, tuple[int, ...]] = {
    WIDTH: NUMBERS, HEIGHT: NUMBERS, ROWS: NUMBERS, TILE_WIDTH: NUMBERS, TILE_HEIGHT: NUMBERS,
    STRIPS: NUMBERS, STRIP_BYTES: NUMBERS, TILES: NUMBERS, TILE_BYTES: NUMBERS,
    BITS: (0, 1, 2, 4, 7, 8, 12, 15, 16, 24, 32, 64, 128, 65535),
    SAMPLES: (0, 1, 2, 3, 4, 5, 100, 1000, 21_000, 65535),
    COMPRESSION: COMPRESSIONS, PHOTOMETRIC: (0, 1, 2, 3, 4, 5, 6, 8, 10, 32803, 34892, 65535),
    PLANAR: (0, 1, 2, 3, 65535), PREDICTOR: (0, 1, 2, 3, 4, 34892, 34893, 34894, 34895, 65535),
    FORMAT: (0, 1, 2, 3, 4, 5, 6, 7, 65535), EXTRA: (0, 1, 2, 3, 999), FILL: (0, 1, 2, 3),
    SUBFILE: (0, 1, 2, 4, 5, 7, 2**31),
}  # fmt: skip


@dataclass(kw_only=True)
class Entry:
    """One entry of a directory."""

    tag: int
    kind: int
    count: int
    data: bytes
    """The values; if `raw`, the bytes of the entry that hold the values or their offset."""
    raw: bool = False


@dataclass(kw_only=True)
class Directory:
    """One image of a file."""

    entries: list[Entry]
    next: int | None = None
    """Offset of the next directory, if not that of the list."""

    def get(self, tag: int) -> Entry | None:
        """The first entry of a tag."""
        return next((entry for entry in self.entries if entry.tag == tag), None)


@dataclass(kw_only=True)
class Tiff:
    """A parsed TIFF: its directories, and everything else in place."""

    order: str
    """`<` or `>`."""
    big: bool
    body: bytes
    """The whole file as it was; pixels are found by their old offsets."""
    directories: list[Directory] = field(default_factory=list)

    @classmethod
    def parse(cls, content: bytes) -> Tiff:
        """Parse a valid file."""
        order = "<" if content[:2] == b"II" else ">"
        big = struct.unpack_from(order + "H", content, 2)[0] == 43
        made = cls(order=order, big=big, body=content)
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
        while at:
            at = made._parse_directory(at)
        return made

    def _parse_directory(self, at: int) -> int:
        word, inline, head = ("Q", 8, 8) if self.big else ("I", 4, 2)
        (n,) = struct.unpack_from(self.order + ("Q" if self.big else "H"), self.body, at)
        size = 12 + 2 * inline - 8
        entries = []
        for start in range(at + head, at + head + n * size, size):
            tag, kind, count = struct.unpack_from(self.order + "HH" + word, self.body, start)
            length = count * _SIZES[kind]
            place = start + 4 + inline
            if length > inline:
                (place,) = struct.unpack_from(self.order + word, self.body, place)
            data = self.body[place : place + length]
            entries.append(Entry(tag=tag, kind=kind, count=count, data=data))
        self.directories.append(Directory(entries=entries))
        (following,) = struct.unpack_from(self.order + word, self.body, at + head + n * size)
        return int(following)

    def numbers(self, entry: Entry) -> list[int]:
        """An entry's values that an earlier edit has left complete; [0] if there are none."""
        code = _CODES.get(entry.kind, "B").upper() if entry.kind not in {11, 12} else "B"
        n = len(entry.data) // struct.calcsize(code)
        complete = entry.data[: n * struct.calcsize(code)]
        return list(struct.unpack(f"{self.order}{n}{code}", complete)) or [0]

    def pack(self, kind: int, values: list[Any]) -> bytes:
        """The bytes of values in an entry of this type, modulo the type's range."""
        code = _CODES.get(kind, "B")
        if code in "fd":
            return struct.pack(f"{self.order}{len(values)}{code}", *map(float, values))
        limit = 2 ** (8 * struct.calcsize(code))
        unsigned = code.upper()
        bounded = [int(value) % limit for value in values]
        return struct.pack(f"{self.order}{len(bounded)}{unsigned}", *bounded)

    def put(self, directory: Directory, tag: int, kind: int, values: list[Any]) -> Entry:
        """Set a tag; an existing one is replaced in place."""
        entry = directory.get(tag)
        if entry is None:
            entry = Entry(tag=tag, kind=kind, count=0, data=b"")
            directory.entries.append(entry)
            directory.entries.sort(key=lambda e: e.tag)
        entry.kind, entry.count, entry.data = kind, len(values), self.pack(kind, values)
        return entry

    def build(self) -> bytes:
        """The old file with new directories appended, to which its header points."""
        word, inline = ("Q", 8) if self.big else ("I", 4)
        out = bytearray(self.body + b"\0" * (-len(self.body) % 8))
        places: list[int] = []
        ends: list[int] = []
        for directory in self.directories:
            shown = bytearray()
            for entry in directory.entries:
                shown += struct.pack(self.order + "HH", entry.tag & 0xFFFF, entry.kind & 0xFFFF)
                shown += struct.pack(self.order + word, entry.count % 2 ** (8 * inline))
                if entry.raw or len(entry.data) <= inline:
                    shown += entry.data[:inline].ljust(inline, b"\0")
                else:
                    shown += struct.pack(self.order + word, len(out))
                    out += entry.data + b"\0" * (-len(entry.data) % 8)
            places.append(len(out))
            out += struct.pack(self.order + ("Q" if self.big else "H"), len(directory.entries))
            out += shown
            ends.append(len(out))
            out += bytes(inline)
            out += b"\0" * (-len(out) % 8)
        for number, directory in enumerate(self.directories):
            following = places[number + 1] if number + 1 < len(places) else 0
            if directory.next is not None:
                following = (
                    places[directory.next] if directory.next < len(places) else directory.next
                )
            struct.pack_into(self.order + word, out, ends[number], following)
        struct.pack_into(self.order + word, out, 8 if self.big else 4, places[0])
        return bytes(out)


def edited(content: bytes, change: Callable[[Tiff, Directory], object]) -> bytes:
    """A valid file with its first directory changed."""
    tiff = Tiff.parse(content)
    change(tiff, tiff.directories[0])
    return tiff.build()


# --- edits by the format ----------------------------------------------------------------------


def _trusted_number(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    tag = chance.choice(list(_TRUSTED))
    value = chance.choice(_TRUSTED[tag])
    entry = directory.get(tag)
    count = entry.count if entry else 1
    kind = chance.choice((3, 4, 16)) if entry is None or chance.random() < 0.3 else entry.kind
    values = tiff.numbers(entry) if entry else [value]
    if chance.random() < 0.6:
        values = [value] * min(count, 1000)
    else:
        values[chance.randrange(len(values))] = value
    tiff.put(directory, tag, kind, values)


def _count(chance: random.Random, _tiff: Tiff, directory: Directory) -> None:
    chance.choice(directory.entries).count = chance.choice(NUMBERS)


def _kind(chance: random.Random, _tiff: Tiff, directory: Directory) -> None:
    chance.choice(directory.entries).kind = chance.choice((*_SIZES, 0, 14, 17, 18, 255, 65535))


def _offset(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    entry = chance.choice(directory.entries)
    place = chance.choice((*NUMBERS, len(tiff.body), chance.randrange(len(tiff.body))))
    inline = 8 if tiff.big else 4
    entry.raw = True
    entry.data = struct.pack(tiff.order + ("Q" if tiff.big else "I"), place % 2 ** (8 * inline))


def _tag(chance: random.Random, _tiff: Tiff, directory: Directory) -> None:
    entry = chance.choice(directory.entries)
    entry.tag = chance.choice((*_TRUSTED, SUB_IFDS, JPEG_TABLES, RPC, YCBCR, LERC_PARAMETERS, 0))


def _drop(chance: random.Random, _tiff: Tiff, directory: Directory) -> None:
    directory.entries.remove(chance.choice(directory.entries))


def _twice(chance: random.Random, _tiff: Tiff, directory: Directory) -> None:
    entry = chance.choice(directory.entries)
    directory.entries += [entry] * chance.choice((1, 2, 400))
    if chance.random() < 0.5:
        directory.entries.sort(key=lambda e: e.tag)


def _shuffle(chance: random.Random, _tiff: Tiff, directory: Directory) -> None:
    chance.shuffle(directory.entries)


def _text(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    tag = chance.choice((GDAL_XML, GDAL_NODATA, GEO_TEXT, 270, 305, 306, 700, 34377))
    entry = tiff.put(directory, tag, 1, [0])
    entry.kind = 2 if tag != 700 else 1
    text = chance.choice(TEXTS) + chance.choice((b"\0", b""))
    entry.data, entry.count = text, len(text)


def _georeference(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    tag = chance.choice((PIXEL_SCALE, TIEPOINT, MATRIX, GEO_DOUBLES, GEO_KEYS, RPC))
    if tag == GEO_KEYS:
        entry = directory.get(GEO_KEYS)
        keys = tiff.numbers(entry) if entry else [1, 1, 0, 1]
        for _ in range(chance.randrange(1, 4)):
            keys[chance.randrange(len(keys))] = chance.choice(NUMBERS) % 65536
        tiff.put(directory, tag, 3, keys)
        return
    odd = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e300, float("nan"), float("inf"), float("-inf"), 90.0)
    count = chance.choice({PIXEL_SCALE: (3, 2), TIEPOINT: (6, 12, 24), MATRIX: (16, 8)}.get(
        tag, (1, 3, 92)
    ))  # fmt: skip
    usual = [chance.uniform(-100, 100) for _ in range(count)]
    for _ in range(chance.randrange(1, 4)):
        usual[chance.randrange(count)] = chance.choice(odd)
    tiff.put(directory, tag, 12, usual)


def _loop(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    """Directories that refer to themselves, to each other, or to no directory."""
    way = chance.randrange(4)
    if way == 0:
        tiff.directories[-1].next = chance.randrange(len(tiff.directories))
    elif way == 1:
        tiff.directories[-1].next = chance.choice(NUMBERS) % 2**32
    elif way == 2:
        places = [chance.choice((8, 16, len(tiff.body), *NUMBERS)) for _ in range(4)]
        tiff.put(directory, SUB_IFDS, chance.choice((4, 13, 16)), places)
    else:
        tiff.directories += [directory] * chance.choice((1, 5, 300))


def _as_mask(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    """A second image that claims to be a mask or an overview, of the right or a wrong size."""
    other = Directory(entries=[Entry(**vars(entry)) for entry in directory.entries])
    tiff.put(other, SUBFILE, 4, [chance.choice((1, 4, 5, 7))])
    for _ in range(chance.randrange(3)):
        _trusted_number(chance, tiff, other)
    tiff.directories.append(other)


def _codec(chance: random.Random, tiff: Tiff, directory: Directory) -> None:
    """Another compression over the same bytes, with the tags that belong to it."""
    tiff.put(directory, COMPRESSION, 3, [chance.choice(COMPRESSIONS)])
    if chance.random() < 0.4:
        tiff.put(directory, PREDICTOR, 3, [chance.choice((1, 2, 3, 9))])
    if chance.random() < 0.3:
        tiff.put(directory, BITS, 3, [chance.choice((1, 8, 12, 16, 32, 64))] * 3)
    if chance.random() < 0.3:
        tiff.put(directory, JPEG_TABLES, 7, [chance.randrange(256) for _ in range(64)])
    if chance.random() < 0.3:
        tiff.put(directory, LERC_PARAMETERS, 4, [chance.choice(NUMBERS), chance.choice((0, 1, 2))])


_EDITS: tuple[tuple[Callable[[random.Random, Tiff, Directory], None], int], ...] = (
    (_trusted_number, 8), (_count, 3), (_kind, 3), (_offset, 4), (_tag, 2), (_drop, 3), (_twice, 1),
    (_shuffle, 1), (_text, 4), (_georeference, 4), (_loop, 2), (_as_mask, 2), (_codec, 3),
)  # fmt: skip


def _by_structure(chance: random.Random, content: bytes) -> bytes:
    tiff = Tiff.parse(content)
    edits, weights = zip(*_EDITS, strict=True)
    for edit in chance.choices(edits, weights, k=chance.choice((1, 1, 1, 1, 2, 4))):
        directory = chance.choice(tiff.directories)
        if directory.entries:
            edit(chance, tiff, directory)
    return tiff.build()


def _by_bytes(chance: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    way = chance.randrange(6)
    reach = min(len(out), 1500)
    if way == 0:  # anywhere
        for _ in range(chance.choice((1, 3, 20, 200))):
            out[chance.randrange(len(out))] = chance.randrange(256)
    elif way == 1:  # at the start or the end, where directories lie
        for _ in range(chance.randrange(1, 12)):
            at = chance.randrange(reach)
            out[at if chance.random() < 0.5 else -at - 1] = chance.choice(
                (0, 255, chance.randrange(256))
            )
    elif way == 2:
        del out[chance.randrange(len(out)) :]
    elif way == 3:
        at, n = chance.randrange(len(out)), chance.randrange(1, 4000)
        out[at : at + n] = bytes(len(out[at : at + n]))
    elif way == 4:
        at = chance.randrange(len(out))
        out[at:at] = chance.randbytes(chance.choice((1, 2, 3, 8, 1000)))
    else:
        at, n = chance.randrange(len(out)), chance.randrange(1, 64)
        del out[at : at + n]
    return bytes(out)


# --- valid files to mutate --------------------------------------------------------------------


def sound_files(folder: Path) -> dict[str, bytes]:
    """Small valid GeoTIFFs, one of each variety of the format."""
    chance = np.random.default_rng(11)
    smooth = np.linspace(300, 3500, SIDE * SIDE).reshape(SIDE, SIDE)
    values = np.stack([smooth + chance.integers(0, 50, (SIDE, SIDE)) for _ in BANDS])
    four = np.concatenate([values, np.full((1, SIDE, SIDE), 5)])
    tiled = {"tiled": True, "blockxsize": 32, "blockysize": 16}
    small, float32 = (values / 20).astype("uint8"), (values / 1e4).astype("float32")
    makes: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "plain": (values.astype("uint16"), {}),
        "big-endian": (values.astype("uint16"), {"ENDIANNESS": "BIG"}),
        "bigtiff": (values.astype("uint16"), {"BIGTIFF": "YES", "compress": "lzw"}),
        "bigtiff-big-endian": (values.astype("int16"), {"BIGTIFF": "YES", "ENDIANNESS": "BIG"}),
        "deflate-tiled": (
            values.astype("uint16"),
            {"compress": "deflate", "predictor": 2, **tiled},
        ),
        "lzw-pixel": (values.astype("uint16"), {"compress": "lzw", "interleave": "pixel"}),
        "float": (float32, {"compress": "deflate", "predictor": 3, **tiled}),
        "float16": (float32, {"NBITS": 16}),
        "double": ((values / 1e4).astype("float64"), {"compress": "zstd"}),
        "zstd": (values.astype("uint16"), {"compress": "zstd", "interleave": "band"}),
        "lzma": (values.astype("uint16"), {"compress": "lzma"}),
        "packbits": (small, {"compress": "packbits"}),
        "jpeg": (small, {"compress": "jpeg", "interleave": "pixel", **tiled}),
        "jpeg-ycbcr": (
            small,
            {"compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel", **tiled},
        ),
        "webp": (small, {"compress": "webp", "interleave": "pixel", **tiled}),
        "lerc": (float32, {"compress": "lerc", **tiled}),
        "lerc-zstd": (values.astype("uint16"), {"compress": "lerc_zstd", "MAX_Z_ERROR": 0}),
        "twelve-bits": (values.astype("uint16"), {"NBITS": 12}),
        "four-bands": (four.astype("uint16"), {"compress": "deflate"}),
        "int32": (values.astype("int32"), {"compress": "lzw", "predictor": 2}),
        "geographic": (
            values.astype("uint16"),
            {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-4, 0, 4.5, 0, -1e-4, 50.6)},
        ),
        "rotated": (
            values.astype("uint16"),
            {"transform": rasterio.Affine(7, 7, 500_000, 7, -7, 5_600_000)},
        ),
        "masked": (values.astype("uint16"), {"mask": smooth > 500}),
        "with-overview": (values.astype("uint16"), {"compress": "deflate", **tiled}),
        "sparse": (np.zeros((3, SIDE, SIDE), "uint16"), {"SPARSE_OK": True, "compress": "deflate"}),
    }  # fmt: skip
    files = {}
    for name, (bands, how) in makes.items():
        described = (*BANDS, "SCL")[: len(bands)]
        path = folder / f"{name}.tif"
        _write(path, bands, described, how)
        if name == "with-overview":
            with rasterio.open(path, "r+") as file:
                file.build_overviews([2, 4])
        files[name] = path.read_bytes()
    return files


def _write(path: Path, bands: np.ndarray, names: Sequence[str], how: Mapping[str, Any]) -> None:
    """Write bands (n, h, w) with their names and a date.

    Args:
        path: path of the file.
        bands: values in the number type of the file.
        names: one name per band.
        how: options of rasterio; `mask` (h, w) is written into the file.
    """
    count, height, width = bands.shape
    profile: dict[str, Any] = {
        "crs": "EPSG:32631",
        "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_600_000),
        "nodata": 0,
        **how,
    }
    mask = profile.pop("mask", None)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=count, dtype=bands.dtype,
            **profile,
        ) as file,
    ):  # fmt: skip
        file.write(bands)
        for number, name in enumerate(names, start=1):
            file.set_band_description(number, name)
        file.update_tags(datetime="2021-05-01")
        if mask is not None:
            file.write_mask(mask)


# --- cases ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request."""

    seed: int
    task: str
    files: tuple[tuple[str, bytes], ...]
    """Name and content of each file."""
    fields: Mapping[str, str]
    accept: str
    description: str
    """The mutation, for a report."""


_ACCEPTS = ("image/tiff", "application/json", "application/zip", "*/*")
_POINT = (
    '{"type":"FeatureCollection","features":[{"type":"Feature","geometry":'
    '{"type":"Point","coordinates":[3.0,50.5]}}]}'
)
_ODD_FIELDS = (
    ("scale", "1e-4"), ("scale", "1e30"), ("offset", "-0.1"), ("mask", "none"), ("mask", "scl"),
    ("layout", "file-per-band"), ("layout", "single-file"), ("bands", "B02,B04,B08"),
    ("dates", "2021-01-01,2021-02-01"), ("start", "2020-01-01"), ("model", "../../etc/passwd"),
    ("points", _POINT),
)  # fmt: skip
_NAMES = ("s_{n}.tif", "s_2021-0{n}-01.tif", "../../s{n}.tif", "B0{n}.tif", "\u202e{n}.tif")


def case(seed: int, sound: Mapping[str, bytes]) -> Case:
    """The request that a seed makes from valid files."""
    chance = random.Random(seed)
    names = sorted(sound)
    broken = chance.choice(names)
    content = sound[broken]
    kind = chance.random()
    if kind < 0.7:
        how, content = "structure", _by_structure(chance, content)
    elif kind < 0.85:
        how, content = "bytes", _by_bytes(chance, content)
    elif kind < 0.95:
        how, content = "both", _by_bytes(chance, _by_structure(chance, content))
    else:
        other = sound[chance.choice(names)]
        at = chance.randrange(min(len(content), len(other)))
        how = "spliced"
        content = chance.choice(
            (content + other, content[:at] + other[at:], other[:8] + content[8:])
        )
    files = [content, sound[broken], sound[broken]][: chance.choice((1, 2, 3, 3))]
    chance.shuffle(files)
    pattern = chance.choice(_NAMES) if chance.random() < 0.3 else _NAMES[1]
    fields = dict(chance.sample(_ODD_FIELDS, chance.choice((0, 0, 0, 1, 2))))
    if chance.random() < 0.5:
        # The mutation may remove the band names; with the parameter the pixels are read anyway.
        fields["bands"] = ",".join(BANDS)
    if chance.random() < 0.7 and "dates" not in fields:
        # Distinct dates, so that the files are not merged as granules of one date.
        fields["dates"] = ",".join(f"2021-0{n}-01" for n in range(1, len(files) + 1))
    return Case(
        seed=seed,
        task=chance.choice(TASKS),
        files=tuple((pattern.format(n=n), file) for n, file in enumerate(files, start=1)),
        fields=fields,
        accept=chance.choice(_ACCEPTS),
        description=f"{broken}, {how}",
    )
