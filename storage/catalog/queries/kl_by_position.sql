-- question: Where in the response do student and teacher differ?
-- parameter width INTEGER = 8: positions per row
-- column run: run id
-- column position: first position of the stretch, from 0
-- column num_tokens: scored tokens there
-- column kl_nats: mean of log p_old − log q, an unbiased estimate of KL(p_old‖q) per token, nats
-- column standard_error_nats: of kl_nats, tokens taken as independent, nats
SELECT run, position // $width * $width AS position, count(kl_nats) AS num_tokens, avg(kl_nats) AS kl_nats,
    stddev_samp(kl_nats) / sqrt(count(kl_nats)) AS standard_error_nats
FROM tokens
GROUP BY ALL
ORDER BY run, position
