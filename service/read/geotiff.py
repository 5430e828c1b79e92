"""Raster access: only GDAL's GTiff and JP2OpenJPEG drivers, without side files of a raster.

`read_header` reads all metadata that determines whether a file can be used, but no pixels.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import unquote

import numpy as np
import rasterio
from affine import Affine

# Private: an `Env` restores what it sets; used here alone (rasterio 1.4 and 1.5).
from rasterio._env import set_gdal_config
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from service.errors import NotAGeoTIFF, RasterTooLarge, no_descriptors
from service.grid import GDALError, Window
from service.read.band_names import band_of
from service.read.jp2_guard import SIGNATURE, check_jp2
from service.read.tiff_guard import MAX_BLOCK_BYTES, check_directories

# The service rejects a file without georeference itself; rasterio's warning would only be printed.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
MAX_BANDS = 20_000
"""Largest number of bands of a file; listing more costs memory."""
_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF and BigTIFF in both byte orders
# Codecs that decode a block into a second buffer.
_COPYING = ("WEBP", "LERC")
_GDAL: Mapping[str, str | int] = {
    # Do not look for side files (.aux.xml, .tfw, .msk, .ovr): they may belong to other uploads in
    # the same folder.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    # Do not read or write side files with statistics or metadata (PAM).
    "GDAL_PAM_ENABLED": "NO",
    # Take the georeference from the file itself, not from side files.
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    # Do not open network addresses that a file names: GDAL may fetch this name only.
    "CPL_VSIL_CURL_ALLOWED_FILENAME": "none",
}
# Take the georeference of a JP2 from the file itself, not from a world file.
_JP2_SOURCES = {"GEOREF_SOURCES": "INTERNAL"}
CACHE_BYTES = 32 * 2**20
"""Size of GDAL's block cache while no run needs more, bytes."""
# Decoded size of a block from which GDAL decodes the blocks of one read in several threads, bytes.
# With small strips, threads take 1 ms more per read; with blocks of 0.5 MB they are faster.
THREADS_PAY_FROM = 2**18
# Number of small files that are read in parallel, because GDAL opens and decodes without the GIL.
# Only two, because other requests run at the same time. In batches, because passing a file to a
# thread takes 40 us.
SIDE_BY_SIDE = 2
_BATCH = 8
# Largest length of a tag: dates, numbers and names are short, and longer texts are dropped.
_TAG_LENGTH = 1000
Item = TypeVar("Item")
Result = TypeVar("Result")
Driver = Literal["GTiff", "JP2OpenJPEG"]
"""The GDAL driver that reads a file."""
Georeference = tuple[CRS | None, Affine]
"""CRS and transform of a file."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file: the caller's name for it, and its path."""

    name: str
    """The caller's name, from which bands and dates are read; never used as a path."""
    path: Path
    """Path on disk."""
    remote: Path | None = None
    """Description of the remote file whose blocks `path` lacks, and which are fetched when they are
    read (`service.read.on_demand`); None if the file is here."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file and its description, if it has one."""
        return (self.path,) if self.remote is None else (self.path, self.remote)


