-- question: How much of the teacher's probability do its k most likely ids cover?
-- column run: run id
-- column folder: whose scores: the teacher, and after an @ what a back-fill asked for
-- column k: number of ids
-- column mass: mean probability of the k most likely ids together, fraction
-- column mass_of_kth: mean probability of the k-th alone, fraction
-- column num_tokens: positions with so many stored ids
WITH ids AS (
    SELECT run, folder, topk_k, generate_subscripts(topk_logprobs, 1) - 1 AS i, unnest(topk_logprobs) AS logprob
    FROM score_rows WHERE topk_k > 0
), by_rank AS (
    SELECT run, folder, i % topk_k + 1 AS k, avg(exp(logprob)) AS mass, count(*) AS num_tokens FROM ids GROUP BY ALL
)
SELECT run, folder, k, sum(mass) OVER (PARTITION BY run, folder ORDER BY k) AS mass, mass AS mass_of_kth, num_tokens
FROM by_rank
ORDER BY run, folder, k
