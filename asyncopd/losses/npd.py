"""Near-policy distillation: cross-entropy on slightly stale, selected responses mixed with a KL to the teacher."""

from __future__ import annotations

from torch import Tensor


def npd(cross_entropy_T: Tensor, kl_T: Tensor, *, kl_weight: float) -> Tensor:
    """ℓ = (1−λ)·CE + λ·KL_topk.

    Not a divergence to the teacher: the cross-entropy part follows the selected responses, so at p = q the gradient is
    (1−λ) times that of supervised training. "NPD (reconstructed)": the paper's text is not public in detail.

    Args:
        cross_entropy_T: [T] nats, with gradient (cross_entropy.py).
        kl_T: [T] nats, with gradient: forward KL on the teacher's top-k (forward_kl.py, tails.py).
        kl_weight: λ in [0, 1].
    Returns:
        [T] nats, with gradient; one loss per row.
    Source:
        docs/estimators.md 4.6.
    """
    return (1 - kl_weight) * cross_entropy_T + kl_weight * kl_T
