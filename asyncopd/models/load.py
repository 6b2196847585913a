"""Ways to a model: from an architecture and a seed, or from the files of a pretrained one, strictly.

Used by learner, samplers, scorers, evaluation and back-fill alike, so that "the model" is one thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyncopd.config.engines import EngineDtype
from asyncopd.errors import ConfigError
from asyncopd.models.causal_lm import multiplies_bfloat16, output_embedding, packed_hidden
from asyncopd.models.files import ModelFiles, heads_differ, unsupported
from asyncopd.models.packing import pack

# Of masks and rotary codes, which earlier versions of transformers stored beside the weights.
_CONSTANTS = (".attn.masked_bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


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
        ConfigError: the heads do not divide the hidden size.
    """
    if hidden_size % num_heads:
        raise ConfigError(f"hidden size {hidden_size} is not a multiple of {num_heads} heads; change one of them.")
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
        ConfigError: unknown `model_type`, or an architecture that `check_architecture` refuses.
    """
    try:
        config = AutoConfig.for_model(**architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(
            f"architecture {dict(architecture)} cannot be built by transformers with torch's attention: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    check_architecture(model)
    return model.eval()


def load_pretrained(files: ModelFiles, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A pretrained model as its files hold it, or not at all: no tensor is left to chance.

    Raises:
        ConfigError: the files are not there or cannot be read.
        ConfigError: a tensor is missing, unexpected, of another shape or not finite, two tied ones differ, or an
            architecture that `check_architecture` refuses.
    """
    settings, folder = files.settings, files.local_folder()
    source = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(folder, **source)
        says_tied = config.tie_word_embeddings
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            # Reported below with all the others.
            ignore_mismatched_sizes=True,
            **source,
        )
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError),
        *(safetensors.SafetensorError, StrictDataclassError),
    ) as error:
        raise ConfigError(
            f"{files.role}.path: {files.where}: no causal language model could be loaded ({str(error)[:300]}). "
            "Expected a directory with config.json and safetensors weights, or a hub name that this machine can reach."
        ) from error
    wrong = {what: sorted(map(str, found[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    wrong["unexpected"] = [name for name in wrong["unexpected"] if not name.endswith(_CONSTANTS)]
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in wrong.items() if names)
        raise ConfigError(
            f"{files.role}.path: the weights of {files.where} are not those of its configuration "
            f"({model.config.model_type}). {listed}. Expected every tensor of the architecture once, in its shape."
        )
    broken = [name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise ConfigError(f"{files.role}.path: {files.where}: NaN or infinite numbers in {', '.join(broken[:8])}.")
    tied = (
        model.get_output_embeddings() is None
        or model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    if says_tied and not tied:
        raise ConfigError(heads_differ(files))
    if settings.gguf_file or settings.drop_layers:
        model = _plain(model, files)
    if (number := files.tokenizer.num_ids) < model.config.vocab_size:
        # In the configuration, so that whoever builds this architecture again knows it too.
        model.config.num_ids = number
    check_architecture(model)
    return model.eval()


def resolved_dtype(asked: EngineDtype, *, pretrained: bool, device: torch.device) -> torch.dtype:
    """What `auto` means here: bfloat16 for a pretrained model where the processor multiplies it natively. Models made
    here are float32: they are small, and rounding them would show as drift."""
    if asked != "auto":
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    return torch.bfloat16 if pretrained and multiplies_bfloat16(device) else torch.float32


def _plain(model: PreTrainedModel, files: ModelFiles) -> PreTrainedModel:
    """The same tensors under a configuration that says nothing of quantisation, without the layers to drop.

    Raises:
        ConfigError: fewer layers cannot be said in this architecture's configuration.
    """
    described, num_layers = model.config.to_dict(), model.config.num_hidden_layers
    described.pop("quantization_config", None)
    kept = [layer for layer in range(num_layers) if layer not in files.settings.drop_layers]
    described["n_layer" if "n_layer" in described else "num_hidden_layers"] = len(kept)
    for name, value in described.items():
        # One entry a layer: layer_types, SmolLM3's no_rope_layers.
        if isinstance(value, list) and len(value) == num_layers:
            described[name] = [value[layer] for layer in kept]
    if dense := described.get("first_k_dense_replace"):
        described["first_k_dense_replace"] = sum(layer < dense for layer in kept)
    if dense := described.get("mlp_only_layers"):
        described["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in dense]
    new_number = {old: new for new, old in enumerate(kept)}
    tensors = {}
    for tensor_name, tensor in model.state_dict().items():
        parts = tensor_name.split(".")
        place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if place is not None:
            if int(parts[place]) not in new_number:
                continue
            parts[place] = str(new_number[int(parts[place])])
        tensors[".".join(parts)] = tensor
    try:
        config = AutoConfig.for_model(**described)
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=model.dtype).eval()
        plain.load_state_dict(tensors)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise ConfigError(
            f"{files.role}: {files.where}: the configuration that transformers makes of it ({model.config.model_type}) "
            f"with the layers {kept} does not fit its tensors: {' '.join(str(error).split())[:300]}"
        ) from error
    plain.generation_config = model.generation_config
    _check_dropped(model.eval(), plain, files)
    return plain


@torch.no_grad()
def _check_dropped(model: PreTrainedModel, plain: PreTrainedModel, files: ModelFiles) -> None:
    """A layer may do something because of its number; then it does something else under another."""

    def skip(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        hidden = given[0] if given else named["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = next(each for each in model.base_model.children() if isinstance(each, torch.nn.ModuleList))
    hooks = [layers[number].register_forward_hook(skip, with_kwargs=True) for number in files.settings.drop_layers]
    ids = torch.tensor([[1, 0, 1]], device=model.device)
    expected, found = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, plain))
    for hook in hooks:
        hook.remove()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
        raise ConfigError(
            f"{files.role}.drop_layers: {model.config.model_type} without {list(files.settings.drop_layers)} does not "
            f"compute what {files.where} does when it skips them: its layers depend on their number. Drop others, for "
            "example as many as its pattern of layers is long."
        )


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse what packed rows and gathering would silently get wrong: known causes by name, the rest by trial.

    Raises:
        ConfigError: the logits are changed after the output embedding, a layer does not attend to its whole
            prefix (sliding windows, linear attention), the position code depends on what else is in the batch, or two
            sequences packed into one row do not get the logits they get alone.
    """
    if problem := unsupported(model.config.to_dict()):
        raise ConfigError(f"{model.config.model_type}: {problem}")
    _check_packed_logits(model)


@torch.no_grad()
def _check_packed_logits(model: PreTrainedModel) -> None:
    sequences = [(np.array([1, 0, 1]), np.array([0])), (np.array([0, 1]), np.array([0]))]
    model.eval()
    try:
        packed_2D = packed_hidden(model, pack(sequences, capacity=5))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{model.config.model_type} does not take 4-D attention masks with position ids ({error}), so sequences "
            "cannot be packed; it is not supported."
        ) from error
    weight_VD, bias_V = output_embedding(model)
    found_2V = torch.nn.functional.linear(packed_2D, weight_VD, bias_V).float()
    prompts = [torch.from_numpy(prompt)[None].to(model.device) for prompt, _ in sequences]
    alone = [model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits for ids in prompts]
    alone_2V = torch.cat([logits_1CV[:, -1, : len(weight_VD)].float() for logits_1CV in alone])
    difference, scale = (found_2V - alone_2V).abs().max().item(), alone_2V.abs().max().item()
    # NaN fails too.
    if not difference <= (1e-3 if model.dtype == torch.float32 else 0.1) * scale + 1e-6:
        raise ConfigError(
            f"{model.config.model_type}: logits of two sequences packed into one row differ by {difference:.2g} from "
            f"their own (at most {scale:.2g}). The architecture ignores 4-D masks or position ids, or changes its "
            "logits after the output embedding; it is not supported."
        )