@dataclass(frozen=True, kw_only=True)
class FileMemory:
    """Memory that GDAL takes for an open file, bytes, as computed from its header."""

    block: int
    """One decoded strip or tile, with all bands if these are interleaved."""
    blocks: int
    """Table of offsets and sizes of blocks: 16 bytes per block, and 8 per block and band."""
    mask: int = 0
    """One decoded block of the internal mask."""
    encoded: int = 0
    """One encoded block, and the buffers of its codec."""

    @property
    def open(self) -> int:
        """Memory of the file while it is open, with the block that was decoded last."""
        return self.block + self.blocks + self.mask


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a raster, read without its pixels. Tuples have one entry per band."""

    source: SourceFile
    width: int
    height: int
    crs: CRS | None
    transform: Affine
    dtypes: tuple[str, ...]
    nodata: tuple[float | None, ...]
    scales: tuple[float, ...]
    """GDAL's scale of each band, 1 if there is none."""
    offsets: tuple[float, ...]
    """GDAL's offset of each band, 0 if there is none."""
    descriptions: tuple[str | None, ...]
    tags: Mapping[str, str]
    """The file's tags, by lower-case name."""
    band_tags: tuple[Mapping[str, str], ...]
    """Each band's tags, by lower-case name."""
    block: tuple[int, int]
    """Rows and columns of a strip or tile."""
    memory: FileMemory
    masked: bool
    """Whether an internal mask marks missing pixels."""
    alpha: int | None = None
    """Number of the last band, from 1, if GDAL assumes that it is alpha."""
    driver: Driver = "GTiff"
    placed_by: str | None = None
    """What places the pixels of a file without a transform, such as ground control points."""

    @property
    def name(self) -> str:
        """The caller's name for the file."""
        return self.source.name

    @property
    def count(self) -> int:
        """Bands in the file."""
        return len(self.dtypes)


@contextmanager
def gdal_options() -> Iterator[None]:
    """A context with GDAL's options for opening and reading, for the calling thread only."""
    with rasterio.Env(**_GDAL):
        yield


class Copies(Protocol):
    """The local copies of one reader's remote files; used by one thread at a time."""

    def path(self, source: SourceFile) -> Path:
        """The copy of a remote file; the file itself if it is here."""
        ...

    def bring(self, windows: Iterable[tuple[SourceFile, Window]]) -> bool:
        """Fetch the blocks of windows that are not in the copies.

        Args:
            windows: files, each with a window in its pixels.

        Returns:
            Whether copies have changed, so that open datasets of them must be closed.

        Raises:
            PIMCError: a host does not return a block, or the file was replaced.
        """
        ...


class RemoteBlocks(Protocol):
    """Fetches the blocks of remote files that readers need."""

    def copies(
        self, sources: Sequence[SourceFile], before: Callable[[], None]
    ) -> AbstractContextManager[Copies]:
        """Local copies of remote files, for one reader; removed at the end of the context.

        Args:
            sources: the files; those that are here are ignored.
            before: called while blocks are awaited; an exception that it raises ends the wait.
        """
        ...


class BlockCache:
    """GDAL's cache of decoded blocks: one per process, as large as the present runs need.

    The application creates the only instance. The size is not set by an `Env`, which would restore
    the previous size for all threads at its end. GDAL's default is 5 % of the machine's memory:
    with it, writing 2048 x 2048 pixels of 17 bands took 480 MB on a machine of 24 GB; with this
    size it takes 220 MB.

    Args:
        decoded: called with the bytes of each read's pixels, from several threads at once.
        remote: fetches the blocks of remote files that readers need; None if they read none.
    """

    def __init__(
        self,
        *,
        decoded: Callable[[int], None] = lambda _: None,
        remote: RemoteBlocks | None = None,
    ) -> None:
        self.decoded = decoded
        """Counts the bytes of a read's pixels."""
        self.remote = remote
        self._needed = [CACHE_BYTES]
        self._lock = threading.Lock()
        self._bound()

    @property
    def size(self) -> int:
        """Present size of the cache, bytes."""
        return max(self._needed)

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """A context in which the cache has at least `size` bytes, also if other runs need less.

        One block must fit, so that it is not decoded again for its other bands. A larger cache has
        no effect, because no window decodes a block twice, and large rasters fill it: with 512 MiB,
        the service took 2.4 times as much memory for 4096 x 4096 pixels as for 1024 x 1024.
        """
        with self._lock:
            self._needed.append(size)
            self._bound()
        try:
            yield
        finally:
            with self._lock:
                self._needed.remove(size)
                self._bound()

    def _bound(self) -> None:
        # In bytes: rasterio passes the number to GDALSetCacheMax64. GDAL's parser of options would
        # interpret a small number as megabytes.
        set_gdal_config("GDAL_CACHEMAX", self.size)


