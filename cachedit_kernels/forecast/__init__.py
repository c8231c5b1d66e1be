"""Forecasting from stored residuals: `residual_forecast`."""

from cachedit_kernels.forecast.op import residual_forecast

__all__ = ["residual_forecast"]
