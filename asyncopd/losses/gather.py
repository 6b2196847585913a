"""The one place that turns hidden states into log-probs: chunked over tokens, recomputed in backward.

    hidden [T, D] --chunk--> logits [c, V] --log-softmax in fp32--> log-probs at ids [c, J], entropy [c]

Neither direction holds more than one chunk of [c, V] numbers, so no [T, V] tensor exists in training. Backward repeats
the chunk's matrix product, one third more arithmetic in the LM head for V/J times less memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from asyncopd.errors import ShapeError
from asyncopd.models.causal_lm import multiplies_bfloat16
from asyncopd.models.sampling import nucleus
from asyncopd.types import LOGPROB_FLOOR


class GatheredLogprobs(NamedTuple):
    """Student log-probs at the ids an estimator asked for."""

    logprobs_TJ: Tensor
    """[T, J] nats, float32 (float64 for float64 hidden states), with gradient."""
    entropy_T: Tensor
    """[T] nats, entropy of the distribution that is sampled from (temperature and top-p), same dtype, detached."""


def gather_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ids_TJ: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_sampled: int | None = None,
    chunk_tokens: int = 512,
) -> GatheredLogprobs:
    """Log-softmax of (hidden · weightᵀ + bias) / temperature over the full vocabulary, at `ids_TJ`.

    With `top_p` below 1 the first columns are of the truncated and renormalised law instead: LOGPROB_FLOOR, without
    gradient, where the id is outside it. The set of ids inside is taken as given: moving it has no gradient. That costs
    a sort of each row's vocabulary, and one more in backward.

    Value and gradient (hidden, weight, bias) equal the plain computation. The matrix product runs in the dtype of
    `hidden_TD`, as a plain LM head does (`weight_VD` is cast to it, autocast is ignored), or in float32 for half
    precision on a CPU; everything after it in float32, or in float64 when the hidden states are float64. Gradients are
    summed over chunks in that same dtype. Peak extra memory: 2 · chunk_tokens · V such numbers, one [V, D] gradient
    and, where the product's dtype is not the weight's, one cast [V, D].

    Args:
        hidden_TD: [T, D] last hidden states at the rows' prefixes; T may be 0.
        weight_VD: [V, D] LM head.
        ids_TJ: [T, J] int64 in [0, V); repeats are allowed.
        bias_V: [V] added to the logits before the temperature.
        temperature: the one that was really used for sampling, > 0; as is `top_p`, in (0, 1].
        num_sampled: how many columns are of the truncated law; None for all.
        chunk_tokens: rows per chunk, >= 1. 512 keeps a 152k vocabulary below 1 GB (docs/estimators.md).
    Raises:
        ShapeError: shapes disagree, or temperature or chunk_tokens is not positive.
    """
    if hidden_TD.ndim != 2 or ids_TJ.ndim != 2 or len(hidden_TD) != len(ids_TJ):
        raise ShapeError(f"hidden {tuple(hidden_TD.shape)} and ids {tuple(ids_TJ.shape)} must be [T, D] and [T, J].")
    if weight_VD.ndim != 2 or weight_VD.shape[1] != hidden_TD.shape[1]:
        raise ShapeError(f"weight {tuple(weight_VD.shape)} must be [V, {hidden_TD.shape[1]}].")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ShapeError(f"bias {tuple(bias_V.shape)} must be [{len(weight_VD)}].")
    if temperature <= 0 or chunk_tokens < 1:
        raise ShapeError(f"temperature {temperature} must be > 0 and chunk_tokens {chunk_tokens} >= 1.")
    # Autocast is on in forward but not in backward; with it the recomputed softmax would be another one.
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if top_p < 1.0:
            num_sampled = ids_TJ.shape[1] if num_sampled is None else num_sampled
            parts = [
                checkpoint(
                    _truncated,
                    *(hidden_TD[rows], weight_VD, bias_V, ids_TJ[rows], temperature, top_p, num_sampled),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for rows in _chunks(len(hidden_TD), chunk_tokens) or [slice(0, 0)]
            ]
            return GatheredLogprobs(*map(torch.cat, zip(*parts, strict=True)))
        found = _Gather.apply(hidden_TD, weight_VD, bias_V, ids_TJ, temperature, chunk_tokens)  # type: ignore[no-untyped-call]
    return GatheredLogprobs(*found)


def _truncated(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_CJ: Tensor,
    temperature: float,
    top_p: float,
    num_sampled: int,
) -> tuple[Tensor, Tensor]:
    """Log-probs [C, J] of a chunk, the first columns under the truncated law, and that law's entropy [C]."""
    dtype = _product_dtype(hidden_CD)
    logprobs_CV = torch.log_softmax(_logits(hidden_CD.to(dtype), weight_VD.to(dtype), bias_V, temperature), -1)
    inside_CV = nucleus(logprobs_CV.detach(), top_p)
    mass_C1 = logprobs_CV.masked_fill(~inside_CV, -torch.inf).logsumexp(-1, keepdim=True)
    law_CV = (logprobs_CV - mass_C1).detach()
    entropy_C = -torch.where(inside_CV, law_CV.exp() * law_CV, 0.0).sum(-1)
    ids_CS = ids_CJ[:, :num_sampled]
    sampled_CS = logprobs_CV.gather(-1, ids_CS) - mass_C1
    sampled_CS = torch.where(inside_CV.gather(-1, ids_CS), sampled_CS, LOGPROB_FLOOR)
    return torch.cat([sampled_CS, logprobs_CV.gather(-1, ids_CJ[:, num_sampled:])], -1), entropy_C