def for_each(
    files: Sequence[Item], work: Callable[[Item], Result], *, block_bytes: int = 0
) -> list[Result]:
    """Call a function for each file, inside `gdal_options`, in parallel for many small files.

    Args:
        files: files in order.
        work: called for each file, in the calling thread or in others.
        block_bytes: decoded size of the largest block, bytes. Files with large blocks are read one
            after the other, because GDAL decodes these blocks in several threads.

    Returns:
        The results in order.

    Raises:
        Exception: the exception of the first file, in order, that failed.
    """

    def batch(begin: int, end: int) -> list[Result]:
        with gdal_options():
            return [work(file) for file in files[begin:end]]

    if len(files) <= _BATCH or block_bytes >= THREADS_PAY_FROM:
        return batch(0, len(files))
    begins = range(0, len(files), _BATCH)
    with ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="files") as pool:
        found = pool.map(batch, begins, [begin + _BATCH for begin in begins])
        return [result for results in found for result in results]


def open_geotiff(
    path: Path, *, block_bytes: int = 0, georeferenced: bool = True, driver: Driver = "GTiff"
) -> rasterio.DatasetReader:
    """Open a file with one driver only, inside `gdal_options`.

    Args:
        path: the file.
        block_bytes: decoded size of a block, bytes; several threads decode large blocks. 0 if it is
            not known.
        georeferenced: False skips the georeference if it is known already, which takes most of the
            time of opening: 0.7 ms with it, 0.1 ms without.
        driver: the driver that reads the file.

    Raises:
        RasterioError: GDAL cannot open it.
    """
    if driver == "JP2OpenJPEG":
        # OpenJPEG decodes whole tiles, also for a read of a few pixels.
        return rasterio.DatasetReader(
            path, driver=driver, sharing=False, USE_TILE_AS_BLOCK="YES", **_JP2_SOURCES
        )
    options = {"NUM_THREADS": "ALL_CPUS"} if block_bytes >= THREADS_PAY_FROM else {}
    if not georeferenced:
        options["GEOREF_SOURCES"] = "NONE"
    # Not `rasterio.open`: it sets and restores GDAL's options for each file, which takes 1.5 times
    # as long, and interprets a scheme or an archive in a path that is a text.
    return rasterio.DatasetReader(path, driver="GTiff", sharing=False, **options)


def read_header(source: SourceFile, known: dict[bytes, Georeference] | None = None) -> Header:
    """Read a file's header, inside `gdal_options`.

    Args:
        source: the file.
        known: cache from the bytes of a georeference to CRS and transform, to which this function
            adds. Most files of a stack have the same bytes, which GDAL then parses only once.

    Raises:
        NotAGeoTIFF: the file is neither a TIFF nor a JP2, GDAL cannot open it, or it contains
            complex numbers.
        RasterTooLarge: a block, the number of bands, or their metadata exceeds its limit.
    """
    driver = _driver_of(source)
    if driver == "JP2OpenJPEG":
        return _read_jp2_header(source)
    try:
        written, mask, images = check_directories(source.path, source.name)
        if images > 1:
            raise NotAGeoTIFF(_several_images(source.name, images))
        found = (known or {}).get(written)
        with open_geotiff(source.path, georeferenced=found is None) as dataset:
            georeference = found or (dataset.crs, dataset.transform)
            header = _header(source, dataset, georeference, mask=mask)
    except (RasterioError, GDALError, OSError, ValueError) as error:
        if busy := no_descriptors(error):
            raise busy from error
        raise NotAGeoTIFF(
            f"'{source.name}' begins as a TIFF, but GDAL's GTiff driver cannot read its header: "
            "download or write the file again"
        ) from error
    if known is not None and written:
        known[written] = georeference
    return header


