"""Shows what a local warehouse holds: the partitions of both tables, and an item's nearest items in each training.

On BigQuery the second question is one for VECTOR_SEARCH, which scales and can use an index; the emulator does not
know it, so the distance to every item is computed here.
"""

import argparse
from collections.abc import Iterable, Sequence

from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

from beam_pipeline.emulators import Warehouse

DATASET = "raw_dev"
NEIGHBOURS = 5

PARTITIONS = """
SELECT train_date, mlflow_run_name, COUNT(*) AS embeddings, MAX(ARRAY_LENGTH({tower}_embedding)) AS dimensions
FROM {dataset}.two_tower_{tower}_embedding
GROUP BY train_date, mlflow_run_name
ORDER BY train_date, mlflow_run_name
"""

# Embeddings of different trainings do not compare: both sides are of one run.
NEAREST = """
SELECT item.train_date, item.mlflow_run_name, other.item_id AS neighbour,
  COSINE_DISTANCE(item.item_embedding, other.item_embedding) AS distance
FROM {dataset}.two_tower_item_embedding AS item
JOIN {dataset}.two_tower_item_embedding AS other
  ON other.train_date = item.train_date AND other.mlflow_run_id = item.mlflow_run_id
WHERE item.item_id = @item AND other.item_id != @item
QUALIFY ROW_NUMBER() OVER (PARTITION BY item.train_date, item.mlflow_run_id ORDER BY distance) <= {neighbours}
ORDER BY item.train_date, item.mlflow_run_id, distance
"""


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    print(title)
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def main() -> None:
    """Asks the warehouse and prints its answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("warehouse", help="folder given to --warehouse")
    parser.add_argument("--item", required=True, help="id of the item whose neighbours to show")
    args = parser.parse_args()

    with Warehouse(args.warehouse) as warehouse:
        client = bigquery.Client(project=warehouse.project, credentials=AnonymousCredentials())
        partitions = []
        for tower in ("user", "item"):
            answer = client.query_and_wait(PARTITIONS.format(dataset=DATASET, tower=tower))
            partitions += [(f"{DATASET}.two_tower_{tower}_embedding", *row.values()) for row in answer]
        show("Partitions", ["table", "train_date", "run", "rows", "dimensions"], partitions)

        nearest = client.query_and_wait(
            NEAREST.format(dataset=DATASET, neighbours=NEIGHBOURS),
            job_config=bigquery.QueryJobConfig(
                query_parameters=[bigquery.ScalarQueryParameter("item", "STRING", args.item)]
            ),
        )
        rows = [(row.train_date, row.mlflow_run_name, row.neighbour, f"{row.distance:.3f}") for row in nearest]
        if not rows:
            parser.error(f"--item={args.item}: no such item in {args.warehouse}")
        show(
            f"Nearest items of {args.item} in each training (cosine distance; on BigQuery: VECTOR_SEARCH)",
            ["train_date", "run", "item", "distance"],
            rows,
        )


if __name__ == "__main__":
    main()
