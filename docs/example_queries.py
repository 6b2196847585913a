# %% [markdown]
# Ask a run: run this file with a run's folder or id, or take it cell by cell into a notebook.
#     python docs/example_queries.py runs/runs/<run id>

# %%
import sys

import asyncopd

run = asyncopd.open_run(sys.argv[1])
print(run.run_id, "·", run.config.task.kind, "·", run.config.loss.name)

# %% Typed values, straight from the log: numpy arrays, checked against their manifests.
steps = run.log.steps()
shard = run.log.trajectory_shards()[0]
first = run.log.read_trajectories(shard)[0]
print(f"{len(steps)} steps; trajectory {first.index} has {len(first.response_ids)} tokens, versions {first.versions_T}")

# %% The same as a query, decoded.
rows = run.sql(
    "SELECT index, text_of(run, prompt_ids) AS prompt, text_of(run, response_ids) AS response FROM trajectories"
)
print(rows.rows()[0])

# %% A stored question, and its parameters.
for row in run.sql("kl_by_position", width=16).rows():
    print(f"position {row['position']:4}: KL {row['kl_nats']:.3f} ± {row['standard_error_nats']:.3f} nats")

# %% Everything about tokens as Arrow; .polars() and .pandas() give data frames where those are installed.
table = run.sql("SELECT staleness, kl_nats, version FROM tokens WHERE staleness IS NOT NULL").arrow()
print(table.group_by("staleness").aggregate([("kl_nats", "mean"), ("version", "count")]).to_pylist())

# %% What it looked like when version 1 had just been published.
print(run.sql("SELECT count(*) AS trajectories FROM trajectories", as_of=asyncopd.AsOf(version=1)).rows())