def _several_images(name: str, images: int) -> str:
    return (
        f"'{name}' holds {images} images (directories of a TIFF), of which GDAL reads only the "
        "first: write each to a file of its own, as with gdal_translate -of COG GTIFF_DIR:2:in.tif "
        "20210105.tif, or all of them as the bands of one file"
    )


def _read_jp2_header(source: SourceFile) -> Header:
    try:
        tile = check_jp2(source.path, source.name)
        with open_geotiff(source.path, driver="JP2OpenJPEG") as dataset:
            georeference = dataset.crs, dataset.transform
            # OpenJPEG has a decoded tile in memory twice: as coefficients and as the image.
            header = _header(source, dataset, georeference, codec=2 * tile)
    except (RasterioError, GDALError, OSError, ValueError) as error:
        if busy := no_descriptors(error):
            raise busy from error
        raise NotAGeoTIFF(
            f"'{source.name}' begins as JPEG 2000, but GDAL's OpenJPEG driver cannot read its "
            "header: download or write the file again"
        ) from error
    return replace(header, driver="JP2OpenJPEG")


_NETCDF = (
    "netCDF or HDF5: convert each band with gdal_translate -of COG NETCDF:in.nc:B04 B04.tif, or "
    "write a GeoTIFF with rioxarray's to_raster"
)
ZARR = "a part of a Zarr store: write its bands as GeoTIFFs with rioxarray's to_raster"
_ZARR = re.compile(
    r"\.zarr/|(?:^|/)(?:\.z(?:attrs|group|array|metadata)|zarr\.json)$", re.IGNORECASE
)
_PAGE = (
    "an HTML page, not data: the server of the download returned a page, often one for signing in; "
    "download the file again"
)
_VRT = "a VRT, which only points to other files: write the pixels with gdal_translate -of COG"
_PICTURE = "a picture, which holds no reflectance: export a GeoTIFF"
_APPLE = "macOS's own data about another file: leave out the files whose names begin with ._"
_CODESTREAM = "a bare JPEG 2000 codestream without georeference: send the product's .jp2"
_BASE64 = "a TIFF in base64: send its bytes as they are, without Content-Transfer-Encoding"
_ARCINFO = (
    "an ESRI grid (ArcInfo), which is a folder of files: convert the folder with gdal_translate "
    "-of COG"
)
_OTHER_FORMATS: Mapping[bytes, str] = {
    b"\x89HDF": _NETCDF,
    b"CDF": _NETCDF,
    b"\x0e\x03\x13\x01": "HDF4: convert each band with gdal_translate -of COG",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"<pamdataset": "GDAL's statistics beside a raster (.aux.xml): leave it out",
    b"<vrtdataset": _VRT,
    b"<error": "an error message of a server, not data: download the file again",
    b"\x00\x05\x16\x07": _APPLE,
    b"PK\x03\x04": "a zip inside a zip: send the inner zip itself",
    b"PK\x05\x06": "an empty zip: leave it out",
    b"7z\xbc\xaf": "an archive of 7-Zip: unpack it, or send a zip",
    b"Rar!": "an archive of RAR: unpack it, or send a zip",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x89PNG": _PICTURE,
    b"\xff\xd8\xff": _PICTURE,
    b"%PDF": "a PDF, not a raster: export a GeoTIFF",
    b"\x93NUMPY": "a NumPy array, which has no georeference: write a GeoTIFF with rasterio",
    b"GRIB": "GRIB: convert it with gdal_translate -of COG",
    b"PAR1": "Parquet, not a raster: polygons go into the parameter `fields`",
    b"SQLite format 3": "a GeoPackage or database: polygons go into the parameter `fields`",
    b"\x00\x00\x27\x0a": "a shapefile: send polygons as GeoPackage or GeoJSON in `fields`",
    b"EHFA_HEADER_TAG": "an ERDAS Imagine file: convert it with gdal_translate -of COG",
    b"ENVI": "the header of an ENVI file: convert the ENVI file with gdal_translate -of COG",
    b"<dimap": "the metadata of a DIMAP product: send its .tif or .jp2 files",
    b"<xfdu:xfdu": "the manifest of a SAFE product: send its .jp2 files and MTD_MSIL2A.xml",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: run git lfs pull",
    b"\xff\x4f\xff\x51": _CODESTREAM,
    b"GRID1.": _ARCINFO,
    b"NITF": "NITF: convert it with gdal_translate -of COG",
    b"PCIDSK": "a PCIDSK file: convert it with gdal_translate -of COG",
    b"msid": "MrSID: convert it with gdal_translate -of COG",
    b"SUkq": _BASE64,
    b"TU0AK": _BASE64,
    b"RIFF": _PICTURE,
    b"GIF8": _PICTURE,
    b"fgb\x03": "FlatGeobuf: polygons go into the parameter `fields`, as GeoPackage or GeoJSON",
    b"ARROW1": "Arrow, not a raster: polygons go into the parameter `fields`",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"<kml": "KML: polygons go into the parameter `fields`, as GeoPackage or GeoJSON",
    b"MATLAB": "a MATLAB file, which has no georeference: write a GeoTIFF with geotiffwrite",
    b"<?xml": "XML, not a raster: leave it out",
    b"{": "JSON, not a raster: leave it out; polygons go into the parameter `fields`",
}
"""First bytes of files that are not rasters, with the kind of file and advice for messages."""


