"""The plan of a launch: what it publishes, what was found, and the job's name; as JSON and as SQL for a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from beam_pipeline.bigquery import publication as publications
from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.publication import Publication
from beam_pipeline.launch import execution, preflight
from beam_pipeline.launch.findings import Findings
from beam_pipeline.launch.options import Config
from beam_pipeline.launch.session import Session
from beam_pipeline.reading.tally import Tally
from beam_pipeline.training import Run, Training


@dataclass(frozen=True)
class Plan:
    """What a launch is going to do, once everything was checked.

    Attributes:
        publication: what is published, and where to.
        findings: what was checked; one of them may stop the job.
        job_name: of the Beam job.
        labels: of a Dataflow job, as `key=value`.
    """

    publication: Publication
    findings: Findings
    job_name: str
    labels: tuple[str, ...]


def make_plan(
    config: Config, session: Session, given: PipelineOptions, runs: Sequence[Run], trainings: Sequence[Training]
) -> Plan:
    """Returns the plan for the trainings that are to be published, everything checked and nothing changed.

    Args:
        config: what was asked for.
        session: of the launch.
        given: Beam's options as they were given.
        runs: those that were asked for, published already or not; they name the job.
        trainings: what is to be published.
    """
    name = job_name(config, session.token, given, runs)
    publication = Publication(
        destination=session.destination,
        trainings=tuple(trainings),
        temp_location=session.temp_location,
        if_partition_taken=config.if_partition_taken,
        launch_prefix=session.token,
        job_name=name,
        partition_expiration_days=config.partition_expiration_days,
        require_partition_filter=config.require_partition_filter,
        kms_key=config.kms_key,
        vector_index=config.vector_index,
        latest_tables=config.latest_tables,
    )
    cloud = given.view_as(GoogleCloudOptions)
    findings = preflight.examine(
        session.client,
        publication,
        config,
        region=cloud.region if config.runner == "DataflowRunner" else None,
        dataflow_kms_key=cloud.dataflow_kms_key or config.kms_key,
    )
    return Plan(publication, findings, name, labels(config, runs))


def job_name(config: Config, token: str, given: PipelineOptions, runs: Sequence[Run]) -> str:
    """Returns the job's name: the same for every launch of a run, or of --all_runs of an experiment."""
    subject = f"experiment-{runs[0].experiment_id}" if config.all_runs else runs[0].run_id
    return execution.job_name(config, token, given, f"{publications.JOB_NAME}-{subject}")


def labels(config: Config, runs: Sequence[Run]) -> tuple[str, ...]:
    """Returns labels that say what a Dataflow job publishes."""
    return execution.job_labels(config, None if config.all_runs else runs[0].run_id, runs[0].experiment_name)


def as_sql(publication: Publication) -> str:
    """Returns the publish scripts that the job would run."""
    # What the log says of the vectors is known once they were read.
    unknown = Tally(ids=0, bytes=0, norm_min=0.0, norm_mean=0.0, norm_max=0.0, zero_vectors=0)
    return "\n".join(
        f"-- run {training.run.run_id}; the job fills in the launch id and the numbers of the log's rows\n"
        + tables.publish_script(
            publication.destination,
            number,
            training,
            "LAUNCH",
            publication.if_partition_taken,
            dict.fromkeys(publication.towers, unknown),
            publication.job_name,
            latest_tables=publication.latest_tables,
        )
        for number, training in enumerate(publication.trainings)
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON has it: whether the job could run, trainings, findings and SQL."""
    publication = plan.publication
    return {
        "go": plan.findings.error is None,
        "trainings": [
            {
                "run_id": training.run.run_id,
                "run_name": training.run.run_name,
                "experiment_name": training.run.experiment_name,
                "train_date": str(training.run.train_date),
                "model_uri": training.model_uri,
                "towers": [
                    {
                        "tower": name,
                        "layer": tower.layer,
                        "rows": tower.matrix.rows,
                        "dimension": tower.matrix.dimension,
                        "dtype": tower.matrix.dtype,
                        "table": publication.destination.table(name),
                    }
                    for name, tower in training.towers.items()
                ],
            }
            for training in publication.trainings
        ],
        "findings": [{"check": line.check, "status": line.status, "text": line.text} for line in plan.findings.lines],
        "sql": as_sql(publication),
    }
