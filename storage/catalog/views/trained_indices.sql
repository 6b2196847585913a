-- relation: One row per index and the step of the surviving lineage that trained it.
-- reads steps, dropped
-- column run: Run id.
-- column index: Trajectory index.
-- column step: The step; it started from policy version `step` and made version `step + 1`.
WITH planned AS (SELECT run, step, unnest(indices) AS index FROM steps)
SELECT planned.run, planned.index, planned.step
FROM planned ANTI JOIN (SELECT run, index FROM dropped WHERE stage = 'learn') AS gone USING (run, index)