def _driver_of(source: SourceFile) -> Driver:
    """The driver that reads a file, by its first bytes.

    Raises:
        NotAGeoTIFF: no driver reads the file; the message names the kind of file and gives advice,
            if the kind is known.
    """
    try:
        with source.path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        if busy := no_descriptors(error):
            raise busy from error
        raise NotAGeoTIFF(f"'{source.name}' cannot be opened: send the file again") from error
    if head[:4] in _MAGICS:
        return "GTiff"
    if head.startswith(SIGNATURE):
        return "JP2OpenJPEG"
    raise NotAGeoTIFF(f"'{source.name}' is not a TIFF: {_what_it_is(source.name, head)}")


def not_rasters(sources: Sequence[SourceFile]) -> list[str]:
    """The names of files whose first bytes are neither those of a TIFF nor of a JP2."""
    names = []
    for source in sources:
        try:
            _driver_of(source)
        except NotAGeoTIFF:
            names.append(source.name)
    return names


def is_of_zarr(name: str) -> bool:
    """Whether a file's name, with its folders, is that of a part of a Zarr store."""
    return bool(_ZARR.search(name))


def _what_it_is(name: str, head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    last = name.rpartition("/")[2].lower()
    if last.startswith("._"):
        text = b"\x00\x05\x16\x07"
    elif last.endswith(".aux.xml"):
        text = b"<pamdataset"
    elif text.startswith(b"<?xml"):  # the root element after the declaration identifies the kind
        root = text.partition(b"?>")[2].lstrip()
        text = root if any(root.startswith(magic) for magic in _OTHER_FORMATS) else text
    if is_of_zarr(name):
        return f"it is {ZARR}"
    if last.endswith(".adf"):  # some of these files begin as a shapefile does
        return f"it is {_ARCINFO}"
    if _GEOJSON.search(head):
        return (
            "it is GeoJSON, not a raster: a polygon that cuts the map goes into `area`, polygons "
            "of fields go into `fields`, and points into `points`"
        )
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic) or text.startswith(magic.lower()):
            return f"it is {what}"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it, or send a zip"
    if not head:
        return "it is empty: write or send it again"
    return (
        next((f"it is {what}" for ends, what in _BY_SUFFIX.items() if last.endswith(ends)), "")
        or _text(text)
        or f"it starts with {head[:4]!r}; the service reads GeoTIFF and JP2 files and zips of "
        "them: convert it with gdal_translate -of COG"
    )


