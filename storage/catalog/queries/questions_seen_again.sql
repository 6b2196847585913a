-- question: Does a question that comes up again get a better answer than the first time?
-- column run: run id
-- column time: which time the question was asked, 1 is the first
-- column num_responses: verified responses
-- column accuracy: those the verifier accepts, fraction
-- column mean_tokens: mean length
WITH numbered AS (
    SELECT run, correct, num_tokens, row_number() OVER (PARTITION BY run, prompt_id ORDER BY index) AS time
    FROM trajectories WHERE correct IS NOT NULL
)
SELECT run, time, count(*) AS num_responses, avg(correct::INTEGER) AS accuracy, avg(num_tokens) AS mean_tokens
FROM numbered
GROUP BY ALL
ORDER BY run, time
