"""The public face against emulators: a model on a bucket, and PublishEmbeddings in a pipeline of somebody else's."""

import dataclasses
from datetime import date

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from docstrings import run_examples
from google.cloud import storage

import beam_pipeline as bp

LAYERS = {"user": "user_layer", "item": "item_layer"}
RUN = bp.Run("0123abcd", "weekly", "1", "two tower's é", date(2026, 3, 1), "")


def test_a_model_on_a_bucket(models, warehouse):
    bucket = storage.Client().bucket(warehouse.bucket)
    folder = models("one").folder
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.blob(f"face/{file.relative_to(folder).as_posix()}").upload_from_filename(str(file))
    with bp.open_model(f"gs://{warehouse.bucket}/face") as model:
        ids, vectors = model.tower("user_layer").read()
    assert dict(zip(ids.to_pylist(), vectors.tolist(), strict=True)) == models("one").rows("user")


def publish(job, model, run=RUN, **arguments):
    options = PipelineOptions(runner="FnApiRunner", project=job.client.project)
    with bp.open_model(model.folder) as opened:
        towers = opened.towers(LAYERS)
    with beam.Pipeline(options=options) as pipeline:
        published = pipeline | bp.PublishEmbeddings(
            towers,
            run=run,
            dataset=f"{job.client.project}.{job.dataset}",
            location="US",
            temp_location=f"gs://warehouse/tmp/{job.dataset}",
            **arguments,
        )
        _ = published | beam.Map(lambda launch: None)


def test_publish_embeddings_publishes_both_towers_once(job, models):
    publish(job, models("plain"))
    publish(job, models("plain"))
    for side in LAYERS:
        assert job.rows(side) == {("2026-03-01", RUN.run_id): models("plain").rows(side)}
    other = dataclasses.replace(RUN, run_id="other")
    with pytest.raises(Exception, match="partition 2026-03-01 was taken by another run"):
        publish(job, models("special"), other)
    assert job.published() == {("2026-03-01", RUN.run_id): (3015, 2014)}
    publish(job, models("special"), other, if_partition_taken="replace")
    assert job.published() == {("2026-03-01", "other"): (100, 100)}
    assert not [name for name in job.tables() if "_staging_" in name and "other" in name]


def test_the_example_of_its_docstring(job, models):
    run_examples(
        bp.PublishEmbeddings,
        folder=str(models("plain").folder),
        options=PipelineOptions(runner="FnApiRunner", project=job.client.project),
        dataset=f"{job.client.project}.{job.dataset}",
        temp_location=f"gs://warehouse/tmp/{job.dataset}",
    )
