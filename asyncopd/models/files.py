"""The files of a pretrained model, read without torch: what preflight refuses and every role loads is found here.

path or hub name, revision --> ModelFiles --+--> config, context, rows, stop ids     config.json, generation_config
                                            +--> TokenizerFacts                      tokenizer.json, or the GGUF file
                                            +--> names and shapes of the weights     first bytes of *.safetensors
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from asyncopd.config.engines import PretrainedModel
from asyncopd.errors import ConfigError
from asyncopd.models.headers import (
    StoredTensor,
    TokenizerFacts,
    digest_of,
    read_gguf_metadata,
    stored_tensors,
    tokenizer_facts,
)

PACKAGE_PREFIX = "package:"
"""Begins a path that is the folder of an installed Python package, which may carry weights."""

_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "*.txt")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# What one wrapper or another puts in front of all names.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
# Names of the tensors that turn ids into vectors, and vectors into logits.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
# Families of encoders, which transformers also builds as decoders when told to.
_ENCODERS = re.compile("bert|electra|big_bird|data2vec|roformer|xmod|^ernie$")
# Keys of models that carry a state along instead of attending: state spaces, linear attention, recurrence.
_RECURRENT = re.compile(
    "mamba_|ssm_|state_size$|linear_(attn|conv|key|num)|lru_width|rescale_every|mlstm|conv_L_cache|time_step_"
)
# Sets where a model changes its logits or attention scores, with the value that changes nothing.
_CHANGES: Mapping[str, float | None] = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


@dataclass(frozen=True)
class ModelFiles:
    """One pretrained model where it lies. Nothing is read before it is asked for; errors are ConfigErrors."""

    settings: PretrainedModel
    role: str = "model"
    """Which setting names it, for messages: `student`, `teacher.model`, `task.tokenizer`."""

    @functools.cached_property
    def folder(self) -> Path | None:
        """The local folder; None for a hub name."""
        path = self.settings.path
        if path.startswith(PACKAGE_PREFIX):
            name = path.removeprefix(PACKAGE_PREFIX)
            found = importlib.util.find_spec(name)
            if found is None or not found.submodule_search_locations:
                raise ConfigError(
                    f"{self.role}.path: {path}: there is no installed package {name}. For SmolLM2 run `make smollm2`; "
                    "else give a directory or a hub name."
                )
            return Path(found.submodule_search_locations[0])
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return None
        raise ConfigError(
            f"{self.role}.path: there is no directory {folder.absolute()}. Expected a model in Hugging Face format "
            "(config.json, *.safetensors, tokenizer files), or a hub name such as Qwen/Qwen3-0.6B."
        )

    @property
    def where(self) -> str:
        """The folder, or hub name and revision, for messages."""
        return str(self.folder or f"{self.settings.path} (revision {self.settings.revision})")

    def find(self, name: str) -> Path | None:
        """A small file of the model; None where it has none. Hub files come from the cache or are downloaded."""
        if self.folder is not None:
            return path if (path := self.folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.settings.path, name, revision=self.settings.revision))
        except LocalEntryNotFoundError as error:
            raise self._unreachable(error) from error
        except EntryNotFoundError:
            return None
        # Offline, no such repository, no access: the library has one class for each, and OSError for none of them.
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise self._unreachable(error) from error

    def local_folder(self) -> Path:
        """The folder with everything in it, weights included; a hub model is fetched at its revision first."""
        if self.folder is not None:
            return self.folder
        wanted = [*_WANTED, *filter(None, [self.settings.gguf_file])]
        try:
            return Path(snapshot_download(self.settings.path, revision=self.settings.revision, allow_patterns=wanted))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ConfigError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ConfigError(
            f"{self.role}.path: {self.where} is no directory here, is not in the Hugging Face cache, and could not be "
            f"fetched: {reason} Give a directory, or fetch it where there is a network with "
            f"`hf download {self.settings.path} --revision {self.settings.revision}`."
        )

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the model; None where it has none."""
        path = self.find(name)
        if path is None:
            return None
        try:
            described = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.role}: {path} is not JSON in UTF-8: {error}.") from None
        if not isinstance(described, dict):
            raise ConfigError(f"{self.role}: {path} holds {type(described).__name__}; expected an object.")
        return described

    @functools.cached_property
    def gguf(self) -> dict[str, Any]:
        """Metadata of the GGUF file; empty where the model is not one."""
        if not self.settings.gguf_file:
            return {}
        path = self.find(self.settings.gguf_file)
        if path is None:
            near = sorted(p.name for p in self.folder.glob("*.gguf")) if self.folder else []
            raise ConfigError(
                f"{self.role}.gguf_file: {self.where} has no {self.settings.gguf_file}; it holds "
                f"{near or 'no GGUF file'}."
            )
        return read_gguf_metadata(path)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or what a GGUF file says in its place. `text_config` of a multimodal model is laid over it."""
        if self.gguf:
            kind = str(self.gguf["general.architecture"])
            facts = {"max_position_embeddings": "context_length", "num_hidden_layers": "block_count"}
            found = {key: self.gguf.get(f"{kind}.{name}") for key, name in facts.items()}
            return {"model_type": kind, "vocab_size": self.tokenizer.num_ids, **found}
        described = self.json("config.json")
        if described is None:
            raise ConfigError(
                f"{self.role}.path: {self.where} has no config.json. Expected a model in Hugging Face format, or "
                "gguf_file with the name of a GGUF file in it."
            )
        inner = described.get("text_config")
        return {**described, **inner} if isinstance(inner, dict) else described

    @property
    def num_positions(self) -> int | None:
        """Longest context in tokens; None where the configuration sets no bound."""
        found = [self.config[key] for key in _POSITIONS if isinstance(self.config.get(key), int)]
        return found[0] if found else None

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response, by generation_config.json and config.json."""
        if self.gguf:
            return frozenset(
                {int(self.gguf["tokenizer.ggml.eos_token_id"])} if "tokenizer.ggml.eos_token_id" in self.gguf else ()
            )
        generation = self.json("generation_config.json") or {}
        named = generation.get("eos_token_id")
        # A tokenizer of its own may lie without a model.
        named = (self.json("config.json") or {}).get("eos_token_id") if named is None else named
        ids = named if isinstance(named, list) else [named]
        return frozenset(id_ for id_ in ids if isinstance(id_, int) and not isinstance(id_, bool))

    @functools.cached_property
    def tokenizer(self) -> TokenizerFacts:
        """Read from tokenizer.json or the GGUF file; a tokenizer that has neither is refused."""
        if self.gguf:
            names = ("model", "pre", "tokens", "token_type", "merges", "scores")
            settings = {name: self.gguf.get(f"tokenizer.ggml.{name}") for name in names}
            return TokenizerFacts(digest_of(settings), len(settings["tokens"] or ()))
        path = self.find("tokenizer.json")
        if path is None:
            raise ConfigError(
                f"{self.role}: {self.where} has no tokenizer.json. Make one with "
                "`AutoTokenizer.from_pretrained(…).save_pretrained(…)`, which writes it beside the old files."
            )
        return tokenizer_facts(path.resolve(), self.role)

    @functools.cached_property
    def chat_template(self) -> str:
        """How its tokenizer writes a conversation, as a jinja program; empty where it does not say."""
        if self.gguf:
            return str(self.gguf.get("tokenizer.chat_template", ""))
        if (path := self.find("chat_template.jinja")) is not None:
            return path.read_text("utf-8")
        found = (self.json("tokenizer_config.json") or {}).get("chat_template") or ""
        # Several, by name.
        named = {each["name"]: each["template"] for each in found} if isinstance(found, list) else {"default": found}
        return str(named.get("default", ""))

    # -- refusals -----------------------------------------------------------------------------------------------------
    def check(self, *, needed_context: int) -> None:
        """Refuse what its files show to be unusable; tensors' values are seen when it is loaded.

        Args:
            needed_context: tokens of the longest prompt and response together.
        Raises:
            ConfigError: an architecture that is not supported, a context too short, ids without a row, or weights
                that are missing, cut off or not of this architecture.
        """
        self._check_architecture()
        room, rows = self.num_positions, self.config.get("vocab_size")
        if room is not None and needed_context > room:
            raise ConfigError(
                f"{self.role}.path: {self.where} has a context of {room} tokens, and task.max_prompt_tokens + "
                f"rollout.max_new_tokens = {needed_context}. Lower one of them or take a model with a longer context."
            )
        if isinstance(rows, int) and self.tokenizer.num_ids > rows:
            raise ConfigError(
                f"{self.role}.path: {self.where} has {rows} rows in its embedding and a tokenizer with "
                f"{self.tokenizer.num_ids} ids. Expected a row for every id; were tokens added after training?"
            )
        layers = self.config.get("num_hidden_layers", self.config.get("n_layer"))
        dropped = self.settings.drop_layers
        if isinstance(layers, int) and not all(0 <= layer < layers for layer in dropped):
            raise ConfigError(f"{self.role}.drop_layers: {list(dropped)}; {self.where} has layers 0 to {layers - 1}.")
        if isinstance(layers, int) and len(dropped) >= layers:
            raise ConfigError(f"{self.role}.drop_layers: all {layers} layers of {self.where} are dropped; keep one.")
        if not self.gguf and self.folder is not None:
            self._check_weights(self.folder, layers)

    def _check_architecture(self) -> None:
        # That of the whole, where a model of text is part of it.
        described = self.config if self.gguf else self.json("config.json") or {}
        kind, names = described.get("model_type"), described.get("architectures") or []
        if self.gguf:
            kind = re.sub("moe$", "_moe", str(kind))
        is_encoder = _ENCODERS.search(str(kind)) and "decoder" not in str(kind) and not described.get("is_decoder")
        if reason := _not_built(kind, samples=self.role == "student" and not is_encoder):
            remote = " It needs code of its own (auto_map), which is not run here." if "auto_map" in described else ""
            raise ConfigError(
                f"{self.role}.path: {self.where} is of model_type {kind!r}, {reason}.{remote} "
                f"Expected a Llama-, Qwen-, Mistral- or GPT-2-like model (docs/models.md)."
            )
        if is_encoder or (names and not any(name.endswith(_GENERATES) for name in names)):
            raise ConfigError(
                f"{self.role}.path: {self.where} says architectures {names} in config.json; expected a model that "
                "generates text (…ForCausalLM). Is it an embedding or reward model?"
            )
        if self.role == "student" and (quantised := described.get("quantization_config")):
            raise ConfigError(
                f"student.path: the weights of {self.where} are quantised ({quantised.get('quant_method')}) and cannot "
                "be trained. Take the model that they were made from, or a GGUF file, which is de-quantised."
            )
        if problem := unsupported(self.config):
            raise ConfigError(f"{self.role}.path: {self.where}: {kind}: {problem}")

    def _check_weights(self, folder: Path, num_layers: int | None) -> None:
        stored = stored_tensors(folder, self.role)
        wrapped = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in stored)), None)
        if wrapped:
            raise ConfigError(
                f"{self.role}.path: all tensors of {folder} have names that begin with {wrapped!r}: they were saved "
                "from within a wrapper. Save the model inside it with `save_pretrained`, or strip the prefix."
            )
        self._check_embeddings(folder, stored)
        layers: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, tensor in stored.items():
            if found := re.search(r"(?<=\.)\d+(?=\.)", name):
                layers.setdefault(int(found[0]), {})[name[: found.start()] + "N" + name[found.end() :]] = tensor.shape
        # A multimodal model numbers the layers of its other parts too.
        if "text_config" in self.config:
            return
        if missing := sorted(set(range(num_layers or 0)) - layers.keys()):
            raise ConfigError(
                f"{self.role}.path: config.json says {num_layers} layers, and the weights in {folder} have none of "
                f"the layers {missing[:8]}. Is the download complete?"
            )
        # Layers of a mixture of experts may differ, but none lacks what all others have, or has shapes of its own.
        signatures = {number: frozenset(layer.items()) for number, layer in layers.items()}
        counts = Counter(signatures.values())
        for number, here in signatures.items():
            others = [dict(other) for other in counts if other != here] if counts[here] == 1 else []
            if others and all(layers[number].keys() < other.keys() for other in others):
                names = [
                    name.replace(".N.", f".{number}.") for name in sorted(others[0].keys() - layers[number].keys())
                ]
                raise ConfigError(f"{self.role}.path: {folder}: {names[:8]} are missing; the other layers have them.")
            alike = [other for other in others if other.keys() == layers[number].keys()]
            if len(alike) == 1 and counts[frozenset(alike[0].items())] > 1:
                name, shape = next(item for item in layers[number].items() if item not in alike[0].items())
                raise ConfigError(
                    f"{self.role}.path: {folder}: {name.replace('.N.', f'.{number}.')} has shape {list(shape)}; "
                    f"expected {list(alike[0][name])}, as in the other layers."
                )

    def _check_embeddings(self, folder: Path, stored: Mapping[str, StoredTensor]) -> None:
        rows = self.config.get("vocab_size")
        first = next((tensor for name, tensor in stored.items() if name.endswith(_EMBEDDINGS)), None)
        head = next((tensor for name, tensor in stored.items() if name.endswith(_HEADS)), None)
        for tensor in filter(None, (first, head)):
            if isinstance(rows, int) and tensor.shape[0] != rows:
                raise ConfigError(
                    f"{self.role}.path: config.json says vocab_size {rows}, and {tensor.path} holds an embedding of "
                    f"shape {list(tensor.shape)}. Expected {rows} rows; were tokens added after training?"
                )
        if self.config.get("tie_word_embeddings") is not True or first is None or head is None:
            return
        if (first.dtype, first.shape) == (head.dtype, head.shape) and not first.same_bytes(head):
            raise ConfigError(heads_differ(self))


