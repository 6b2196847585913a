"""Losses as pure functions of log-probs by family, and the estimators that bind them to settings and cached columns."""

from asyncopd.config.losses import LossSettings, OnPolicySettings
from asyncopd.losses import divergences, head_tail
from asyncopd.losses.contract import Estimator, RowLosses, StepContext, estimator_of
from asyncopd.losses.gather import gather_logprobs
from asyncopd.losses.policy_gradient import PrefixWeighted
from asyncopd.losses.rows import TokenRows

FAMILIES = (head_tail, divergences)
"""The modules whose estimators exist, beside policy_gradient: importing one registers them with `estimator_of`."""
__all__ = ["Estimator", "RowLosses", "StepContext", "TokenRows", "build_estimator", "gather_logprobs"]


def build_estimator(settings: LossSettings) -> Estimator:
    """The estimator that `settings` describe, with the weight of prefixes if they ask for one.

    Raises:
        ConfigError: the settings have no function.
    """
    estimator = estimator_of(settings)
    if isinstance(settings, OnPolicySettings) and settings.max_prefix_weight is not None:
        return PrefixWeighted(estimator, settings.max_prefix_weight)
    return estimator
