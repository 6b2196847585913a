-- relation: One row per response token, with the log-prob the run's own teacher gives it.
-- reads trajectory_rows, score_rows, trained_indices
-- column run: Run id.
-- column index: Trajectory index.
-- column position: Position t in the response, from 0.
-- column token_id: Token id; `vocabulary` has its text.
-- column version: Policy version that produced the token.
-- column behaviour_logprob: log p_old of the token, nats.
-- column teacher_logprob: log q of the token, nats; null while unscored.
-- column kl_nats: log p_old − log q: its mean is an unbiased estimate of KL(p_old‖q) per token; one can be < 0.
-- column step: Step that trained the token; null while none has.
-- column staleness: step − version, versions; null while untrained.
-- column prompt_group: The prompt's label; may be empty.
-- column num_tokens: T, length of its response, tokens.
-- column correct: Verdict on its response; null without a verifier.
-- Runs of one version are taken apart first, then the positions in them. Lists stay whole until an entry is asked for,
-- so that a query pays for the columns it names only.
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
