-- question: Do engine and learner agree on the log-prob of the same token under the same weights?
-- parameter every INTEGER = 10: steps per row
-- column run: run id
-- column step: first step of the stretch
-- column num_steps: steps in it that trained without any staleness: there a ratio other than 1 is mismatch alone
-- column drift_nats: mean k3 estimate of KL(engine‖learner) over those steps, nats per token
-- column ratio_p01: lowest first percentile of p_learner/p_engine
-- column ratio_p99: highest 99th percentile
-- column ratio_max: largest ratio of a token
SELECT run, step // $every * $every AS step, count(*) AS num_steps, avg(metrics['train/drift_nats']) AS drift_nats,
    min(metrics['train/ratio_p01']) AS ratio_p01, max(metrics['train/ratio_p99']) AS ratio_p99,
    max(metrics['train/ratio_max']) AS ratio_max
FROM steps
WHERE metrics['train/staleness_max_versions'] = 0
GROUP BY ALL
ORDER BY run, step
