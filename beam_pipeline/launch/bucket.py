"""Whether the bucket for files on the way suits the dataset: it is there, and load jobs can read from it."""

from __future__ import annotations

from collections.abc import Sequence

from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.credentials import credentials
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch.findings import Findings, first_line

_DAY_SECONDS = 24 * 3600


def examine(findings: Findings, name: str, destination: Destination, kms_key: str | None) -> None:
    """Adds whether load jobs of the destination's dataset can read a bucket."""
    location = destination.location
    try:
        client = storage.Client(project=destination.job_project, credentials=credentials())
        bucket = client.get_bucket(name, timeout=10)
    except NotFound:
        findings.stop(
            "bucket",
            ConfigError(
                f"bucket gs://{name} of --temp_location does not exist; create it where the dataset is: "
                f"gcloud storage buckets create gs://{name} --location={location} --soft-delete-duration=0"
            ),
        )
        return
    except (GoogleAPICallError, GoogleAuthError, OSError) as error:
        findings.note("bucket", f"the location of gs://{name} is unknown: {first_line(error)}")
        return
    regions = bucket.data_locations or ()
    place = f"{bucket.location} ({', '.join(regions)})" if regions else bucket.location
    fits = location_fits(bucket.location or "", location, regions)
    remedy = f"name one in {location}" + ("" if location.upper() == "EU" else ", or in a dual-region that includes it,")
    if fits:
        findings.ok("bucket", f"gs://{name} in {place}")
    elif fits is None:
        findings.note(
            "bucket",
            f"gs://{name} in {place}, and the dataset in {location}: only the load job will show whether that fits; to "
            f"be sure, {remedy} with --temp_location",
        )
    else:
        findings.stop(
            "bucket",
            ConfigError(
                f"bucket gs://{name} is in {place}, from where a dataset in {location} cannot load; {remedy} with "
                "--temp_location"
            ),
        )
    if kept := bucket.soft_delete_policy.retention_duration_seconds:
        findings.note(
            "soft delete",
            f"gs://{name} keeps deleted files for {kept / _DAY_SECONDS:g} days, load files too, and they are billed; "
            f"gcloud storage buckets update gs://{name} --clear-soft-delete ends that",
        )
    if kms_key and not bucket.default_kms_key_name:
        findings.note(
            "bucket", f"gs://{name} has no default key: load files are encrypted with Google's, not --kms_key"
        )


def location_fits(bucket: str, dataset: str, regions: Sequence[str] = ()) -> bool | None:
    """Returns whether a dataset can load from a bucket, by their locations; None where that is not documented.

    A dataset in the US loads from anywhere; one in the EU from the EU and the regions that belong to it; one in a
    region from there and from dual-regions that include it
    (https://cloud.google.com/bigquery/docs/locations#load-data-location-considerations). That page says of the rest
    that the transfer is billed. In reports, the load job fails with "Cannot read and write in different locations",
    with a bucket in the US and a dataset in us-east4 or us-west2 too (airbytehq/airbyte#17013,
    googlegenomics/gcp-variant-transforms#718).

    Args:
        bucket: location of the bucket.
        dataset: location of the dataset.
        regions: of a bucket in a custom dual-region, whose location is the continent's.
    """
    bucket, dataset = bucket.upper(), dataset.upper()
    if dataset == "US":
        return True
    if regions := [region.upper() for region in regions] or _DUAL_REGIONS.get(bucket, []):
        inside = [_includes(dataset, region) for region in regions]
        if dataset == "EU" and any(inside) and not all(inside):
            return None  # Which of its two regions a load reads is not documented.
        return any(inside)
    if "-" not in bucket and bucket not in _MULTI_REGIONS:
        return None
    return _includes(dataset, bucket)


def _includes(dataset: str, place: str) -> bool:
    """Whether a place is a dataset's location, or a region within it."""
    return place == dataset or (dataset == "EU" and place.startswith("EUROPE-") and place not in _OUTSIDE_EU)


_MULTI_REGIONS = ("US", "EU", "ASIA")
_OUTSIDE_EU = ("EUROPE-WEST2", "EUROPE-WEST6")  # London, Zurich (https://cloud.google.com/storage/docs/locations)
_DUAL_REGIONS = {
    "ASIA1": ["ASIA-NORTHEAST1", "ASIA-NORTHEAST2"],
    "EUR4": ["EUROPE-NORTH1", "EUROPE-WEST4"],
    "EUR5": ["EUROPE-WEST1", "EUROPE-WEST2"],
    "EUR7": ["EUROPE-WEST2", "EUROPE-WEST3"],
    "EUR8": ["EUROPE-WEST3", "EUROPE-WEST6"],
    "NAM4": ["US-CENTRAL1", "US-EAST1"],
}
