import dataclasses
import time
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from google.cloud import bigquery
from hypothesis import given
from hypothesis import strategies as st
from towers import computed, described

from beam_pipeline import __version__
from beam_pipeline.bigquery import tables
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.reading.tally import Tally
from beam_pipeline.training import Run, Training, by_name

DESTINATION = Destination("p", "raw_dev", "EU", "two_tower")
RUN = Run("0123abcd", "it's; DROP", "7", "two_tower", date(2026, 3, 1), "gs://b/a")
TOWERS = tuple(described(name, "gs://b/a") for name in ("user", "item"))
TRAINING = Training(RUN, "gs://b/a", by_name(TOWERS))
TALLIES = {"user": Tally(10, 352, 0.5, 1.25, 2.0, 0), "item": Tally(7, 352, 0.0, 1e-300, 1.5e300, 2)}


def script(how):
    return tables.publish_script(DESTINATION, 3, TRAINING, "launch1", how, TALLIES, "job")


# The table of the first version: fewer columns, NULLABLE.
FIRST_VERSION = [
    bigquery.SchemaField("train_date", "DATE"),
    bigquery.SchemaField("mlflow_run_id", "STRING"),
    bigquery.SchemaField("mlflow_experiment_name", "STRING"),
    bigquery.SchemaField("mlflow_run_name", "STRING"),
    bigquery.SchemaField("user_id", "STRING"),
    bigquery.SchemaField("user_embedding", "FLOAT64", mode="REPEATED"),
]


def table(schema, type_="DAY", field="train_date"):
    made = bigquery.Table("p.raw_dev.two_tower_user_embedding", schema=schema)
    made.time_partitioning = bigquery.TimePartitioning(type_=type_, field=field) if type_ else None
    return made


def test_names():
    assert DESTINATION.table("user") == "p.raw_dev.two_tower_user_embedding"
    assert DESTINATION.staging("item", "abc") == "p.raw_dev.two_tower_item_embedding_staging_abc"


def test_names_of_the_other_tables():
    assert DESTINATION.latest("user") == "p.raw_dev.two_tower_user_embedding_latest"
    assert dataclasses.replace(DESTINATION, suffix="_s").latest("user") == "p.raw_dev.two_tower_user_embedding_latest_s"
    assert DESTINATION.log == "p.raw_dev.two_tower_embedding_log"
    assert DESTINATION.lock == "p.raw_dev.two_tower_embedding_lock"
    assert tables.split_name("example.com:p.d.t") == ("example.com:p", "d", "t")
    assert DESTINATION.job_project == "p"
    assert dataclasses.replace(DESTINATION, billing_project="b").job_project == "b"


def test_when_a_publication_is_said_to_be():
    """CURRENT_TIMESTAMP is that of the transaction's start."""
    (published,) = (field for field in tables.LOG_SCHEMA if field.name == "published_at")
    assert published.description == "When the transaction of the publication began"


def test_names_with_a_suffix():
    history = dataclasses.replace(DESTINATION, suffix="_history")
    assert history.table("user") == "p.raw_dev.two_tower_user_embedding_history"
    assert history.staging("item", "abc") == "p.raw_dev.two_tower_item_embedding_history_staging_abc"
    # A run of one history is not to be looked up in the log of another.
    assert history.log == "p.raw_dev.two_tower_embedding_history_log"
    assert history.lock == "p.raw_dev.two_tower_embedding_history_lock"


