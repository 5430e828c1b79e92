"""Calibration of a forecast by how much a pixel is like the training data.

Shapes: N pixels, R networks, D numbers of an embedding, H steps of a forecast, S spectral indices,
Q quantiles, K references, P directions, A anchors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

REFERENCES, DIRECTIONS = 4096, 48
"""K, and the largest P."""
CLOSEST, FARTHEST = 0.9, 3.0
"""Bounds of a relative distance."""
ANCHORS = 2
"""A: the last value, and the mean of the past."""
EARLIER_PREFIXES = ("band.", "interval.")
"""Prefixes of the calibration's weights in files of earlier versions, instead of `calibration.`."""
_NARROWEST = 1e-3
"""Least half width of an interval, index units, that the disagreement is compared with."""


class ForecastCalibration(nn.Module):
    """Damps the change of the median and scales the prediction interval; at first neither.

    A network errs more on series unlike those that it was trained on, and its own interval does
    not show it. Three signs do: several networks disagree about such pixels (Lakshminarayanan et
    al. 2017, arXiv 1612.01474), their embedding lies far from those of the training series (compare
    Sun et al. 2022, arXiv 2204.06507), and a linear classifier of the embedding distinguishes them
    from the series that are like those of the validation places. The factor on the distances of a
    pixel's outer quantiles from the median is

        sqrt(1 + (disagreement * d)^2) * r^power * near^(1 - g) * far^g

    Of such series a network also predicts too much change, because the seasons that it knows come
    at other times. So the median moves towards two anchors, the last value (persistence) and the
    mean of the past, by the shares

        damping * g * (1 - CLOSEST / r)

    Where the place of a pixel is known to be far from those of the training data, g is 1, and the
    shares are `damping_elsewhere` whatever its distance r: the place shows what the embedding of
    some regions does not.

    Here d is the standard deviation of the networks' medians, in half widths of the interval,
    means over steps and indices; r is the distance of the embedding from the nearest of K
    references, which are embeddings of training series, in median distances of the validation
    places; g, 0 to 1, is the classifier's probability of another region.

    Args:
        embedding: D.
    """

    def __init__(self, embedding: int) -> None:
        super().__init__()
        directions = min(DIRECTIONS, embedding)
        self.register_buffer("damping", torch.zeros(ANCHORS))
        self.register_buffer("damping_elsewhere", torch.zeros(ANCHORS))
        self.register_buffer("disagreement", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(embedding))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("near", torch.ones(()))
        self.register_buffer("far", torch.ones(()))
        self.register_buffer("power", torch.zeros(()))
        self.register_buffer("projection", torch.zeros(embedding, directions))
        self.register_buffer("references", torch.zeros(REFERENCES, directions))
        self.register_load_state_dict_pre_hook(_not_calibrated)  # type: ignore[no-untyped-call]  # torch's own

    damping: Tensor
    damping_elsewhere: Tensor
    disagreement: Tensor
    weight: Tensor
    bias: Tensor
    near: Tensor
    far: Tensor
    power: Tensor
    projection: Tensor
    references: Tensor

    def forward(
        self,
        outputs: Tensor,
        embedding: Tensor,
        anchors: Tensor,
        elsewhere: Tensor | None = None,
    ) -> Tensor:
        """Mean of the networks' quantiles, calibrated.

        Args:
            outputs: quantiles of each network (R, N, H, S, Q), ascending, index units.
            embedding: of the first network (N, D).
            anchors: of each index (N, A, S), as `anchors_of` returns them.
            elsewhere: 1 where the place is far from the training data, else 0 (N); None is 0.

        Returns:
            Quantiles (N, H, S, Q), ascending, index units.
        """
        quantiles = outputs.mean(dim=0)
        middle = quantiles.shape[-1] // 2
        median = quantiles[..., middle : middle + 1]
        apart = self.disagreement * relative_disagreement(outputs)
        other = torch.sigmoid((embedding * self.weight).sum(dim=1) + self.bias)
        if elsewhere is not None:
            other = other + elsewhere * (1.0 - other)
        near, far = torch.log(self.near), torch.log(self.far)
        distance = torch.log(self._squared_distance(embedding)) / 2.0
        factor = torch.exp(near + other * (far - near) + self.power * distance)  # (N)
        factor = (factor * torch.sqrt(1.0 + apart * apart))[:, None, None, None]
        below = (quantiles[..., :middle] - median) * factor
        above = (quantiles[..., middle + 1 :] - median) * factor
        unlike = other * (1.0 - CLOSEST * torch.exp(-distance))
        shares = unlike[:, None] * self.damping  # (N, A)
        if elsewhere is not None:
            shares = shares + elsewhere[:, None] * (self.damping_elsewhere - shares)
        towards = (shares[..., None] * anchors).sum(dim=1)[:, None, :, None]
        damped = median * (1.0 - shares.sum(dim=1))[:, None, None, None] + towards
        return torch.cat([damped + below, damped, damped + above], dim=-1)

    def _squared_distance(self, embedding: Tensor) -> Tensor:
        """Square of the relative distance (N) of embeddings (N, D), within its bounds."""
        place = embedding @ self.projection.to(embedding.dtype)
        references = self.references.to(embedding.dtype)
        # The pixel's own square is the same for all references, so it is added to the least alone.
        rest = (references * references).sum(dim=1) - 2.0 * (place @ references.T)
        squared = rest.amin(dim=1) + (place * place).sum(dim=1)
        return torch.clamp(squared, CLOSEST**2, FARTHEST**2)


def anchors_of(series: Tensor, observed: Tensor) -> Tensor:
    """The last value of each index, and its mean over the observed steps (N, A, S).

    Args:
        series: spectral indices on the regular grid (N, S, M).
        observed: how well each step is observed (N, 1, M), 0 to 1.
    """
    mean = (series * observed).sum(dim=2) / observed.sum(dim=2)
    return torch.stack([series[..., -1], mean], dim=1)


def relative_disagreement(outputs: Tensor) -> Tensor:
    """Standard deviation of the networks' medians in half widths of their mean interval (N).

    Args:
        outputs: quantiles of each network (R, N, H, S, Q), index units.
    """
    medians = outputs[..., outputs.shape[-1] // 2]
    deviation = (medians - medians.mean(dim=0)).square().mean(dim=0)
    # A root has no slope at 0, where a single network is, so nothing is trained through it.
    apart = torch.sqrt(deviation).mean(dim=(1, 2))
    quantiles = outputs.mean(dim=0)
    half = (quantiles[..., -1] - quantiles[..., 0]).mean(dim=(1, 2)) / 2.0
    return apart / torch.clamp(half, min=_NARROWEST)


def _not_calibrated(
    calibration: ForecastCalibration, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Set a calibration that changes nothing in the weights of earlier versions.

    They have no calibration, a part of it, or one of another shape; it is fitted after the weights
    are.
    """
    for name, value in ForecastCalibration(len(calibration.weight)).state_dict().items():
        stored = state.get(prefix + name)
        if stored is None or stored.shape != value.shape:
            state[prefix + name] = value
