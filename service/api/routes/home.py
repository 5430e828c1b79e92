"""Home page and API documentation page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.requests import Request
from starlette.responses import Response

from service.api.dependencies import root_of
from service.api.middleware import page_policy
from service.api.sending import StoredFile
from service.errors import NotFound

_STATIC = Path(__file__).parents[1] / "static" / "swagger-ui"
# Changed by a new release of the service alone.
_CACHED = {"Cache-Control": "public, max-age=86400"}
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
router = APIRouter(include_in_schema=False)
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>PIMC</title>
<style>body{font:1rem/1.5 system-ui;max-width:40rem;margin:3rem auto;padding:0 1rem}</style>
<h1>PIMC</h1>
<p>Land-cover classes, vegetation forecasts and embeddings from satellite image time series.</p>
<ul>
<li><code>POST /classify-pixels</code>: a class for every pixel
<li><code>POST /forecast</code>: the next values of NDVI, EVI and SAVI
<li><code>POST /landcover</code>: land-cover labels from imagery
<li><code>POST /embed</code>: embeddings of pixels or patches
<li><a href="/jobs">/jobs</a>: runs that go on by themselves
<li><a href="/models">/models</a>: the models and their cards
<li><a href="/docs">/docs</a>, <a href="/openapi.json">/openapi.json</a>: the API
<li><a href="/health/ready">/health/ready</a>, <a href="/metrics">/metrics</a>: how it is doing
</ul>
</html>
"""


@router.get("/", response_class=HTMLResponse)
async def home(request: Request) -> HTMLResponse:
    """The endpoints, listed."""
    page = _PAGE.replace('href="/', f'href="{root_of(request)}/')
    return HTMLResponse(page, headers={"Content-Security-Policy": page_policy(page)})


@router.get("/docs", response_class=HTMLResponse)
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
    # Swagger UI writes style attributes as it goes, which no hash can foresee.
    policy = page_policy(bytes(page.body).decode(), styles="'unsafe-inline'")
    page.headers["Content-Security-Policy"] = policy
    return page


@router.get("/docs/{asset}", response_class=Response)
async def documentation_asset(asset: str) -> StoredFile:
    """Swagger UI's script and style sheet, served from here so that no other host is needed."""
    kind = _ASSETS.get(asset)
    if kind is None:
        raise NotFound(f"there is no /docs/{asset[:64]}")
    response = StoredFile(_STATIC / asset, media_type=kind)
    response.headers.update(_CACHED)
    return response
