-- question: How stale are the tokens each stretch of steps trains on?
-- parameter every INTEGER = 10: steps per row
-- column run: run id
-- column step: first step of the stretch
-- column staleness: versions between the learner and the weights that sampled the token
-- column num_tokens: trained tokens that had it
-- column share: of the stretch's tokens, fraction
WITH counted AS (
    SELECT run, step // $every * $every AS step, unnest(map_entries(staleness_tokens)) AS entry FROM steps
)
SELECT run, step, entry.key AS staleness, sum(entry.value)::BIGINT AS num_tokens,
    sum(entry.value) / sum(sum(entry.value)) OVER (PARTITION BY run, step) AS share
FROM counted
GROUP BY run, step, entry.key
ORDER BY run, step, staleness
