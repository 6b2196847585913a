-- question: Which shards took longest, and why?
-- parameter num INTEGER = 20: rows
-- column run: run id
-- column stage: rollout or score
-- column shard: first and last index
-- column seconds: wall time from start to publication, s
-- column num_tokens: response tokens in it
-- column longest: its longest response, tokens
-- column tokens_per_second: num_tokens / seconds
-- column attempts: claims made for it; more than 1 means that a worker died over it
-- column worker: who published it
WITH slow AS (SELECT * FROM shards WHERE seconds IS NOT NULL ORDER BY seconds DESC, run, stage, shard LIMIT $num),
lengths AS (SELECT run, shard, max(num_tokens) AS longest FROM trajectories GROUP BY ALL),
attempts AS (SELECT run, shard, split_part(stage, '-', 1) AS stage, max(attempt) AS attempts FROM claims GROUP BY ALL)
SELECT run, stage, shard, seconds, num_tokens, longest, num_tokens / nullif(seconds, 0) AS tokens_per_second,
    attempts, worker
FROM slow LEFT JOIN lengths USING (run, shard) LEFT JOIN attempts USING (run, stage, shard)
ORDER BY seconds DESC, run, stage, shard
