"""What the DAG meets: a model by tf-keras, an MLflow store and emulators. Run by the project's Python, not Airflow's.

Prints one line of JSON when all is there, and serves until its stdin is closed.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from mlflow.tracking import MlflowClient
from models import made_by
from store import Store

from beam_pipeline import emulators


def main(folder):
    announce, sys.stdout = sys.stdout, sys.stderr
    with emulators.Warehouse(str(folder / "warehouse")) as warehouse:
        emulators.connect()
        (folder / "mlflow").mkdir()
        store = Store(folder / "mlflow", warehouse)
        model = made_by("make_models.py")("plain")
        start = datetime(2026, 3, 1, 23, 30, tzinfo=UTC)
        local = store.log(model, "weekly", start)
        # Workers of Dataflow read artifacts from a bucket only.
        on_a_bucket = store.log(model, "on a bucket", start, bucket=True)
        later = store.log(model, "a week later", datetime(2026, 3, 8, 23, 30, tzinfo=UTC), bucket=True)
        for run in (local, on_a_bucket, later):
            MlflowClient(store.uri).log_metric(run, "recall_at_10", 0.25)
        found = {
            "bigquery": warehouse.bigquery_url,
            "storage": warehouse.storage_url,
            "read": warehouse.read_host,
            "project": warehouse.project,
            "temp_location": warehouse.temp_location,
            "tracking_uri": store.uri,
            "experiment": store.experiment,
            "local": local,
            "on_a_bucket": on_a_bucket,
            "later": later,
            "rows": {tower: model.rows(tower) for tower in ("user", "item")},
        }
        print(json.dumps(found), file=announce, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
