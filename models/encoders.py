"""Encoders: pixel series by their recurrence plots, patches by their imagery (PIMC)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.formulas import INDEX_CENTER, INDEX_SPREAD
from models.recurrence import Threshold, recurrence_plot

# Reflectance at which imagery saturates: EuroSAT's RGB is clipped at 2750 / 10000.
_BRIGHTEST = 0.275
# Standard deviation, in units where dark is -1 and _BRIGHTEST 1, below which a patch's contrast
# fades: about that of calm water.
_LEAST_SPREAD = 0.03
# The same for square roots of reflectance, which spread dark ground and bright ground alike.
_ROOT_CENTER = 0.35
_ROOT_SPREAD = 0.2
# Number of tokens at the end of a pixel encoder's pyramid.
_TOKENS = 4


def standardised(series: Tensor) -> Tensor:
    """Spectral indices in the unit that every encoder sees: about -2 to 2."""
    return (series - INDEX_CENTER) / INDEX_SPREAD


def standardised_roots(reflectance: Tensor) -> Tensor:
    """Reflectance in the unit that every encoder sees: about -2 to 2."""
    return (reflectance.clamp(0.0, 1.0).sqrt() - _ROOT_CENTER) / _ROOT_SPREAD


class Block(nn.Module):
    """Residual two-layer perceptron over the last axis.

    BatchNorm rather than LayerNorm: after export it is part of the matrix product that follows.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C) -> (..., C)`."""
        hidden = torch.relu(self.up(self.norm(x)))
        out: Tensor = x + self.down(self.dropout(hidden))
        return out


class ChannelNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis, for any number of leading axes."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C) -> (..., C)`."""
        return super().forward(x.flatten(0, -2)).view_as(x)


class PixelEncoder(nn.Module):
    """Encodes a pixel from the recurrence plots of its spectral indices.

    Each step of the regular grid is a token. The token contains the step's row of every index's
    recurrence plot (its distance to every other step), and what a plot of distances does not show:
    the level and sign of the series, and how well the step is observed. A pyramid of matrix
    products joins neighbouring steps twice until four tokens remain: 36 steps by factors of three
    and three, 32 steps by factors of four and two.

    Args:
        steps: M, four times a product of two factors.
        indices: K.
        bands: C, the bands whose reflectance the tokens also hold; 0 for none. Most indices are
            ratios, which do not separate bright ground from dark.
        width: channels of the finest level; doubled at each join.
        depths: residual blocks of each of the three levels. 0 at the finest level saves the most
            time, because it has many narrow tokens, and narrow products are the slowest.
        embedding: D.
        dropout: share of hidden values dropped in training.
        plots: whether the encoder sees the recurrence plots.
        series: whether it also sees the series.
        calendar: whether each token also holds the step's day of the year.
        threshold: of the recurrence plots, in standardised index units, or `point` or `distance`
            (see `recurrence_plot`); None keeps distances.
        percentage: of the thresholds `point` and `distance`.
        plot_dropout: share of the pixels whose plots are hidden in training, if the encoder also
            sees the series. Without it the network overfits on the plots.
    """

    def __init__(
        self,
        *,
        steps: int = 36,
        indices: int = 3,
        bands: int = 0,
        width: int = 64,
        depths: Sequence[int] = (1, 1, 1),
        embedding: int = 256,
        dropout: float = 0.3,
        plots: bool = True,
        series: bool = True,
        calendar: bool = False,
        threshold: Threshold = None,
        percentage: float = 10.0,
        plot_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not (plots or series):
            raise ValueError("an encoder needs the plots, the series or both")
        self.plots, self.series, self.calendar = plots, series, calendar
        self.threshold, self.percentage = threshold, percentage
        self.plot_dropout = plot_dropout if series else 0.0
        self.embedding = embedding
        self.steps, self.bands = steps, bands
        self.factors = _factors(steps)
        features = (indices * steps if plots else 0) + (indices if series else 0) + bands + 1
        self.row = nn.Linear(features + (2 if calendar else 0), width)
        widths = (width, 2 * width, 4 * width)
        self.levels = nn.ModuleList(
            # Without a block, two linear maps in sequence would be a single one.
            nn.Sequential(*(Block(w, dropout / 2) for _ in range(depth))) if depth else nn.ReLU()
            for w, depth in zip(widths, depths, strict=True)
        )
        self.joins = nn.ModuleList(
            nn.Linear(factor * w, 2 * w)
            for factor, w in zip(self.factors, widths[:-1], strict=True)
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(widths[-1] * _TOKENS, embedding),
            ChannelNorm(embedding),
            nn.ReLU(),
        )

    def forward(
        self,
        series: Tensor,
        observed: Tensor,
        season: Tensor | None = None,
        reflectance: Tensor | None = None,
    ) -> Tensor:
        """Encode pixels.

        Args:
            series: spectral indices on the regular grid (N, K, M).
            observed: how well each step is observed (N, 1, M), 0 to 1.
            season: sine and cosine of each step's day of the year (N, 2, M), for `calendar`.
            reflectance: the bands on the regular grid (N, C, M), for an encoder with bands.

        Returns:
            Embeddings (N, D).
        """
        levels = standardised(series)
        tokens = token_parts(
            levels if self.series else None,
            observed,
            season if self.calendar else None,
            reflectance,
        )
        if self.plots:
            # Symmetric: row j of the plot is its column j, so (N, K, M, M) folds to (N, K * M, M).
            plots = recurrence_plot(
                levels, threshold=self.threshold, percentage=self.percentage
            ).flatten(1, 2)
            tokens.append(self._hide(plots))
        x: Tensor = self.row(torch.cat(tokens, dim=1).transpose(1, 2))
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.joins):
                n, m, width = x.shape
                factor = self.factors[i]
                x = self.joins[i](x.reshape(n, m // factor, factor * width))
        out: Tensor = self.head(x)
        return out

    def _hide(self, plots: Tensor) -> Tensor:
        """Zero the plots (N, K * M, M) of a random share of the pixels, in training only."""
        if not (self.training and self.plot_dropout):
            return plots
        shown = torch.rand(len(plots), 1, 1, device=plots.device) >= self.plot_dropout
        return plots * shown


def token_parts(
    levels: Tensor | None, observed: Tensor, season: Tensor | None, reflectance: Tensor | None
) -> list[Tensor]:
    """The parts of a step's token other than its rows of the plots, in the order of the weights.

    Args:
        levels: standardised series (N, K, M), or None if the encoder does not see them.
        observed: how well each step is observed (N, 1, M), 0 to 1.
        season: sine and cosine of each step's day of the year (N, 2, M), or None.
        reflectance: the bands on the regular grid (N, C, M), unitless, or None.

    Returns:
        Parts (N, ..., M) of the tokens.
    """
    roots = None if reflectance is None else standardised_roots(reflectance)
    return [part for part in (observed, levels, season, roots) if part is not None]


def _factors(steps: int) -> tuple[int, int]:
    """Number of steps that each of the two joins combines, the larger first."""
    product, rest = divmod(steps, _TOKENS)
    small = max((f for f in range(2, product) if f * f <= product and product % f == 0), default=0)
    if rest or not small:
        raise ValueError(f"steps must be {_TOKENS} times a product of two factors, not {steps}")
    return product // small, small


class PatchEncoder(nn.Module):
    """Encodes a patch of imagery: a small residual network.

    Args:
        bands: C.
        width: channels at the finest level; doubled at each further one, which halves the
            resolution.
        depths: residual blocks of each level. 0 at the finest level saves the most time: a
            convolution there takes twice as long as one with the same number of products at half
            the resolution.
        stride: pixels between positions of the finest level. With 1, blocks see texture at the
            imagery's own resolution, at four times the cost of 2.
        embedding: D.
        dropout: share of the pooled features dropped in training.
        contrast: whether the input also holds each band standardised by its mean and standard
            deviation over the patch. Light, air and soil differ between places and shift whole
            patches; contrast within a patch does not shift, and only contrast separates dark water
            from dark forest.
    """

    def __init__(
        self,
        *,
        bands: int = 3,
        width: int = 32,
        depths: Sequence[int] = (1, 1, 1, 1),
        embedding: int = 256,
        dropout: float = 0.2,
        contrast: bool = False,
        stride: int = 2,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.contrast = contrast
        inputs = 2 * bands if contrast else bands
        self.stem = _convolution(inputs, width, kernel=2 + stride, stride=stride)
        levels: list[nn.Module] = []
        for i, depth in enumerate(depths):
            w = width * 2**i
            if i:
                levels.append(_convolution(w // 2, w, kernel=2, stride=2))
            levels.extend(_Residual(w) for _ in range(depth))
        self.levels = nn.Sequential(*levels)
        self.head = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width * 2 ** (len(depths) - 1), embedding), nn.ReLU()
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patches.

        Args:
            patches: reflectance (N, C, H, W), unitless, H and W multiples of 16.

        Returns:
            Embeddings (N, D).
        """
        x = patches.clamp(0.0, _BRIGHTEST) * (2.0 / _BRIGHTEST) - 1.0
        if self.contrast:
            off = x - x.mean(dim=(2, 3), keepdim=True)
            spread = off.square().mean(dim=(2, 3), keepdim=True).sqrt()
            x = torch.cat([x, off / (spread + _LEAST_SPREAD)], dim=1)
        x = self.levels(self.stem(x))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class EfficientNetLite0(nn.Module):
    """Encodes a patch of imagery by EfficientNet-Lite0, made for weights learned on ImageNet.

    Inverted residual blocks (Sandler et al. 2018, arXiv 1801.04381) in the arrangement of
    EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946, table 1). The Lite variant has no
    squeeze-and-excitation and bounds activations to 0 to 6, which suits float16.

    The weights were learned under TensorFlow's SAME padding, which at stride 2 adds its odd row and
    column at the end. Symmetric padding adds them at the beginning, so it computes the same result
    if image and kernels are turned by 180 degrees. `training.imagenet` turns the kernels. The image
    need not be turned, because imagery from above has no upright orientation, so the graph needs no
    padding of its own.

    Args:
        bands: C, three: the weights are of red, green and blue.
        zoom: factor by which patches are enlarged, linearly. The network halves the resolution five
            times: without enlargement, a patch of 64 pixels would end in 2 x 2 positions.
        dropout: share of the pooled features dropped in training.
    """

    def __init__(self, *, bands: int = 3, zoom: float = 2.0, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = _LITE0_FEATURES
        self.zoom = zoom
        self.stem = _lite_convolution(bands, _LITE0_STEM, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        inputs = _LITE0_STEM
        for repeats, kernel, stride, expansion, outputs in _LITE0_STAGES:
            for i in range(repeats):
                blocks.append(
                    _InvertedResidual(
                        inputs,
                        outputs,
                        kernel=kernel,
                        stride=1 if i else stride,
                        expansion=expansion,
                    )
                )
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = _lite_convolution(inputs, _LITE0_FEATURES)
        self.dropout = nn.Dropout(dropout)

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patches.

        Args:
            patches: reflectance (N, C, H, W), unitless, H and W multiples of 16.

        Returns:
            Embeddings (N, 1280), 0 to 6.
        """
        x = patches.clamp(0.0, _BRIGHTEST) * (2.0 / _BRIGHTEST) - 1.0
        if self.zoom != 1.0:
            x = nn.functional.interpolate(x, scale_factor=self.zoom, mode="bilinear")
        x = self.last(self.blocks(self.stem(x)))
        out: Tensor = self.dropout(x.mean(dim=(2, 3)))
        return out


# Channels after the stem; then by stage: blocks, kernel, stride of the first block, expansion,
# channels; then the features that are pooled.
_LITE0_STEM = 32
_LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_LITE0_FEATURES = 1280


class _InvertedResidual(nn.Module):
    """Expansion, one convolution per channel, linear projection; the identity where shapes agree.

    Sandler et al. 2018, arXiv 1801.04381, figure 3b.
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = inputs * expansion
        expand = [_lite_convolution(inputs, width)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            _lite_convolution(width, width, kernel=kernel, stride=stride, groups=width),
            _lite_convolution(width, outputs, bounded=False),
        )
        self.identity = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.identity else out


def _lite_convolution(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    bounded: bool = True,
) -> nn.Sequential:
    """Convolution, normalisation with the constants of the weights' origin, bounded activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
        *([nn.ReLU6()] if bounded else []),
    )


def _convolution(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    """Two 3 x 3 convolutions and the identity (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width, kernel=3)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))
