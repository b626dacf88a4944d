"""What `import beam_pipeline` gives, and what it leaves alone; the examples of the docstrings."""

import json
import subprocess
import sys

import pytest
from docstrings import run_examples

import beam_pipeline as bp

_IMPORT = """
import json, logging, os, signal, sys, threading
before = dict(os.environ), logging.getLogger().level, [*logging.getLogger().handlers], signal.getsignal(signal.SIGTERM)
import beam_pipeline as bp
modules = sorted(sys.modules)
if {use}:
    for name in bp.__all__:
        getattr(bp, name)
after = dict(os.environ), logging.getLogger().level, [*logging.getLogger().handlers], signal.getsignal(signal.SIGTERM)
print(json.dumps([before == after, modules, sorted(set(bp.__all__) - set(dir(bp)))]))
"""


def imported(*, use):
    done = subprocess.run([sys.executable, "-c", _IMPORT.format(use=use)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_is_lazy():
    _, modules, unlisted = imported(use=False)
    # What site-packages itself imports at start are empty namespaces, such as google.cloud.
    heavy = (
        "apache_beam",
        "tensorflow",
        "mlflow",
        "numpy",
        "pyarrow",
        "google.cloud.",
        "google.api_core",
        "google.auth",
    )
    assert [name for name in modules if name.startswith(heavy)] == []
    assert [name for name in modules if name.startswith("beam_pipeline")] == ["beam_pipeline", "beam_pipeline.errors"]
    assert unlisted == []


def test_import_has_no_side_effects():
    unchanged, _, _ = imported(use=True)
    assert unchanged, "importing the package changed os.environ, the root logger or a signal handler"


_READ = """
import json, logging, os, signal, sys, warnings
import beam_pipeline as bp
for name in bp.__all__:
    getattr(bp, name)
def state():
    root = logging.getLogger()
    return dict(os.environ), root.level, [*root.handlers], [*warnings.filters], signal.getsignal(signal.SIGTERM), os.getcwd()
before = state()
with bp.open_model(sys.argv[1]) as model:
    ids, vectors = model.tower("user_layer").read()
print(json.dumps([before == state(), len(ids)]))
"""


def test_reading_a_model_has_no_side_effects(models):
    folder = str(models("plain").folder)
    done = subprocess.run([sys.executable, "-c", _READ, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [True, 3015], "opening a model changed the process, or printed something"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'beam_pipeline' has no attribute 'publish'"):
        bp.publish  # noqa: B018
    assert issubclass(bp.errors.ChecksumError, bp.PipelineError)


@pytest.mark.parametrize("name", ["open_model", "Model", "ModelTower", "ReadEmbeddings"])
def test_the_examples_of_a_docstring(name, models):
    run_examples(getattr(bp, name), folder=str(models("plain").folder))


def test_as_in_a_notebook(models):
    """Which items are most like the first user, by the dot product that the model scores with."""
    with bp.open_model(models("plain").folder) as model:
        users, user_vectors = model.tower("user_layer").read()
        items, item_vectors = model.tower("item_layer").read()
    best = (item_vectors @ user_vectors[users.index("u0").as_py()]).argsort()[::-1][:3]
    vector = models("plain").rows("user")["u0"]
    scores = {
        name: sum(a * b for a, b in zip(vector, other, strict=True))
        for name, other in models("plain").rows("item").items()
    }
    assert items.take(best).to_pylist() == sorted(scores, key=scores.get, reverse=True)[:3]
