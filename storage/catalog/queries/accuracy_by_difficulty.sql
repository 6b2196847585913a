-- question: How does training accuracy on easy and hard prompts change?
-- parameter every INTEGER = 25: steps per row
-- column run: run id
-- column prompt_group: the prompt's label; all of a run where prompts have none
-- column step: first step of the stretch
-- column num_responses: verified responses
-- column accuracy: those the verifier accepts, fraction
-- column standard_error: of accuracy
SELECT run, prompt_group, step // $every * $every AS step, count(correct) AS num_responses,
    avg(correct::INTEGER) AS accuracy,
    sqrt(avg(correct::INTEGER) * (1 - avg(correct::INTEGER)) / nullif(count(correct), 0)) AS standard_error
FROM trajectories
WHERE step IS NOT NULL AND correct IS NOT NULL
GROUP BY ALL
ORDER BY run, prompt_group, step
