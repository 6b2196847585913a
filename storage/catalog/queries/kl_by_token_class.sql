-- question: On which kind of token do student and teacher differ?
-- column run: run id
-- column class: class of the token (relation `vocabulary`)
-- column num_tokens: scored tokens of the class
-- column share: of all scored tokens, fraction
-- column kl_nats: mean of log p_old − log q, nats per token
-- column share_of_kl: of the sum of KL over all tokens, fraction
WITH by_id AS (SELECT run, token_id, count(kl_nats) AS n, sum(kl_nats) AS kl FROM tokens GROUP BY ALL)
SELECT run, class, sum(n)::BIGINT AS num_tokens, sum(n) / sum(sum(n)) OVER (PARTITION BY run) AS share,
    sum(kl) / sum(n) AS kl_nats, sum(kl) / sum(sum(kl)) OVER (PARTITION BY run) AS share_of_kl
FROM by_id JOIN vocabulary USING (run, token_id)
GROUP BY run, class
ORDER BY run, share_of_kl DESC