def test_schema():
    assert [(c["name"], c["type"], c["mode"]) for c in tables.schema("item")] == [
        ("train_date", "DATE", "REQUIRED"),
        ("mlflow_experiment_id", "STRING", "REQUIRED"),
        ("mlflow_experiment_name", "STRING", "REQUIRED"),
        ("mlflow_run_id", "STRING", "REQUIRED"),
        ("mlflow_run_name", "STRING", "REQUIRED"),
        ("item_id", "STRING", "REQUIRED"),
        ("item_embedding", "FLOAT64", "REPEATED"),
    ]
    assert [c["description"] for c in tables.schema("item")] == [
        "Day on which the training started, in UTC",
        "MLflow experiment",
        "Name of the MLflow experiment",
        "MLflow run of the training",
        "Name of the MLflow run",
        "The item",
        "The item's embedding after this training",
    ]
    assert tables.run_values(RUN) == {
        "train_date": date(2026, 3, 1),
        "mlflow_experiment_id": "7",
        "mlflow_experiment_name": "two_tower",
        "mlflow_run_id": "0123abcd",
        "mlflow_run_name": "it's; DROP",
    }
    assert [*tables.run_values(RUN)] == [c["name"] for c in tables.schema("item")[:-2]]
    for columns, fields in ((tables.schema, tables.schema_fields), (tables.staging_schema, tables.staging_fields)):
        assert [(c["name"], c["type"], c["mode"], c["description"]) for c in columns("item")] == [
            (field.name, field.field_type, field.mode, field.description) for field in fields("item")
        ]


def test_a_staging_table_holds_what_differs_from_row_to_row():
    assert [(c["name"], c["type"], c["mode"]) for c in tables.staging_schema("item")] == [
        ("train_date", "DATE", "REQUIRED"),
        ("training", "INTEGER", "REQUIRED"),
        ("item_id", "STRING", "REQUIRED"),
        ("item_embedding", "FLOAT64", "REPEATED"),
    ]
    assert [c["description"] for c in tables.staging_schema("item")] == [
        "Day on which the training started, in UTC",
        "Number of the training in its launch",
        "The item",
        "The item's embedding after this training",
    ]
    later = dataclasses.replace(TRAINING, run=dataclasses.replace(RUN, run_id="later", train_date=date(2026, 3, 8)))
    values = tables.staged_values([TRAINING, later])
    assert values == {
        "0123abcd": {"train_date": date(2026, 3, 1), "training": 0},
        "later": {"train_date": date(2026, 3, 8), "training": 1},
    }
    assert [*values["later"]] == [c["name"] for c in tables.staging_schema("item")[:-2]]


def test_the_publish_script():
    columns = "train_date, mlflow_experiment_id, mlflow_experiment_name, mlflow_run_id, mlflow_run_name"
    others = "train_date = DATE '2026-03-01' AND (mlflow_run_id IS NULL OR mlflow_run_id != '0123abcd')"
    names = [tables.text(name) for name in ("two_tower", "it's; DROP")]
    of_run = f"DATE '2026-03-01', '7', {names[0]}, '0123abcd', {names[1]}"
    ours = "train_date = DATE '2026-03-01' AND training = 3"
    *lines, log, commit = script("fail").splitlines()
    assert lines == [
        "BEGIN TRANSACTION;",
        "UPDATE `p.raw_dev.two_tower_embedding_lock` SET launch = 'launch1', locked_at = CURRENT_TIMESTAMP() WHERE TRUE;",
        f"SELECT IF(EXISTS(SELECT 1 FROM `p.raw_dev.two_tower_user_embedding` WHERE {others}), "
        "ERROR('partition taken: p.raw_dev.two_tower_user_embedding'), 1);",
        f"SELECT IF(EXISTS(SELECT 1 FROM `p.raw_dev.two_tower_item_embedding` WHERE {others}), "
        "ERROR('partition taken: p.raw_dev.two_tower_item_embedding'), 1);",
        "DELETE FROM `p.raw_dev.two_tower_user_embedding` WHERE train_date = DATE '2026-03-01';",
        f"INSERT INTO `p.raw_dev.two_tower_user_embedding` ({columns}, user_id, user_embedding) SELECT {of_run}, user_id, "
        f"user_embedding FROM `p.raw_dev.two_tower_user_embedding_staging_launch1` WHERE {ours};",
        "DELETE FROM `p.raw_dev.two_tower_item_embedding` WHERE train_date = DATE '2026-03-01';",
        f"INSERT INTO `p.raw_dev.two_tower_item_embedding` ({columns}, item_id, item_embedding) SELECT {of_run}, item_id, "
        f"item_embedding FROM `p.raw_dev.two_tower_item_embedding_staging_launch1` WHERE {ours};",
    ]
    assert log.startswith("INSERT INTO `p.raw_dev.two_tower_embedding_log` (published_at, train_date, ")
    assert "'user', SAFE_CONVERT_BYTES_TO_STRING(FROM_HEX('" in log
    assert "10, 8, 0.5, 1.25, 2.0, 0, 352, 'crc32c:00000abc'" in log
    assert "7, 8, 0.0, 1e-300, 1.5e+300, 2, 352, 'crc32c:00000abc'" in log
    assert "DROP" not in log
    assert commit == "COMMIT TRANSACTION;"


