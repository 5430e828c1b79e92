"""The front door: what is here, for a person with a browser."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

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
async def home() -> str:
    """The endpoints, listed."""
    return _PAGE
