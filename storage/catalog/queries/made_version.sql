-- question: Which trajectories made a policy version out of the one before?
-- parameter version INTEGER = 1: the version
-- column run: run id
-- column index: trajectory
-- column prompt_id: its question
-- column version_first: policy version that sampled its first token
-- column num_tokens: its length, tokens
-- column correct: the verifier's answer
-- column dropped: why it was not trained; null when it was
SELECT planned.run, planned.index, t.prompt_id, t.version_first, t.num_tokens, t.correct, dropped.reason AS dropped
FROM (SELECT run, unnest(indices) AS index FROM steps WHERE version = $version) AS planned
LEFT JOIN trajectories AS t USING (run, index)
LEFT JOIN (SELECT run, index, min(reason) AS reason FROM dropped GROUP BY ALL) AS dropped USING (run, index)
ORDER BY planned.run, planned.index
