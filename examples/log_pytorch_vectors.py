"""Trains a small two-tower model with PyTorch and logs its towers' outputs to MLflow, for `--vectors`.

The data is invented, as in train_two_tower.py. What is logged is what the model serves: the output of each tower for
each id, not the row of an embedding. Two forms are written:

* `vectors/user.parquet` and `vectors/item.parquet`: columns id and vector, with checksums of the pages;
* `vectors/towers.safetensors`: tensors user and item, with the ids beside it in `vectors/user_ids.txt` and so on.

    python examples/log_pytorch_vectors.py
    beam-pipeline --experiment_name=two_tower --vectors=user=vectors/user.parquet,item=vectors/item.parquet

Prints the run's id, and nothing else, to stdout. It needs torch, mlflow, pyarrow and safetensors.
"""

import argparse
import tempfile
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch

EXPERIMENT = "two_tower"
DIMENSION = 16
GENRES = ["folk", "jazz", "metal", "techno"]
USERS = [f"user-{number:03}" for number in range(300)]
ITEMS = [f"item-{genre}-{number:03}" for genre in GENRES for number in range(30)]


class Tower(torch.nn.Module):
    """An embedding and two dense layers after it: its rows are not what it serves."""

    def __init__(self, ids):
        super().__init__()
        self.embedding = torch.nn.Embedding(len(ids), 32)
        self.dense = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, DIMENSION))

    def forward(self, rows):
        """Returns vectors [n, DIMENSION] of the ids in these rows."""
        return self.dense(self.embedding(rows))


def train(steps, seed):
    """Returns the towers, trained to tell what a user listens to from what others do."""
    torch.manual_seed(seed)
    user, item = Tower(USERS), Tower(ITEMS)
    optimizer = torch.optim.Adam([*user.parameters(), *item.parameters()], lr=0.01)
    per_genre = len(ITEMS) // len(GENRES)
    for _ in range(steps):
        users = torch.randint(len(USERS), (256,))
        # A user's favourite genre follows from the user's number.
        items = users % len(GENRES) * per_genre + torch.randint(per_genre, (256,))
        scores = user(users) @ item(items).T
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(users)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"user": (USERS, user), "item": (ITEMS, item)}


def outputs(ids, tower):
    """Returns what a tower serves for all ids, as a NumPy matrix of float32."""
    with torch.no_grad():
        return tower(torch.arange(len(ids))).contiguous().numpy()


def write(towers, folder):
    """Writes the files of vectors into a folder; towers are name → (ids, matrix)."""
    for name, (ids, vectors) in towers.items():
        # A list of one length: pyarrow keeps the matrix as it is.
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(pa.table({"id": ids, "vector": lists}), folder / f"{name}.parquet", write_page_checksum=True)
        (folder / f"{name}_ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    safetensors.numpy.save_file({name: vectors for name, (_, vectors) in towers.items()}, folder / "towers.safetensors")


def main(argv=None):
    """Trains, logs, and prints the run's id."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tracking_uri", help="default: MLFLOW_TRACKING_URI")
    parser.add_argument("--experiment_name", default=EXPERIMENT)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(argv)
    if options.tracking_uri:
        mlflow.set_tracking_uri(options.tracking_uri)
    mlflow.set_experiment(options.experiment_name)
    with mlflow.start_run() as run, tempfile.TemporaryDirectory() as folder:
        trained = train(options.steps, options.seed)
        write({name: (ids, outputs(ids, tower)) for name, (ids, tower) in trained.items()}, Path(folder))
        mlflow.log_artifacts(folder, "vectors")
        # The weights too: whoever serves the model needs them, and the test compares with what they compute.
        weights = Path(folder, "towers.pt")
        torch.save({name: tower.state_dict() for name, (_, tower) in trained.items()}, weights)
        mlflow.log_artifact(str(weights), "weights")
    print(run.info.run_id)


if __name__ == "__main__":
    main()
