"""`/healthz`, `/readyz` and `/metrics`: for load balancers, operators and Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.deps import Reader, Runs
from api.problems import responses
from api.reader import RunReader
from api.schemas import Check, Health, Readiness, Run
from asyncopd import __version__
from asyncopd.errors import StorageError
from asyncopd.local.stack import server_answers, shown_url

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="get_health")
def get_health() -> Health:
    """The process is alive. Needs no token."""
    return Health(version=__version__)


@router.get("/readyz", operation_id="get_readiness", responses={503: {"model": Readiness, "description": "Not ready"}})
def get_readiness(runs: Runs, response: Response) -> Readiness:
    """Does storage answer, and can runs be launched? Needs no token and names no run."""
    storage = Check(ok=True, detail="the storage root answers")
    try:
        runs.store.folder("runs")
    except StorageError as error:
        storage = Check(ok=False, detail=str(error))
    prefect = Check(ok=server_answers(), detail=f"{shown_url()} answers")
    if not prefect.ok:
        missing = f"no Prefect server answers at {shown_url()}; start it with `asyncopd up`."
        prefect = Check(ok=False, detail=f"{missing} Runs can be looked at, not launched.")
    ready = storage.ok and prefect.ok
    response.status_code = 200 if ready else 503
    return Readiness(ready=ready, checks={"storage": storage, "prefect": prefect})


@router.get(
    "/metrics",
    operation_id="get_prometheus_metrics",
    dependencies=[Reader],
    responses=responses(),
    response_class=Response,
)
def get_prometheus_metrics(request: Request) -> Response:
    """Prometheus exposition; runs that are over are counted, not listed."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


_GAUGES: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("asyncopd_trained_steps", "Optimizer steps trained.", lambda r: r.progress.steps),
    ("asyncopd_trained_tokens", "Response tokens trained.", lambda r: r.progress.tokens),
    ("asyncopd_train_loss_nats", "Loss of the last step.", lambda r: r.latest.loss_nats),
    ("asyncopd_train_kl_nats", "KL to the teacher on the last step.", lambda r: r.latest.kl_nats),
    ("asyncopd_train_drift_nats", "Drift on the last step.", lambda r: r.latest.drift_nats),
    (
        "asyncopd_train_staleness_mean_versions",
        "Mean staleness of the last step.",
        lambda r: r.latest.staleness_mean_versions,
    ),
    ("asyncopd_eval_accuracy_ratio", "Held-out accuracy.", lambda r: r.latest.accuracy),
)


class RunCollector(Collector):
    """Gauges of the runs that go on, read from storage when asked."""

    def __init__(self, reader: RunReader) -> None:
        self._reader = reader

    def collect(self) -> Iterator[Metric]:
        runs = [self._reader.run(run_id) for run_id in self._reader.ids()]
        by_status = GaugeMetricFamily("asyncopd_runs", "Runs by status.", labels=["status"])
        for status in sorted({run.status for run in runs}):
            by_status.add_metric([status], sum(run.status == status for run in runs))
        yield by_status
        live = [run for run in runs if run.status == "running"]
        for name, about, value_of in _GAUGES:
            gauge = GaugeMetricFamily(name, about, labels=["run"])
            for run in live:
                if (value := value_of(run)) is not None:
                    gauge.add_metric([run.id], value)
            yield gauge
