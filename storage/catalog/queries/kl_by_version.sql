-- question: How far from the teacher is each policy version on its own tokens?
-- parameter every INTEGER = 10: versions per row
-- column run: run id
-- column version: first policy version of the stretch that sampled the tokens
-- column num_tokens: scored tokens they produced
-- column kl_nats: mean of log p_old − log q, nats per token
SELECT run, version // $every * $every AS version, count(kl_nats) AS num_tokens, avg(kl_nats) AS kl_nats
FROM tokens
GROUP BY ALL
ORDER BY run, version
