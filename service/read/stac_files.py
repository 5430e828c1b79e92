"""Stacks by STAC: the needed assets of given items, or of items found by a search.

    stac → items → assets → directories → windows → blocks → files, and an item.json beside them

The result is the same as an upload of these assets with their items, and is read in the same way.
"""

from __future__ import annotations

import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
from anyio import to_thread

from service.errors import (
    ForbiddenReference,
    GridMismatch,
    InvalidRequest,
    PIMCError,
    UnreachableReference,
    shown,
)
from service.grid import Window, crs_name
from service.read.blocks import RemoteFile, fetch_windows, side_by_side
from service.read.clouds import BANDS as CLOUD_BANDS
from service.read.connect import Connections, Patience, Remote, Remotes, Resolver, resolve
from service.read.geotiff import SourceFile, gdal_options, label
from service.read.layouts import StackOptions
from service.read.masks import OWN, MaskRule, parse_mask
from service.read.placement import Bounds, Place, extent_of, needed_windows, touches
from service.read.references import Local, location_of
from service.read.stac import Asset, Search, StacItem, read_items
from service.read.stack import read_headers
from service.settings import Settings

_MARGIN = 0.01
"""Margin around points and polygons that is read as well, degrees."""
_SIGN = (
    "sign the item's hrefs first (Planetary Computer: planetary_computer.sign), or take the same "
    "data from a public collection such as Earth Search's"
)
_OUTSIDE = "the item does not touch the area"


@dataclass(frozen=True, kw_only=True)
class StacFiles:
    """The files of a request by STAC, with the request's options for them."""

    files: tuple[SourceFile, ...]
    stack: StackOptions
    """The request's options, with `grid` set if tiles of one CRS need it, and the unused items."""
    items: tuple[Mapping[str, Any], ...]
    """The items to which the files belong: `id`, `collection`, `datetime`, `href`."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One asset of one item, as a file."""

    asset: Asset
    file: SourceFile
    remote: RemoteFile | None
    """The remote file; None for a file of this machine, which is read in place."""


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """One item and its files."""

    item: StacItem
    pieces: tuple[_Piece, ...]
    beside: SourceFile
    """The item's JSON."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The rasters, and the file of the item."""
        return (*(piece.file for piece in self.pieces), self.beside)


async def fetch_stac(
    stac: Mapping[str, Any] | str | Search,
    folder: Path,
    settings: Settings,
    *,
    bands: Sequence[str],
    optional: Sequence[str] = (),
    stack: StackOptions,
    patience: Patience | None = None,
    resolver: Resolver = resolve,
    tls: ssl.SSLContext | None = None,
    on_demand: bool = False,
    remotes: Remotes | None = None,
) -> StacFiles:
    """Find items, and fetch the parts of their assets that a request needs.

    Args:
        stac: an ItemCollection or Item, the URL of one, or a search.
        folder: folder of the request, to which files are written.
        settings: allowed roots and hosts, largest numbers of items and bytes.
        bands: the needed bands, by Sentinel-2 name.
        optional: further bands, fetched if an item has them.
        stack: the request's options, of which `bbox`, `area`, `grid` and `mask` determine the parts
            that are fetched.
        patience: time limits.
        resolver: resolves host names.
        tls: trusted certificates; None uses httpx's own.
        on_demand: whether only the directories of TIFFs with a strong ETag are fetched, and their
            blocks when they are read.
        remotes: limits and caches that all requests share; None for own ones.

    Raises:
        ForbiddenReference: a URL, link or redirect is outside the allowed roots and hosts.
        UnreachableReference: a host does not return the requested bytes in time, or an asset
            needs a signature.
        BodyTooLarge: the files have more bytes than an upload may have.
        InvalidRequest: the document is not STAC, has no or too many items, or no item intersects
            the area.
        MissingBands: an item has no asset for a needed band.
        PIMCError: a file is not a raster, or the files do not fit together.
    """
    if not (settings.allowed_roots or settings.allowed_hosts):
        raise ForbiddenReference(
            "'stac' is not allowed, because this server reads no files by reference: send the "
            "files themselves, or have the server's administrator set PIMC_ALLOWED_HOSTS"
        )
    patience = patience or Patience()
    with anyio.move_on_after(patience.total_seconds):
        async with Connections(
            settings, patience=patience, resolver=resolver, tls=tls, remotes=remotes
        ) as web:
            items = await _items(stac, web, settings.max_items)
            place = Place(grid=stack.grid, bbox=stack.bbox, area=stack.area)
            near = [item for item in items if _is_near(item, place)]
            if not near:
                raise _none_touches(items, place)
            near = await _described(near, bands, web)
            scenes = _scenes(near, (bands, optional), parse_mask(stack.mask), folder, settings)
            await to_thread.run_sync(_write_items, scenes)
            await side_by_side(
                [partial(p.remote.open, web) for s in scenes for p in s.pieces if p.remote]
            )
            kept, windows, grid = await to_thread.run_sync(_needed, scenes, place)
            if not kept:
                raise _none_touches(near, place)
            if on_demand:
                kept, windows = await to_thread.run_sync(_left_for_later, kept, windows)
            await fetch_windows(windows, web, "stac")
            left_out = [(i.id, _OUTSIDE) for i in items if all(s.item is not i for s in kept)]
            return StacFiles(
                files=tuple(file for scene in kept for file in scene.files),
                stack=replace(stack, grid=grid, left_out=(*stack.left_out, *left_out)),
                items=tuple(scene.item.source for scene in kept),
            )
    raise UnreachableReference(
        f"stac: not all items and files arrived within {patience.total_seconds:g} s: request fewer "
        "dates or a smaller area"
    )


