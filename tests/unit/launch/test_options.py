import pytest

from beam_pipeline.launch.options import parse


def test_defaults():
    config = parse(["--run_id=abc"])
    assert config.run_id == "abc"
    assert dict(config.towers) == {"user": "user_layer", "item": "item_layer"}
    assert (config.dataset, config.project, config.if_partition_taken) == ("raw_dev", None, "fail")
    assert config.local
    assert config.beam_args == ()


def test_everything():
    config = parse(
        [
            "--experiment_name",
            "two_tower",
            "--run_name",
            "weekly",
            "--dataset",
            "other-project.my_data",
            "--tower",
            "film=films",
            "--tower",
            "user=a.b",
            "--if_partition_taken",
            "replace",
            "--partition_expiration_days",
            "7",
            "--runner",
            "DataflowRunner",
            "--region",
            "europe-west1",
            "--labels",
            "airflow-version=v3",
            "--temp_location",
            "gs://b/t",
            "--project",
            "p1",
            "--table_prefix",
            "tt",
        ]
    )
    assert dict(config.towers) == {"film": "films", "user": "a.b"}
    assert (config.project, config.dataset_project, config.dataset) == ("p1", "other-project", "my_data")
    assert not config.local
    assert not config.waits
    assert not config.reads_local_files
    assert {"--region", "--labels", "--temp_location", "--project=p1"} <= {*config.beam_args}


