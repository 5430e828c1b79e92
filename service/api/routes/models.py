"""Model routes: the list of models, and each model's card."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from models.card import Modality, ModelCard, Task
from service.api.dependencies import KNOWN_CALLER, App, Caller, root_of
from service.api.negotiation import negotiate
from service.api.openapi import STAC_ITEM, problems
from service.api.responses import GEOJSON, json_response
from service.api.schemas.response_bodies import ModelList
from service.errors import UnknownModel, shown
from service.infer.engine import Engine
from service.write.stac_item import model_item

DEFAULTS: Mapping[str, tuple[Task, Modality]] = {
    "classify-pixels": ("classify-pixels", "pixel"),
    "forecast": ("forecast", "pixel"),
    "landcover": ("landcover", "patch"),
    "embed": ("embed", "pixel"),
    "embed-patch": ("embed", "patch"),
}
"""Task and modality of each default model, for requests that name none."""
router = APIRouter(tags=["models"], dependencies=[KNOWN_CALLER])


@router.get("/models", response_model=ModelList, responses=problems(["unauthorized"]))
async def list_models(app: App, caller: Caller) -> Response:
    """List all models that the caller may use, and the default model of each task."""
    usable = {**app.engine.models, **app.engine.own(caller or "")}
    cards = [model.card for _, model in sorted(usable.items())]
    return await json_response(lambda: ModelList(models=cards, defaults=defaults(app.engine)))


@router.get(
    "/models/{name}",
    response_model=ModelCard,
    responses={
        200: {"content": {GEOJSON: {"schema": STAC_ITEM}}},
        **problems(["unauthorized", "unknown_model", "invalid_request"]),
    },
)
async def read_model(name: str, request: Request, app: App, caller: Caller) -> ModelCard | Response:
    """A model's card, by `name` or `name@version`; a STAC Item for `application/geo+json`."""
    model = app.engine.named(name, caller or "")
    if model is None:
        usable = {*app.engine.models, *app.engine.own(caller or "")}
        served = ", ".join(sorted(usable)) or "none"
        raise UnknownModel(f"there is no model '{shown(name)}'; available: {served}")
    accept = request.headers.get("accept", "")
    if negotiate(accept, ("application/json", GEOJSON), lenient=True) == GEOJSON:
        item = model_item(model.card, f"{root_of(request)}/models/{model.card.id}")
        return JSONResponse(item, media_type=GEOJSON, headers={"Vary": "Accept"})
    return model.card


def defaults(engine: Engine) -> dict[str, str]:
    """The names of the default models that are loaded, by task."""
    found = {key: engine.registry.default(*which) for key, which in DEFAULTS.items()}
    return {
        key: bundle.card.name
        for key, bundle in found.items()
        if bundle is not None and bundle.card.name in engine.models
    }
