"""STAC searches with pystac-client, all of whose requests use checked connections.

    search → landing page → pages of items
                │               │
                └──── `connect`: host allowed? address allowed? redirects the same way

By default pystac-client sends requests with the library `requests`, which follows any link and any
redirect. `_CheckedIO` replaces its I/O object and sends every request over checked connections.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import httpx
from anyio import from_thread, to_thread
from pystac import STACError, STACTypeError
from pystac.link import HREF, Link
from pystac_client import Client
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO

from service.errors import (
    ForbiddenReference,
    InvalidRequest,
    PIMCError,
    UnreachableReference,
)
from service.read.connect import Connections, Remote
from service.read.stac import Search, StacItem, read_items

_PAGE_ITEMS = 100
_MAX_PAGES = 200


async def search_items(search: Search, web: Connections, most: int) -> list[StacItem]:
    """The items that a STAC API finds.

    Args:
        search: the search.
        web: the request's connections.
        most: largest number of items.

    Raises:
        ForbiddenReference: the API, a link of it, or a redirect leads to a host that is not
            allowed.
        UnreachableReference: the API does not respond, or its response is not STAC.
        InvalidRequest: the API rejects the search, or finds no or too many items.
        BodyTooLarge: the API's responses are too large.
    """
    stopped: list[bool] = []
    try:
        return await to_thread.run_sync(
            partial(_search, search, web, most, stopped), abandon_on_cancel=True
        )
    finally:
        stopped.append(True)


def _search(search: Search, web: Connections, most: int, stopped: Sequence[bool]) -> list[StacItem]:
    """`search_items`, in a worker thread."""
    io = _CheckedIO(web, stopped)
    remote = Remote.of(search.url, "stac.url", web.rules)
    try:
        client = Client.from_file(search.url, stac_io=io)
        if not client.conforms_to("ITEM_SEARCH"):
            raise InvalidRequest.of(
                "stac.url",
                f"'{remote.host}' has no item search at this address; give the landing page of an "
                "API, or the URL of an ItemCollection as `stac`",
            )
        found = _pages(client, search, most)
    except (ClientTypeError, STACTypeError) as error:
        raise remote.unreachable(
            "returned a document that is not a STAC landing page: check the API's URL"
        ) from error
    except (APIError, STACError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error.__cause__, PIMCError):  # pystac wraps the errors of `_CheckedIO`
            raise error.__cause__ from None
        raise remote.unreachable(
            f"returned a document that is not STAC ({type(error).__name__}): check the API's URL"
        ) from error
    if not found:
        raise InvalidRequest.of(
            "stac",
            f"the search at '{remote.host}' finds no item: check collections, bbox, datetime and "
            "max_cloud_cover",
        )
    return list(found.values())


def _pages(client: Client, search: Search, most: int) -> dict[tuple[str | None, str], StacItem]:
    query: dict[str, Any] = dict(search.query or {})
    limit = search.max_cloud_cover
    if limit is not None and client.conforms_to("QUERY"):
        query.setdefault("eo:cloud_cover", {})
        query["eo:cloud_cover"] = {**query["eo:cloud_cover"], "lte": limit}
    elif query:
        _check_conforms(client, "QUERY", "query")
    if search.filter:
        _check_conforms(client, "FILTER", "filter")
    pages = client.search(
        method="POST",
        limit=_PAGE_ITEMS,
        collections=list(search.collections) or None,
        ids=list(search.ids) or None,
        bbox=search.bbox,
        intersects=dict(search.intersects) if search.intersects else None,
        datetime=search.datetime,
        query=query or None,
        filter=dict(search.filter) if search.filter else None,
    ).pages_as_dicts()
    found: dict[tuple[str | None, str], StacItem] = {}
    for number, page in enumerate(pages):
        if number >= _MAX_PAGES:
            raise InvalidRequest.of(
                "stac",
                f"the search has more pages than the limit of {_MAX_PAGES}: narrow datetime or "
                "bbox",
            )
        for item in read_items({"type": "FeatureCollection", **page}, "stac"):
            if limit is None or _cloud(item) <= limit:
                found.setdefault((item.collection, item.id), item)
        if len(found) > most:
            raise InvalidRequest.of(
                "stac",
                f"the search finds more items than the limit of {most} (PIMC_MAX_ITEMS): narrow "
                "datetime or bbox, or lower max_cloud_cover",
            )
    return found


def _check_conforms(client: Client, name: str, parameter: str) -> None:
    if not client.conforms_to(name):
        raise InvalidRequest.of(
            f"stac.{parameter}", "the API does not state that it takes this parameter; leave it out"
        )


def _cloud(item: StacItem) -> float:
    cover = item.properties.get("eo:cloud_cover")
    return float(cover) if isinstance(cover, int | float) else 0.0


class _CheckedIO(StacApiIO):
    """I/O object of pystac-client that follows links and redirects to allowed hosts only."""

    def __init__(self, web: Connections, stopped: Sequence[bool]) -> None:
        super().__init__(max_retries=None)
        self._web = web
        self._stopped = stopped

    def read_text(self, source: HREF, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401
        """The text at a link or URL; a path of this machine is rejected."""
        if isinstance(source, Link):
            return super().read_text(source, *args, **kwargs)
        return self.request(str(source), *args, **kwargs)

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,  # noqa: ARG002 - a link's are not sent
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """The text that a URL returns, over checked connections."""
        if self._stopped:
            raise UnreachableReference("stac: the search was cancelled")
        method = (method or "GET").upper()
        if method not in {"GET", "POST"}:
            raise ForbiddenReference(
                f"stac: the API requires the method {method}; only GET and POST are allowed"
            )
        content = None
        if method == "POST":
            content = json.dumps(parameters or {}).encode()
        elif parameters:
            href = str(httpx.URL(href).copy_merge_params(parameters))
        remote = Remote.of(href, "stac.url", self._web.rules)
        return from_thread.run(partial(self._web.document, remote, method=method, content=content))