_SIDE = (
    "a side file of a raster, which the service does not read: send a GeoTIFF, which contains its "
    "georeference"
)
_SHAPEFILE = "a part of a shapefile: send polygons as GeoPackage or GeoJSON in `fields`"
_RAW = "raw numbers without a header: convert it with gdal_translate -of COG, beside its .hdr"
_BY_SUFFIX: Mapping[tuple[str, ...], str] = {
    (".csv", ".txt", ".tsv"): "a text: points go into the parameter `points`, dates into `dates`",
    (".tfw", ".j2w", ".wld", ".prj", ".ovr", ".msk"): _SIDE,
    (".dbf", ".shx", ".cpg", ".sbn", ".sbx"): _SHAPEFILE,
    (".dat", ".bsq", ".bil", ".bip", ".raw", ".flt", ".bin", ".envi"): _RAW,
    (".sdat",): "a SAGA grid: convert it with gdal_translate -of COG, beside its .sgrd",
    (".ecw",): "ECW: convert it with gdal_translate -of COG",
    (".nc", ".nc4", ".h5", ".he5"): _NETCDF,
    (".hdf",): "HDF: convert each band with gdal_translate -of COG",
    (".rds", ".rdata", ".pkl", ".pickle", ".pt"): "data of a program: write GeoTIFFs with it",
}
"""Ends of names of files that their first bytes do not identify, with the kind and advice."""
_ASCII_GRID = re.compile(rb"(?:\s*(?:ncols|nrows|xll\w+|yll\w+|cellsize)\s+\S+\s*){3}")


def _text(text: bytes) -> str:
    """What a text is that begins so; empty if it is not a known kind."""
    if _ASCII_GRID.match(text):
        return "it is an ESRI ASCII grid: convert it with gdal_translate -of COG -a_srs EPSG:32631"
    return ""


_MANAGER = "data of a file manager or of version control"
_STYLE = "a style or project, which holds no pixels"
_PLACE = "a georeference beside a raster; that in the GeoTIFF itself counts"
_TEXT = "a text or table, which is not read: give dates in `dates` and points in `points`"
_MASK = (
    "a mask beside a raster, so that the pixels that it marks as missing are not known: write it "
    "into the file with gdal_translate -of COG"
)
_META = "metadata in a form that is not read"
_SIDE_FILES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"\.[^_].*|(?:eh)?thumbs\.db|desktop\.ini|_success", _MANAGER),
        (r".*\.(?:qml|qmd|qlr|sld|lyrx?|clr|cpt|qgs|qgz|mxd|aprx|rmd|ipynb)", _STYLE),
        (r".*\.(?:prj|tfwx?|tifw|tiffw|j2w|jp2w|jgw|pgw|wld|hdr)", _PLACE),
        (r".*\.(?:ovr|rrd|aux)", "overviews or statistics beside a raster; the raster counts"),
        (r".*\.msk", _MASK),
        (r".*\.(?:md5|sha\d+|crc\d*|sig)(?:sums?)?|(?:md5|sha\d+)sums?(?:\..*)?", "checksums"),
        (r".*\.(?:txt|md|rst|log|csv|tsv|xlsx?|ods|docx?|rtf|pdf)", _TEXT),
        (r"(?:readme|licen[cs]e|changelog|copying|notice)(?:\..*)?", _TEXT),
        (r".*\.(?:png|jpe?g|gif|bmp|webp|svg)", "a picture, which holds no reflectance"),
        (r".*(?<!\.aux)\.(?:xml|safe|dim|met|json|yaml|yml|ini|cfg|py|r|js|sh)", _META),
    )
)
"""Lower-case names of files that people and programs keep beside rasters."""


_GEOJSON = re.compile(rb'"type"\s*:\s*"Feature')
_DATA = (b"\x89HDF", b"CDF", b"GRIB", b"PAR1", b"SQLite format 3", b"\x0e\x03\x13\x01")
"""First bytes of formats that hold data, whatever their names."""


