"""Inference engine: every bundle of a registry, and the callers' own, loaded and warm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from models.card import Modality, Task
from models.registry import Bundle, BundleError, Registry
from service.errors import UnknownModel, WrongTask
from service.infer.cpus import usable_cpus
from service.infer.model import LoadedModel
from service.infer.session import (
    CPU,
    CUDA,
    ArenaShrinking,
    PrecisionChoice,
    Providers,
    ProviderUnavailable,
    Session,
    open_session,
    wanted,
)

_LOG = logging.getLogger(__name__)


class Engine:
    """Every bundle of a registry, loaded and warm.

    Args:
        registry: verified bundles.
        providers: `auto` uses CUDA if a session really gets it; `cuda` requires it; `cpu`.
        threads: threads that run batches on the CPU, shared by all models and requests;
            None uses the CPUs that this process may use, `usable_cpus`.
        precision: `auto` uses variants with a negligible loss; `float32` none.

    Raises:
        ProviderUnavailable: `cuda` is required and a session does not get it.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        providers: Providers = "auto",
        threads: int | None = None,
        precision: PrecisionChoice = "auto",
    ) -> None:
        self.registry = registry
        self._precision = precision
        self.threads = threads or usable_cpus()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="infer")
        # One call at a time on the device: two would alternate anyway and double its memory.
        self._device = threading.Lock()
        self._shrinking = ArenaShrinking()
        self._changing = threading.Lock()
        # Replaced, never changed, so that requests read it without a lock.
        self._own: Mapping[tuple[str, str], LoadedModel] = {}
        provider = wanted(providers)
        models: dict[str, LoadedModel] = {}
        refused: dict[str, str] = dict(registry.refused)
        try:
            for name, bundle in registry.bundles.items():
                try:
                    models[name] = self._load(bundle, provider)
                except BundleError as error:
                    refused[name] = str(error)
                    # With the runtime's message, which names paths and so stays in the log.
                    _LOG.error("%s", error, exc_info=error)
                    continue
                if models[name].provider != provider:
                    if providers == "cuda":
                        raise ProviderUnavailable(  # noqa: TRY301 - the pool must be closed
                            f"CUDA is required, but the session of '{name}' runs on "
                            f"{models[name].provider}: the driver, CUDA or cuDNN does not load"
                        )
                    _LOG.warning("CUDA is offered but no session gets it; serving on the CPU")
                    provider = CPU  # trying again for each bundle would fail as slowly
        except BaseException:
            self.close()
            raise
        self._wanted = provider
        self.models: Mapping[str, LoadedModel] = models
        self.refused: Mapping[str, str] = refused
        """Bundles that are not served, with the reason; those rejected by the registry included."""

    @property
    def provider(self) -> str:
        """The execution provider in use, by the sessions: CUDA only if all have it."""
        on_cuda = bool(self.models) and all(m.provider == CUDA for m in self.models.values())
        return CUDA if on_cuda else CPU

    @property
    def failing(self) -> list[str]:
        """Models whose last run failed on the device, as `name@version`."""
        return sorted(model.card.id for model in self.models.values() if model.failing)

    def own(self, owner: str) -> Mapping[str, LoadedModel]:
        """A caller's own models, by name."""
        return {name: model for (whose, name), model in self._own.items() if whose == owner}

    def load(self, bundle: Bundle) -> LoadedModel:
        """Load a bundle that only the caller of this method uses.

        Raises:
            BundleError: it does not load, or fails its warm-up.
        """
        return self._load(bundle, self._wanted)

    def add(self, owner: str, model: LoadedModel) -> None:
        """Serve a model to one caller; it replaces that caller's model of the same name."""
        with self._changing:
            self._own = {**self._own, (owner, model.card.name): model}

    def remove(self, owner: str, name: str) -> None:
        """Serve a caller's own model no longer; runs that use it still end."""
        with self._changing:
            self._own = {key: m for key, m in self._own.items() if key != (owner, name)}

    def named(self, reference: str, owner: str = "") -> LoadedModel | None:
        """The model of a `name` or `name@version` that a caller may use; None if there is none."""
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
            reference: None takes the default.
            task: the task it must serve.
            modality: that it must take; None for any.
            owner: the caller, whose own models count as well.

        Raises:
            UnknownModel: no model of that name and version, or none for the task, is served.
            WrongTask: the model serves another task or modality.
        """
        if reference is None:
            bundle = self.registry.default(task, modality)
            model = self.models.get(bundle.card.name) if bundle else None
        else:
            bundle = self.registry.find(reference)
            model = self.named(reference, owner)
        if model is None:
            raise UnknownModel(self._why_unknown(reference, task, bundle, owner))
        card = model.card
        if card.task != task:
            raise WrongTask(f"model '{card.id}' is for {card.task}, but the request is for {task}")
        if modality not in {None, card.modality}:
            raise WrongTask(
                f"model '{card.id}' takes {card.modality} input, but the request has modality "
                f"{modality}"
            )
        return model

    def close(self) -> None:
        """Stop the threads; a call in progress still ends."""
        # Pending batches are not cancelled: a caller that waits for one would wait for ever.
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, bundle: Bundle, provider: str) -> LoadedModel:
        session = self._open(bundle, provider)
        if session.provider != provider:
            # The variant and the options of CUDA are not those of the CPU.
            session = self._open(bundle, session.provider)
        on_device = session.provider == CUDA
        reference = self._open(bundle, CPU) if on_device else None
        return LoadedModel(
            bundle.card,
            session,
            pool=self._pool,
            threads=self.threads,
            device=self._device,
            reference=reference,
        )

    def _open(self, bundle: Bundle, provider: str) -> Session:
        return open_session(bundle, provider, self._precision, shrinking=self._shrinking)

    def _why_unknown(
        self, reference: str | None, task: Task, bundle: Bundle | None, owner: str
    ) -> str:
        if bundle and bundle.card.name in self.refused:
            return f"model '{bundle.card.id}' could not be loaded: {self.refused[bundle.card.name]}"
        usable = (*self.models.values(), *self.own(owner).values())
        served = ", ".join(sorted(m.card.id for m in usable)) or "none"
        asked = f"no model '{reference}'" if reference else f"no model serves {task}"
        return f"{asked}; available: {served}"
