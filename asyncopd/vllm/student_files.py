"""What goes into the vLLM sampler's engine process and what comes out: weights as files, records as Trajectories."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.outputs import CompletionOutput

from asyncopd.errors import EngineError
from asyncopd.models.causal_lm import read_fitting
from asyncopd.models.sampling import CandidateRule
from asyncopd.ports import SampleRequest
from asyncopd.types import PolicyWeights, Trajectory, VersionRun
from asyncopd.vllm.model_folder import ModelFolder


class StudentFiles:
    """The folder from which the engine loads the student, with whatever version was written last."""

    def __init__(self, architecture: Mapping[str, Any]) -> None:
        """
        Args:
            architecture: the student's transformers configuration, `model_type` included.
        Raises:
            EngineError: transformers does not know it.
        """
        self._expected, self._tied = _tensors_of(architecture)
        # Untied: vLLM's reload of a tied output embedding leaves the CPU engine its packed copy of the old one.
        self._architecture = {**architecture, "tie_word_embeddings": False}
        num_weights = sum(math.prod(shape) for shape in self._expected.values())
        num_weights += sum(math.prod(self._expected[name]) for name in self._tied.values())
        self.folder = ModelFolder(4 * num_weights)
        """To be removed when the engine has ended."""
        self.path = str(self.folder.path)

    def write(self, weights: PolicyWeights) -> None:
        """Put weights where the engine loads them from. Checked first: vLLM only warns about missing tensors.

        Raises:
            EngineError: not safetensors, or a tensor is missing, unexpected or of another shape; nothing was written.
        """
        what = f"{self._architecture['model_type']} student (version {weights.version.number})"
        tensors = read_fitting(weights.safetensors, self._expected, what)
        serialised = weights.safetensors
        if self._tied:
            copies = {alias: tensors[name].clone() for alias, name in self._tied.items()}
            serialised = safetensors.torch.save({**tensors, **copies})
        self.folder.write(self._architecture, serialised)


def trajectory_of(
    request: SampleRequest,
    completion: CompletionOutput,
    ids_bytes: bytes,
    logprobs_bytes: bytes,
    *,
    rule: CandidateRule,
    stop_ids: Collection[int],
) -> Trajectory:
    """A finished response, from what vLLM emitted and what the recorder drew (`EngineWorker.take_records`).

    Raises:
        EngineError: the two disagree, or a log-prob is NaN.
    """
    emitted = list(completion.token_ids)
    num_columns = 1 + rule.head + rule.num_draws
    # An asynchronous scheduler may have drawn one token beyond the end.
    ids_TC = np.frombuffer(ids_bytes, np.int32).reshape(-1, num_columns)[: len(emitted)]
    logprobs_TC = np.frombuffer(logprobs_bytes, np.float32).reshape(-1, num_columns + 1)[: len(emitted)]
    if not np.isfinite(logprobs_TC).all():
        raise EngineError(
            f"index {request.index}: the student produced NaN under weight versions {completion.weight_versions}; "
            "check the published weights and the learner's last steps."
        )
    if ids_TC[:, 0].tolist() != emitted or completion.weight_versions is None:
        raise EngineError(
            f"index {request.index}: vLLM emitted {emitted[:8]}… and the recorder drew {ids_TC[:8, 0].tolist()}…, "
            f"with versions {completion.weight_versions}. This is a bug of the vllm engine or a vLLM other than 0.32; "
            "use rollout.engine hf and report it."
        )
    return rule.trajectory(
        request.index,
        request.prompt_ids,
        ids_TC,
        logprobs_TC,
        version_runs=tuple(
            VersionRun(int(span.version.split(".")[0]), span.end - span.start)
            for span in completion.weight_versions
            if span.end > span.start
        ),
        finish_reason="stop" if emitted[-1] in stop_ids else "length",
    )


def _tensors_of(architecture: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of a student's tensors by name, tied ones once; and of tied names, which tensor each is. No memory."""
    try:
        config = AutoConfig.for_model(**architecture)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineError(f"architecture {dict(architecture)} cannot be built by transformers: {error}") from error
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    tied = {name: first[id(tensor)] for name, tensor in every.items() if first[id(tensor)] != name}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return shapes, tied
