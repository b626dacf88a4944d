"""A tower whose vectors are computed: described at launch, and checked there against what the model takes."""

from __future__ import annotations

from dataclasses import dataclass

from google.cloud import bigquery

from beam_pipeline.computing import is_query, model
from beam_pipeline.computing.columns import Columns, bind, id_column, of_ids
from beam_pipeline.computing.signature import Signature
from beam_pipeline.computing.sources import ParquetFiles, Query, Source, Vocabulary
from beam_pipeline.errors import ArtifactMissingError, FeaturesError, TowerMissingError, UnsupportedModelError
from beam_pipeline.files import list_folder
from beam_pipeline.formats import model as formats
from beam_pipeline.formats.files import parquet
from beam_pipeline.formats.model import Artifact, Encoding, Ending, Matrix, Tail, Tower
from beam_pipeline.formats.protobuf import Span


@dataclass(frozen=True, kw_only=True)
class ComputedTower(Tower):
    """A tower whose vectors are what a part of the model returns.

    Its matrix is in no file: it has a dimension, and rows that are at most those of a lookup, or 0 for features.

    Attributes:
        model_path: the SavedModel's folder, or the `.keras` file.
        signature: what the part of the model takes and returns; `layer` is its path.
        columns: which column is which input.
        ids_from: where ids and features come from.
    """

    model_path: str
    signature: Signature
    columns: Columns
    ids_from: Source

    @property
    def ids_place(self) -> str:
        """Where its ids are, for a message."""
        return super().ids_place if isinstance(self.ids_from, Vocabulary) else str(self.ids_from)

    @property
    def has_ids_beside_it(self) -> bool:
        """Whether its ids are in a table of features."""
        return not isinstance(self.ids_from, Vocabulary)

    @property
    def part(self) -> str:
        """The path of the part in its model, without that of a model of its own."""
        return self.layer.rpartition(":")[2]

    @property
    def is_computed(self) -> bool:
        """Returns True."""
        return True

    @property
    def computed_by(self) -> str:
        """The library that computes its vectors, and its version."""
        return self.signature.library


def computed_tower(
    name: str,
    layer: str,
    model_path: str,
    artifact: Artifact,
    features: str | None,
    client: bigquery.Client | None = None,
    project: str = "",
) -> ComputedTower:
    """Returns a tower to be computed, its features checked against what the model takes.

    The model is loaded: nothing but TensorFlow knows what all its parts take, and a model that cannot be loaded here
    cannot be loaded on a worker.

    Args:
        name: of the tower.
        layer: the part of the model that computes it.
        model_path: the model.
        artifact: the same, as data, for the ids of its lookup.
        features: --features of this tower: a query or a pattern; None for the ids of its lookup.
        client: runs a query's dry run; None if there is no session, and then the features are not looked at.
        project: reads its result, and is billed.

    Raises:
        TowerMissingError: there is no such part, or it returns no vector.
        FeaturesError: the features are not what it takes, or it takes features and there are none.
    """
    signature = model.loaded(model_path).part(name, layer).signature
    source: Source
    if features is None:
        columns = of_ids(name, signature)
        try:
            source = Vocabulary(artifact.tower(name, layer))
        except (TowerMissingError, UnsupportedModelError) as error:
            raise FeaturesError(
                f"{error}; to compute tower {name!r}, give its ids: --features {name}=SOURCE, a "
                f"query or Parquet files with the column {id_column(name)}"
            ) from error
    elif is_query(features):
        query = Query(features, project)
        source = query
        columns = bind(name, signature, query.schema(client, name), str(query)) if client else Columns(name, "", (), ())
    else:
        files = _parquet_files(name, features)
        source = files
        columns = bind(name, signature, files.schema(), str(files))
    known = source.tower if isinstance(source, Vocabulary) else None
    return ComputedTower(
        name,
        layer,
        Matrix(model_path, 0, known.matrix.rows if known else 0, signature.dimension, signature.dtype, None),
        known.vocabulary if known else _NO_VOCABULARY,
        tail=Tail(Ending.COMPUTED),
        source="computed",
        model_path=model_path,
        signature=signature,
        columns=columns,
        ids_from=source,
    )


def _parquet_files(name: str, path: str) -> ParquetFiles:
    try:
        return ParquetFiles(path, tuple(parquet.find_files(path, list_folder)))
    except ArtifactMissingError as error:
        raise ArtifactMissingError(f"--features {name}={path}: {error}") from error


_NO_VOCABULARY = formats.Vocabulary("", Span(0, 0), Encoding.LINES, 0)
