"""Every relation a query can name, and the views behind the derived ones, which take flat lists apart.

    records    runs, policies, steps, evals, claims, shards, ...    Arrow tables built from JSON objects and manifests
    rows       trajectory_rows, score_rows                          Arrow datasets over the Parquet shards
    derived    trajectories, scores, tokens, candidates, ...        views over the two

List columns are expanded side by side: several `unnest` in one SELECT go through their lists together, and a shorter
list (or NULL) is filled up with NULL. A flat list of T·K numbers has entry i at position i // K and rank i % K. Times
are TIMESTAMP WITH TIME ZONE in UTC; indices and positions count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from storage.catalog.relations import CANDIDATES_FROM, FOLDER, ORIGIN, RECORDS, ROWS, Field, Relation

_FLAT = "head_ids, head_logprobs, tail_logmass, draw_ids, draw_logprobs"
_FLAT_SCORES = "topk_ids, topk_logprobs, head_logprobs, draw_logprobs, teacher_draw_ids, teacher_draw_logprobs"

TRAINED = Relation(
    "trained_indices",
    "One row per index and the step of the surviving lineage that trained it.",
    (
        Field("run", "Run id."),
        Field("index", "Trajectory index."),
        Field("step", "The step; it started from policy version `step` and made version `step + 1`."),
    ),
    """
    WITH planned AS (SELECT run, step, unnest(indices) AS index FROM steps)
    SELECT planned.run, planned.index, planned.step
    FROM planned ANTI JOIN (SELECT run, index FROM dropped WHERE stage = 'learn') AS gone USING (run, index)
    """,
    ("steps", "dropped"),
)

TRAJECTORIES = Relation(
    "trajectories",
    "One row per trajectory, without the flat candidate lists (`candidates` has them one by one).",
    (
        Field("run", "Run id."),
        Field("shard", "Name of its shard: first and last index, both inclusive."),
        Field("index", "Trajectory index in the run."),
        Field("prompt_id", "Stable id of the question; may repeat at other indices."),
        Field("prompt_group", "The prompt's label, for example a noise level; may be empty."),
        Field("prompt_ids", "[P] token ids of the prompt."),
        Field("num_tokens", "T, response tokens, EOS included."),
        Field("response_ids", "[T] token ids of the response."),
        Field("behaviour_logprobs", "[T] log p_old of each response token, nats."),
        Field("version_first", "Policy version that produced the first response token."),
        Field("version_last", "Policy version that produced the last response token."),
        Field("version_run_versions", "[R] policy version of each run of consecutive tokens."),
        Field("version_run_lengths", "[R] tokens in each run; they add up to T."),
        Field("finish_reason", "`stop` (EOS) or `length` (token limit)."),
        Field("correct", "The verifier's answer; null where the task has no verifier."),
        Field("head_k", "Ids in the head per token; 0 for none."),
        Field("num_draws", "Draws per token; 0 for none."),
        Field("draw_law", "`policy` (p_old) or `tail` (p_old outside the head)."),
        Field("step", "Step that trained it; null while none has."),
        Field("staleness_max", "Staleness of its oldest token, versions; null while untrained."),
    ),
    f"""
    SELECT t.* EXCLUDE ({_FLAT}), trained.step, trained.step - t.version_first AS staleness_max
    FROM trajectory_rows AS t LEFT JOIN trained_indices AS trained USING (run, index)
    """,
    ("trajectory_rows", "trained_indices"),
)

SCORES = Relation(
    "scores",
    "One row per trajectory and folder of scores that has it, without the flat lists.",
    (
        Field("run", "Run id."),
        Field("shard", "Name of its shard: first and last index, both inclusive."),
        FOLDER,
        ORIGIN,
        CANDIDATES_FROM,
        Field("index", "Trajectory index in the run."),
        Field("teacher", "The teacher's name."),
        Field("teacher_digest", "Hash of everything that decides the numbers."),
        Field("temperature", "Softmax temperature of every log-prob in the row."),
        Field("num_tokens", "T, response tokens, EOS included."),
        Field("sampled_logprobs", "[T] log q of each response token, nats."),
        Field("topk_k", "Teacher top-k ids per token; 0 for none."),
        Field("head_k", "Head ids per token of the trajectory that were scored; 0 for none."),
        Field("num_draws", "Draws per token of the trajectory that were scored; 0 for none."),
        Field("num_teacher_draws", "Ids per token drawn from the teacher; 0 for none."),
    ),
    f"SELECT * EXCLUDE ({_FLAT_SCORES}) FROM score_rows",
    ("score_rows",),
)

TOKENS = Relation(
    "tokens",
    "One row per response token, with the log-prob the run's own teacher gives it.",
    (
        Field("run", "Run id."),
        Field("index", "Trajectory index."),
        Field("position", "Position t in the response, from 0."),
        Field("token_id", "Token id; `vocabulary` has its text."),
        Field("version", "Policy version that produced the token."),
        Field("behaviour_logprob", "log p_old of the token, nats."),
        Field("teacher_logprob", "log q of the token, nats; null while unscored."),
        Field(
            "kl_nats", "log p_old − log q: its mean is an unbiased estimate of KL(p_old‖q) per token; one can be < 0."
        ),
        Field("step", "Step that trained the token; null while none has."),
        Field("staleness", "step − version, versions; null while untrained."),
        Field("prompt_group", "The prompt's label; may be empty."),
        Field("num_tokens", "T, length of its response, tokens."),
        Field("correct", "Verdict on its response; null without a verifier."),
    ),
    # Runs of one version are taken apart first, then the positions in them. Lists stay whole until an entry is asked
    # for, so that a query pays for the columns it names only.
    """
    WITH own AS (
        SELECT run, index, sampled_logprobs FROM score_rows WHERE origin = 'run'
    ), version_runs AS (
        SELECT t.run, t.index, t.prompt_group, t.num_tokens, t.correct, trained.step, t.response_ids,
            t.behaviour_logprobs, own.sampled_logprobs, t.version_run_lengths AS lengths,
            unnest(t.version_run_versions) AS version, generate_subscripts(t.version_run_lengths, 1) AS number
        FROM trajectory_rows AS t LEFT JOIN own USING (run, index)
        LEFT JOIN trained_indices AS trained USING (run, index)
    ), placed AS (
        SELECT *, coalesce(list_sum(lengths[:number - 1]), 0)::BIGINT AS first, lengths[number] AS length
        FROM version_runs
    ), expanded AS (
        SELECT *, unnest(range(first, first + length)) AS position FROM placed
    )
    SELECT run, index, position, response_ids[position + 1] AS token_id, version,
        behaviour_logprobs[position + 1] AS behaviour_logprob, sampled_logprobs[position + 1] AS teacher_logprob,
        behaviour_logprob - teacher_logprob AS kl_nats, step, step - version AS staleness,
        prompt_group, num_tokens, correct
    FROM expanded
    """,
    ("trajectory_rows", "score_rows", "trained_indices"),
)

_CANDIDATE_FIELDS = (
    Field("run", "Run id."),
    Field("index", "Trajectory index."),
    Field("position", "Position t in the response, from 0."),
    Field("source", "`head` (student's most likely), `draw` (student's draws), `topk` (teacher's), `teacher_draw`."),
    Field("rank", "0 for the most likely, or for the first draw."),
    Field("token_id", "Token id; `vocabulary` has its text."),
    Field("student_logprob", "log p_old of the id, nats; null for ids that came from the teacher."),
    Field("teacher_logprob", "log q of the id, nats; null while unscored."),
    Field("teacher", "The teacher; null while unscored."),
    Field("folder", "Folder of the scores; null while unscored."),
)


# Back-filled candidates have ids of their own: scores of those speak of other ids than the trajectories'.
_SAMPLED = (
    "trajectory_rows AS t LEFT JOIN (FROM score_rows WHERE candidates_from = 'trajectories') AS s USING (run, index)"
)
_NO_LIST = "NULL::FLOAT[]"


def _candidates(source: str, ids: str, student: str, teacher: str, width: str, tables: str) -> str:
    return f"""
    SELECT run, index, i // width AS position, '{source}' AS source, i % width AS rank,
        token_id, student_logprob, teacher_logprob, teacher, folder
    FROM (SELECT run, index, s.teacher, s.folder, {width} AS width, generate_subscripts({ids}, 1) - 1 AS i,
              unnest({ids}) AS token_id, unnest({student}) AS student_logprob, unnest({teacher}) AS teacher_logprob
          FROM {tables} WHERE {width} > 0)
    """


CANDIDATES = Relation(
    "candidates",
    "One row per extra token id whose log-prob was asked for, for every folder of scores that has it; the ids of "
    "back-filled candidates are not among them.",
    _CANDIDATE_FIELDS,
    " UNION ALL ".join(
        (
            _candidates("head", "t.head_ids", "t.head_logprobs", "s.head_logprobs", "t.head_k", _SAMPLED),
            _candidates("draw", "t.draw_ids", "t.draw_logprobs", "s.draw_logprobs", "t.num_draws", _SAMPLED),
            _candidates("topk", "s.topk_ids", _NO_LIST, "s.topk_logprobs", "s.topk_k", "score_rows AS s"),
            _candidates(
                "teacher_draw",
                "s.teacher_draw_ids",
                _NO_LIST,
                "s.teacher_draw_logprobs",
                "s.num_teacher_draws",
                "score_rows AS s",
            ),
        )
    ),
    ("trajectory_rows", "score_rows"),
)

DOCUMENTATION = Relation(
    "documentation",
    "One row per column of every relation, with its comment.",
    (
        Field("relation", "Relation."),
        Field("column", "Column."),
        Field("type", "DuckDB type."),
        Field("meaning", "Meaning, unit and shape."),
    ),
    """
    SELECT table_name AS relation, column_name AS column, data_type AS type, comment AS meaning
    FROM duckdb_columns() WHERE NOT internal AND comment IS NOT NULL ORDER BY table_name, column_index
    """,
)

DERIVED = (TRAINED, TRAJECTORIES, SCORES, TOKENS, CANDIDATES, DOCUMENTATION)


RELATIONS: tuple[Relation, ...] = (*RECORDS, *ROWS, *DERIVED)
TEXT_FUNCTION = "text_of"
"""SQL function text_of(run, ids): the ids as text."""
BY_NAME = {relation.name: relation for relation in RELATIONS}


def closure(names: Collection[str]) -> set[str]:
    """`names` and everything their views read."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += BY_NAME[name].reads
    return found


def mentioned(sql: str) -> set[str]:
    """Every relation `sql` can refer to, views resolved: those whose name occurs in its text as a word.

    A superset, which is all that deciding what to read needs; nobody else's SQL is parsed in this process.
    """
    words = set(re.findall(r"\w+", sql.lower()))
    return closure(words & BY_NAME.keys())
