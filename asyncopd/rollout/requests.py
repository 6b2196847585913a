"""What every sampler refuses before it starts on a request."""

from __future__ import annotations

import numpy as np

from asyncopd.errors import EngineError
from asyncopd.ports import SampleRequest


def check_request(request: SampleRequest, *, max_context: int, vocab_size: int, has_weights: bool) -> None:
    """Refuse what an engine cannot serve.

    Raises:
        EngineError: no weights yet, an empty or invalid prompt, or no room for the response; names the index.
    """
    ids, index = request.prompt_ids, request.index
    if not has_weights:
        raise EngineError(f"index {index}: the sampler has no weights yet; await refresh(weights) first.")
    if len(ids) == 0 or request.max_new_tokens < 1:
        raise EngineError(
            f"index {index}: {len(ids)} prompt tokens and max_new_tokens {request.max_new_tokens}; "
            "both must be at least 1."
        )
    if len(ids) + request.max_new_tokens > max_context:
        raise EngineError(
            f"index {index}: {len(ids)} prompt + {request.max_new_tokens} new tokens exceed max_context "
            f"{max_context}. Lower the response limit or raise max_context."
        )
    if np.min(ids) < 0 or np.max(ids) >= vocab_size:
        raise EngineError(
            f"index {index}: prompt ids reach from {np.min(ids)} to {np.max(ids)}, the model's vocabulary has "
            f"{vocab_size}. Do task and student use the same tokenizer?"
        )
