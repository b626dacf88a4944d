"""The files beside a model that hold ids or vectors of its towers: where they are, and the towers they describe."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from beam_pipeline.errors import ConfigError
from beam_pipeline.files import list_folder, open_file
from beam_pipeline.formats.files import ids, vectors
from beam_pipeline.formats.files.vectors import fitted
from beam_pipeline.formats.model import Artifact, Matrix, Tower, Vocabulary
from beam_pipeline.launch.options import ROW_NUMBERS, Config, NamedFile
from beam_pipeline.tracking import download
from beam_pipeline.tracking.models import Model, readable_folder
from beam_pipeline.training import Run


@dataclass(frozen=True)
class Sources:
    """The files of a run that hold ids or vectors, as they can be read.

    Attributes:
        ids: tower → the file of its ids.
        vectors: tower → the file of its vectors.
        first_row: tower → the row of its first id, where that is not 0.
    """

    ids: Mapping[str, NamedFile]
    vectors: Mapping[str, NamedFile]
    first_row: Mapping[str, int]

    def towers_of_model(self, artifact: Artifact, layers: Mapping[str, str], *, include_oov: bool) -> list[Tower]:
        """Returns towers whose vectors are in a model, with their tails.

        Args:
            artifact: the model.
            layers: tower → layer.
            include_oov: as `Artifact.tower` takes it.

        Raises:
            ArtifactError: the model, or a file of ids, is not what was asked for.
        """
        towers = []
        for name, layer in layers.items():
            if name in self.ids:
                matrix = artifact.matrix(name, layer)
                towers.append(Tower(name, layer, matrix, self._vocabulary(name, matrix)))
            else:
                towers.append(artifact.tower(name, layer, include_oov=include_oov))
        tails = artifact.tails(layers, self.ids.keys() & layers.keys())
        return [replace(tower, tail=tails[tower.name]) for tower in towers]

    def towers_of_files(self, layers: Mapping[str, str]) -> list[Tower]:
        """Returns the towers whose vectors are in files.

        Args:
            layers: tower → what stands for its layer in the log.

        Raises:
            ArtifactError: a file is not what was asked for.
        """
        towers = []
        for name, file in self.vectors.items():
            found, vocabulary = vectors.find_vectors(
                name, file.path, file.names, open_file, list_folder, outside_ids=name in self.ids
            )
            if vocabulary is None and isinstance(found, Matrix):
                vocabulary = self._vocabulary(name, found)
            if vocabulary is not None:
                towers.append(vectors.file_tower(name, layers[name], found, vocabulary))
        return towers

    def _vocabulary(self, name: str, matrix: Matrix) -> Vocabulary:
        file, first_row = self.ids[name], self.first_row.get(name, 0)
        if file == ROW_NUMBERS:
            return ids.row_numbers(matrix, first_row)
        vocabulary = ids.read_vocabulary(file.path, name, file.names, first_row, open_file, list_folder)
        return fitted(name, vocabulary, matrix)


def find_sources(config: Config, run: Run, copies_to: str, copies: ExitStack, progress: download.Progress) -> Sources:
    """Returns the files that --ids and --vectors name, copied where the workers could not read them.

    Args:
        config: what was asked for.
        run: whose artifacts they are in.
        copies_to: folder for copies.
        copies: removes them if what follows fails.
        progress: shows the copying.

    Raises:
        ConfigError: the workers could not read a file.
        ArtifactMissingError: a file is not there.
    """
    found: dict[str, dict[str, NamedFile]] = {"ids": {}, "vectors": {}}
    for kind, files in (("ids", config.ids), ("vectors", config.vectors)):
        for name, file in files.items():
            path = file.path
            # What is on Cloud Storage can be read everywhere.
            if file != ROW_NUMBERS and not path.startswith("gs://"):
                path = _readable(config, run, file.path, f"{copies_to}/{run.run_id}-{kind}-{name}", copies, progress)
            found[kind][name] = replace(file, path=path)
    return Sources(found["ids"], found["vectors"], config.first_row)


def _readable(
    config: Config, run: Run, path: str, copies_to: str, copies: ExitStack, progress: download.Progress
) -> str:
    """Returns the path of a file, a folder or a pattern below a run's artifacts, where this process can read it."""
    parent, _, last = path.rpartition("/")
    # A store of MLflow's lists folders, and knows no patterns: the whole folder is copied where it has to be.
    inside, pattern = (parent, f"/{last}") if "*" in last else (path, "")
    place = Model(path, run.artifact_uri, inside)
    folder = readable_folder(place)
    if folder is None:
        return copies.enter_context(download.copied(place, copies_to, config.tracking_uri, progress)) + pattern
    if not config.reads_local_files and not folder.startswith("gs://"):
        raise ConfigError(
            f"{config.runner} cannot read {folder} of run {run.run_id} on this machine; use a run whose artifacts are "
            f"on gs://{config.sharing}, or --runner=DirectRunner"
        )
    return folder + pattern
