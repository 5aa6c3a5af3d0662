"""The campaign in MLflow's format, in its own folder and offline, where MLflow is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from raysegment.applications.campaign.journal import Journal, Record
from raysegment.applications.campaign.space import CampaignConfig


def log_to_mlflow(out: Any, config: CampaignConfig, journal: Journal) -> bool:
    """Each trial as a run in `out`/mlflow.db, once; whether MLflow is there."""
    if importlib.util.find_spec("mlflow") is None:
        return False
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    name = config.question or config.folder.name
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name, artifact_location=f"file://{out}/mlflow")
    known = {run.data.tags.get("trial") for run in client.search_runs([experiment], max_results=50000)}
    for record in journal.records.values():
        if record.status and record.trial not in known:
            _log(client, experiment, config, record)
    return True


def _log(client: Any, experiment: str, config: CampaignConfig, record: Record) -> None:
    tags = {"trial": record.trial, "phase": record.phase, "status": record.status, "reason": record.reason}
    run = client.create_run(experiment, tags=tags, run_name=record.trial).info.run_id
    for key, value in record.point.items():
        client.log_param(run, key, value)
    for report in record.reports:
        for key, name in (("value", config.metric), ("loss", "trial_loss"), ("iou", "trial_iou")):
            if report[key] is not None:
                client.log_metric(run, name, report[key], step=report["step"])
    client.set_terminated(run, "FINISHED" if record.status == "finished" else "KILLED")
