"""The whole graph, from reflectance to prediction, as trained and as exported.

Shapes: N pixels or patches, T dates, C bands, M steps of the regular grid, D numbers of an
embedding. K is spectral indices in series (N, K, M) and classes in predictions (N, K). A forecast
has H steps, S spectral indices and Q quantiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.card import Modality
from models.encoders import (
    EfficientNetLite0,
    PatchEncoder,
    PixelEncoder,
    standardised,
    standardised_roots,
)
from models.forecast_calibration import EARLIER_PREFIXES, ForecastCalibration, anchors_of
from models.formulas import SMALLEST_DENOMINATOR, YEAR
from models.heads import ClassificationHead, ForecastHead
from models.indices import SpectralIndices
from models.timegrid import TimeGrid

_BLUE = "B02"


class PixelGraph(nn.Module):
    """Series of reflectance to predictions.

    indices -> regular grid -> recurrence plots -> encoder -> head. The head determines the output:
    probabilities (N, K), quantiles (N, H, S, Q), or, without a head, the embedding (N, D).

    Several small networks may share indices and grid; the prediction is then their mean (of logits
    or of quantiles). With few training pixels, that is more accurate than one network of the same
    cost (Lakshminarayanan et al. 2017, arXiv 1612.01474).

    Args:
        bands: names of the bands on the C axis.
        indices: names of the spectral indices.
        steps: M.
        step_days: days between two steps.
        encoder: the pixel encoder.
        head: None returns the embedding.
        others: further encoders, each with its head.
        yearly: whether dates of several years are placed on one (see `TimeGrid`, `period`).
        clarity: how fast a date's weight falls with its blue reflectance. With 40, a date that is
            0.05 brighter than its neighbours in time counts e^2 times less. Thin cloud, haze and
            snow brighten blue most, and no mask detects all of them. 0 weights all dates equally.
        reflectance: whether the encoders see the bands in addition to the indices.
        with_series: whether the embedding continues with the standardised series that the encoder
            sees, index by index and then band by band. An encoder trained without labels discards
            details of the series that some classes differ in; a linear model needs both.
    """

    modality: Modality = "pixel"

    def __init__(
        self,
        *,
        bands: Sequence[str],
        indices: Sequence[str],
        steps: int,
        step_days: int,
        encoder: PixelEncoder,
        head: ClassificationHead | ForecastHead | None,
        others: Sequence[tuple[PixelEncoder, ClassificationHead | ForecastHead]] = (),
        yearly: bool = False,
        clarity: float = 0.0,
        reflectance: bool = False,
        with_series: bool = False,
    ) -> None:
        super().__init__()
        if with_series and head is not None:
            raise ValueError("only an embedding can continue with the series, so give no head")
        self.with_series = with_series
        self.indices = SpectralIndices(indices, bands)
        self.grid = TimeGrid(steps, step_days, period=YEAR if yearly else None)
        self.clarity = clarity
        self.reflectance = reflectance
        # One product computes the sums of the indices and, after them, single bands.
        single = torch.eye(len(bands))
        self.blue = bands.index(_BLUE) if clarity else 0
        if not reflectance:  # no single band is needed, except blue for `clarity`
            single, self.blue = single[self.blue :][: int(clarity > 0)], 0
        self.register_buffer("sums", torch.cat([self.indices.weights, single]), persistent=False)
        self.encoder = encoder
        self.head = head
        self.others = nn.ModuleList(nn.ModuleList(pair) for pair in others)
        self.register_load_state_dict_pre_hook(_renamed)  # type: ignore[no-untyped-call]  # torch's own
        self.calibration = (
            ForecastCalibration(encoder.embedding) if isinstance(head, ForecastHead) else None
        )

    sums: Tensor

    def regular(
        self, values: Tensor, valid: Tensor, days: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Spectral indices, and bands if the encoders see them, on the regular grid.

        Args:
            values: reflectance (N, T, C), unitless; any value where not valid.
            valid: True where usable (N, T).
            days: days since the window's first day (T).

        Returns:
            Series (N, K, M), NaN for a pixel without a usable date; observed (N, 1, M), 0 to 1;
            reflectance (N, C, M) or None.
        """
        device = values.device.type
        if torch.is_autocast_enabled(device):
            # Training in bfloat16 is for the encoders: with eight bits, an index is wrong by up to
            # a hundredth, and the weights of a series of few dates are all rounded to 0.
            with torch.autocast(device, enabled=False):
                return self._regular(values, valid, days)
        return self._regular(values, valid, days)

    def _regular(
        self, values: Tensor, valid: Tensor, days: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # A float16 variant takes float16 to halve the transfer to a device; it computes in float32.
        sums = (values.float() @ self.sums.T).transpose(1, 2)
        count = 2 * len(self.indices.names)
        x, denominators = self.indices.ratios(sums[:, :count], dim=1)
        bands = sums[:, count:]
        # A date on which one index cannot be computed is missing in all indices. NaN in one band
        # is NaN in every sum; only NaN differs from itself, and some devices' minimum ignores NaN.
        least, first = denominators.amin(dim=1), denominators[:, 0]
        usable = valid & (least > SMALLEST_DENOMINATOR) & (first == first)
        worth = self._worth(bands[:, self.blue]) if self.clarity else None
        if not self.reflectance:
            return *self.grid(x, usable, days, worth), None
        # One matrix product for both.
        series, observed = self.grid(torch.cat([x, bands], dim=1), usable, days, worth)
        return series[:, : x.shape[1]], observed, series[:, x.shape[1] :]

    def _worth(self, blue: Tensor) -> Tensor:
        """Weight of each date (N, T), above 0, decreasing with its blue reflectance (N, T)."""
        # The bound keeps the weight of the brightest snow far above the smallest float32.
        return torch.exp(-self.clarity * blue.clamp(0.0, 1.0))

    def raw(
        self,
        values: Tensor,
        valid: Tensor,
        days: Tensor,
        day_of_year: Tensor | None = None,
        elsewhere: Tensor | None = None,
    ) -> Tensor:
        """Mean output of the networks: logits (N, K), quantiles (N, H, S, Q), embeddings (N, D).

        Quantiles are calibrated.
        """
        if self.calibration is not None:
            evidence = self.evidence(values, valid, days, day_of_year)
            calibrated: Tensor = self.calibration(*evidence, elsewhere)
            return calibrated
        outputs = self.each(values, valid, days, day_of_year)
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)

    def each(
        self, values: Tensor, valid: Tensor, days: Tensor, day_of_year: Tensor | None = None
    ) -> list[Tensor]:
        """Output of each network, on which the training loss is computed."""
        return self._networks(*self.regular(values, valid, days), day_of_year)[0]

    def evidence(
        self, values: Tensor, valid: Tensor, days: Tensor, day_of_year: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a forecast's calibration takes.

        Returns:
            Quantiles of each network (R, N, H, S, Q), the first network's embeddings (N, D), and
            `models.forecast_calibration.anchors_of` the series (N, A, S).
        """
        regular = self.regular(values, valid, days)
        outputs, embedding = self._networks(*regular, day_of_year)
        series, observed, _ = regular
        return torch.stack(outputs), embedding, anchors_of(series, observed)

    def _networks(
        self,
        series: Tensor,
        observed: Tensor,
        reflectance: Tensor | None,
        day_of_year: Tensor | None,
    ) -> tuple[list[Tensor], Tensor]:
        """Output of each network, and the first one's embeddings (N, D), from `regular`."""
        season = None if day_of_year is None else self._season(day_of_year)
        networks = ((self.encoder, self.head), *self.others)
        embedded: list[Tensor] = [
            encoder(series, observed, season, reflectance) for encoder, _ in networks
        ]
        outputs = []
        for (_, head), embeddings in zip(networks, embedded, strict=True):
            if isinstance(head, ForecastHead):
                outputs.append(head(embeddings, series))
            elif head is not None:
                outputs.append(head(embeddings))
            elif self.with_series:
                outputs.append(torch.cat([embeddings, *_flat(series, reflectance)], dim=1))
            else:
                outputs.append(embeddings)
        return outputs, embedded[0]

    def forward(
        self,
        values: Tensor,
        valid: Tensor,
        days: Tensor,
        day_of_year: Tensor | None = None,
        elsewhere: Tensor | None = None,
    ) -> Tensor:
        """Predict for pixels; the class describes the output.

        Args:
            values: reflectance (N, T, C), unitless; any value where not valid.
            valid: True where usable (N, T).
            days: days since the window's first day (T).
            day_of_year: day of the year of the first day (N), 1 to 366, for a calendar encoder.
            elsewhere: 1 where the place is far from those of the training data, 0 where it is not
                or is unknown (N), for a forecast; None is 0.
        """
        out = self.raw(values, valid, days, day_of_year, elsewhere)
        if isinstance(self.head, ClassificationHead):
            return self.head.probabilities(out)
        return out

    def _season(self, day_of_year: Tensor) -> Tensor:
        """Sine and cosine of each step's day of the year (N, 2, M)."""
        angle = (day_of_year[:, None] + self.grid.grid) * (2.0 * math.pi / YEAR)
        return torch.stack([torch.sin(angle), torch.cos(angle)], dim=1)


def _renamed(_: PixelGraph, state: dict[str, Tensor], prefix: str, *_more: object) -> None:
    """Give weights of earlier versions their present names."""
    for before in (prefix + earlier for earlier in EARLIER_PREFIXES):
        for name in [name for name in state if name.startswith(before)]:
            state[f"{prefix}calibration.{name.removeprefix(before)}"] = state.pop(name)


def _flat(series: Tensor, reflectance: Tensor | None) -> list[Tensor]:
    """The series as an encoder sees them: (N, K * M), and (N, C * M) if it sees the bands."""
    parts = [standardised(series)]
    if reflectance is not None:
        parts.append(standardised_roots(reflectance))
    return [part.flatten(1) for part in parts]


class PatchGraph(nn.Module):
    """Patches (N, C, P, P) to probabilities (N, K) or, without a head, embeddings (N, D).

    Args:
        encoder: the patch encoder.
        head: None returns the embedding.
        others: further encoders, each with its head; the prediction is the mean of their logits.
        views: number of a patch's eight symmetries whose logits are averaged, 1, 2, 4 or 8. Imagery
            from above has no upright orientation, so a prediction should not depend on that of the
            patch. Several networks share the views, at least one each, so that they cost no more
            than one network. Training uses one symmetry of each patch at a time.
    """

    modality: Modality = "patch"

    def __init__(
        self,
        *,
        encoder: PatchEncoder | EfficientNetLite0,
        head: ClassificationHead | None,
        others: Sequence[tuple[PatchEncoder | EfficientNetLite0, ClassificationHead]] = (),
        views: int = 1,
    ) -> None:
        super().__init__()
        if views not in {1, 2, 4, 8}:
            raise ValueError(f"views must be 1, 2, 4 or 8, not {views}")
        self.encoder = encoder
        self.head = head
        self.others = nn.ModuleList(nn.ModuleList(pair) for pair in others)
        self.views = views

    def raw(self, patches: Tensor) -> Tensor:
        """Mean output of the networks: logits (N, K) or embeddings (N, D)."""
        if self.training or self.head is None or self.views == 1:
            outputs = self.each(patches)
        else:
            views = symmetries(patches.float())[:: 8 // max(self.views, 1 + len(self.others))]
            networks = itertools.cycle(self._networks)
            outputs = [network(view) for network, view in zip(networks, views, strict=False)]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)

    def each(self, patches: Tensor) -> list[Tensor]:
        """Output of each network, without symmetries, on which the training loss is computed."""
        patches = patches.float()  # see `PixelGraph.regular`
        return [network(patches) for network in self._networks]

    @property
    def _networks(self) -> list[Callable[[Tensor], Tensor]]:
        """Encoder and head of each network, as one module."""
        heads = ((self.encoder, self.head), *self.others)
        return [e if head is None else nn.Sequential(e, head) for e, head in heads]

    def forward(self, patches: Tensor) -> Tensor:
        """Predict for patches of reflectance (N, C, H, W), unitless."""
        out = self.raw(patches)
        return out if self.head is None else self.head.probabilities(out)


def symmetries(patches: Tensor) -> list[Tensor]:
    """The eight symmetries of square patches (N, C, P, P): rotations and reflections."""
    mirrored = [patches, patches.flip(-1), patches.flip(-2), patches.flip(-1, -2)]
    return [*mirrored, *(m.transpose(-1, -2) for m in mirrored)]
