"""Causal language models as the learner and the hf engines see them: build, load, serialise, and one packed forward.

Relies on transformers' public interfaces only: auto classes, 4-D attention masks, `base_model` and output embeddings.
Suffixes: R rows, C columns, T predicted tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.packing import PackedTokens, pack

# Sets where a model changes its logits after the output embedding, with the value that changes nothing.
_LOGIT_CHANGES: Mapping[str, float | None] = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
# Facts about where a model came from or how it runs; its numbers do not depend on them.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "architectures", "use_cache")


def architecture_of_size(
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    vocab_size: int,
    max_positions: int,
    eos_id: int,
    pad_id: int,
    bos_id: int | None = None,
    model_type: Literal["gpt2", "llama", "qwen3"] = "gpt2",
) -> dict[str, Any]:
    """A small architecture, as the mapping that `build_causal_lm` takes; no dropout.

    With 42 ids and 256 positions, 2 × 48 and 3 × 96 have 68,784 and 395,808 parameters as `llama` (MLP 10/3 wide,
    untied embeddings), 68,832 and 395,952 as `qwen3`, 70,944 and 364,320 as `gpt2` (MLP 4 wide, tied, learned
    positions; a third faster on a CPU because it is fewer operations).

    Raises:
        EngineError: the heads do not divide the hidden size.
    """
    if hidden_size % num_heads:
        raise EngineError(f"hidden size {hidden_size} is not a multiple of {num_heads} heads; change one of them.")
    # 0.02 is right for a width of 768; keep its ratio to 1/sqrt(width), or tiny models start almost silent.
    initializer_range = 0.02 * (768 / hidden_size) ** 0.5
    common = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "initializer_range": initializer_range,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
    }
    if model_type == "gpt2":
        sizes = {"n_layer": num_layers, "n_embd": hidden_size, "n_head": num_heads, "n_positions": max_positions}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        # The exact GELU is one operation where GPT-2's own approximation is eight.
        return {**common, **sizes, **dropout, "activation_function": "gelu"}
    return {
        **common,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": max(16, round(hidden_size * 10 / 3 / 16) * 16),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
    }


def build_causal_lm(
    architecture: Mapping[str, Any], *, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A randomly initialised model; the same architecture, seed and dtype give the same weights.

    Args:
        architecture: a transformers configuration as a mapping, `model_type` included.
    Raises:
        EngineError: unknown `model_type`, or an architecture that `check_architecture` refuses.
    """
    try:
        config = AutoConfig.for_model(**architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineError(
            f"architecture {dict(architecture)} cannot be built by transformers with torch's attention: {error}"
        ) from error
    check_architecture(model)
    return model.eval()


def load_causal_lm(directory: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model from a transformers checkpoint directory (or a hub name, where the hub can be reached).

    Raises:
        EngineError: nothing loadable is there, or an architecture that `check_architecture` refuses.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise EngineError(
            f"{directory}: no causal language model could be loaded ({error}). Expected a directory with config.json "
            "and safetensors weights, or a hub name that this machine can download."
        ) from error
    check_architecture(model)
    return model.eval()


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse what packed rows and gathering would silently get wrong: known causes by name, the rest by trial.

    Raises:
        EngineError: the logits are changed after the output embedding, a layer does not attend to its whole prefix
            (sliding windows, linear attention), the position code depends on what else is in the batch, or two
            sequences packed into one row do not get the logits they get alone.
    """
    config = model.config
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise EngineError(
                f"{config.model_type}: {name} = {value} changes the logits after the output embedding. "
                f"Log-probs are gathered from hidden states here; only {name} = {neutral} is supported."
            )
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    uses_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if other_layers or uses_window:
        raise EngineError(
            f"{config.model_type}: layers attend to less than their prefix "
            f"({', '.join(sorted(other_layers)) or f'sliding_window = {config.sliding_window}'}). "
            "Only full attention is supported; set sliding_window to null if the context fits the window."
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise EngineError(
            f"{config.model_type}: rope_type {rope_type} changes with the longest position of a batch, so a "
            "token's log-prob would depend on its neighbours. Use default, linear, yarn or llama3."
        )
    _check_packed_logits(model)


@torch.no_grad()
def _check_packed_logits(model: PreTrainedModel) -> None:
    sequences = [(np.array([1, 0, 1]), np.array([0])), (np.array([0, 1]), np.array([0]))]
    model.eval()
    try:
        packed_2D = packed_hidden(model, pack(sequences, capacity=5))
    except (TypeError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"{model.config.model_type} does not take 4-D attention masks with position ids ({error}), so sequences "
            "cannot be packed; it is not supported."
        ) from error
    weight_VD, bias_V = output_embedding(model)
    found_2V = torch.nn.functional.linear(packed_2D, weight_VD, bias_V).float()
    prompts = [torch.from_numpy(prompt)[None].to(model.device) for prompt, _ in sequences]
    alone_2V = torch.cat(
        [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float() for ids in prompts]
    )
    difference, scale = (found_2V - alone_2V).abs().max().item(), alone_2V.abs().max().item()
    # NaN fails too.
    if not difference <= (1e-3 if model.dtype == torch.float32 else 0.1) * scale + 1e-6:
        raise EngineError(
            f"{model.config.model_type}: logits of two sequences packed into one row differ by {difference:.2g} from "
            f"their own (at most {scale:.2g}). The architecture ignores 4-D masks or position ids, or changes its "
            "logits after the output embedding; it is not supported."
        )


def packed_hidden(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
    """Final hidden states where response tokens are predicted; sequences in one row do not see each other.

    Logits are `hidden @ weight.T + bias` of `output_embedding`; the caller makes them in chunks, so that no
    [B, T, V] tensor exists. With gradient when grad is enabled.

    Returns:
        [T, D] in the order of `packed.predict_rows_T`, in the model's dtype and on its device.
    """
    device = model.device
    segments_RC = torch.from_numpy(packed.segments_RC).to(device)
    output = model.base_model(
        input_ids=torch.from_numpy(packed.ids_RC).to(device),
        position_ids=torch.from_numpy(packed.positions_RC).to(device),
        attention_mask=block_causal_mask(segments_RC, model.dtype),
        use_cache=False,
    )
    hidden_RCD: Tensor = output.last_hidden_state
    return hidden_RCD.flatten(0, 1)[torch.from_numpy(packed.predict_rows_T).to(device)]


def block_causal_mask(segments_RC: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, C, C] additive mask: 0 where a cell may look (its own segment, not later), the lowest number elsewhere.

    Padding looks at padding: a row of the mask that forbids everything would make its softmax NaN.
    """
    num_columns = segments_RC.shape[1]
    same_RCC = segments_RC[:, :, None] == segments_RC[:, None, :]
    allowed_RCC = same_RCC & torch.ones(num_columns, num_columns, dtype=torch.bool, device=same_RCC.device).tril()
    mask_RCC = torch.zeros(allowed_RCC.shape, dtype=dtype, device=same_RCC.device)
    return mask_RCC.masked_fill_(~allowed_RCC, torch.finfo(dtype).min)[:, None]


def output_embedding(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """(weight_VD, bias_V or None) that turn hidden states into logits; the live parameters, not copies.

    Raises:
        EngineError: the model has no linear output embedding.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise EngineError(f"{model.config.model_type}: the output embedding is {type(head).__name__}, not linear.")
    return head.weight, head.bias


def to_safetensors(model: PreTrainedModel, dtype: torch.dtype | None = None) -> bytes:
    """The model's tensors; a tied tensor appears once, under its first name. Deterministic.

    Args:
        dtype: of the floating-point tensors, rounded to nearest; None keeps the model's own.
    """
    tensors = {
        name: tensor.cpu().to(dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in _own_tensors(model).items()
    }
    serialised: bytes = safetensors.torch.save(tensors)
    return serialised


def load_safetensors(model: PreTrainedModel, serialised: bytes) -> None:
    """Copy serialised tensors into `model`, converting to its dtype. All names and shapes are checked before any copy.

    Raises:
        EngineError: not safetensors, or a tensor is missing, unexpected, or of another shape; `model` is unchanged.
    """
    targets = _own_tensors(model)
    shapes = {name: tuple(target.shape) for name, target in targets.items()}
    tied = model.state_dict().keys() - targets.keys()
    loaded = read_fitting(serialised, shapes, f"{model.config.model_type} model", ignored=tied)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(loaded[name])


def read_fitting(
    serialised: bytes, shapes: Mapping[str, tuple[int, ...]], what: str, ignored: Collection[str] = ()
) -> dict[str, Tensor]:
    """Tensors that have the names and `shapes` of `what`; those of the `ignored` names may be there or not.

    Raises:
        EngineError: not safetensors, or a tensor is missing, unexpected, or of another shape.
    """
    try:
        loaded: dict[str, Tensor] = safetensors.torch.load(serialised)
    except safetensors.SafetensorError as error:
        raise EngineError(f"{len(serialised)} bytes of weights are not safetensors: {error}.") from error
    for name in sorted(shapes.keys() | loaded.keys() - set(ignored)):
        expected = shapes.get(name, "no such tensor")
        found = tuple(loaded[name].shape) if name in loaded else "no such tensor"
        if expected != found:
            raise EngineError(
                f"weights do not fit the {what}: tensor {name} should be {expected} and is {found}. "
                "Were they made with another architecture?"
            )
    return loaded


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 (hex) of what decides a model's numbers: architecture, dtype and every tensor."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG_KEYS}
    description = json.dumps({"config": config, "dtype": str(model.dtype)}, sort_keys=True, default=str)
    return hashlib.sha256(description.encode() + to_safetensors(model)).hexdigest()


def _own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tensor once: tied aliases are left out."""
    state = model.state_dict()
    own_parameters = {name for name, _ in model.named_parameters()}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own_parameters
    return {name: tensor for name, tensor in state.items() if name not in aliases}
