"""Answers of teachers, shared by all runs of a storage root: nobody is asked the same question twice.

    question = teacher digest, temperature, top-k, teacher draws (and their seed)      --> folder
    token key = prompt, response and candidate ids (and the index, where draws follow it) --> row of a pack

A pack holds what one call of the teacher answered, in the format of a score shard; its manifest lists the token keys
of its rows. Lookups list the folder and read only manifests they have not seen.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from functools import lru_cache

from asyncopd.ports import ScoreRequest
from asyncopd.records import Facts
from asyncopd.types import TeacherScores, Trajectory
from storage.layout import parse, shared_key
from storage.manifests import publish, read_manifest, read_objects
from storage.parquet import SCHEMA_VERSION, decode_scores, encode_scores
from storage.stores.base import ObjectStore

_PACKS_IN_MEMORY = 64
"""Decoded packs kept; neighbouring trajectories of a run lie in the same few."""


class StoredScoreCache:
    """`asyncopd.ports.ScoreCache` on an object store. Safe to share between threads."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._places: dict[str, dict[str, tuple[str, int]]] = {}
        """Question -> token key -> (pack, row)."""
        self._known_packs: dict[str, set[str]] = {}
        self._pack = lru_cache(_PACKS_IN_MEMORY)(self._read_pack)

    def find(
        self, teacher_digest: str, request: ScoreRequest, trajectories: Sequence[Trajectory]
    ) -> dict[int, TeacherScores]:
        """The answers that are there, by trajectory index; their `teacher` is whoever was asked first."""
        question = _question(teacher_digest, request)
        with self._lock:
            self._look_for_packs(question)
            places = self._places.get(question, {})
            found = {t.index: places[key] for t in trajectories if (key := _token_key(t, request)) in places}
            return {index: self._pack(question, pack)[row] for index, (pack, row) in found.items()}

    def add(
        self,
        teacher_digest: str,
        request: ScoreRequest,
        answers: Sequence[tuple[Trajectory, TeacherScores]],
        *,
        worker: str,
    ) -> None:
        """Keep what a teacher just answered. Harmless when somebody else kept the same."""
        if not answers:
            return
        question = _question(teacher_digest, request)
        keys = [_token_key(trajectory, request) for trajectory, _ in answers]
        pack = hashlib.sha256("".join(keys).encode()).hexdigest()[:24]
        body = encode_scores([scores for _, scores in answers], "score-cache")
        publish(
            self._store,
            shared_key("cached scores", question=question, pack=pack),
            {shared_key("cached scores.data", question=question, pack=pack): body},
            kind="cached scores",
            worker=worker,
            facts=Facts(
                token_keys=tuple(keys),
                num_rows=len(keys),
                teacher_digests=(teacher_digest,),
                parquet_schema_version=SCHEMA_VERSION,
            ),
        )

    def _look_for_packs(self, question: str) -> None:
        known = self._known_packs.setdefault(question, set())
        places = self._places.setdefault(question, {})
        for key in self._store.folder(shared_key("cached scores", question=question, pack="_").rpartition("/")[0]).keys:
            parsed = parse(key)
            pack = parsed.fields.get("pack", "")
            if parsed.kind == "cached scores" and pack not in known:
                known.add(pack)
                for row, token_key in enumerate(read_manifest(self._store, key).facts.token_keys):
                    places.setdefault(token_key, (pack, row))

    def _read_pack(self, question: str, pack: str) -> list[TeacherScores]:
        key = shared_key("cached scores", question=question, pack=pack)
        ((data_key, body),) = read_objects(self._store, key, read_manifest(self._store, key)).items()
        return decode_scores(body, data_key)


def _question(teacher_digest: str, request: ScoreRequest) -> str:
    """Digest of what decides the numbers, the tokens apart."""
    parts = {
        "teacher": teacher_digest,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "num_teacher_draws": request.num_teacher_draws,
        # Without draws nothing depends on the seed, and runs of different seeds may share.
        "seed": request.seed if request.num_teacher_draws else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _token_key(trajectory: Trajectory, request: ScoreRequest) -> str:
    """Digest of every id the teacher is asked about, with shapes, so that no two questions look alike."""
    candidates = trajectory.candidates
    digest = hashlib.sha256()
    for ids in (trajectory.prompt_ids, trajectory.response_ids, candidates.head_ids_TK, candidates.draw_ids_TN):
        digest.update(repr(ids.shape).encode() + ids.astype("<i4").tobytes())
    if request.num_teacher_draws:
        digest.update(f"index {trajectory.index}".encode())
    return digest.hexdigest()[:32]