@pytest.mark.parametrize(
    ("how", "condition"),
    [
        ("keep", "train_date = DATE '2026-03-01' AND mlflow_run_id = '0123abcd'"),
        ("replace", "train_date = DATE '2026-03-01'"),
    ],
)
def test_what_the_publish_script_deletes(how, condition):
    assert [line for line in script(how).splitlines() if line.startswith("DELETE")] == [
        f"DELETE FROM `p.raw_dev.two_tower_{tower}_embedding` WHERE {condition};" for tower in ("user", "item")
    ]


def latest_statements(tower, condition):
    columns = (
        "train_date, mlflow_experiment_id, mlflow_experiment_name, mlflow_run_id, mlflow_run_name, "
        f"{tower}_id, {tower}_embedding"
    )
    latest = f"p.raw_dev.two_tower_{tower}_embedding_latest"
    return [
        f"DELETE FROM `{latest}` WHERE {condition};",
        f"INSERT INTO `{latest}` ({columns}) SELECT {columns} FROM `p.raw_dev.two_tower_{tower}_embedding` "
        f"WHERE train_date = DATE '2026-03-01' AND mlflow_run_id = '0123abcd' AND {condition};",
    ]


def test_the_publish_script_replaces_the_latest_tables_after_all_towers():
    condition = (
        "NOT EXISTS(SELECT 1 FROM `p.raw_dev.two_tower_{0}_embedding` WHERE train_date > DATE '2026-03-01') "
        "AND NOT EXISTS(SELECT 1 FROM `p.raw_dev.two_tower_embedding_log` WHERE tower = '{0}' AND "
        "train_date = DATE '2026-03-01' AND run_started_at > TIMESTAMP '2026-03-01 00:00:00.000000+00')"
    )
    plain = script("fail").splitlines()
    with_latest = tables.publish_script(
        DESTINATION, 3, TRAINING, "launch1", "fail", TALLIES, "job", latest_tables=True
    ).splitlines()
    expected = [line for tower in ("user", "item") for line in latest_statements(tower, condition.format(tower))]
    assert with_latest == [*plain[:-2], *expected, *plain[-2:]]


def test_the_rollback_script():
    found = tables.rollback_script(DESTINATION, ["user", "item"], date(2026, 3, 1), "0123abcd", "launch1")
    assert found.endswith(";\n")
    assert found.splitlines() == [
        "BEGIN TRANSACTION;",
        "UPDATE `p.raw_dev.two_tower_embedding_lock` SET launch = 'launch1', locked_at = CURRENT_TIMESTAMP() WHERE TRUE;",
        *latest_statements("user", "TRUE"),
        *latest_statements("item", "TRUE"),
        "COMMIT TRANSACTION;",
    ]


