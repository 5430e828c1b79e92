"""Regular time grid: irregular, cloudy dates to regular steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.formulas import FAR, NARROW, WIDE, WIDE_HEIGHT


class TimeGrid(nn.Module):
    """Masked kernel regression of irregular series onto M regular steps.

    `grid = (x * valid) @ W / (valid @ W)`, where `W (T, M)` depends on the dates only, so that all
    pixels of a stack share it and the regression is two matrix products (Nadaraya 1964, Watson
    1964). W is the sum of a narrow Gaussian, which dominates near clear dates, and a wide Cauchy
    kernel of a thousandth of its height, which dominates far from them. The Cauchy tail never
    underflows, so no step is empty as long as the series holds one valid date.

    Args:
        steps: M.
        step_days: days between steps.
        narrow: standard deviation of the Gaussian, in steps.
        wide: half width of the Cauchy kernel, in steps.
        period: days after which the grid repeats, such as a year: dates of any number of years are
            then placed on one, and the grid's ends are neighbours. None for a grid without period.
    """

    def __init__(
        self,
        steps: int,
        step_days: float,
        narrow: float = NARROW,
        wide: float = WIDE,
        period: float | None = None,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.narrow = narrow * step_days
        self.wide = wide * step_days
        self.period = period
        self.register_buffer(
            "grid", torch.arange(steps, dtype=torch.float32) * step_days, persistent=False
        )

    grid: Tensor

    def forward(
        self, x: Tensor, valid: Tensor, days: Tensor, worth: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Interpolate series onto the grid.

        Args:
            x: series (N, K, T); any value, NaN included, where not valid.
            valid: True where usable (N, T).
            days: days since the window's first day (T), or (N, T) in training, where each pixel
                has its own dates.
            worth: relative weight of each date (N, T), above 0; None for equal weights.

        Returns:
            The series on the grid (N, K, M), NaN for a pixel without a valid date; and how well
            each step is observed (N, 1, M), 0 (no date near) to 1.
        """
        square = self._distance(days).square()
        # Clipped, because products with subnormal numbers are far slower.
        narrow = torch.exp((square * (-0.5 / self.narrow**2)).clamp(min=-FAR))
        wide = WIDE_HEIGHT / (1.0 + square * self.wide**-2)
        weight = narrow + wide
        usable = valid[:, None, :]
        # `where`, not a product: 0 * NaN is NaN.
        seen = torch.where(usable, x, x.new_zeros(()))
        present = usable.to(x.dtype)
        # How well a step is observed depends on the dates only, not on their weights.
        density = present @ narrow
        if worth is not None:
            present = torch.where(usable, worth[:, None, :], worth.new_zeros(()))
            seen = seen * present
        series = seen @ weight / (present @ weight)
        return series, density / (density + 0.5)

    def _distance(self, days: Tensor) -> Tensor:
        """Days from each date to each step (T, M) or (N, T, M), signed unless periodic."""
        distance = days[..., None] - self.grid
        if self.period is None:
            return distance
        within = distance - self.period * torch.floor(distance / self.period)
        return torch.minimum(within, self.period - within)
