-- question: How many of the trained tokens count, after importance weighting, as training goes on?
-- parameter every INTEGER = 10: steps per row
-- column run: run id
-- column step: first step of the stretch
-- column ess_fraction: mean effective sample size, fraction of the step's tokens
-- column worst_ess_fraction: of its worst step
-- column drift_nats: mean KL(p_old‖p_θ), nats per token
-- column staleness_mean: mean staleness, versions
SELECT run, step // $every * $every AS step, avg(metrics['train/ess_fraction']) AS ess_fraction,
    min(metrics['train/ess_fraction']) AS worst_ess_fraction, avg(metrics['train/drift_nats']) AS drift_nats,
    avg(metrics['train/staleness_mean_versions']) AS staleness_mean
FROM steps
GROUP BY ALL
ORDER BY run, step
