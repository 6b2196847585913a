"""CPU seconds of each stage for one step of configs/smollm2.yaml, by how many responses share a prompt.

    python benchmarks/shared_prompts.py --responses-per-prompt 1 4

Needs `make smollm2`. One thread, one process; loading is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import torch

from asyncopd.config import load_config
from asyncopd.models.causal_lm import to_safetensors
from asyncopd.models.files import ModelFiles
from asyncopd.models.load import build_causal_lm, load_pretrained
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import SampleRequest, ScoreRequest
from asyncopd.rollout.decoding import Decoder
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory
from flows.wiring import student_of, task_of

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses-per-prompt", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(CONFIG)
    task, cached = task_of(config, 0), config.cached()
    teacher_model = config.models()["teacher"]
    teacher = load_pretrained(ModelFiles(teacher_model, "teacher"))  # type: ignore[arg-type]  # a pretrained one
    print("responses per prompt | tokens | prefill s | decode s | score s | train s", flush=True)
    for shared in arguments.responses_per_prompt:
        causal_lm = load_pretrained(ModelFiles(config.student, "student"))  # type: ignore[arg-type]
        prompts = [task.prompt(index // shared, "train") for index in range(config.learner.batch_size)]
        settings = SamplerSettings(
            slots=len(prompts),
            max_context=task.max_prompt_tokens + config.rollout.max_new_tokens,
            stop_ids=tuple(task.tokenizer.stop_ids),
            seed=0,
            head=cached.head,
            num_draws=cached.num_draws,
            law=cached.law or "policy",
        )
        decoder = Decoder(build_causal_lm(causal_lm.config.to_dict(), seed=0), settings)
        seconds = []
        with torch.inference_mode():
            decoder.refresh(PolicyWeights(PolicyVersion(0), to_safetensors(causal_lm)))
            for index, prompt in enumerate(prompts):
                decoder.admit(SampleRequest(index, prompt.ids, config.rollout.max_new_tokens))
            start = time.process_time()
            finished = decoder.step()
            seconds.append(time.process_time() - start)
            start = time.process_time()
            while decoder.num_active:
                finished += decoder.step()
            seconds.append(time.process_time() - start)
        trajectories = sorted((made for _, made in finished), key=lambda made: made.index)
        scorer = HfScorer(teacher, name="t", tokenizer_digest="", row_capacity=config.score.row_capacity)
        request = ScoreRequest(top_k=cached.top_k, num_teacher_draws=cached.num_teacher_draws, temperature=1.0, seed=0)
        start = time.process_time()
        scores = asyncio.run(scorer.score(trajectories, request))
        seconds.append(time.process_time() - start)
        batch = [ScoredTrajectory(made, scored) for made, scored in zip(trajectories, scores, strict=True)]
        student = student_of(config, causal_lm)
        start = time.process_time()
        student.train(0, batch)
        seconds.append(time.process_time() - start)
        num_tokens = sum(len(made.response_ids) for made in trajectories)
        print(f"{shared:20} | {num_tokens:6} | " + " | ".join(f"{value:8.2f}" for value in seconds), flush=True)


if __name__ == "__main__":
    main()
