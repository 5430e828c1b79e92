"""The landing page and the explorer, its parts, and the API documentation page."""

# No `from __future__ import annotations` here: FastAPI needs the types at run time.
import html
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from service.api.dependencies import KNOWN_IF_PRIVATE, App, root_of
from service.api.middleware import page_policy
from service.api.negotiation import negotiate
from service.api.openapi import DESCRIPTION, DocumentedApp
from service.api.schemas.response_bodies import LandingPage, Link
from service.api.sending import StoredFile
from service.api.uploads import JSON
from service.errors import NotFound, shown
from service.settings import Settings

_STATIC = Path(__file__).parents[1] / "static"
_SWAGGER = _STATIC / "swagger-ui"
_EXPLORER = _STATIC / "explorer"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_HTML = "text/html"
_KINDS = {".js": "text/javascript", ".css": "text/css"}
_PARTS: Mapping[str, Path] = {
    path.relative_to(_EXPLORER).as_posix(): path
    for path in sorted(_EXPLORER.rglob("*"))
    if path.suffix in _KINDS
}
_PAGE = (_EXPLORER / "index.html").read_text()
_BACKGROUND = "<!-- background map -->\n"
"""Line of the page that names the tiles of the background map, if there are any."""
_DEMO = frozenset({".tif", ".tiff"})
router = APIRouter(include_in_schema=False)


@router.get("/", response_class=Response)
async def home(request: Request, app: App) -> Response:
    """The explorer for a browser; for others the landing page of OGC API - Processes."""
    accept = request.headers.get("accept", "")
    headers = {"Vary": "Accept"}
    # A program that accepts anything reads JSON; every browser names HTML.
    if negotiate(accept, (JSON, _HTML), lenient=True) == JSON:
        page = landing_page(root_of(request)).model_dump(exclude_none=True)
        return JSONResponse(page, headers=headers)
    explorer, images = _explorer_page(app.settings)
    policy = {"Content-Security-Policy": page_policy(explorer, images=images)}
    return HTMLResponse(explorer, headers={**headers, **policy})


def _explorer_page(settings: Settings) -> tuple[str, str]:
    """The explorer's page, and the sources of its images for the policy."""
    own = "'self' data:"
    if settings.explorer_tiles is None:
        return _PAGE.replace(_BACKGROUND, ""), own
    url, attribution = settings.explorer_tiles, settings.explorer_attribution or ""
    tag = (
        f'<meta name="pimc-background" content="{html.escape(url)}" '
        f'data-attribution="{html.escape(attribution)}">\n'
    )
    return _PAGE.replace(_BACKGROUND, tag), f"{own} {settings.explorer_origin}"


def landing_page(root: str) -> LandingPage:
    """Links to the parts of the API.

    Args:
        root: path before the service's own paths.
    """
    relations = "http://www.opengis.net/def/rel/ogc/1.0"
    links = (
        ("/", "self", JSON, "this page"),
        ("/", "alternate", _HTML, "the explorer"),
        ("/openapi.json", "service-desc", JSON, "the OpenAPI document"),
        ("/docs", "service-doc", _HTML, "the OpenAPI document, for people"),
        ("/conformance", f"{relations}/conformance", JSON, "classes of OGC API - Processes"),
        ("/processes", f"{relations}/processes", JSON, "the processes"),
        ("/jobs", f"{relations}/job-list", JSON, "the caller's jobs"),
    )
    return LandingPage(
        title="PIMC",
        description=DESCRIPTION,
        links=[Link(href=f"{root}{path}", rel=r, type=kind, title=t) for path, r, kind, t in links],
    )


@router.get("/explorer/demo", dependencies=[KNOWN_IF_PRIVATE])
async def demo(app: App) -> JSONResponse:
    """List the names of the demo's GeoTIFFs, which are the files of `PIMC_DEMO_DIR`.

    Raises:
        NotFound: this service has no demo.
    """
    return JSONResponse({"files": sorted(_demo_files(app.settings.demo_dir))})


@router.get("/explorer/demo/{name}", dependencies=[KNOWN_IF_PRIVATE])
async def demo_file(name: str, app: App) -> Response:
    """One file of the demo.

    Raises:
        NotFound: the demo has no such file.
    """
    path = _demo_files(app.settings.demo_dir).get(name)
    if path is None:
        raise NotFound(f"the demo has no file '{shown(name)}': GET /explorer/demo lists its files")
    return StoredFile(path, media_type="image/tiff")


@router.get("/explorer/{asset:path}")
async def explorer_asset(asset: str) -> Response:
    """A script or style sheet of the explorer.

    Raises:
        NotFound: the explorer has no such part.
    """
    path = _PARTS.get(asset)
    if path is None:
        raise NotFound(f"there is no /explorer/{shown(asset)}")
    # The browser checks for changes each time, so that one page never mixes parts of two releases.
    return _cached(path, _KINDS[path.suffix], "no-cache")


def _cached(path: Path, kind: str, cache_control: str) -> Response:
    response = StoredFile(path, media_type=kind)
    response.headers["Cache-Control"] = cache_control
    return response


def _demo_files(folder: Path | None) -> dict[str, Path]:
    """The GeoTIFFs of the demo's folder, by name.

    Raises:
        NotFound: this service has no demo.
    """
    if folder is None:
        raise NotFound("this service has no demo: PIMC_DEMO_DIR is not set")
    return {path.name: path for path in folder.iterdir() if path.suffix.lower() in _DEMO}


@router.get("/openapi.json", response_class=Response, dependencies=[KNOWN_IF_PRIVATE])
async def description(request: Request) -> Response:
    """The OpenAPI document."""
    app = request.app
    if not isinstance(app, DocumentedApp):
        raise TypeError("the application has no OpenAPI document")
    return Response(await app.description_of(root_of(request)), media_type="application/json")


@router.get("/docs", response_class=HTMLResponse, dependencies=[KNOWN_IF_PRIVATE])
async def documentation(request: Request) -> HTMLResponse:
    """Swagger UI over the OpenAPI document."""
    root = root_of(request)
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="PIMC - API",
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    # Swagger UI sets style attributes at run time, which a policy cannot allow by hash.
    policy = page_policy(bytes(page.body).decode(), styles="'unsafe-inline'")
    page.headers["Content-Security-Policy"] = policy
    return page


@router.get("/docs/{asset}", dependencies=[KNOWN_IF_PRIVATE])
async def documentation_asset(asset: str) -> Response:
    """Swagger UI's script and style sheet, so that the page loads nothing from other hosts.

    Raises:
        NotFound: Swagger UI has no such part.
    """
    kind = _ASSETS.get(asset)
    if kind is None:
        raise NotFound(f"there is no /docs/{shown(asset)}")
    return _cached(_SWAGGER / asset, kind, "public, max-age=86400")