def side_file(file: SourceFile) -> str | None:
    """Why a file beside rasters is left out; None if it is read as a raster or rejected.

    A file is a side file by its name, and only if its content does not contradict the name: a page
    or a picture with the name of a raster is a failed download of a date. Rejected as well are data
    that the caller may expect to count: statistics of GDAL, netCDF, polygons.

    Args:
        file: the file, which is not metadata that the service reads.
    """
    last = file.name.rpartition("/")[2].lower()
    reason = next((why for pattern, why in _SIDE_FILES if pattern.fullmatch(last)), None)
    if reason is None or last.startswith("._") or is_of_zarr(file.name):
        return None
    if last.endswith((".ovr", ".msk")):  # TIFFs themselves
        return reason
    try:
        with file.path.open("rb") as source:
            head = source.read(512)
    except OSError:
        return None
    if head[:4] in _MAGICS or head.startswith((SIGNATURE, *_DATA)) or _GEOJSON.search(head):
        return None
    return None if head.lstrip().lower().startswith((b"<!doctype html", b"<html")) else reason


def _header(
    source: SourceFile,
    dataset: rasterio.DatasetReader,
    georeference: Georeference,
    *,
    mask: int = 0,
    codec: int | None = None,
) -> Header:
    """The header of an open file.

    Args:
        source: the file.
        dataset: the open file.
        georeference: CRS and transform of the file.
        mask: bytes of one block of its internal mask.
        codec: bytes that decoding takes in addition to the block; None derives them from the
            compression.
    """
    strange = sorted({dtype for dtype in dataset.dtypes if dtype.startswith("complex")})
    if strange:
        raise NotAGeoTIFF(
            f"'{source.name}' has numbers of type {strange[0]}, which cannot be reflectance: write "
            "the file with real numbers"
        )
    if dataset.count > MAX_BANDS:
        raise RasterTooLarge(
            f"'{source.name}' has {dataset.count} bands, and the limit is {MAX_BANDS}: divide it "
            "into several files"
        )
    rows, columns = dataset.block_shapes[0]
    together = dataset.count if dataset.interleaving == Interleaving.pixel else 1
    block_bytes = rows * columns * np.dtype(dataset.dtypes[0]).itemsize * together
    if block_bytes > MAX_BLOCK_BYTES:
        raise RasterTooLarge(
            f"'{source.name}': one block of {rows} x {columns} pixels and {together} bands decodes "
            f"to {block_bytes} bytes, and the limit is {MAX_BLOCK_BYTES}: write the file in tiles, "
            "as with gdal_translate -of COG"
        )
    # GDAL's assumption about alpha is not enough: `DescribedFile.bands` decides by the names.
    flags = dataset.mask_flag_enums[0]
    tags = _lower(dataset.tags())
    # This query takes time for every band, so it is skipped if the last band has a name.
    unnamed = dataset.count > 1 and not dataset.descriptions[-1]
    alpha = unnamed and dataset.colorinterp[-1] == ColorInterp.alpha
    return Header(
        source=source,
        width=dataset.width,
        height=dataset.height,
        crs=georeference[0],
        transform=georeference[1],
        dtypes=dataset.dtypes,
        nodata=dataset.nodatavals,
        scales=dataset.scales,
        offsets=dataset.offsets,
        descriptions=_descriptions(dataset, tags),
        tags=tags,
        band_tags=tuple(_lower(dataset.tags(index)) for index in dataset.indexes),
        block=(rows, columns),
        memory=FileMemory(
            block=block_bytes,
            blocks=_blocks_bytes(dataset, together),
            mask=mask,
            # libtiff reads at most ten times a block's decoded size.
            encoded=min(source.path.stat().st_size, 10 * block_bytes)
            + (_codec_bytes(dataset, block_bytes) if codec is None else codec),
        ),
        masked=MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
        alpha=dataset.count if alpha else None,
        placed_by=None if georeference[0] else _placed_by(dataset),
    )


