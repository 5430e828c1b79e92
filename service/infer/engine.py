"""Inference engine: the bundles of a registry and the callers' own models, loaded and warm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.card import Modality, Task
from models.registry import ZOO, Bundle, BundleError, Registry, read_checksums
from service.errors import UnknownModel, WrongTask
from service.infer.cpus import usable_cpus
from service.infer.model import LoadedModel, Observe, unobserved
from service.infer.session import (
    CPU,
    CUDA,
    ArenaShrinking,
    PrecisionChoice,
    Providers,
    ProviderUnavailable,
    Session,
    open_session,
    provider_to_request,
)
from service.settings import Settings, SettingsError

_LOG = logging.getLogger(__name__)


def load_models(
    settings: Settings,
    *,
    built_in: Path | None = ZOO,
    threads: int | None = None,
    observe: Observe = unobserved,
) -> Engine:
    """An engine with the built-in bundles and those of the settings.

    Args:
        settings: folder and checksums of further bundles, provider and precision.
        built_in: folder of the built-in bundles; None for none.
        threads: as for `Engine`.
        observe: as for `Engine`.

    Raises:
        SettingsError: the file of checksums cannot be used, or CUDA is required and missing.
    """
    folders = [folder for folder in (built_in, settings.model_dir) if folder is not None]
    registry = Registry.load(*folders, checksums=_checksums(settings))
    engine = Engine(
        registry,
        providers=settings.providers,
        precision=settings.precision,
        threads=threads,
        observe=observe,
    )
    for name, reason in registry.refused.items():  # the engine logs those that it rejects itself
        _LOG.error("rejected bundle", extra={"bundle": name, "reason": reason})
    served = sorted(model.card.id for model in engine.models.values())
    precisions = sorted({model.variant for model in engine.models.values()})
    loaded = {"provider": engine.provider, "precisions": precisions, "models": served}
    _LOG.info("models loaded", extra=loaded)
    return engine


def _checksums(settings: Settings) -> dict[str, str] | None:
    """The sha256 by file from `PIMC_MODEL_CHECKSUMS`; None if the cards state them instead.

    Raises:
        SettingsError: the file of checksums cannot be used.
    """
    if settings.model_checksums is None:
        return None
    try:
        return read_checksums(settings.model_checksums)
    except OSError as error:
        reason = f"{settings.model_checksums} cannot be read: {error.strerror}"
    except ValueError as error:  # an invalid line, or bytes that are not UTF-8
        reason = str(error)
    raise SettingsError(f"PIMC_MODEL_CHECKSUMS: {reason}")


class Engine:
    """The bundles of a registry and the callers' own models, loaded and warm.

    Args:
        registry: verified bundles.
        providers: `auto` uses CUDA if sessions can be created on it, else the CPU; `cuda` requires
            CUDA; `cpu` uses the CPU.
        threads: number of threads that run batches on the CPU, shared by all models and requests;
            None takes one per usable CPU, see `usable_cpus`.
        precision: `auto` uses reduced-precision variants whose measured loss is negligible;
            `float32` never uses them.
        observe: called after each batch with the model's id, the pixels or patches of the batch,
            and the seconds in the session; from several threads at once.

    Raises:
        ProviderUnavailable: `cuda` is required, and a session cannot be created on it.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        providers: Providers = "auto",
        threads: int | None = None,
        precision: PrecisionChoice = "auto",
        observe: Observe = unobserved,
    ) -> None:
        self._observe = observe
        self.registry = registry
        self._precision = precision
        self.threads = threads or usable_cpus()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="infer")
        # One call at a time on the device: two calls would alternate and take twice the memory.
        self._device = threading.Lock()
        self._shrinking = ArenaShrinking()
        self._changing = threading.Lock()
        # The mapping is replaced and never modified, so that requests read it without a lock.
        self._own: Mapping[tuple[str, str], LoadedModel] = {}
        provider = provider_to_request(providers)
        models: dict[str, LoadedModel] = {}
        refused: dict[str, str] = dict(registry.refused)
        try:
            for name, bundle in registry.bundles.items():
                try:
                    models[name] = self._load(bundle, provider)
                except BundleError as error:
                    refused[name] = str(error)
                    # The runtime's message contains paths, so it appears only in the log.
                    _LOG.error("%s", error, exc_info=error)
                    continue
                if models[name].provider != provider:
                    if providers == "cuda":
                        raise ProviderUnavailable(  # noqa: TRY301 - the pool must be closed
                            f"CUDA is required (PIMC_PROVIDERS=cuda), but the session of '{name}' "
                            f"runs on {models[name].provider}, because the driver, CUDA or cuDNN "
                            "does not load: install them, or set PIMC_PROVIDERS=auto"
                        )
                    _LOG.warning("CUDA is installed but cannot be used; models run on the CPU")
                    provider = CPU  # each further attempt on CUDA would take as long and fail
        except BaseException:
            self.close()
            raise
        self._requested_provider = provider
        self.models: Mapping[str, LoadedModel] = models
        self.refused: Mapping[str, str] = refused
        """Bundles that are not served, with the reason: rejected by the registry or not loaded."""

    @property
    def provider(self) -> str:
        """The execution provider in use: CUDA if every session runs on it, else the CPU."""
        on_cuda = bool(self.models) and all(m.provider == CUDA for m in self.models.values())
        return CUDA if on_cuda else CPU

    @property
    def failing(self) -> list[str]:
        """Models whose last run failed on the device, as `name@version`."""
        return sorted(model.card.id for model in self.models.values() if model.failing)

    def own(self, owner: str) -> Mapping[str, LoadedModel]:
        """A caller's own models, by name."""
        return {name: model for (key, name), model in self._own.items() if key == owner}

    def load(self, bundle: Bundle) -> LoadedModel:
        """Load a bundle without serving it; `add` serves it.

        Raises:
            BundleError: the bundle does not load, or its warm-up fails.
        """
        return self._load(bundle, self._requested_provider)

    def add(self, owner: str, model: LoadedModel) -> None:
        """Serve a model to one caller, in place of the caller's model of the same name."""
        with self._changing:
            self._own = {**self._own, (owner, model.card.name): model}

    def remove(self, owner: str, name: str) -> None:
        """Stop serving a caller's own model; runs that use it continue to their end."""
        with self._changing:
            self._own = {key: m for key, m in self._own.items() if key != (owner, name)}

    def named(self, reference: str, owner: str = "") -> LoadedModel | None:
        """The model with a `name` or `name@version` that a caller may use; None if none exists."""
        name, _, version = reference.partition("@")
        own = self._own.get((owner, name))
        if own is not None and version in {"", own.card.version}:
            return own
        bundle = self.registry.find(reference)
        return self.models.get(bundle.card.name) if bundle else None

    def find(
        self,
        reference: str | None,
        task: Task,
        modality: Modality | None = None,
        *,
        owner: str = "",
    ) -> LoadedModel:
        """The model of a `name` or `name@version`, or the task's default.

        Args:
            reference: `name` or `name@version`; None takes the task's default.
            task: the task that the model must serve.
            modality: the input that the model must take; None allows any.
            owner: the caller; the models that this caller has made may be named too.

        Raises:
            UnknownModel: the engine serves no model with that name and version, or no model for
                the task.
            WrongTask: the model serves another task or takes input of another modality.
        """
        if reference is None:
            bundle = self.registry.default(task, modality)
            model = self.models.get(bundle.card.name) if bundle else None
        else:
            bundle = self.registry.find(reference)
            model = self.named(reference, owner)
        if model is None:
            raise UnknownModel(self._unknown_model_message(reference, task, bundle, owner))
        card = model.card
        if card.task != task:
            raise WrongTask(
                f"model '{card.id}' is for {card.task}, but the request is for {task}: choose a "
                "model of this task from GET /models"
            )
        if modality not in {None, card.modality}:
            raise WrongTask(
                f"model '{card.id}' takes {card.modality} input, but the request has modality "
                f"{modality}: change `modality`, or choose another model from GET /models"
            )
        return model

    def close(self) -> None:
        """Stop the threads after the calls in progress."""
        # Pending batches still run: a caller that waits for a cancelled batch would never return.
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, bundle: Bundle, provider: str) -> LoadedModel:
        session = self._open(bundle, provider)
        if session.provider != provider:
            # Opened again, because the CPU uses another variant and other options than CUDA.
            session = self._open(bundle, session.provider)
        on_device = session.provider == CUDA
        # In float32: on input that no stack holds, as in the warm-up, int8 differs from any other
        # variant by more than a working device does.
        reference = (
            open_session(bundle, CPU, "float32", shrinking=self._shrinking) if on_device else None
        )
        return LoadedModel(
            bundle.card,
            session,
            pool=self._pool,
            threads=self.threads,
            device=self._device,
            reference=reference,
            observe=self._observe,
            folder=bundle.folder,
        )

    def _open(self, bundle: Bundle, provider: str) -> Session:
        return open_session(bundle, provider, self._precision, shrinking=self._shrinking)

    def _unknown_model_message(
        self, reference: str | None, task: Task, bundle: Bundle | None, owner: str
    ) -> str:
        if bundle and bundle.card.name in self.refused:
            return f"model '{bundle.card.id}' could not be loaded: {self.refused[bundle.card.name]}"
        usable = (*self.models.values(), *self.own(owner).values())
        served = ", ".join(sorted(m.card.id for m in usable)) or "none"
        lacking = f"there is no model '{reference}'" if reference else f"no model serves {task}"
        return f"{lacking}; available: {served}"
