"""Does `asyncopd plan` come to AsyncOPD's published 1.6×–3.8×? Every assumption is here; docs/capacity.md judges them.

    python benchmarks/plan_asyncopd.py

Published (arXiv 2606.24143 and its repository's 8-GPU configurations): one teacher GPU (Qwen3-30B-A3B), 4 rollout + 3
learner GPUs with a staleness bound of 4, against 7 time-shared GPUs; Qwen3-1.7B student, 256 responses a step, at most
16384 tokens, 16 scored at once. Not published: GPU, response lengths, and what any of it costs. Those are varied.
"""

from __future__ import annotations

import argparse
import itertools

from rich.console import Console
from rich.table import Table

from asyncopd.plan.forecast import forecast
from asyncopd.plan.workload import Costs, DecodeCurve, Fleet, Lognormal, Workload

LIMIT = 16_384
LENGTHS = {
    "short (mean 1500, p99 8000)": Lognormal(1500, 8000, LIMIT),
    "middle (mean 3000, p99 16384)": Lognormal(3000, LIMIT, LIMIT),
    "long (mean 6000, p99 16384)": Lognormal(6000, LIMIT, LIMIT),
}
SCORE_TOKENS_PER_S = (15_000, 40_000)
"""Of the teacher: 3B active parameters are 6 GFLOP a token, 40k tokens/s are 240 TFLOP/s. 15k is a teacher that runs
eagerly and returns 64 log-probs a position."""
TRAIN_TOKENS_PER_S = (10_000, 20_000)
"""Of a learner GPU: 1.7B parameters are 10 GFLOP a token, 20k tokens/s are 200 TFLOP/s; half with recomputation."""
KV_BYTES = 2 * 28 * 8 * 128 * 2
"""Of a token of Qwen3-1.7B: keys and values, 28 layers, 8 heads of 128, bfloat16."""
BANDWIDTH = 2.5e12
"""Bytes/s of an H100-class memory in practice."""
CACHE_BYTES = 0.85 * 80e9 - 4e9


def costs(mean: float, score: float, train: float) -> Costs:
    # A step reads the weights (about 4 ms with launches), then the cache of every active response, half-way on average.
    slot_s = KV_BYTES * mean / 2 / BANDWIDTH
    curve = DecodeCurve((1, 512), (0.004 + slot_s, 0.004 + 512 * slot_s))
    return Costs(
        curve,
        score_tokens_per_s=score,
        train_tokens_per_s=train,
        train_step_s=4 * 0.5,  # four optimizer steps of 64 responses each
        publish_s=1.0,
        refresh_s=1.0,
        prefill_token_s=1e-5,
        switch_s=5.0,  # sleep, wake and reload of every engine, once each way
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    table = Table(title="4 rollout + 3 learner + 1 teacher, to 7 time-shared + 1 teacher at τ = 0")
    for heading in ("lengths", "score tokens/s", "train tokens/s", "time-shared tokens/s", "τ=1", "τ=2", "τ=4", "τ=8"):
        table.add_column(heading, justify="left" if heading == "lengths" else "right")
    ratios = []
    for (name, law), score, train in itertools.product(LENGTHS.items(), SCORE_TOKENS_PER_S, TRAIN_TOKENS_PER_S):
        slots = min(512, int(CACHE_BYTES / (KV_BYTES * law.mean)))
        work = Workload(law, batch_size=256, shard_size=8, num_steps=50, num_slots=slots)
        priced = costs(law.mean, score, train)
        base = forecast(work, priced, Fleet(7, 1, 7, time_shared=True), 0).tokens_per_s
        found = {tau: forecast(work, priced, Fleet(4, 1, 3), tau).tokens_per_s / base for tau in (1, 2, 4, 8)}
        ratios.append(found[4])
        table.add_row(
            f"{name}, {slots} slots", f"{score:,}", f"{train:,}", f"{base:,.0f}", *(f"{r:.2f}" for r in found.values())
        )
    console = Console(width=150)
    console.print(table)
    console.print(f"τ=4: {min(ratios):.2f} to {max(ratios):.2f}; published 1.6 to 3.8")


if __name__ == "__main__":
    main()
