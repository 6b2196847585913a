-- question: How long did each stage work and wait, and how many tokens did it get through?
-- column run: run id
-- column role: rollout, score, learn, evaluate or pretrain
-- column activity: what it did; `wait:` and `orchestrate:` are not work
-- column seconds: time of all its processes, s; overlapping stretches count each
-- column num_tokens: response tokens the role handled in the whole run; only beside its own work
-- column tokens_per_second: num_tokens / seconds
WITH tokens_by_role AS (
    SELECT run, stage AS role, sum(num_tokens)::BIGINT AS num_tokens FROM shards GROUP BY ALL
    UNION ALL
    SELECT run, 'learn', sum(num_tokens)::BIGINT FROM steps GROUP BY ALL
), spent AS (SELECT run, role, activity, sum(seconds) AS seconds FROM spans GROUP BY ALL)
SELECT run, role, activity, seconds,
    CASE WHEN activity IN ('sample', 'score', 'train') THEN num_tokens END AS num_tokens,
    CASE WHEN activity IN ('sample', 'score', 'train') THEN num_tokens / nullif(seconds, 0) END AS tokens_per_second
FROM spent LEFT JOIN tokens_by_role USING (run, role)
ORDER BY run, role, seconds DESC
