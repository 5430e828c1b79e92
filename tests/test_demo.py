"""The demo's comparison of forecasts with what came, against numbers by hand."""

from __future__ import annotations

from datetime import date
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pimc_client import Forecast


def forecast(**quantiles: list[float]) -> Forecast:
    dates = (date(2020, 1, 10), date(2020, 1, 20))
    ndvi = {name: np.array(values) for name, values in quantiles.items()}
    return Forecast(id="1", status="ok", dates=dates, indices={"NDVI": ndvi})


def place(**values: float | None) -> dict[str, Any]:
    """A place with NDVI by date (`d0101` is the first of January of 2020); None is cloudy."""
    days = [date(2020, int(name[1:3]), int(name[3:])).isoformat() for name in values]
    clear = [float(value is not None) for value in values.values()]
    return {"status": "ok", "dates": days, "clear": clear, "NDVI": list(values.values())}


def test_a_forecast_is_compared_with_clear_dates_near_its_own(demo: ModuleType) -> None:
    measured = [place(d0101=0.3, d0105=None, d0112=0.5, d0121=0.9, d0130=0.1)]
    forecasts = [forecast(q10=[0.35, 0.4], q50=[0.4, 0.6], q90=[0.5, 0.8])]
    skill = demo.forecast_skill(measured, forecasts, date(2020, 1, 5))
    assert skill.compared == 2  # 30 January is too far from the last date of the forecast
    assert skill.rmse == pytest.approx(np.sqrt((0.1**2 + 0.3**2) / 2))
    assert skill.persistence == pytest.approx(np.sqrt((0.2**2 + 0.6**2) / 2))
    assert skill.coverage == 0.5


def test_without_a_clear_date_there_is_no_skill(demo: ModuleType) -> None:
    measured = [place(d0101=0.3, d0112=None), {"status": "outside"}]
    forecasts = [forecast(q10=[0.1, 0.1], q50=[0.2, 0.2], q90=[0.3, 0.3])] * 2
    assert demo.forecast_skill(measured, forecasts, date(2020, 1, 5)) is None
