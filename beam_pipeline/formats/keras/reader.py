"""`.keras` files of Keras 3 and 2: finds a tower's lookup and embedding without building a Keras object.

The file is a zip of uncompressed members: `config.json`, the model as a tree of layers; `model.weights.h5`, an HDF5
file whose datasets are the variables; and `assets/<path>/vocabulary.txt` for lookups whose ids were learnt by
`adapt()` or read from a file. Ids that were given as a list are in the lookup's config.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from beam_pipeline.errors import CorruptFileError, NotAModelError, TowerMissingError, UnsupportedModelError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.keras import indexes, tails
from beam_pipeline.formats.keras.archive import CONFIG, METADATA, WEIGHTS, asset, asset_owner, read_directory
from beam_pipeline.formats.keras.config import INDEXES, Layer, is_keras_2, read_config, read_layers
from beam_pipeline.formats.keras.heap import REFERENCE_BYTES
from beam_pipeline.formats.keras.ids import Ids
from beam_pipeline.formats.keras.indexes import Index
from beam_pipeline.formats.keras.towers import Layers
from beam_pipeline.formats.keras.weights import STRINGS, Dataset, Weights, require_offset
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Tail, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span

_ID_TYPES = {"<i4": (Encoding.INT32, 4), "<i8": (Encoding.INT64, 8), STRINGS: (Encoding.REFERENCES, REFERENCE_BYTES)}
_DTYPES = {"<f4": "float32", "<f8": "float64", "<f2": "float16", "|V2": "bfloat16"}  # h5py has no name for the last.


class KerasFile:
    """A `.keras` file.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str, open_file: OpenFile, layers: Iterable[str] = ()) -> None:
        """Reads the zip's directory, config.json and the names in the HDF5 file.

        Args:
            path: local or `gs://`.
            open_file: opens it.
            layers: all layers that `tower` will be asked for. In a subclassed model the last one that is not found
                by its name can only be the tower that is left.

        Raises:
            NotAModelError: it is not a `.keras` file.
            UnsupportedModelError: it is packed in another way.
            CorruptFileError: it contradicts its format.
        """
        self.path = path
        self._file = open_file(path)
        try:
            self._members = read_directory(self._file)
            for name in (CONFIG, WEIGHTS):
                if name not in self._members:
                    raise NotAModelError(f"{path} has no {name}: not a model that Keras saved with model.save()")
            is_reversed = is_keras_2(self._file, self._members.get(METADATA))
            config, self._lists = read_config(self._file, self._members[CONFIG])
            self._weights = Weights(self._file, self._members[WEIGHTS].span)
            owners = [owner for name in self._members if (owner := asset_owner(name)) is not None]
            for owner in owners:
                self._weights.add_group(owner)
            self._layers = Layers(
                path,
                read_layers(config),
                self._weights,
                frozenset(owners),
                requested=layers,
                is_reversed=is_reversed,
            )
            self._indexes = {index.name.replace("/", "."): index for index in indexes.find(self._layers)}
        except BaseException:
            self._file.close()
            raise

    def tower(self, name: str, layer: str, *, include_oov: bool = False) -> Tower:
        """Returns the tower that `layer` holds: an embedding that is fed by a lookup, or a layer with one of each.

        In a Functional or Sequential model `layer` is a layer's name, or names joined by dots for a layer inside of
        another. In a subclassed model it is an attribute path, a layer's name or a path in `model.weights.h5`. A search
        index is the tower of the items that it finds; one that is the model itself is called `candidates`.

        Raises:
            TowerMissingError: no such layer, or it does not hold one lookup and one embedding.
            UnsupportedModelError: it holds them in a form that cannot be read.
            CorruptFileError: the file contradicts itself.
        """
        if index := self._index(layer):
            matrix = self._candidates(name, index)
            return Tower(name, layer, matrix, self._identifiers(name, index, matrix.rows), source="index")
        found = self._layers.tower(name, layer)
        lookup = found.lookup
        noted_name = self._weights.groups.get(lookup.path, "")
        ids = Ids(self._file, lookup, noted_name, self._members.get(asset(lookup.path)), self._lists)
        return Tower(name, layer, self._matrix(found.embedding), ids.vocabulary(include_oov=include_oov))

    def matrix(self, name: str, layer: str) -> Matrix:
        """Returns the embedding of a layer that has no lookup: its ids are elsewhere.

        Raises:
            TowerMissingError: no such layer, or it holds a lookup, or not one embedding.
            UnsupportedModelError, CorruptFileError: as `tower`.
        """
        if index := self._index(layer):
            if index.ids is not None:
                raise TowerMissingError(
                    f"tower {name!r}: index {layer!r} in {self.path} has ids of its own; leave out --ids {name}=…"
                )
            return self._candidates(name, index)
        return self._matrix(self._layers.without_lookup(name, layer).embedding)

    def tails(self, layers: Mapping[str, str], without_lookup: Collection[str] = ()) -> dict[str, Tail]:
        """Returns how towers continue after their embeddings, until they meet each other or are returned.

        The code of a subclassed model is not in the file: of that only the layers inside of a tower can be seen.

        Args:
            layers: of all towers that are published together: name → layer, as `tower` takes them.
            without_lookup: names of those towers whose layers are as `matrix` takes them.

        Raises:
            TowerMissingError: there is no such tower.
        """
        found = {name: index for name, layer in layers.items() if (index := self._index(layer))}
        return tails.read(self.path, self._layers, layers, without_lookup, found, self._indexes.values())

    def tower_layers(self) -> list[str]:
        """Returns all layers that are towers, outermost ones only, and the search indexes."""
        certain = {index.name for index in self._indexes.values() if index.is_certain and not _needs_ids(index)}
        return sorted(certain.union(self._layers.tower_names()))

    def embeddings_without_ids(self) -> list[str]:
        """Returns what could be given as `layer` to `matrix`: embeddings that no lookup feeds, indexes without ids."""
        paths = {index.path for index in self._indexes.values()}
        without = {index.name for index in self._indexes.values() if index.is_certain and _needs_ids(index)}
        return sorted(without.union(name for name in self._layers.names_without_ids() if name not in paths))

    def index_layers(self) -> list[str]:
        """Returns those of the layers that are search indexes."""
        return [index.name for index in self._indexes.values() if index.is_certain]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _matrix(self, embedding: Layer) -> Matrix:
        where = f"{self.path}: embedding {embedding.path!r}"
        noted_name = self._weights.groups.get(embedding.path)
        if noted_name and embedding.config and noted_name != embedding.name:
            raise CorruptFileError(f"{where} is called {noted_name!r} in {WEIGHTS}, {embedding.name!r} in {CONFIG}")
        dtype = embedding.settings.get("dtype")
        policy = str(dtype.get("class_name", "")) if isinstance(dtype, dict) else ""
        if "Quantized" in policy or self._weights.count(embedding.path) > 1:
            raise UnsupportedModelError(f"{where} is quantized; save the model before quantize()")
        offset, variable = self._weights.variable(embedding.path, where)
        return self._placed(where, offset, variable)

    def _index(self, layer: str) -> Index | None:
        return self._indexes.get(layer.replace("/", "."))

    def _candidates(self, name: str, index: Index) -> Matrix:
        """Returns the vectors of an index."""
        where = f"{self.path}: the vectors of index {index.name!r}"
        if index.vectors is None:
            raise UnsupportedModelError(
                f"tower {name!r}: {index.kind} {index.name!r} in {self.path} has no matrix of vectors there: "
                + (
                    "a .keras file does not hold what ScaNN searches; save a BruteForce index beside it, or the model "
                    "with tf.saved_model.save"
                    if index.kind not in INDEXES
                    else "give it its candidates (index, update_candidates) before the model is saved"
                )
            )
        return self._placed(where, require_offset(index.vectors, where), index.vectors)

    def _identifiers(self, name: str, index: Index, rows: int) -> Vocabulary:
        """Returns the ids of an index; damage to them is found by the checksum of the file that the vectors are in."""
        if index.ids is None:
            raise TowerMissingError(
                f"tower {name!r}: index {index.name!r} in {self.path} has vectors, and no ids; name them with --ids "
                f"{name}=PATH (text, JSON, .npy, CSV or Parquet), or --ids {name}=rows if the ids are the numbers of "
                "the rows"
            )
        where = f"{self.path}: the ids of index {index.name!r}"
        (count,) = index.ids.shape
        if count != rows:
            raise CorruptFileError(f"{where} are {count:,}, and its vectors {rows:,}: there must be one id for each")
        encoding, width = _ID_TYPES[index.ids.dtype]
        member = self._members[WEIGHTS].span
        start = member.start + require_offset(index.ids, where)
        span = Span(start, start + count * width)
        if span.start < member.start or span.end > member.end:
            raise CorruptFileError(f"{where} are beyond the end of {WEIGHTS}: the file is damaged, log the model again")
        heap = Span(member.start + self._weights.base, member.end) if encoding is Encoding.REFERENCES else None
        return Vocabulary(self.path, span, encoding, 0, count, heap=heap)

    def _placed(self, where: str, offset: int, variable: Dataset) -> Matrix:
        """Returns a variable as a matrix whose rows are vectors."""
        shape = variable.shape
        if variable.dtype not in _DTYPES:
            raise UnsupportedModelError(f"{where} has values of type {variable.dtype}, not one of the float types")
        if len(shape) != 2 or not all(shape):
            raise UnsupportedModelError(f"{where} has shape {list(shape)}, not [rows, dimension]")
        member = self._members[WEIGHTS]
        checksum = Checksum("crc32", member.crc, member.span)
        matrix = Matrix(self.path, member.span.start + offset, *shape, _DTYPES[variable.dtype], checksum)
        if matrix.offset < member.span.start or matrix.span.end > member.span.end:
            raise CorruptFileError(
                f"{where} has shape {list(shape)} and begins at byte {offset:,} of {WEIGHTS}, which has only "
                f"{member.span.end - member.span.start:,}: the file is damaged, log the model again"
            )
        return matrix


def _needs_ids(index: Index) -> bool:
    return index.vectors is not None and index.ids is None
