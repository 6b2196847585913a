-- question: Do responses grow longer, and do more of them hit the limit?
-- parameter every INTEGER = 25: steps per row
-- column run: run id
-- column step: first step of the stretch that trained them
-- column num_responses: responses
-- column mean_tokens: mean length
-- column p50_tokens: median length
-- column p99_tokens: 99th percentile
-- column longest: longest
-- column limited_share: responses cut at the token limit, fraction
SELECT run, step // $every * $every AS step, count(*) AS num_responses, avg(num_tokens) AS mean_tokens,
    quantile_disc(num_tokens, 0.5) AS p50_tokens, quantile_disc(num_tokens, 0.99) AS p99_tokens,
    max(num_tokens) AS longest, avg((finish_reason = 'length')::INTEGER) AS limited_share
FROM trajectories
WHERE step IS NOT NULL
GROUP BY ALL
ORDER BY run, step
