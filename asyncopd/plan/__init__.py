"""The capacity planner: what a fleet of GPUs will do, before it is paid for. A simulation of the run's own scheduling.

workload.py   how long responses are, what work costs per GPU, and the fleet that does it
pipeline.py   the discrete-event simulation; admission is asyncopd/schedule.py's
forecast.py   throughput, overlap and staleness of fleets and staleness bounds; costs from the timeline of a run
"""
