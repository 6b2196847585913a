-- question: What did dropped, superseded and repeated work cost?
-- column run: run id
-- column kind: `dropped <stage>: <reason>`, `superseded steps`, or `claims taken over: <stage>`
-- column num: indices, steps or shards
-- column num_tokens: response tokens that were generated or trained for nothing; null where nobody knows
-- column seconds: time spent on them, s; for claims, from the first claim to the last
WITH pace AS (SELECT run, shard, any_value(seconds / nullif(num_tokens, 0)) AS s FROM shards WHERE stage = 'rollout' GROUP BY ALL)
SELECT run, 'dropped ' || d.stage || ': ' || d.reason AS kind, count(*) AS num,
    sum(t.num_tokens)::BIGINT AS num_tokens, sum(t.num_tokens * pace.s) AS seconds
FROM dropped AS d LEFT JOIN trajectories AS t USING (run, index) LEFT JOIN pace USING (run, shard)
GROUP BY ALL
UNION ALL
SELECT run, 'superseded steps', count(*), sum(num_tokens)::BIGINT, sum(metrics['train/seconds'])
FROM superseded_steps
GROUP BY ALL
UNION ALL
SELECT run, 'claims taken over: ' || stage, count(*), NULL, sum(seconds)
FROM (
    SELECT run, stage, shard, date_diff('millisecond', min(claimed), max(claimed)) / 1000 AS seconds
    FROM claims GROUP BY ALL HAVING max(attempt) > 1
)
GROUP BY ALL
ORDER BY run, kind
