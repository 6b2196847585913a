"""Pretrained models are loaded as their files hold them or not at all, and every engine then has the same policy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_builders
import numpy as np
import pytest
import safetensors.torch
import torch
from hf_models import EOS_ID, files_of, requests, running_sampler, sample_all, save_model, tiny_model, weights
from transformers import AutoConfig, PreTrainedModel

from asyncopd.config.losses import DenseForwardKLConfig, DenseReverseKLConfig, ForwardKLConfig, HeadTailConfig
from asyncopd.errors import ConfigError
from asyncopd.models.causal_lm import load_safetensors, num_ids, output_embedding, to_safetensors
from asyncopd.models.load import build_causal_lm, load_pretrained
from asyncopd.models.sampling import CandidateRule
from asyncopd.ports import ScoreRequest
from asyncopd.rollout.candidates import CandidateSource
from asyncopd.teacher.hf import HfScorer
from asyncopd.types import ScoredTrajectory, TeacherScores, Trajectory

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
IDS = 20
"""Of the tokenizer: models have 24, 28 or 32 rows."""


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.torch.save(edit(safetensors.torch.load(path.read_bytes())), {"format": "pt"}))
    return folder


def in_both(name: str, tensor: torch.Tensor) -> Tensors:
    return {name.format(layer): tensor.clone() for layer in range(2)}


def with_value(tensors: Tensors, value: float) -> Tensors:
    tensors[UP][3, 4] = value
    return tensors


# A2: each of these gave random weights, other ones in every process.
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: {name: t for name, t in tensors.items() if name != UP}, f"missing: {UP}"),
        (
            lambda tensors: {name: t for name, t in tensors.items() if "norm" not in name},
            "missing: model.layers.0.input",
        ),
        (
            lambda tensors: tensors | {"model.layers.1.mlp.extra.weight": torch.ones(2)},
            "unexpected: .*mlp.extra.weight",
        ),
        (lambda tensors: tensors | {UP: tensors[UP][:5].clone()}, f"mismatched: .*{UP}"),
        (lambda tensors: {f"module.{name}": t for name, t in tensors.items()}, "missing: .*; unexpected: module"),
        (lambda tensors: with_value(tensors, float("nan")), f"NaN or infinite numbers in {UP}"),
        (lambda tensors: with_value(tensors, float("inf")), f"NaN or infinite numbers in {UP}"),
    ],
)
def test_weights_that_are_not_those_of_the_architecture(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], said: str
) -> None:
    folder = edit_weights(save_model(tmp_path, tiny_model()), edit)
    with pytest.raises(ConfigError, match=rf"student\.path: .*{said}"):
        load_pretrained(files_of(folder))


def tied_model(family: str) -> PreTrainedModel:
    return tiny_model(family, **({} if family == "gpt2" else {"tie_word_embeddings": True}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tied_model_stored_with_one_matrix_or_with_equal_copies(tmp_path: Path, family: str) -> None:
    model = tied_model(family)
    folder = save_model(tmp_path, model)
    for head in ({}, {"lm_head.weight": model.get_input_embeddings().weight.detach().clone()}):
        edit_weights(folder, lambda tensors, head=head: tensors | head)  # type: ignore[misc]
        loaded = load_pretrained(files_of(folder))
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert to_safetensors(loaded) == to_safetensors(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "change", [lambda head: head + 1.0, lambda head: head.bfloat16().float(), torch.Tensor.bfloat16]
)
def test_a_tied_model_stored_with_another_head(
    tmp_path: Path, family: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    # A3: the learner trained two matrices, samplers tied them: drift of 2 nats in the first step.
    model = tied_model(family)
    head = change(model.get_input_embeddings().weight.detach().clone())
    folder = edit_weights(save_model(tmp_path, model), lambda tensors: tensors | {"lm_head.weight": head})
    with pytest.raises(ConfigError, match=r"tie_word_embeddings: true.*Set tie_word_embeddings to false"):
        load_pretrained(files_of(folder))


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    model = tiny_model()
    folder = save_model(tmp_path, model)
    loaded = load_pretrained(files_of(folder))
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    edit_weights(folder, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        load_pretrained(files_of(folder))


def test_one_file_and_shards_are_the_same_model(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=4)
    folder = save_model(tmp_path, model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert to_safetensors(load_pretrained(files_of(folder))) == to_safetensors(model)


def test_bfloat16_weights_are_loaded_exactly_in_either_dtype(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    folder = save_model(tmp_path, model)
    exact, half = (load_pretrained(files_of(folder), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert to_safetensors(half) == to_safetensors(model) == to_safetensors(exact, torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        # As openai-community/gpt2 is stored.
        ("gpt2", lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()}),
        ("gpt2", lambda tensors: tensors | in_both("transformer.h.{}.attn.bias", torch.ones(1, 1, 128, 128))),
        ("gpt2", lambda tensors: tensors | in_both("transformer.h.{}.attn.masked_bias", torch.ones(1))),
        ("llama", lambda tensors: tensors | in_both("model.layers.{}.self_attn.rotary_emb.inv_freq", torch.ones(4))),
    ],
)
def test_files_of_earlier_versions_are_loaded(tmp_path: Path, family: str, edit: Callable[[Tensors], Tensors]) -> None:
    model = tiny_model(family)
    files = files_of(edit_weights(save_model(tmp_path, model), edit))
    files.check(needed_context=96)
    assert to_safetensors(load_pretrained(files)) == to_safetensors(model)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 48, "sliding_window": None},
        {"model_type": "qwen3_moe", **EXPERTS},
        # Experts in every second layer only.
        {"model_type": "qwen3_moe", "decoder_sparse_step": 2, **EXPERTS, "num_hidden_layers": 4},
        {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 16, **EXPERTS},
    ],
    ids=lambda architecture: f"{architecture['model_type']}-{architecture.get('decoder_sparse_step', 1)}",
)
def test_mixtures_of_experts_are_loaded(tmp_path: Path, architecture: dict[str, Any]) -> None:
    model = build_causal_lm({**SIZES, "max_position_embeddings": 128, **architecture}, seed=1)
    files = files_of(save_model(tmp_path, model))
    files.check(needed_context=96)
    loaded = load_pretrained(files)
    ids = torch.arange(2, 20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# -- every engine has the same policy ---------------------------------------------------------------------------------
async def sampled(model: PreTrainedModel, count: int = 6, **settings: Any) -> list[Trajectory]:
    async with running_sampler(model, **{"head": 2, "num_draws": 2, "law": "tail", **settings}) as sampler:
        asked = [replace(request, prompt_ids=request.prompt_ids % IDS) for request in requests(count)]
        made = await sample_all(sampler, asked)
    return [made[index] for index in sorted(made)]


def scored(teacher: PreTrainedModel, trajectories: list[Trajectory], *, top_k: int) -> list[TeacherScores]:
    scorer = HfScorer(teacher, name="teacher", tokenizer_digest="same")
    return asyncio.run(scorer.score(trajectories, ScoreRequest(top_k, 2, 1.0, 0)))


def first_step(model: PreTrainedModel, loss: Any, batch: list[ScoredTrajectory]) -> dict[str, float]:
    with learner_builders.accelerator() as accelerator:
        return dict(learner_builders.student(model, loss, accelerator).train(0, batch).metrics)


DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **DROPOUT},
        {"model_type": "opt", **SIZES, "ffn_dim": 64, "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
        {"model_type": "phi", **SIZES, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
        {"model_type": "mixtral", **SIZES, "intermediate_size": 48, "sliding_window": None, "router_jitter_noise": 0.4},
    ],
    ids=lambda architecture: architecture["model_type"],
)
def test_what_is_trained_is_what_was_sampled(tmp_path: Path, architecture: dict[str, Any]) -> None:
    # A5: with GPT-2's usual dropout, drift was 0.81 nats and ESS 0.24 in the first step.
    built = build_causal_lm({"vocab_size": 24, "eos_token_id": EOS_ID, **architecture}, seed=2)
    folder = save_model(tmp_path, built)
    sampler, teacher, learner = (load_pretrained(files_of(folder)) for _ in range(3))
    trajectories = asyncio.run(sampled(sampler))
    scores = scored(teacher, trajectories, top_k=24)
    batch = [ScoredTrajectory(*pair) for pair in zip(trajectories, scores, strict=True)]
    metrics = first_step(learner, HeadTailConfig(head=2, num_draws=2), batch)
    assert abs(metrics["train/drift_nats"]) < 1e-5
    assert metrics["train/ess_fraction"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["train/loss_nats"]) < 1e-5


def padded_model(folder: Path, rows: int, seed: int) -> PreTrainedModel:
    """A model whose rows beyond the ids would be drawn most of the time, were they ids."""
    model = tiny_model(vocab_size=rows, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[IDS:] *= 5
    return load_pretrained(files_of(save_model(folder, model, num_ids=IDS)))


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(24, 32), (32, 24), (IDS, 24), (24, IDS)])
def test_only_ids_that_exist_have_mass(tmp_path: Path, student_rows: int, teacher_rows: int) -> None:
    # A7, A8: as Qwen2.5-0.5B and -7B, which have 151,936 and 152,064 rows and one tokenizer.
    student = padded_model(tmp_path / "student", student_rows, seed=1)
    teacher = padded_model(tmp_path / "teacher", teacher_rows, seed=2)
    assert num_ids(student) == num_ids(teacher) == IDS
    initial = to_safetensors(student)
    trajectories = asyncio.run(sampled(student, head=IDS - 1, num_draws=2, top_p=1.0))
    for trajectory in trajectories:
        for ids in (trajectory.response_ids, trajectory.candidates.head_ids_TK, trajectory.candidates.draw_ids_TN):
            assert ids.max() < IDS
        held = np.exp(trajectory.candidates.head_logprobs_TK.astype(float)).sum(1)
        assert np.allclose(held + np.exp(trajectory.candidates.tail_logmass_T.astype(float)), 1, atol=1e-5)
    assert sum(len(trajectory.response_ids) for trajectory in trajectories) > 50
    # The whole of the teacher's law, and its draws.
    scores = scored(teacher, trajectories, top_k=IDS)
    for each in scores:
        assert np.allclose(np.exp(each.topk_logprobs_TK.astype(float)).sum(1), 1, atol=1e-5)
        assert each.topk_ids_TK.max() < IDS
        assert each.teacher_draw_ids_TM.max() < IDS
    # Dense is dense, and forward KL trains: index 30 used to be out of the student's bounds.
    batch = [ScoredTrajectory(*pair) for pair in zip(trajectories, scores, strict=True)]
    prompts = [(t.prompt_ids, t.response_ids) for t in trajectories]
    expected = _exact_kl(student, teacher, prompts)
    for loss, number in ((DenseForwardKLConfig(), 0), (DenseReverseKLConfig(), 1)):
        learner = build_causal_lm(student.config.to_dict(), seed=0)
        load_safetensors(learner, initial)
        metrics = first_step(learner, loss, batch)
        assert metrics["train/loss_nats"] == pytest.approx(expected[number], rel=1e-4)
        assert abs(metrics["train/drift_nats"]) < 1e-5
        # Rows of no id get no gradient, and weight decay is 0.
        before, after = safetensors.torch.load(initial)["lm_head.weight"], learner.get_output_embeddings().weight
        assert torch.equal(before[IDS:], after[IDS:].detach())
        assert not torch.equal(before[:IDS], after[:IDS].detach())
    narrow = [
        ScoredTrajectory(*pair) for pair in zip(trajectories, scored(teacher, trajectories, top_k=4), strict=True)
    ]
    assert first_step(learner, ForwardKLConfig(top_k=4), narrow)["train/loss_nats"] > 0
    # Candidates that are added later are those of sampling.
    skeleton = build_causal_lm(student.config.to_dict(), seed=0)
    rule = CandidateRule(IDS - 1, 2, "tail")
    source = CandidateSource(
        skeleton, lambda _: initial, rule=rule, temperature=1.0, top_p=1.0, seed=5, row_capacity=64
    )
    made = source.candidates(trajectories)
    for trajectory in trajectories:
        assert np.array_equal(made[trajectory.index].draw_ids_TN, trajectory.candidates.draw_ids_TN)
        assert made[trajectory.index].head_ids_TK.max() < IDS


def _exact_kl(student: PreTrainedModel, teacher: PreTrainedModel, pairs: list[Any]) -> tuple[float, float]:
    """KL(q‖p) and KL(p‖q) per response token over the ids that exist; float64, one sequence at a time."""
    sums, count = np.zeros(2), 0
    for prompt_ids, response_ids in pairs:
        ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids]).astype(np.int64))[None]
        laws = []
        for model in (student, teacher):
            model.set_attn_implementation("sdpa")
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1, :IDS].double()
            laws.append(logits.log_softmax(-1))
        p, q = laws
        sums += [float((q.exp() * (q - p)).sum()), float((p.exp() * (p - q)).sum())]
        count += len(response_ids)
    return sums[0] / count, sums[1] / count


def test_a_nucleus_smaller_than_the_head_is_filled_with_ids_that_exist(tmp_path: Path) -> None:
    # Ids outside a nucleus are all equally unlikely: a top-k of 12 took rows of no id for some of them.
    student = padded_model(tmp_path, 32, seed=1)
    for trajectory in asyncio.run(sampled(student, head=12, top_p=0.3)):
        assert trajectory.candidates.head_ids_TK.max() < IDS


def test_a_bias_of_the_head_follows_the_weights(tmp_path: Path) -> None:
    # Phi has one; a sampler that kept a masked copy of it went on with the first version's.
    sizes = {**SIZES, "model_type": "phi", "eos_token_id": EOS_ID}
    model = build_causal_lm(sizes, seed=1)
    loaded = load_pretrained(files_of(save_model(tmp_path, model, num_ids=IDS)))

    async def run() -> list[Trajectory]:
        async with running_sampler(build_causal_lm(loaded.config.to_dict(), seed=0)) as sampler:
            with torch.no_grad():
                bias_V = output_embedding(loaded)[1]
                assert bias_V is not None
                bias_V[5] = 100.0
            await sampler.refresh(weights(loaded, 1))
            return list((await sample_all(sampler, requests(2, max_new_tokens=5))).values())

    for trajectory in asyncio.run(run()):
        assert (trajectory.response_ids == 5).all()


def test_an_architecture_stored_by_an_earlier_version_is_built(tmp_path: Path) -> None:
    # It says nothing of ids that exist: all rows are.
    stored = AutoConfig.for_model("qwen2", **SIZES).to_dict()
    assert "num_ids" not in stored
    assert num_ids(build_causal_lm(stored, seed=0)) == 24
