"""One class per way the job can be stopped; each message is one line that names the thing and the remedy.

Four parents say where to look: `ArtifactError`, `TrackingError`, `DestinationError` and `UsageError`.
"""

_LONGEST_MESSAGE = 2000


class PipelineError(Exception):
    """The job cannot continue; nothing was published.

    Names in a message may come from an artifact: whatever they hold, it is one line, of bounded length, without
    anything that a terminal would take for a command.

    Attributes:
        exit_code: of the command that it stops.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST_MESSAGE:  # What it is about comes first, the remedy last.
            half = _LONGEST_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__("".join(letter if letter.isprintable() else " " for letter in message))


class UsageError(PipelineError):
    """The command, its environment or the moment it was started does not allow the job."""


class ConfigError(UsageError):
    """Options that contradict each other, or an environment that cannot run the job."""


class SeveralModelsError(ConfigError):
    """A run has several models, and none was named.

    Attributes:
        names: of the models.
    """

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class JobActiveError(UsageError):
    """A job of the same name, as a rule of the same run, has not ended yet."""


class LabelsError(UsageError):
    """A query for labels fails, or gives an id twice."""


class FeaturesError(UsageError):
    """A table of features is not what a tower takes: a column is missing, unexpected, of another type, or NULL."""


class TrackingError(PipelineError):
    """MLflow does not provide the run or its model."""


class RunNotFoundError(TrackingError):
    """The tracking server does not know the run, the experiment or the model, or has no FINISHED run."""


class TrackingServerError(TrackingError):
    """There is no tracking server or store at that place, or it does not respond, or it fails."""


class ArtifactError(PipelineError):
    """The run's artifact cannot be published as it is."""


class ArtifactMissingError(ArtifactError):
    """The run's artifact folder, or a file that belongs to it, does not exist."""


class UnfinishedUploadError(ArtifactMissingError):
    """MLflow knows the model, but not that all of its files were uploaded."""


class NotAModelError(ArtifactError):
    """The folder or file exists but is not a model."""


class UnsupportedModelError(ArtifactError):
    """The model holds its ids or vectors in a form that this package does not read."""


class TruncatedFileError(ArtifactError):
    """A file of the artifact ends before bytes that its own index says it holds."""


class FileReplacedError(ArtifactError):
    """A file of the artifact was replaced or deleted between its opening and a read."""


class CorruptFileError(ArtifactError):
    """A file of the artifact contradicts its own format."""


class ChecksumError(CorruptFileError):
    """Bytes do not match the checksum stored beside them."""


class TowerMissingError(ArtifactError):
    """The model has no such tower, or the layer holds no single lookup and embedding."""


class VectorNotServedError(ArtifactError):
    """The rows of a tower's embedding are not the vectors that the model serves."""


class ModelCallError(ArtifactError):
    """A part of a model that computes a tower failed on the ids that it was called with."""


class BadIdError(ArtifactError):
    """An id is empty, appears twice, is not UTF-8, or points to a row that the matrix does not have."""


class BadVectorError(ArtifactError):
    """A vector holds NaN or infinity."""


class DestinationError(PipelineError):
    """The tables, or where they are, do not allow the job."""


class WarehouseError(DestinationError):
    """The embedded warehouse, or an emulator, cannot be used."""


class DatasetMissingError(DestinationError):
    """The destination dataset does not exist."""


class IncompatibleTableError(DestinationError):
    """The destination table exists with another partitioning or other column types."""


class PartitionTakenError(DestinationError):
    """The partition holds rows of another run."""


class DimensionChangedError(DestinationError):
    """The table's latest partition holds vectors of another length."""


class AuditError(DestinationError):
    """The staging tables do not hold what the artifact holds."""


class PublishError(DestinationError):
    """BigQuery refused the publication for a reason that a retry does not fix."""


class TrainingMissingError(DestinationError):
    """The tables hold no such training, or not the towers or columns that a comparison needs."""


class IdMissingError(DestinationError):
    """A training has no vector of the id whose neighbours are wanted."""


class ZeroVectorError(DestinationError):
    """A vector of zeros has no cosine."""


class SearchError(DestinationError):
    """BigQuery refused a search."""


class UnusualError(PipelineError):
    """A comparison is unusual beside earlier ones, and --fail_if_unusual was given; its results are published."""

    exit_code = 3
