"""Copies of models, from a folder that MLflow's own client reads to another."""

import contextlib

import pytest

from beam_pipeline.errors import ArtifactMissingError
from beam_pipeline.tracking.download import copied
from beam_pipeline.tracking.models import Model

FILES = {"model/saved_model.pb": b"graph", "model/variables/variables.index": b"index", "other": b"not the model"}


class Progress:
    """Keeps what it was called with, and the bytes done before and after the copy."""

    @contextlib.contextmanager
    def __call__(self, files, size, to, done):
        before = done()
        yield
        self.seen = files, size, to, before, done()


@pytest.fixture
def root(tmp_path):
    for name, data in FILES.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(data)
    return str(tmp_path / "from")


@pytest.fixture
def uri(tmp_path):
    return f"sqlite:///{tmp_path}/mlflow.db"


def files_in(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_is_copied_and_its_progress_shown(root, uri, tmp_path):
    progress = Progress()
    with copied(Model("model", root, "model"), f"{tmp_path}/to", uri, progress) as folder:
        assert folder == f"{tmp_path}/to"
    copy = {name.removeprefix("model/"): data for name, data in FILES.items() if name.startswith("model/")}
    assert files_in(tmp_path / "to") == copy
    assert progress.seen == (2, 10, f"{tmp_path}/to", 0, 10)


def test_a_model_that_is_one_file(root, uri, tmp_path):
    with copied(Model("other", root, "other"), f"{tmp_path}/to", uri, Progress()) as path:
        assert path == f"{tmp_path}/to/other"
    assert files_in(tmp_path / "to") == {"other": FILES["other"]}


def test_the_copy_is_removed_if_the_launch_fails(root, uri, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        copied(Model("model", root, "model"), f"{tmp_path}/to", uri, Progress()),
    ):
        raise KeyboardInterrupt
    assert files_in(tmp_path / "to") == {}


def test_a_model_without_files(root, uri, tmp_path):
    with (
        pytest.raises(ArtifactMissingError, match="model 'gone' has no files at "),
        copied(Model("gone", root, "gone"), f"{tmp_path}/to", uri, Progress()),
    ):
        pytest.fail("there is nothing to copy")