class _Gather(torch.autograd.Function):
    """Forward keeps the inputs and one normaliser per row; backward rebuilds each chunk's softmax from them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_TJ: Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        dtype, product_dtype = _accumulation_dtype(hidden_TD), _product_dtype(hidden_TD)
        logprobs_TJ, entropy_T, normaliser_T1 = (
            torch.empty(shape, dtype=dtype, device=hidden_TD.device)
            for shape in (ids_TJ.shape, len(hidden_TD), (len(hidden_TD), 1))
        )
        weight_cast_VD = weight_VD.to(product_dtype)
        for rows in _chunks(len(hidden_TD), chunk_tokens):
            logits_CV = _logits(hidden_TD[rows].to(product_dtype), weight_cast_VD, bias_V, temperature)
            logprobs_TJ[rows], entropy_T[rows], normaliser_T1[rows] = _log_softmax_at(logits_CV, ids_TJ[rows])
            # Before the next chunk's logits exist: otherwise the peak holds two chunks.
            del logits_CV
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, ids_TJ, normaliser_T1)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_TJ, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TJ: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, ids_TJ, normaliser_T1 = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = normaliser_T1.dtype
        product_dtype = _product_dtype(hidden_TD)
        weight_cast_VD = weight_VD.to(product_dtype)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        for rows in _chunks(len(hidden_TD), ctx.chunk_tokens):
            # d logprob_j / d logit_v = (1[v = id_j] − p_v) / temperature
            hidden_CD = hidden_TD[rows].to(product_dtype)
            grad_CV = _logits(hidden_CD, weight_cast_VD, bias_V, ctx.temperature)
            grad_CV.sub_(normaliser_T1[rows]).exp_().mul_(-grad_TJ[rows].sum(-1, keepdim=True))
            grad_CV.scatter_add_(-1, ids_TJ[rows], grad_TJ[rows]).div_(ctx.temperature)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(product_dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows] = grad_CV @ weight_cast_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV.T, hidden_CD)
            del grad_CV
        # Before the gradient is cast to the weight's dtype: otherwise the peak holds three [V, D].
        del weight_cast_VD
        return (
            grad_hidden_TD,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None, None, None),
        )


def _accumulation_dtype(hidden_TD: Tensor) -> torch.dtype:
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32


def _product_dtype(hidden_TD: Tensor) -> torch.dtype:
    half = hidden_TD.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and not multiplies_bfloat16(hidden_TD.device) else hidden_TD.dtype


def _chunks(num_rows: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, num_rows)) for start in range(0, num_rows, chunk_tokens)]


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """[C, V] tempered logits in the accumulation dtype, a fresh tensor the caller may overwrite."""
    logits_CV = (hidden_CD @ weight_VD.T).to(_accumulation_dtype(hidden_CD))
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _log_softmax_at(logits_CV: Tensor, ids_CJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [C, J], entropy [C] and log normaliser [C, 1] of a chunk; overwrites `logits_CV`."""
    maximum_C1 = logits_CV.amax(-1, keepdim=True)
    logits_CV -= maximum_C1
    # One exp serves the normaliser and the entropy.
    exp_CV = logits_CV.exp()
    mass_C1 = exp_CV.sum(-1, keepdim=True)
    log_mass_C1 = mass_C1.log()
    logprobs_CJ = logits_CV.gather(-1, ids_CJ) - log_mass_C1
    entropy_C1 = log_mass_C1 - exp_CV.mul_(logits_CV).sum(-1, keepdim=True) / mass_C1
    return logprobs_CJ, entropy_C1[:, 0], maximum_C1 + log_mass_C1


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """sum += left · right. A bf16 product is added in fp32: a bf16 running sum would lose late chunks."""
    if sum_VD.dtype == right_CD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD += left_VC @ right_CD