_LISTS_OF_NAMES = (
    "long_name",
    "band_names",
    "bandnames",
    "band_descriptions",
    "band_order",
    "bands",
    "channels",
    "tifftag_imagedescription",
)
_NUMBERED_NAMES = ("band_{}", "band{}", "band_{}_name", "band{}_name", "band_name_{}")
_MARKS_OF_LISTS = re.compile(r"[\[\](){}'\"]")


def _descriptions(
    dataset: rasterio.DatasetReader, tags: Mapping[str, str]
) -> tuple[str | None, ...]:
    """The bands' descriptions, or else the names of all bands in the file's own tags.

    They are `Band_1`, `Band_2`, ... as ENVI's and ERDAS's metadata have them, `BAND_1_NAME` and so
    on, or a list with a name for each band, as xarray's `long_name` of several.

    Args:
        dataset: the open file.
        tags: the file's tags, by lower-case name.
    """
    count = int(dataset.count)
    if count < 2 or any(dataset.descriptions):
        return tuple(dataset.descriptions)
    for form in _NUMBERED_NAMES:
        numbered = [tags.get(form.format(n)) for n in range(1, count + 1)]
        if all(numbered) and form.format(count + 1) not in tags:
            return tuple(numbered)
    for key in _LISTS_OF_NAMES:
        text = _MARKS_OF_LISTS.sub("", tags.get(key, ""))
        names = [name.strip() for name in re.split("[,;|]", text)]
        words = key == "tifftag_imagedescription"  # may be a sentence
        if len(names) == count and all(band_of(name) if words else name for name in names):
            return tuple(names)
    return tuple(dataset.descriptions)


def _placed_by(dataset: rasterio.DatasetReader) -> str | None:
    """What places the pixels of an open file that has no CRS; None if nothing does."""
    if dataset.gcps[0]:
        return "ground control points"
    return "rational polynomial coefficients (RPC)" if dataset.rpcs else None


def _blocks_bytes(dataset: rasterio.DatasetReader, together: int) -> int:
    rows, columns = dataset.block_shapes[0]
    bands = int(dataset.count)
    of_a_band = -(-int(dataset.height) // int(rows)) * -(-int(dataset.width) // int(columns))
    written = of_a_band if together == bands else of_a_band * bands
    return 16 * written + 8 * of_a_band * bands


def _codec_bytes(dataset: rasterio.DatasetReader, block_bytes: int) -> int:
    codec = dataset.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION", "")
    return block_bytes if codec.startswith(_COPYING) else 0


def _lower(tags: Mapping[str, str]) -> dict[str, str]:
    return {key.lower(): value for key, value in tags.items() if len(value) <= _TAG_LENGTH}


def with_full_name(item: tuple[str, str]) -> tuple[str, str]:
    """A tag with its complete name: GDAL cuts the name of `s2:processing_baseline=04.00` at `:`."""
    key, value = item
    name, equals, rest = value.partition("=")
    return (f"{key}:{name}".lower(), rest) if equals and name.isidentifier() else item


_NAME_LENGTH = 250
_FOLDERS = 6
# Control characters, and halves of characters, which UTF-8 cannot express.
_NOT_SHOWN = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]+")


def label(name: str, position: int) -> str:
    """A name for messages: without control characters, not too long, and without `..`.

    The name keeps its last folders, which may contain the date or the tile.
    """
    # Names from addresses have spaces as %20, whose digits would be read as those of a date.
    parts = _NOT_SHOWN.sub("", unquote(name)).replace("\\", "/").split("/")
    *folders, last = [part.strip() for part in parts]
    if not last.strip(". "):
        return f"file {position + 1}"
    folders = [part for part in folders if part.strip(". ") and not part.endswith(":")]
    # A long name is cut at its beginning: its end has the date and the suffix.
    return "/".join([*folders[-_FOLDERS:], last])[-_NAME_LENGTH:]
