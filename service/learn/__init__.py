"""Fits to a caller's own data: own classes, and the correction of a forecast.

own classes   labelled series → features → a calibrated head, scored by place → one ONNX graph:
              graph, kernel, places, scores
forecasts     forecasts from earlier dates → shares and interval widths: backtest
"""