def around(extent: Bounds) -> Bounds:
    """The extent of points or polygons with a margin, which is the part that is read for them.

    Args:
        extent: west, south, east and north of the points or polygons in degrees.
    """
    west, south, east, north = extent
    return (
        max(west - _MARGIN, -180.0),
        max(south - _MARGIN, -90.0),
        min(east + _MARGIN, 180.0),
        min(north + _MARGIN, 90.0),
    )


async def _items(
    stac: Mapping[str, Any] | str | Search, web: Connections, most: int
) -> list[StacItem]:
    """The items that a request names or searches for, by date."""
    if isinstance(stac, str):
        items = read_items(await _document(stac, web), "stac", stac)
    elif isinstance(stac, Mapping):
        items = read_items(stac, "stac")
    else:
        search_items = await to_thread.run_sync(_search)
        items = await search_items(stac, web, most)
    if not items:
        raise InvalidRequest.of("stac", "the ItemCollection is empty: send at least one item")
    if len(items) > most:
        raise InvalidRequest.of(
            "stac",
            f"{len(items)} items; at most {most} are allowed in a request (PIMC_MAX_ITEMS): send "
            "fewer items",
        )
    return sorted(items, key=lambda item: (str(item.source.get("datetime")), item.id))


async def _described(
    items: Sequence[StacItem], bands: Sequence[str], web: Connections
) -> list[StacItem]:
    """The items, those that lack a needed band with what their collection states of the assets."""
    found: list[StacItem] = []
    collections: dict[str, Mapping[str, Any] | PIMCError] = {}
    for item in items:
        url = item.collection_link
        if url is None or not item.lacks(bands):
            found.append(item)
            continue
        if url not in collections:
            try:
                collections[url] = await _document(url, web)
            except (ForbiddenReference, UnreachableReference) as error:
                collections[url] = error
        collection = collections[url]
        if isinstance(collection, PIMCError):
            note = f"; its collection, which may name them, is not read ({collection.detail})"
            found.append(replace(item, note=note))
        else:
            found.append(item.described_by(collection))
    return found


def _search() -> Callable[[Search, Connections, int], Awaitable[list[StacItem]]]:
    """The search, imported by the first request that needs it: pystac-client takes seconds."""
    from service.read.stac_search import search_items

    return search_items


async def _document(url: str, web: Connections) -> Mapping[str, Any]:
    remote = Remote.of(url, "stac", web.rules)
    try:
        document = json.loads(await web.document(remote))
    except (ValueError, RecursionError) as error:
        raise remote.unreachable(
            "returned a document that is not valid JSON: check the URL"
        ) from error
    if not isinstance(document, Mapping):
        raise remote.unreachable("returned JSON that is not an object: check the URL")
    return document


def _is_near(item: StacItem, place: Place) -> bool:
    """Whether an item's bounding box intersects the requested part; True if either is unknown."""
    part = place.bbox or (extent_of(place.area) if place.area else None)
    if part is None or item.bbox is None:
        return True
    west, south, east, north = item.bbox
    if west > east or part[0] > part[2]:  # across the antimeridian: the files' headers decide
        return True
    return west <= part[2] and part[0] <= east and south <= part[3] and part[1] <= north


def _none_touches(items: Sequence[StacItem], place: Place) -> InvalidRequest:
    boxes = [item.bbox for item in items if item.bbox]
    extent = ""
    if boxes:
        west, south, east, north = zip(*boxes, strict=True)
        box = (min(west), min(south), max(east), max(north))
        extent = f", whose extent is ({', '.join(f'{v:.6g}' for v in box)})"
    return InvalidRequest.of(
        "bbox" if place.bbox else "area",
        f"the requested part touches none of the {len(items)} items{extent}: choose a part of the "
        "items, in degrees, longitude first",
    )


