"""Losses as pure functions of log-probs by family, and the estimators that bind them to settings and cached columns."""

from asyncopd.losses.build import build_estimator
from asyncopd.losses.contract import Estimator, RowLosses, StepContext
from asyncopd.losses.gather import gather_logprobs
from asyncopd.losses.rows import TokenRows

__all__ = ["Estimator", "RowLosses", "StepContext", "TokenRows", "build_estimator", "gather_logprobs"]