@pytest.mark.parametrize("runner", ["PrismRunner", "FlinkRunner", "PortableRunner"])
def test_the_launcher_waits_for_a_portable_runner(runner):
    config = parse(["--run_id=1", f"--runner={runner}", "--job_endpoint=localhost:8099"])
    assert (config.local, config.waits, config.reads_local_files) == (False, True, False)
    assert parse(["--run_id=1", f"--runner={runner}", "--shared_files"]).reads_local_files


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name the model: --run_id=ID, --experiment_name=NAME for its latest FINISHED run, or --model_uri=URI"),
        (["--run_id=1", "--experiment_name=x"], "--run_id names one run"),
        (["--model_uri=models:/a@b", "--run_id=1"], "--model_uri names one model; leave out --run_id"),
        (["--model_uri=models:/a@b", "--experiment_name=x"], "--model_uri names one model"),
        (["--model_uri=runs:/1/a", "--artifact_path=b"], "--model_uri names one model"),
        (["--run_id=1", "--runid=2"], "unknown flag --runid=2; did you mean --run_id?"),
        (["--run_id=1", "--if_partition_token=keep"], "did you mean --if_partition_taken?"),
        (["--run_id=1", "--temp_locaton=gs://b"], "did you mean --temp_location?"),
        (["--run_id=1", "--if_partition=keep"], "unknown flag --if_partition=keep"),
        (["--run_id=1", "extra"], "unknown flag extra"),
        (["--run_id=1", "--if_partition_taken=maybe"], "invalid choice: 'maybe'"),
        (["--run_id=1", "--env=live"], "invalid choice: 'live'"),
        (["--run_id=1", "--shared_files"], "--shared_files is for PrismRunner, FlinkRunner, PortableRunner; leave it"),
        (["--run_id=1", "--runner=DataflowRunner", "--shared_files"], "leave it out with DataflowRunner"),
        (["--run_id=1", "--runner=PrismRunner", "--warehouse=w"], "--warehouse runs with DirectRunner only"),
        (
            ["--run_id=1", "--compute=user", "--features=user=/f/*.parquet", "--runner=DataflowRunner"],
            "--features=user='/f/*.parquet': DataflowRunner cannot read files of this machine; put them on gs://, or use",
        ),
        (
            ["--run_id=1", "--compute=user", "--features=user=/f/*.parquet", "--runner=PrismRunner"],
            "put them on gs://, --shared_files if the workers can read it, or use --runner=DirectRunner",
        ),
        (["--run_id=1", "--tower=user"], "--tower='user': NAME=LAYER"),
        (["--run_id=1", "--tower=User=a"], "--tower='User=a': NAME=LAYER"),
        (["--run_id=1", "--tower=a=b", "--tower=a=c"], "tower 'a' is named twice"),
        (["--run_id=1", "--dataset=a`b"], "--dataset='a`b'"),
        (["--run_id=1", "--dataset=a.b.c"], "--dataset='a.b.c'"),
        (["--run_id=1", "--project=p`x"], "--project='p`x' is not a project id"),
        (["--run_id=1", "--table_prefix=x;y"], "--table_prefix='x;y'"),
        (["--run_id=1", "--table_suffix=_x`"], "--table_suffix='_x`'"),
        (["--run_id=1", "--partition_expiration_days=0"], "at least 1"),
        (["--run_id=1", "--warehouse=w", "--runner=DataflowRunner"], "--warehouse runs with DirectRunner only"),
        (["--run_id=1", "--warehouse=w", "--env=prod"], "--warehouse is for the laptop"),
        (["--run_id=1", "--env=dev", "--dataset=d"], "--env=dev is dataset raw_dev and --dataset=d another"),
        (["--run_id=1", "--compute=film"], "--compute=film: there is no such tower; towers are user, item"),
        (["--run_id=1", "--compute=user", "--include_oov"], "--include_oov adds rows of an embedding"),
        (["--run_id=1", "--features=user=SELECT 1"], "add --compute=user"),
        (
            ["--run_id=1", "--compute=user", "--features=user=SELECT 1", '--features={"user": "gs://b/*.parquet"}'],
            "tower 'user' has two sources; its ids come from one",
        ),
        (["--run_id=1", "--compute=user", "--features=user=a.csv"], "a query or Parquet files"),
        (["--run_id=1", "--compute=user", "--features=user="], "NAME=SOURCE"),
        (["--run_id=1", "--compute=user", "--features={"], "is not a JSON object"),
        (["--run_id=1", "--plan", "--inspect"], "--inspect stops before anything that --plan shows"),
        (
            ["--experiment_name=x", "--all_runs", "--inspect"],
            "--inspect shows the model of one run; leave out --all_runs",
        ),
        (["--run_id=1", "--warehouse=w", "--temp_location=gs://b/t"], "--warehouse has a bucket of its own; leave out"),
        (["--run_id=1", "--warehouse=w", "--temp_location", "gs://b/t"], "--warehouse has a bucket of its own; leave"),
        (["--run_id=1", "--vectors=user=u.npz", "--embedding_rows"], "--embedding_rows is for towers that end in an"),
        (["--run_id=1", "--compute=user,item", "--embedding_rows"], "--embedding_rows is for towers that end in an"),
        (["--run_id=1", "--vectors=user=u.npz", "--include_oov"], "--include_oov is for towers with a lookup"),
        (["--run_id=1", "--ids=user=rows,item=rows", "--include_oov"], "--include_oov is for towers with a lookup"),
        (["--run_id=1", "--vectors=user=u.npz", "--artifact_path=m"], "--artifact_path is for towers in one model"),
        (["--run_id=1", "--tower=user=a:,item=b:", "--artifact_path=m"], "--artifact_path is for towers in one model"),
        (["--model_uri=runs:/1/m", "--tower=user=a:,item=b:"], "name the run with --run_id"),
        (
            ["--run_id=1", "--tag_run", "--runner=DataflowRunner"],
            "this process does not wait for DataflowRunner; leave it out and run python -m beam_pipeline.tag afterwards",
        ),
    ],
)
def test_misuse_is_one_line_and_exit_2(capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        parse(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert error.endswith("; see python -m beam_pipeline --help\n")


@pytest.mark.parametrize(
    "flags",
    [
        ["--compute=user", "--embedding_rows"],  # The rows of the item tower.
        ["--ids=user=rows", "--include_oov"],
        ["--tower=user=a:,item=layer", "--artifact_path=m"],
        ["--plan", "--tag_run", "--vector_index=COSINE"],  # A mode is for the command of a job as it is.
        ["--inspect", "--tag_run", "--latest_tables"],
    ],
)
def test_flags_that_do_something_for_one_tower_or_for_the_job(flags):
    parse(["--run_id=1", *flags])


def test_env_names_the_dataset_and_no_other_flag_has_to():
    assert (parse(["--run_id=1"]).env, parse(["--run_id=1"]).dataset) == ("dev", "raw_dev")
    assert (parse(["--run_id=1", "--env=stg"]).env, parse(["--run_id=1", "--env=stg"]).dataset) == ("stg", "raw_stg")


@pytest.mark.parametrize("runner", ["DirectRunner", "PrismRunner", "FlinkRunner"])
def test_runs_are_tagged_where_this_process_waits(runner):
    assert parse(["--run_id=1", "--tag_run", f"--runner={runner}"]).tag_run


def test_beams_flags_in_any_form(capsys):
    parse(["--run_id", "1", "--no_use_public_ips", "--experiments=a", "--experiments", "b", "--labels", '{"a": "b"}'])


@pytest.mark.parametrize(
    "flags",
    [
        ["--features=user=/f/*.parquet"],
        ["--features=user=/f/*.parquet", "--runner=FlinkRunner", "--shared_files"],
        ["--features=user=gs://b/*.parquet", "--runner=DataflowRunner"],
        ["--features=user=SELECT 1", "--runner=PrismRunner"],
    ],
)
def test_features_that_the_workers_can_read(flags):
    assert parse(["--run_id=1", "--compute=user", *flags]).features


def test_features_may_be_one_json_object():
    config = parse(
        [
            "--run_id=1",
            "--compute=user,item",
            '--features={"user": "SELECT user_id, a FROM t WHERE b IN (1, 2);", "item": "gs://b/*.parquet"}',
        ]
    )
    assert config.compute == ("user", "item")
    assert config.features == {"user": "SELECT user_id, a FROM t WHERE b IN (1, 2)", "item": "gs://b/*.parquet"}


def test_an_index_needs_vectors_of_one_length(capsys):
    assert parse(["--run_id=1", "--vector_index=DOT_PRODUCT"]).vector_index == "DOT_PRODUCT"
    assert parse(["--run_id=1"]).vector_index is None
    with pytest.raises(SystemExit):
        parse(["--run_id=1", "--vector_index=COSINE", "--allow_dimension_change"])
    assert "--vector_index=COSINE needs vectors of one length, and --allow_dim" in capsys.readouterr().err