def heads_differ(files: ModelFiles) -> str:
    """Said when a model's file holds a head beside the embedding to which its configuration ties it."""
    return (
        f"{files.role}.path: config.json of {files.where} says tie_word_embeddings: true, and its weights hold a head "
        "that differs from the embedding. Set tie_word_embeddings to false in config.json to have both, or delete "
        "lm_head.weight from the weights."
    )


def unsupported(config: Mapping[str, Any]) -> str:
    """Why packed rows and gathered log-probs would silently be wrong for this architecture; empty if known to be right.

    Args:
        config: a transformers configuration as a mapping.
    """
    for name, neutral in _CHANGES.items():
        value = config.get(name, neutral)
        if value is not None and value != neutral:
            return (
                f"{name} = {value} changes the logits or attention scores. Log-probs are gathered from hidden states "
                f"here; only {name} = {neutral} is supported."
            )
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    windows = [f"{key} = {config[key]}" for key in ("sliding_window", "attention_chunk_size") if config.get(key)]
    if others or (windows and config.get("use_sliding_window", True)):
        return (
            f"layers attend to less than their prefix ({', '.join(others or windows)}). Only full "
            "attention is supported; set sliding_window to null if the context fits the window."
        )
    if recurrent := sorted(key for key, value in config.items() if value and _RECURRENT.match(key)):
        return (
            f"layers carry a state along instead of attending to their prefix (it has {recurrent[0]}), so sequences "
            "cannot be packed into one row. Only full attention is supported."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in ("dynamic", "longrope", "su"):
        return (
            f"rope_type {rope_type} changes with the longest position of a batch, so a token's log-prob would depend "
            "on its neighbours. Use default, linear, yarn or llama3."
        )
    return ""


def _not_built(kind: object, *, samples: bool) -> str:
    """Why transformers does not build this model type as it is needed here; empty if it does.

    Its tables and classes are read as text, because importing them imports torch.
    """
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.submodule_search_locations
    models = Path(found.submodule_search_locations[0]) / "models"
    table = (models / "auto" / "modeling_auto.py").read_text().partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES =")[2]
    if not isinstance(kind, str) or kind not in re.findall(r'\("([^"]+)",', table.partition("\n)")[0]):
        return "which this transformers cannot generate text with"
    name = kind.replace("-", "_")
    sources = [path for folder in {name, name.removesuffix("_text")} for path in models.glob(f"{folder}/modeling_*.py")]
    code = "".join(path.read_text() for path in sources)
    if code and "_supports_sdpa = True" not in code:
        return "which transformers does not run on torch's scaled_dot_product_attention"
    # A multimodal model has an attention for each of its parts.
    if code and samples and (calls := code.count("attention_interface(")) != 1 and "pixel_values" not in code:
        return f"whose layers call transformers' attention {calls} times; a student's must once, a teacher's need not"
    return ""