# Files ------------------------------------------------------------------------------------------


def _scenes(
    items: Sequence[StacItem],
    bands: tuple[Sequence[str], Sequence[str]],
    rules: tuple[MaskRule, ...] | None,
    folder: Path,
    settings: Settings,
) -> list[_Scene]:
    """The files of each item, before they are fetched.

    Raises:
        MissingBands: an item has no asset for a needed band.
        ForbiddenReference: an asset is outside the allowed roots and hosts.
    """
    own = any(rule.name == OWN for rule in rules or ())
    needed, optional = bands
    needed = (*needed, *(band for band in CLOUD_BANDS if own and band not in needed))
    times = Counter(item.id for item in items)
    scenes = []
    number = 0
    for item in items:
        root = item.id.replace("/", "_")
        if times[item.id] > 1:
            root = f"{item.collection}/{root}"
        pieces: list[_Piece] = []
        for asset in item.chosen(needed, rules, optional):
            taken = {piece.file.name for piece in pieces}
            name = label(f"{root}/{asset.last}", number)
            if name in taken:
                name = label(f"{root}/{asset.key}-{asset.last}", number)
            path = folder / f"{number:05d}.tif"
            pieces.append(_piece(item, asset, name, path, settings))
            number += 1
        beside = SourceFile(name=label(f"{root}/item.json", 0), path=folder / f"{number:05d}.json")
        scenes.append(_Scene(item=item, pieces=tuple(pieces), beside=beside))
    return scenes


def _piece(item: StacItem, asset: Asset, name: str, path: Path, settings: Settings) -> _Piece:
    field = f"item '{item.id}', asset '{asset.key}'"
    if not (asset.href.startswith("/") or urlsplit(asset.href).scheme):
        raise ForbiddenReference(
            f"{field}: '{shown(asset.href)}' is relative, and the item has no link rel=self with "
            "an absolute URL to which it refers: give absolute hrefs, add such a link, or give the "
            "URL of the item in place of its text"
        )
    location = location_of(asset.href, field, settings)
    if isinstance(location, Local):
        found = location.find(settings.allowed_roots)
        return _Piece(asset=asset, file=SourceFile(name=name, path=found), remote=None)
    remote = RemoteFile(remote=location, path=path, hint=_SIGN)
    return _Piece(asset=asset, file=SourceFile(name=name, path=path), remote=remote)


def _write_items(scenes: Sequence[_Scene]) -> None:
    for scene in scenes:
        names = {p.asset.key: p.file.name.rpartition("/")[2] for p in scene.pieces}
        scene.beside.path.write_text(json.dumps(scene.item.beside(names)), encoding="utf-8")


_Windows = list[tuple[RemoteFile, Window]]


def _left_for_later(scenes: Sequence[_Scene], windows: _Windows) -> tuple[list[_Scene], _Windows]:
    """The scenes, with files whose blocks are fetched when they are read, and the other windows."""

    def described(piece: _Piece) -> _Piece:
        remote = piece.remote
        if remote is None or not remote.can_wait:
            return piece
        return replace(piece, file=replace(piece.file, remote=remote.save()))

    return (
        [replace(s, pieces=tuple(map(described, s.pieces))) for s in scenes],
        [(remote, window) for remote, window in windows if not remote.can_wait],
    )


def _needed(scenes: Sequence[_Scene], place: Place) -> tuple[list[_Scene], _Windows, str | None]:
    """The scenes that intersect the requested part, the windows to fetch, and the parameter `grid`.

    Tiles of one CRS whose grids differ are resampled to the finest of these grids.
    """
    headers = read_headers([file for scene in scenes for file in scene.files]).headers
    by_path = {header.source.path: header for header in headers}
    with gdal_options():
        kept = [
            scene
            for scene in scenes
            if any(touches(by_path[piece.file.path], place) for piece in scene.pieces)
        ]
        if not kept:
            return [], [], place.grid
        pieces = [piece for scene in kept for piece in scene.pieces]
        own = [by_path[piece.file.path] for piece in pieces]
        try:
            windows = needed_windows(own, place)
        except GridMismatch:
            if place.grid is not None or len({crs_name(h.crs) for h in own if h.crs}) > 1:
                raise
            place = replace(place, grid="finest")
            windows = needed_windows(own, place)
    to_fetch = [
        (piece.remote, window)
        for piece, window in zip(pieces, windows, strict=True)
        if piece.remote is not None and not piece.remote.whole and window is not None
    ]
    return kept, to_fetch, place.grid
