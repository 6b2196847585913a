-- The relations made from JSON objects and manifests: the comment above a table is its meaning, the one behind a column
-- is that column's. relations.py reads this file by its layout; nothing executes it.

-- One row per run.
CREATE TABLE runs (
    run VARCHAR, -- Run id.
    created TIMESTAMPTZ, -- When the run was created.
    name VARCHAR, -- The configuration's name.
    task VARCHAR, -- Kind of task: walk or text.
    teacher VARCHAR, -- Name of the run's own teacher, whose scores `tokens` shows.
    loss VARCHAR, -- Estimator the learner minimises.
    seed BIGINT, -- Seed of prompts and sampling.
    batch_size BIGINT, -- B, trajectory indices per optimizer step.
    shard_size BIGINT, -- Consecutive indices per shard.
    max_staleness BIGINT, -- τ, oldest admissible weights, versions.
    num_steps BIGINT, -- Planned optimizer steps.
    config_hash VARCHAR, -- Digest of the configuration.
    code_version VARCHAR, -- Version of the code that created the run.
    parent VARCHAR, -- Run it was derived from; empty for none.
    config VARCHAR -- The whole configuration as JSON: config->>'$.learner.lr'.
);

-- One row per policy version of the surviving lineage.
CREATE TABLE policies (
    run VARCHAR, -- Run id.
    version BIGINT, -- Learner steps behind the weights; 0 is the initial student.
    rewind INTEGER, -- How often the learner had gone back to a checkpoint before.
    created TIMESTAMPTZ, -- When the version was published.
    worker VARCHAR, -- Name of the process that did it.
    size_bytes BIGINT, -- Size of the weights, bytes.
    sha256 VARCHAR -- Digest of the weights.
);

-- One row per optimizer step of the surviving lineage.
CREATE TABLE steps (
    run VARCHAR, -- Run id.
    step BIGINT, -- Optimizer step, from 0. It starts from policy version `step`.
    rewind INTEGER, -- How often the learner had gone back to a checkpoint before; 0 in an undisturbed run.
    version BIGINT, -- Policy version published after the step.
    index_start BIGINT, -- Lowest trajectory index of the step.
    index_stop BIGINT, -- One beyond its highest index.
    indices BIGINT[], -- The indices it decided about, ascending; in index order all of the range.
    num_tokens BIGINT, -- Response tokens trained.
    num_dropped BIGINT, -- Indices of the step that were not trained (relation `dropped` says why).
    finished TIMESTAMPTZ, -- When the step was recorded.
    metrics MAP(VARCHAR, DOUBLE), -- Name -> value; docs/metrics.md has meaning and unit. metrics['train/kl_nats'] is one.
    staleness_tokens MAP(INTEGER, BIGINT) -- Staleness in versions -> trained tokens that had it.
);

-- Steps that no longer count, because the learner went back before them.
CREATE TABLE superseded_steps (LIKE steps);

-- One row per evaluated policy version of the surviving lineage.
CREATE TABLE evals (
    run VARCHAR, -- Run id.
    version BIGINT, -- Policy version evaluated.
    rewind INTEGER, -- Rewind it was published under.
    num_prompts BIGINT, -- Held-out prompts asked.
    accuracy DOUBLE, -- Fraction of responses the verifier accepts; null without a verifier.
    accuracy_by_group MAP(VARCHAR, DOUBLE), -- Prompt group -> accuracy, fraction.
    kl_nats DOUBLE, -- KL(p‖q) student to teacher on the student's own responses, nats per token.
    kl_standard_error_nats DOUBLE, -- Standard error of kl_nats, nats.
    mean_response_tokens DOUBLE, -- Mean response length, tokens, EOS included.
    finished TIMESTAMPTZ -- When the evaluation was done.
);

-- One row per claim of a shard; a second attempt means that the first holder died.
CREATE TABLE claims (
    run VARCHAR, -- Run id.
    stage VARCHAR, -- `rollout` or `score-<teacher>`.
    shard VARCHAR, -- Name of the shard the row is stored in: first and last index, both inclusive.
    index_start BIGINT, -- First index.
    index_stop BIGINT, -- One beyond the last index.
    attempt INTEGER, -- 1 for the first claim of the shard; one more each time it was taken over.
    worker VARCHAR, -- Name of the process that did it.
    claimed TIMESTAMPTZ -- When; null where a power cut lost the record.
);

-- One row per complete shard of trajectories or scores.
CREATE TABLE shards (
    run VARCHAR, -- Run id.
    stage VARCHAR, -- `rollout` or `score`.
    teacher VARCHAR, -- Whose scores; empty for trajectories.
    shard VARCHAR, -- Name of the shard the row is stored in: first and last index, both inclusive.
    index_start BIGINT, -- First index.
    index_stop BIGINT, -- One beyond the last index.
    num_rows BIGINT, -- Trajectories in it; dropped indices have none.
    num_tokens BIGINT, -- Response tokens in it.
    num_dropped BIGINT, -- Indices without a row.
    seconds DOUBLE, -- Wall time from start to publication, s; shards of one engine overlap.
    worker VARCHAR, -- Name of the process that did it.
    published TIMESTAMPTZ, -- When its manifest was written.
    size_bytes BIGINT -- Size of its Parquet file, bytes.
);

-- One row per index that was left out, and the stage that recorded it.
CREATE TABLE dropped (
    run VARCHAR, -- Run id.
    index BIGINT, -- Trajectory index.
    stage VARCHAR, -- `rollout`, `score` or `learn`.
    teacher VARCHAR, -- Whose scores left it out; empty for other stages.
    reason VARCHAR -- Why.
);

-- One row each time the learner went back to a checkpoint.
CREATE TABLE rewinds (
    run VARCHAR, -- Run id.
    rewind INTEGER, -- 1 for the first.
    to_step BIGINT, -- Steps behind the state it went back to.
    worker VARCHAR, -- Name of the process that did it.
    recorded TIMESTAMPTZ -- When.
);

-- One row per stretch of wall time a worker spent on one activity.
CREATE TABLE spans (
    run VARCHAR, -- Run id.
    role VARCHAR, -- rollout, score, learn, evaluate or pretrain.
    worker VARCHAR, -- Name of the process that did it.
    activity VARCHAR, -- docs/metrics.md; `wait:` and `orchestrate:` prefix what is not work.
    started TIMESTAMPTZ, -- When it began.
    ended TIMESTAMPTZ, -- When it ended.
    seconds DOUBLE, -- Its length, s.
    detail VARCHAR -- For example the shard or the step.
);

-- One row per recorded failure of a role.
CREATE TABLE failures (
    run VARCHAR, -- Run id.
    role VARCHAR, -- Which role failed.
    worker VARCHAR, -- Name of the process that did it.
    reason VARCHAR, -- Its own words.
    failed TIMESTAMPTZ -- When.
);

-- One row per token of each run's tokenizer.
CREATE TABLE vocabulary (
    run VARCHAR, -- Run id.
    token_id INTEGER, -- Token id.
    text VARCHAR, -- The token's own text.
    class VARCHAR -- Walk: special, noise, operation or state. Text: special, number, word, blank, symbol, mixed.
);