def test_the_log_entries():
    started = datetime(2026, 3, 1, 23, 30, 1, 5, tzinfo=timezone(timedelta(hours=1)))
    towers = (dataclasses.replace(TOWERS[0], model_uri="gs://b/own"), computed("item", library="tensorflow 2.21.0"))
    training = Training(dataclasses.replace(RUN, started=started), "gs://b/a", by_name(towers))
    entries = [
        tables._log_entry(DESTINATION, training, tower, "launch1", TALLIES[tower.name], "nightly") for tower in towers
    ]
    common = {
        "published_at": "CURRENT_TIMESTAMP()",
        "train_date": "DATE '2026-03-01'",
        "mlflow_experiment_id": "'7'",
        "mlflow_experiment_name": tables.text("two_tower"),
        "mlflow_run_id": "'0123abcd'",
        "mlflow_run_name": tables.text("it's; DROP"),
        "dimension": "8",
        "job_name": tables.text("nightly"),
        "launch": "'launch1'",
        "pipeline_version": f"'{__version__}'",
        "run_started_at": "TIMESTAMP '2026-03-01 22:30:01.000005+00'",
    }
    assert entries == [
        common
        | {
            "model_uri": tables.text("gs://b/own"),
            "tower": "'user'",
            "table_name": tables.text("p.raw_dev.two_tower_user_embedding"),
            "row_count": "10",
            "norm_min": "0.5",
            "norm_mean": "1.25",
            "norm_max": "2.0",
            "zero_vectors": "0",
            "bytes_read": "352",
            "checksum": "'crc32c:00000abc'",
            "vector_source": f"'{towers[0].vector_source}'",
            "computed_by": "NULL",
        },
        common
        | {
            "model_uri": tables.text("gs://b/a"),
            "tower": "'item'",
            "table_name": tables.text("p.raw_dev.two_tower_item_embedding"),
            "row_count": "7",
            "norm_min": "0.0",
            "norm_mean": "1e-300",
            "norm_max": "1.5e+300",
            "zero_vectors": "2",
            "bytes_read": "352",
            "checksum": "NULL",
            "vector_source": "'computed'",
            "computed_by": tables.text("tensorflow 2.21.0"),
        },
    ]
    log = tables.publish_script(DESTINATION, 3, training, "launch1", "fail", TALLIES, "nightly").splitlines()[-2]
    columns = ", ".join(column.name for column in tables.LOG_SCHEMA)
    values = ", ".join(f"({', '.join(entry.values())})" for entry in entries)
    assert log == f"INSERT INTO `p.raw_dev.two_tower_embedding_log` ({columns}) VALUES {values};"


STAGING = "`p.raw_dev.two_tower_user_embedding_staging_launch1`"
LOG = "`p.raw_dev.two_tower_embedding_log`"


@pytest.mark.parametrize(
    ("make", "sql"),
    [
        (
            lambda: tables.audit_sql(DESTINATION, "user", "launch1"),
            f"SELECT train_date, training, COUNT(*), COUNT(DISTINCT user_id) FROM {STAGING} GROUP BY train_date, training",
        ),
        (
            lambda: tables.duplicates_sql(DESTINATION, "user", "launch1", RUN, 3),
            f"SELECT user_id, COUNT(*) FROM {STAGING} WHERE train_date = DATE '2026-03-01' AND training = 3 "
            "GROUP BY user_id HAVING COUNT(*) > 1 ORDER BY COUNT(*) DESC, user_id LIMIT 1",
        ),
        (
            lambda: tables.partitions_sql("p.d.t"),
            "SELECT train_date, mlflow_run_id, COUNT(*) FROM `p.d.t` WHERE train_date BETWEEN @first AND @last "
            "GROUP BY train_date, mlflow_run_id",
        ),
        (
            lambda: tables.latest_partition_sql("p.d.t"),
            "SELECT MAX(partition_id) FROM `p.d`.INFORMATION_SCHEMA.PARTITIONS WHERE table_name = 't' "
            r"AND total_rows > 0 AND partition_id NOT LIKE '\\_\\_%'",
        ),
        (
            lambda: tables.latest_publication_sql(DESTINATION),
            f"SELECT tower, table_name, train_date, row_count FROM {LOG} WHERE mlflow_run_id = @run_id AND "
            f"published_at = (SELECT MAX(published_at) FROM {LOG} WHERE mlflow_run_id = @run_id) ORDER BY tower",
        ),
        (
            lambda: tables.dimension_sql("p.d.t", "user"),
            "SELECT ARRAY_LENGTH(user_embedding) FROM `p.d.t` WHERE train_date = @day LIMIT 1",
        ),
        (lambda: tables.count_sql("p.d.t"), "SELECT COUNT(*) FROM `p.d.t`"),
        (lambda: tables.lock_rows_sql(DESTINATION), "SELECT COUNT(*) FROM `p.raw_dev.two_tower_embedding_lock`"),
        (
            lambda: tables.fill_lock_sql(DESTINATION),
            "INSERT INTO `p.raw_dev.two_tower_embedding_lock` (launch) VALUES (NULL)",
        ),
        (
            lambda: tables.keep_forever_sql("p.d.t", False),
            "ALTER TABLE `p.d.t` SET OPTIONS (expiration_timestamp = NULL)",
        ),
        (
            lambda: tables.keep_forever_sql("p.d.t", True),
            "ALTER TABLE `p.d.t` SET OPTIONS (expiration_timestamp = NULL, partition_expiration_days = NULL)",
        ),
        (
            lambda: tables.create_features_sql("p.d.t", "SELECT 1", None),
            "CREATE OR REPLACE TABLE `p.d.t` OPTIONS (expiration_timestamp = "
            "TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL 48 HOUR)) AS\nSELECT 1",
        ),
        (
            lambda: tables.create_features_sql("p.d.t", "SELECT 1", "projects/p/k"),
            "CREATE OR REPLACE TABLE `p.d.t` OPTIONS (expiration_timestamp = "
            "TIMESTAMP_ADD(CURRENT_TIMESTAMP(), INTERVAL 48 HOUR), kms_key_name = 'projects/p/k') AS\nSELECT 1",
        ),
    ],
)
def test_the_other_statements(make, sql):
    """As they are: tests/packaging/test_sql.py shows that BigQuery's own analyzer takes them."""
    assert make() == sql


