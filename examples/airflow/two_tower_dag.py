"""After each training: evaluate the model and, if it is good enough, historize its embeddings and compare them.

Copy it into the DAGs folder and set the defaults. All tasks run in an environment that has `beam-pipeline[launcher]`
in it, named by BEAM_PIPELINE_PYTHON; Airflow's own keeps its versions. Where MLflow is (MLFLOW_TRACKING_URI) and its
token are in the worker's environment: pipeline options are shown by Airflow and by Dataflow.
"""

import os

from airflow.providers.apache.beam.operators.beam import BeamRunPythonPipelineOperator
from airflow.sdk import Param, dag, task
from airflow.sdk.exceptions import AirflowSkipException

PYTHON = os.environ.get("BEAM_PIPELINE_PYTHON", "/opt/beam_pipeline/bin/python")


class PipelineOperator(BeamRunPythonPipelineOperator):
    """Waits in the triggerer for a job on Dataflow; any other runner would run there, and so runs in the worker."""

    def execute(self, context):
        """Runs the launcher, and waits for what it started."""
        self.deferrable = self.runner == "DataflowRunner"
        return super().execute(context)

    def defer(self, **arguments):
        """Waits for the job; there is none after a first training, which has nothing to be compared with."""
        if not self.dataflow_job_id:
            raise AirflowSkipException("the launcher had nothing to do; see its last line")
        super().defer(**arguments)


@dag(
    schedule=None,  # the training triggers it: TriggerDagRunOperator(conf={"run_id": …}), or an asset
    catchup=False,
    params={
        "run_id": Param("", type="string", title="MLflow run; empty: the experiment's latest FINISHED run"),
        "experiment_name": Param("two_tower", type="string"),
        "metric": Param("recall_at_10", type="string", title="Metric of the run that decides; empty: none does"),
        "at_least": Param(0.1, type="number"),
        "env": Param("dev", enum=["dev", "stg", "prod"]),
        "if_partition_taken": Param("fail", enum=["fail", "replace", "keep"]),
        "fail_if_unusual": Param(False, type="boolean", title="An unusual comparison fails its task, and what follows"),
        "runner": Param("DataflowRunner", enum=["DataflowRunner", "DirectRunner"]),
        "project": Param("my-project", type="string"),
        "region": Param("europe-west1", type="string"),
        "temp_location": Param("gs://my-bucket/tmp", type="string"),
        "image": Param("europe-docker.pkg.dev/my-project/images/beam_pipeline:1", type="string"),
    },
)
def two_tower():
    """Evaluate, historize, compare with the training before."""

    @task.external_python(python=PYTHON, expect_airflow=False, skip_on_exit_code=99)
    def evaluate(mlflow_run_id, experiment_name, metric, at_least):  # "run_id" alone is a word of Airflow's own
        """Returns the run's id; skips what follows if its metric is too low."""
        import sys

        from mlflow.tracking import MlflowClient

        from beam_pipeline.tracking.runs import find_run

        run_id = mlflow_run_id or find_run(experiment_name=experiment_name).run_id
        if metric:
            value = MlflowClient().get_run(run_id).data.metrics[metric]
            print(f"{metric} of run {run_id} is {value}, wanted at least {at_least}")
            if not value >= float(at_least):  # NaN too
                sys.exit(99)
        return run_id

    run_id = evaluate(
        "{{ params.run_id }}", "{{ params.experiment_name }}", "{{ params.metric }}", "{{ params.at_least }}"
    )
    where = {
        "env": "{{ params.env }}",
        "project": "{{ params.project }}",
        "temp_location": "{{ params.temp_location }}",
        "sdk_container_image": "{{ params.image }}",
        "labels": {"dag": "two-tower"},
    }

    def pipeline(task_id, module, **options):
        return PipelineOperator(
            task_id=task_id,
            py_interpreter=PYTHON,
            py_options=["-m"],
            py_file=module,
            runner="{{ params.runner }}",
            # Templates become strings: an option that may be absent is set in Python, not in a template.
            pipeline_options={**where, **options},
            dataflow_config={
                # One name per run, with nothing appended: Dataflow refuses a second launch while the first is active.
                "job_name": f"{task_id}-{run_id}",
                "append_job_name": False,
                "project_id": "{{ params.project }}",
                "location": "{{ params.region }}",
            },
        )

    historize = pipeline(
        "historize",
        "beam_pipeline",
        run_id=run_id,
        if_partition_taken="{{ params.if_partition_taken }}",
        tower=["user=user_layer", "item=item_layer"],
    )
    compare = pipeline("compare", "beam_pipeline.compare", to=run_id, fail_if_unusual="{{ params.fail_if_unusual }}")
    historize >> compare


two_tower()
