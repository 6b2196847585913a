"""Causal language models as the learner and the hf engines see them: one packed forward, the head, and serialising.

Relies on transformers' public interfaces only: auto classes, 4-D attention masks, `base_model` and output embeddings.
Suffixes: R rows, C columns, T predicted tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.packing import NO_PREFIX, PackedTokens

# Facts about where a model came from or how it runs; its numbers do not depend on them.
_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "architectures", "use_cache")


def packed_hidden(model: PreTrainedModel, packed: PackedTokens) -> Tensor:
    """Final hidden states where response tokens are predicted; sequences in one row do not see each other.

    Logits are `hidden @ weight.T + bias` of `output_embedding`; the caller makes them in chunks, so that no
    [B, T, V] tensor exists. With gradient when grad is enabled.

    Returns:
        [T, D] in the order of `packed.predict_rows_T`, in the model's dtype and on its device.
    """
    device = model.device
    mask = block_causal_mask(packed, model.dtype, device)
    output = model.base_model(
        input_ids=torch.from_numpy(packed.ids_RC).to(device),
        position_ids=torch.from_numpy(packed.positions_RC).to(device),
        attention_mask=mask,
        use_cache=False,
    )
    hidden_RCD: Tensor = output.last_hidden_state
    return hidden_RCD.flatten(0, 1)[torch.from_numpy(packed.predict_rows_T).to(device)]


def block_causal_mask(packed: PackedTokens, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[R, 1, C, C] additive mask: 0 where a cell may look (its own segment and the shared prompt that it continues, not
    later), the lowest number elsewhere.

    Padding looks at padding: a row of the mask that forbids everything would make its softmax NaN.
    """
    segments_RC = torch.from_numpy(packed.segments_RC).to(device)
    num_columns = segments_RC.shape[1]
    allowed_RCC = segments_RC[:, :, None] == segments_RC[:, None, :]
    if (packed.prefixes_RC != NO_PREFIX).any():
        allowed_RCC |= torch.from_numpy(packed.prefixes_RC).to(device)[:, :, None] == segments_RC[:, None, :]
    allowed_RCC &= torch.ones(num_columns, num_columns, dtype=torch.bool, device=device).tril()
    mask_RCC = torch.zeros(allowed_RCC.shape, dtype=dtype, device=device)
    return mask_RCC.masked_fill_(~allowed_RCC, torch.finfo(dtype).min)[:, None]


def output_embedding(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """(weight_VD, bias_V or None) that turn hidden states into logits; views of the live parameters, not copies.

    V are the ids that exist. The head may have more rows, padded to a round number, which are no ids: no engine ever
    multiplies with them, so they get no mass, no draw and no gradient.

    Raises:
        EngineError: the model has no linear output embedding.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise EngineError(f"{model.config.model_type}: the output embedding is {type(head).__name__}, not linear.")
    number = getattr(model.config, "num_ids", head.out_features)
    if number >= head.out_features:
        return head.weight, head.bias
    return head.weight[:number], None if head.bias is None else head.bias[:number]


def num_ids(model: PreTrainedModel) -> int:
    """Ids that exist; the rows of the head may be more."""
    return len(output_embedding(model)[0])


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for it: without AVX512-BF16 torch's products on a CPU are 50 times slower
    than float32's."""
    if device.type != "cpu":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
