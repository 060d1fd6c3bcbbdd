"""MLflow. Metrics cannot be taken back there: a run that goes on is found again by its id, keeps the points that were
sent before the stop, and continues after them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from configs.trackers import DEFAULT_PROJECT, Mlflow
from launch.trackers.protocol import Ending, Point, RunFacts
from launch.trackers.reaching import answers

ID_TAG = "stillhouse.id"
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000
"""Of one request, and of one value: limits of MLflow's REST API."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""The follower tries again itself; the library's own 120 s, seven times, would hide that a server is gone."""

KILLED = (75, 130)  # exit codes of runs that were asked to stop


class Tracker(Mlflow):
    """Which server or file, and which experiment."""

    @property
    def given_uri(self) -> str | None:
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")

    def reach(self) -> None:
        uri = self.given_uri or ""
        if uri.startswith(("http://", "https://")):
            answers(f"{uri.rstrip('/')}/health")

    def begin(self, run: RunFacts) -> MlflowRun:
        self.reach()  # says in a line what the library says in ten
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        uri = self.given_uri or f"sqlite:///{run.folder / 'mlflow.db'}"
        _make_database(uri)
        client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(client)
        found = client.search_runs([experiment], f"tags.`{ID_TAG}` = '{run.id}'", max_results=1)
        if found:
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            tags = {**self.tags, ID_TAG: run.id}
            run_id = client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
            _log_settings(client, run_id, run.config)
        page = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        where = page if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
        return MlflowRun(client, run_id, where=where, held=None if found else -1)

    def _experiment(self, client: Any) -> str:
        """Its id; it is made where there is none."""
        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_PROJECT
        found = client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else client.create_experiment(name))


class MlflowRun:
    """`TrackedRun`: every request is answered before the next one."""

    def __init__(self, client: Any, run_id: str, *, where: str, held: int | None) -> None:
        self._client = client
        self._run_id = run_id
        self.where = where
        self.held = held

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = (
            Metric(name, value, int(point.time_s * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        )
        while some := list(islice(metrics, MOST_METRICS)):
            self._client.log_batch(self._run_id, metrics=some)

    def rewind(self, step: int) -> bool:
        return False

    def close(self, ending: Ending | None) -> None:
        from mlflow.entities import RunTag

        code = None if ending is None else ending.code
        if ending is not None:
            said = {"stillhouse.exit_code": ending.code, "stillhouse.reason": ending.reason, **ending.summary}
            tags = [RunTag(name, str(value)[:LONGEST_PARAM]) for name, value in said.items()]
            self._client.log_batch(self._run_id, tags=tags)
        status = "FINISHED" if code == 0 else "KILLED" if code is None or code in KILLED else "FAILED"
        self._client.set_terminated(self._run_id, status)


def _make_database(uri: str) -> None:
    """A database file that is not there is made beside its place and moved there whole: it takes MLflow seconds, and
    one that was stopped in the middle could never be opened again."""
    from mlflow.tracking import MlflowClient

    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or file.exists():
        return
    made = file.with_name(f".{file.name}.{os.getpid()}")
    MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
    made.replace(file)


def _log_settings(client: Any, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    settings = (Param(name, str(value)[:LONGEST_PARAM]) for name, value in _flat(config, ""))
    while some := list(islice(settings, MOST_PARAMS)):
        client.log_batch(run_id, params=some)


def _flat(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """`training.steps` -> 50. What is not set is left out."""
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _flat(inside, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, inside in enumerate(value):
            yield from _flat(inside, f"{place}.{index}")
    elif value is not None:
        yield place, value
