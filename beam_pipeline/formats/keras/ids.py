"""The ids of a lookup layer: in a vocabulary file below `assets/`, or as a list in config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from beam_pipeline.errors import UnsupportedModelError
from beam_pipeline.files import ByteFile
from beam_pipeline.formats import encodings
from beam_pipeline.formats.keras.archive import Member
from beam_pipeline.formats.keras.config import Layer
from beam_pipeline.formats.keras.towers import KEEP_IDS
from beam_pipeline.formats.model import Checksum, Encoding, Vocabulary, special_names
from beam_pipeline.formats.protobuf import Span

_MAX_OOV = 100_000
"""Lines at the start of a vocabulary that may stand for unknown ids."""


@dataclass(frozen=True)
class Ids:
    """Where the ids of a lookup are.

    Attributes:
        file: the `.keras` file.
        lookup: the layer.
        noted_name: its name in the HDF5 file, "" if there is none.
        asset: the member with its ids, if it has one.
        lists: all lists of ids in config.json, by the numbers that replaced them; None for one that is not plain.
    """

    file: ByteFile
    lookup: Layer
    noted_name: str
    asset: Member | None
    lists: Sequence[Span | None]

    @property
    def _where(self) -> str:
        return f"{self.file.path}: lookup {self.lookup.path!r}"

    def vocabulary(self, *, include_oov: bool) -> Vocabulary:
        """Returns the ids in row order.

        Raises:
            UnsupportedModelError: they are not in the file, or in a form that cannot be read.
            CorruptFileError: the lookup's config is not what Keras writes.
        """
        vocabulary = self._stored()
        special, names = self._special_rows(vocabulary)
        size = self.lookup.settings.get("vocabulary_size")
        size = size if type(size) is int and abs(size) < 1 << 62 else None
        head, end = encodings.first(self.file, vocabulary, len(special)) if special else ([], vocabulary.span.start)
        # As Keras does: the special tokens may stand at the start of a list, and stand at the start of a file.
        if head == special:
            vocabulary = replace(vocabulary, span=Span(end, vocabulary.span.end))
        return replace(
            vocabulary,
            first_row=len(special),
            count=None if size is None else size - len(special),
            special_tokens=tuple(names) if include_oov else (),
        )

    def _stored(self) -> Vocabulary:
        """Returns all that is stored, special tokens included."""
        settings, path = self.lookup.settings, self.file.path
        given = settings.get("vocabulary")
        if settings.get("invert") or settings.get("output_mode", "int") != "int":
            raise UnsupportedModelError(
                f"{self._where} does not turn ids into row numbers (invert, or output_mode other than 'int')"
            )
        if self.asset and given is None:
            checksum = Checksum("crc32", self.asset.crc, self.asset.span)
            return Vocabulary(path, self.asset.span, Encoding.LINES, 0, checksum=checksum)
        if type(given) is int and 0 <= given < len(self.lists):
            span = self.lists[given]
            if span is None:
                raise UnsupportedModelError(
                    f"{self._where} has ids of bytes, which Keras itself cannot load; make them strings"
                )
            return Vocabulary(path, span, Encoding.JSON, 0)
        if isinstance(given, str):
            raise UnsupportedModelError(
                f"{self._where} was given the file {given!r}, which Keras < 3.12 does not store; use "
                "set_vocabulary(file) or another Keras, and log the model again"
            )
        if self.lookup.config:
            raise UnsupportedModelError(f"{self._where} has no ids: it was given none before the model was saved")
        raise UnsupportedModelError(f"{path}: the ids of lookup {self.lookup.path!r} are not in the file: {KEEP_IDS}")

    def _special_rows(self, vocabulary: Vocabulary) -> tuple[list[str], list[str]]:
        """Returns the tokens of the rows before the first id, as the file has them, and distinct names for these rows.

        The mask token comes first, then one row per out-of-vocabulary bucket.
        """
        settings = self.lookup.settings
        if self.lookup.config:
            mask, oov, buckets = settings.get("mask_token"), settings.get("oov_token"), settings.get("num_oov_indices")
            names = special_names(self._where, mask, oov, buckets)
            tokens = [] if mask is None else [str(mask)]
        else:
            # Without its config the file itself has to say it: it holds the special tokens, and no id is one of them.
            oov = "-1" if "integer_lookup" in f"{self.lookup.path} {self.noted_name}" else "[UNK]"
            head, _ = encodings.first(self.file, vocabulary, _MAX_OOV)
            tokens = head[: head[:2].index(oov)] if oov in head[:2] else []
            buckets = next((i for i, token in enumerate(head[len(tokens) :]) if token != oov), len(head) - len(tokens))
            if not buckets:
                raise UnsupportedModelError(
                    f"{self._where} does not say which rows stand for unknown ids (no {oov} in its first two lines); "
                    "have get_config return the layer (keras.saving.serialize_keras_object) and log the model again"
                )
            names = special_names(self._where, tokens[0] if tokens else None, oov, buckets)
        return [*tokens, *[str(oov)] * (len(names) - len(tokens))], names