def test_every_column_of_the_log_has_a_value():
    entry = tables._log_entry(DESTINATION, TRAINING, TOWERS[0], "launch1", TALLIES["user"], "job")
    assert [*entry] == [column.name for column in tables.LOG_SCHEMA]
    matrix = dataclasses.replace(TOWERS[0].matrix, checksum=None)
    unsummed = dataclasses.replace(TOWERS[0], matrix=matrix)
    without = tables._log_entry(DESTINATION, TRAINING, unsummed, "launch1", TALLIES["user"], "job")
    assert without == {**entry, "checksum": "NULL"}


def test_the_tables_may_require_a_partition_filter():
    for statement in [*script("fail").splitlines(), *script("keep").splitlines()]:
        if "_embedding` WHERE" in statement:
            assert "WHERE train_date = DATE '2026-03-01'" in statement
    assert "WHERE train_date" in tables.partitions_sql("p.d.t")
    assert "WHERE train_date" in tables.dimension_sql("p.d.t", "user")


def test_the_latest_partition_is_that_of_a_named_table():
    sql = tables.latest_partition_sql("example.com:p.d.t_user")
    assert " FROM `example.com:p.d`.INFORMATION_SCHEMA.PARTITIONS WHERE table_name = 't_user' AND " in sql
    assert "@" not in sql


def test_staging_in_a_dataset_of_its_own():
    elsewhere = Destination("p", "raw_dev", "EU", "two_tower", "q.scratch")
    assert elsewhere.table("user") == "p.raw_dev.two_tower_user_embedding"
    assert elsewhere.staging("user", "abc") == "q.scratch.two_tower_user_embedding_staging_abc"


@given(st.text(st.characters(codec="utf-8")))
def test_text_is_letters_and_digits(value):
    quoted = tables.text(value).removeprefix("SAFE_CONVERT_BYTES_TO_STRING(FROM_HEX('").removesuffix("'))")
    assert bytes.fromhex(quoted).decode() == value


@pytest.mark.parametrize("how", ["fail", "replace", "keep"])
def test_the_publish_script_is_one_transaction(how):
    statements = script(how).split(";\n")[:-1]
    assert statements[0] == "BEGIN TRANSACTION"
    assert statements[-1] == "COMMIT TRANSACTION"
    assert statements[1].startswith("UPDATE `p.raw_dev.two_tower_embedding_lock`")
    assert not any("TRANSACTION" in statement for statement in statements[1:-1])
    assert [s for s in statements if "ERROR(" in s] == (statements[2:4] if how == "fail" else [])
    deletes = [s for s in statements if s.startswith("DELETE")]
    assert all(s.endswith("AND mlflow_run_id = '0123abcd'") == (how == "keep") for s in deletes)


