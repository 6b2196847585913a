"""The loss and gradient of an optimizer step depend on its tokens alone, not on how they are laid out (check 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from learner_builders import (
    HEAD,
    NUM_DRAWS,
    KeepsParameters,
    accelerator,
    flat_gradient,
    scored_batch,
    student,
    tiny_model,
)

from asyncopd.config import losses as c
from asyncopd.learner.optimize import LogprobModel, MicroBatch, micro_batches, optimizer_step
from asyncopd.losses import TokenRows, build_estimator
from asyncopd.models.packing import NO_PREFIX, PackedTokens, TokenPair, pack, pad
from asyncopd.types import ScoredTrajectory

CONFIGS: dict[str, c.LossConfig] = {
    "head_tail": c.HeadTailConfig(head=HEAD, num_draws=NUM_DRAWS),
    "m2po": c.PolicyGradientConfig(num_draws=NUM_DRAWS, correction=c.M2po(budget=0.01)),
    "policy_gradient_1_prefix_weight": c.PolicyGradientConfig(num_draws=1, max_prefix_weight=2.0),
    "dense_reverse_kl": c.DenseReverseKLConfig(),
    "forward_kl": c.ForwardKLConfig(top_k=4),
    "cross_entropy": c.CrossEntropyConfig(),
}
Layout = Callable[[Sequence[ScoredTrajectory]], list[MicroBatch]]


def packed(row_capacity: int, rows_per_micro_batch: int) -> Layout:
    return lambda batch: micro_batches(
        batch, row_capacity=row_capacity, rows_per_micro_batch=rows_per_micro_batch, device=torch.device("cpu")
    )


def laid_out(lay_out: Callable[[Sequence[TokenPair]], PackedTokens], size: int) -> Layout:
    """Micro-batches of `size` trajectories, each laid out by `lay_out`."""

    def cut(batch: Sequence[ScoredTrajectory]) -> list[MicroBatch]:
        groups = [batch[start : start + size] for start in range(0, len(batch), size)]
        return [
            MicroBatch(
                lay_out([(s.trajectory.prompt_ids, s.trajectory.response_ids) for s in group]),
                TokenRows.from_scored(group),
            )
            for group in groups
        ]

    return cut


LAYOUTS: dict[str, Layout] = {
    "one micro-batch": packed(64, 100),
    "one trajectory a micro-batch": packed(8, 1),
    "rows of 40": packed(40, 2),
    "rows of 24": packed(24, 3),
    "reversed order": lambda batch: packed(40, 2)(batch[::-1]),
    "padded": laid_out(pad, 100),
    "padded, micro-batches of 3": laid_out(pad, 3),
    "rows wider than their tokens": laid_out(lambda pairs: _widened(pack(pairs, 64), 7), 4),
}


def _widened(tokens: PackedTokens, columns: int) -> PackedTokens:
    """The same rows with `columns` more cells of padding on the left, where padding is never otherwise."""

    def shifted(cells, fill):  # type: ignore[no-untyped-def]
        return torch.nn.functional.pad(torch.from_numpy(cells), (columns, 0), value=fill).numpy()

    width = tokens.ids_RC.shape[1]
    rows_T, columns_T = divmod(tokens.predict_rows_T, width)
    return PackedTokens(
        ids_RC=shifted(tokens.ids_RC, 3),
        positions_RC=shifted(tokens.positions_RC, 0),
        segments_RC=shifted(tokens.segments_RC, -1),
        prefixes_RC=shifted(tokens.prefixes_RC, NO_PREFIX),
        prompts_S=tokens.prompts_S,
        predict_rows_T=rows_T * (width + columns) + columns_T + columns,
    )


def step_of(config: c.LossConfig, layout: Layout) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics and gradient of one step."""
    batch = scored_batch(law=config.requirements().law or "policy")
    model = LogprobModel(tiny_model(), temperature=1.0)
    with accelerator() as one_process:
        result = optimizer_step(
            model,
            KeepsParameters(model),
            layout(batch),
            build_estimator(config),
            accelerator=one_process,
            grad_clip=1e9,
        )
    assert result.num_tokens == sum(len(s.trajectory.response_ids) for s in batch)
    return dict(result.metrics), flat_gradient(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradient_and_metrics_do_not_depend_on_the_layout(name: str) -> None:
    expected_metrics, expected = step_of(CONFIGS[name], LAYOUTS["one micro-batch"])
    for layout in LAYOUTS:
        metrics, gradient = step_of(CONFIGS[name], LAYOUTS[layout])
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), layout
        assert metrics == pytest.approx(expected_metrics, rel=2e-6, abs=1e-7), layout


def test_m2po_clips_here_so_that_its_pass_over_the_step_matters() -> None:
    metrics, _ = step_of(CONFIGS["m2po"], LAYOUTS["rows of 24"])
    assert 0 < metrics["loss/clipped_fraction"] < 1


def test_a_step_tells_which_micro_batch_it_works_on() -> None:
    told: list[tuple[int, int]] = []
    with accelerator() as ready:
        trained = student(tiny_model(), c.DenseReverseKLConfig(), ready, rows_per_micro_batch=1)
        trained.train(0, scored_batch(law="tail"), lambda number, num_batches: told.append((number, num_batches)))
    assert len(told) > 1
    assert told == [(number, len(told)) for number in range(1, len(told) + 1)]
