-- question: Do long responses differ more from the teacher than short ones?
-- column run: run id
-- column tokens_from: shortest length of the class; each class is twice as wide as the one before
-- column num_responses: scored responses
-- column kl_nats: mean over tokens of log p_old − log q, nats
-- column correct_share: responses the verifier accepts, fraction
WITH sampled AS (
    SELECT run, index, num_tokens, correct, list_sum(behaviour_logprobs) AS student FROM trajectories
), scored AS (
    SELECT run, index, list_sum(sampled_logprobs) AS teacher_logprob
    FROM scores WHERE origin = 'run'
), per_response AS (
    SELECT run, num_tokens, correct, student - teacher_logprob AS kl FROM sampled JOIN scored USING (run, index)
)
SELECT run, (2 ** floor(log2(num_tokens)))::INTEGER AS tokens_from, count(*) AS num_responses,
    sum(kl) / sum(num_tokens) AS kl_nats, avg(correct::INTEGER) AS correct_share
FROM per_response
GROUP BY ALL
ORDER BY run, tokens_from