@pytest.mark.parametrize("value", ["it's", 'a"b', "a\\", "a;b", "a b", "", "a\n", "x" * 257, "`", "é"])
def test_literals_that_could_end_early_are_refused(value):
    with pytest.raises(ValueError, match="is not allowed in the publish script"):
        tables.literal(value)


@given(st.text())
def test_a_literal_is_safe_or_refused(value):
    try:
        text = tables.literal(value)
    except ValueError:
        return
    assert text == f"'{value}'"
    assert not set(value) & set("'\"\\`;\n\r ")


def test_literals():
    assert tables.literal(date(2026, 3, 1)) == "DATE '2026-03-01'"
    assert tables.literal("4e6f_A-b.c:d") == "'4e6f_A-b.c:d'"
    assert tables.literal(datetime(2026, 3, 1, 12, tzinfo=UTC)) == "TIMESTAMP '2026-03-01 12:00:00.000000+00'"
    assert (tables.literal(7), tables.literal(0.1)) == ("7", "0.1")
    with pytest.raises(
        ValueError, match=r"^\"it's\" is not allowed in the publish script: only letters, digits and _ \. : - are$"
    ):
        tables.literal("it's")


@pytest.fixture
def tokyo(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def test_times_are_in_utc_wherever_the_job_runs(tokyo):
    assert tables.literal(datetime(2026, 3, 1, 12, tzinfo=UTC)) == "TIMESTAMP '2026-03-01 12:00:00.000000+00'"


def test_the_first_version_can_be_used():
    assert tables.differences(table(FIRST_VERSION), "user") == []
    missing = tables.missing_columns(table(FIRST_VERSION), tables.schema_fields("user"))
    assert [c.name for c in missing] == ["mlflow_experiment_id"]


def test_missing_columns_are_added_by_one_statement():
    """Each is a change of the table's metadata, and BigQuery takes five in ten seconds."""
    assert tables.add_columns_sql("p.d.t", table(FIRST_VERSION[:5]), tables.schema_fields("user")) == [
        "ALTER TABLE `p.d.t` ADD COLUMN IF NOT EXISTS mlflow_experiment_id STRING, "
        "ADD COLUMN IF NOT EXISTS user_embedding ARRAY<FLOAT64>"
    ]
    assert len(tables.add_columns_sql("p.d.log", table([]), tables.LOG_SCHEMA)) == 1
    assert tables.add_columns_sql("p.d.t", table(tables.schema_fields("user")), tables.schema_fields("user")) == []


def test_the_types_of_added_columns_are_spelled_as_sql_does():
    columns = [
        bigquery.SchemaField("a", "INTEGER"),
        bigquery.SchemaField("b", "FLOAT"),
        bigquery.SchemaField("c", "BOOLEAN"),
        bigquery.SchemaField("D", "FLOAT", "REPEATED"),
        bigquery.SchemaField("E", "DATE"),
    ]
    assert tables.add_columns_sql("p.d.t", table([bigquery.SchemaField("e", "DATE")]), columns) == [
        "ALTER TABLE `p.d.t` ADD COLUMN IF NOT EXISTS a INT64, ADD COLUMN IF NOT EXISTS b FLOAT64, "
        "ADD COLUMN IF NOT EXISTS c BOOL, ADD COLUMN IF NOT EXISTS D ARRAY<FLOAT64>"
    ]


def test_names_and_types_are_compared_as_bigquery_does():
    """Without regard to their case; a type may have two names."""
    schema = [c for c in FIRST_VERSION if not c.name.startswith("user")]
    spelled = [bigquery.SchemaField("USER_ID", "string"), bigquery.SchemaField("User_Embedding", "float", "REPEATED")]
    found = table([*schema, *spelled])
    assert tables.differences(found, "user") == []
    missing = tables.missing_columns(found, tables.schema_fields("user"))
    assert [column.name for column in missing] == ["mlflow_experiment_id"]
    mixed = table([c for c in found.schema if c.name != "train_date"] + [bigquery.SchemaField("Train_Date", "DATE")])
    assert tables.differences(mixed, "user") == []


def test_all_differences_are_listed():
    schema = [
        bigquery.SchemaField("owner", "STRING", "REQUIRED"),
        bigquery.SchemaField("filled", "STRING", "REQUIRED", default_value_expression="'x'"),
        bigquery.SchemaField("user_id", "INT64", "REPEATED"),
        bigquery.SchemaField("team", "STRING", "REQUIRED"),
        bigquery.SchemaField("user_embedding", "FLOAT64", mode=None),
    ]
    assert tables.differences(table(schema, "MONTH"), "user") == [
        "it is partitioned by MONTH(train_date), not by DAY(train_date)",
        "column user_id is INT64, not STRING",
        "column user_id is REPEATED, not REQUIRED",
        "column user_embedding is NULLABLE, not REPEATED",
        "column owner is REQUIRED, and this job does not write it",
        "column team is REQUIRED, and this job does not write it",
    ]


def test_the_table_of_the_newest_training_alone():
    fields = tables.schema_fields("user")
    assert tables.differences(table(fields, None), "user", partitioned=False) == []
    assert tables.differences(table(fields), "user", partitioned=False) == [
        "it is partitioned, and holds one training alone"
    ]
    other = table([bigquery.SchemaField("user_id", "INT64")], None)
    assert tables.differences(other, "user", partitioned=False) == ["column user_id is INT64, not STRING"]


def test_our_own_table_can_be_used():
    assert tables.differences(table(tables.schema_fields("user")), "user") == []
    assert tables.missing_columns(table(tables.schema_fields("user")), tables.schema_fields("user")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type_": None}, "it is not partitioned, not by DAY(train_date)"),
        ({"type_": "MONTH"}, "it is partitioned by MONTH(train_date), not by DAY(train_date)"),
        ({"field": "other"}, "it is partitioned by DAY(other), not by DAY(train_date)"),
        ({"field": None}, "it is partitioned by DAY(_PARTITIONTIME), not by DAY(train_date)"),
    ],
)
def test_another_partitioning_is_spelled_out(change, words):
    assert tables.differences(table(FIRST_VERSION, **change), "user") == [words]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (bigquery.SchemaField("user_id", "INT64"), "column user_id is INT64, not STRING"),
        (bigquery.SchemaField("user_embedding", "FLOAT64"), "column user_embedding is NULLABLE, not REPEATED"),
        (
            bigquery.SchemaField("user_embedding", "NUMERIC", "REPEATED"),
            "column user_embedding is NUMERIC, not FLOAT64",
        ),
        (bigquery.SchemaField("train_date", "TIMESTAMP"), "column train_date is TIMESTAMP, not DATE"),
        (
            bigquery.SchemaField("owner", "STRING", "REQUIRED"),
            "column owner is REQUIRED, and this job does not write it",
        ),
    ],
)
def test_another_column_is_spelled_out(column, words):
    schema = [c for c in FIRST_VERSION if c.name != column.name] + [column]
    assert tables.differences(table(schema), "user") == [words]


def test_more_columns_of_ones_own_are_fine():
    assert tables.differences(table([*FIRST_VERSION, bigquery.SchemaField("note", "STRING")]), "user") == []


def of_resource(**resource):
    """A table as BigQuery describes it, with the schema of a history."""
    reference = {"projectId": "p", "datasetId": "raw_dev", "tableId": "two_tower_user_embedding"}
    found = bigquery.Table.from_api_repr({"tableReference": reference, **resource})
    found.schema = tables.schema_fields("user")
    return found


def test_a_view_and_a_table_that_is_partitioned_otherwise():
    by_day = {"timePartitioning": {"type": "DAY", "field": "train_date"}}
    assert tables.differences(of_resource(type="TABLE", **by_day), "user") == []
    assert tables.differences(of_resource(type="VIEW", **by_day), "user") == ["it is a VIEW, not a table"]
    by_range = {"field": "shard", "range": {"start": "0", "end": "9", "interval": "1"}}
    assert tables.differences(of_resource(type="TABLE", rangePartitioning=by_range), "user") == [
        "it is partitioned by range, not by DAY(train_date)"
    ]
    assert tables.differences(of_resource(type="TABLE"), "user") == ["it is not partitioned, not by DAY(train_date)"]
