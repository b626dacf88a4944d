"""Google's own parser and analyzer on every statement that the project can make, with a catalog of its own tables.

PyPI's `zetasql` is GoogleSQL built for WebAssembly: it knows the language, not the service. That a statement is
accepted here says that names, types and syntax are right, not that BigQuery's limits and transactions allow it.
"""

import ast
import inspect
import itertools
import json
import re
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from google.cloud import bigquery
from towers import described

from beam_pipeline.bigquery import history, indexes, tables
from beam_pipeline.bigquery.history import Trained
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import tables as comparison_tables
from beam_pipeline.comparison.tables import Pair
from beam_pipeline.launch.options import DISTANCES, IF_TAKEN
from beam_pipeline.reading.tally import Tally
from beam_pipeline.retrieval import sql as search_sql
from beam_pipeline.retrieval.sql import Search
from beam_pipeline.training import Run, Training

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache/zetasql"
DESTINATION = Destination("p", "raw_prod", "EU", "two_tower")
TOWERS = ("user", "item")
RUN = Run("0123abcd", "it's; DROP `x` -- é", "7", "two tower's", date(2026, 3, 1), "gs://b/a")
TALLY = Tally(10, 352, 0.0, 1e-300, 1.5e300, 2)
LAUNCH = "launch1"

_STARTS = re.compile(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE|MERGE|ALTER|CREATE|DROP|TRUNCATE|BEGIN|COMMIT|CALL)\s")
"""How a string begins that is SQL."""

INFORMATION_SCHEMA_PARTITIONS = {
    "table_catalog": "STRING",
    "table_schema": "STRING",
    "table_name": "STRING",
    "partition_id": "STRING",
    "total_rows": "INTEGER",
    "total_logical_bytes": "INTEGER",
    "total_billable_bytes": "INTEGER",
    "last_modified_time": "TIMESTAMP",
    "storage_tier": "STRING",
}
"""Columns of the view (https://cloud.google.com/bigquery/docs/information-schema-partitions)."""

INFORMATION_SCHEMA_VECTOR_INDEXES = {
    "index_catalog": "STRING",
    "index_schema": "STRING",
    "table_name": "STRING",
    "index_name": "STRING",
    "index_status": "STRING",
    "creation_time": "TIMESTAMP",
    "last_modification_time": "TIMESTAMP",
    "last_refresh_time": "TIMESTAMP",
    "disable_time": "TIMESTAMP",
    "disable_reason": "STRING",
    "ddl": "STRING",
    "coverage_percentage": "INTEGER",
    "unindexed_row_count": "INTEGER",
    "total_logical_bytes": "INTEGER",
    "total_storage_bytes": "INTEGER",
}
"""Columns of the view (https://cloud.google.com/bigquery/docs/information-schema-vector-indexes)."""

INDEX_UNUSED_REASONS = bigquery.SchemaField(
    "index_unused_reasons",
    "RECORD",
    mode="REPEATED",
    fields=[bigquery.SchemaField(name, "STRING") for name in ("code", "message", "index_name")],
)
"""Of vector_search_statistics in JOBS (https://cloud.google.com/bigquery/docs/information-schema-jobs)."""

QUERY_PARAMETERS = {
    "first": "DATE",
    "last": "DATE",
    "day": "DATE",
    "table": "STRING",
    "run_id": "STRING",
    "item": "STRING",
    "ids": "STRING[]",
    "tables": "STRING[]",
    "days": "DATE[]",
}
"""Types of the parameters that the code gives to its queries."""


def first_version(tower):
    """Returns a table that lacks a column of each kind."""
    kept = [field for field in tables.schema_fields(tower) if field.name not in ("mlflow_run_id", f"{tower}_embedding")]
    return bigquery.Table(DESTINATION.table(tower), schema=kept)


ARGUMENTS = {
    ("destination", "Destination"): [DESTINATION],
    ("training", "Training"): [
        Training(RUN, "gs://b/m", {name: described(name) for name in TOWERS}),
        # The log's rows are of towers with a checksum and without.
        Training(RUN, "gs://b/m", {name: described(name, checksum=at == 0) for at, name in enumerate(TOWERS)}),
    ],
    ("number", "int"): [0, 12],
    ("run", "Run"): [RUN],
    ("launch", "str"): [LAUNCH],
    ("tower", "str"): TOWERS,
    ("if_partition_taken", "str"): IF_TAKEN,
    ("tallies", "Mapping[str, Tally]"): [dict.fromkeys(TOWERS, TALLY)],
    ("job_name", "str"): ["historize-1"],
    ("table", "str"): [lambda chosen: DESTINATION.table(chosen.get("tower", "user"))],
    ("name", "str"): [DESTINATION.table("user")],
    ("table", "bigquery.Table"): [first_version("user")],
    ("wanted", "Sequence[bigquery.SchemaField]"): [tables.schema_fields("user"), tables.LOG_SCHEMA],
    ("partitioned", "bool"): [True, False],
    ("select", "str"): ["SELECT user_id, user_embedding FROM `p.raw_prod.two_tower_user_embedding`"],
    ("kms_key", "str | None"): [None, "projects/p/locations/eu/keyRings/r/cryptoKeys/k"],
    ("latest_tables", "bool"): [True, False],
    ("towers", "Sequence[str]"): [TOWERS],
    ("train_date", "date"): [RUN.train_date],
    ("run_id", "str"): [RUN.run_id],
    ("condition", "str"): ["TRUE"],
}
"""Values for the parameters of the functions in tables.py that make SQL, by name and annotation.

A value that depends on the others is a function of them.
"""


def sql_functions():
    """Returns name → function of all that make SQL in tables.py."""
    return {
        name: function
        for name, function in vars(tables).items()
        if inspect.isfunction(function)
        and function.__module__ == tables.__name__
        and not name.startswith("_")
        and name.endswith(("_sql", "_script"))
    }


PAIR = Pair(*(Trained(date(2026, 3, day), "it's; DROP `x` -- é", "", "", {}) for day in (1, 8)))
SONGS_SCHEMA = [bigquery.SchemaField(name, "STRING") for name in ("id", "genre")]
JOINED = comparison_tables.joined_table(DESTINATION, "item", LAUNCH, 0)
JOINED_SCHEMA = [
    *(bigquery.SchemaField(name, "STRING") for name in ("id", "label", "group_name")),
    *(bigquery.SchemaField(name, "INTEGER") for name in ("sample", "before_length", "after_length")),
    *(bigquery.SchemaField(name, "FLOAT", mode="REPEATED") for name in ("before_vector", "after_vector")),
]
LABELS = "SELECT id, genre AS label, genre AS group_name FROM catalogue.songs -- a comment at the end"


def of_a_comparison():
    """Returns name → statements of all functions in comparison/tables.py that make SQL."""
    module = comparison_tables
    joins = [module.join_sql(DESTINATION, "item", PAIR, labels) for labels in (None, LABELS)]
    expires, keys = datetime(2026, 3, 1, tzinfo=UTC), (None, "projects/p/locations/l/keyRings/r/cryptoKeys/k")
    return {
        "join_sql": joins,
        "create_joined_sql": [
            module.create_joined_sql("p.raw_prod.t", join, expires, key, {"a": "b"}) for join in joins for key in keys
        ],
        "joined_sql": [module.joined_sql(JOINED)],
        "joined_labels_sql": [module.joined_labels_sql(JOINED)],
        "audit_sql": [module.audit_sql(module.staged_change(DESTINATION, "item", LAUNCH), "item")],
        "publish_script": [
            module.publish_script(DESTINATION, 1, PAIR, LAUNCH, changed, ["user", "item"]) for changed in ([], ["item"])
        ],
        "compared_sql": [module.compared_sql(DESTINATION)],
        "results_sql": [module.results_sql(DESTINATION)],
        "percentiles_sql": [module.percentiles_sql(DESTINATION)],
        "usual_sql": [module.usual_sql(DESTINATION, "item")],
    }


def of_a_history():
    """Returns name → statements of all functions in bigquery/history.py that make SQL."""
    names = ["mlflow_run_name", "mlflow_experiment_name"]
    return {
        "labels_sql": [history.labels_sql(LABELS)],
        "double_labels_sql": [history.double_labels_sql(LABELS)],
        "partitions_sql": [
            history.partitions_sql(DESTINATION, ["two_tower_user_embedding", "two_tower_item_embedding"])
        ],
        "logged_sql": [history.logged_sql(DESTINATION)],
        "dimensions_sql": [history.dimensions_sql(DESTINATION, "item")],
        "runs_sql": [history.runs_sql(DESTINATION.table("item"), names[:count]) for count in range(3)],
    }


def of_a_search():
    """Returns name → statements of all functions in retrieval/sql.py that make SQL."""
    nasty = "é\"; \\ --\n\x01\t'`\U0001f600"
    training = Trained(date(2026, 3, 8), nasty, "", "", {})
    searches = [
        Search(DESTINATION, training, tower, nasty, among, 10, distance, alone)
        for tower, among in (("user", "item"), ("item", "item"), ("user", "user"))
        for distance in DISTANCES
        for alone in (True, False)
    ]
    return {
        **{
            name: [getattr(search_sql, name)(search) for search in searches]
            for name in ("search_sql", "vector_sql", "zero_vectors_sql")
        },
        "found_labels_sql": [search_sql.found_labels_sql(LABELS)],
    }


def of_indexes():
    """Returns name → statements of all functions in bigquery/indexes.py that make SQL."""
    of_tower = [(DESTINATION.table(tower), tower) for tower in TOWERS]
    return {
        "create_index_sql": [
            indexes.create_index_sql(table, tower, distance, partitioned=partitioned)
            for table, tower in of_tower
            for distance in DISTANCES
            for partitioned in (True, False)
        ],
        "indexes_sql": [indexes.indexes_sql(table) for table, _ in of_tower],
    }


def made_by(name):
    """Yields what a function makes of every combination of the arguments above."""
    function = sql_functions()[name]
    parameters = [(p.name, str(p.annotation)) for p in inspect.signature(function).parameters.values()]
    unknown = [parameter for parameter in parameters if parameter not in ARGUMENTS]
    assert not unknown, f"add values for {unknown} of {name}() to ARGUMENTS"
    for values in itertools.product(*(ARGUMENTS[parameter] for parameter in parameters)):
        chosen = {name: value for (name, _), value in zip(parameters, values, strict=True)}
        made = function(**{name: value(chosen) if callable(value) else value for name, value in chosen.items()})
        yield from [made] if isinstance(made, str) else made


def in_documents():
    """Yields (where, SQL) of all SQL in pages: fenced blocks, and code within a line."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        fenced = re.findall(r"^ *```sql\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        inline = [code for code in re.findall(r"`([^`\n]+)`", text) if _STARTS.match(code)]
        for number, sql in enumerate([*fenced, *inline], 1):
            yield f"{page.name}-{number}", sql


def in_code():
    """Yields (file, function or None, whether it has placeholders, SQL) of all SQL in the package's strings."""
    for path in sorted((ROOT / "beam_pipeline").rglob("*.py")):
        name = "comparison/tables.py" if path.parent.name == "comparison" and path.name == "tables.py" else path.name
        yield from _in_node(ast.parse(path.read_text(encoding="utf-8")), name, None)


def _in_node(node, file, function):
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if _STARTS.match(text):
            yield file, function, True, text
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found = [node.value] if _STARTS.match(node.value) else re.findall(r"'(SELECT [^']+)'", node.value)
        yield from ((file, function, False, sql) for sql in found)
    for child in ast.iter_child_nodes(node):
        yield from _in_node(child, file, function)


class GoogleSql:
    """Google's parser and analyzer, with a catalog of the project's tables."""

    def __init__(self):
        from zetasql.api import Analyzer, CatalogBuilder, Parser, TypeFactory
        from zetasql.types import (
            AnalyzerOptions,
            LanguageFeature,
            LanguageOptions,
            ProductMode,
            SimpleCatalog,
            ZetaSQLBuiltinFunctionOptions,
        )

        self._types = TypeFactory
        language = LanguageOptions.maximum_features()
        language.product_mode = ProductMode.PRODUCT_EXTERNAL
        # BigQuery has it, of vector indexes; here it counts as in development.
        language.enabled_language_features.append(LanguageFeature.FEATURE_CREATE_INDEX_PARTITION_BY)
        parameters = [
            AnalyzerOptions.QueryParameter(name=name, type=self._parameter(name, type_))
            for name, type_ in QUERY_PARAMETERS.items()
        ]
        schemas = self._schemas()
        here = f"{DESTINATION.project}.{DESTINATION.dataset}"
        views = {
            name: [bigquery.SchemaField(*column) for column in columns.items()]
            for name, columns in (
                ("PARTITIONS", INFORMATION_SCHEMA_PARTITIONS),
                ("VECTOR_INDEXES", INFORMATION_SCHEMA_VECTOR_INDEXES),
            )
        }
        information_schema = SimpleCatalog(
            name="INFORMATION_SCHEMA", table=[self._table(name, schema) for name, schema in views.items()]
        )
        catalog = (
            CatalogBuilder("BigQuery")
            .with_builtin_functions(ZetaSQLBuiltinFunctionOptions(language_options=language))
            .add_table_valued_function(self._vector_search())
        )
        for name, schema in schemas.items():
            catalog.add_table(self._table(name, schema))  # `project.dataset.table`, quoted as a whole
        built = catalog.build()
        built.catalog = [
            SimpleCatalog(  # dataset.table
                name=DESTINATION.dataset,
                table=[self._table(name.removeprefix(f"{here}."), schema) for name, schema in schemas.items()],
                catalog=[information_schema],
            ),
            SimpleCatalog(name="region-eu", catalog=[SimpleCatalog(name="INFORMATION_SCHEMA", table=[self._jobs()])]),
            SimpleCatalog(name="catalogue", table=[self._table("songs", SONGS_SCHEMA)]),  # the users' own
            SimpleCatalog(
                name=here,
                catalog=[information_schema],
            ),
        ]
        self._parser = Parser(language)
        self._analyzer = Analyzer(AnalyzerOptions(language_options=language, query_parameters=parameters), built)

    def check(self, sql):
        """Parses a script whole and analyzes its statements; returns their kinds. Raises what Google's code says."""
        from zetasql.types import ParseResumeLocation

        self._parser.parse_script(sql)
        kinds, place = [], ParseResumeLocation(input=sql, byte_position=0)
        while place.byte_position < len(sql.rstrip().encode()):
            kinds.append(type(self._analyzer.analyze_next_statement(place)).__name__)
        return kinds

    @staticmethod
    def _schemas():
        found = {DESTINATION.log: tables.LOG_SCHEMA, DESTINATION.lock: tables.LOCK_SCHEMA}
        for tower in TOWERS:
            found[DESTINATION.table(tower)] = tables.schema_fields(tower)
            found[DESTINATION.latest(tower)] = tables.schema_fields(tower)
            found[DESTINATION.staging(tower, LAUNCH)] = tables.staging_fields(tower)
            found[comparison_tables.change_table(DESTINATION, tower)] = comparison_tables.change_schema(tower)
            staged = comparison_tables.staged_change(DESTINATION, tower, LAUNCH)
            found[staged] = comparison_tables.staged_change_schema(tower)
        found[comparison_tables.comparison_table(DESTINATION)] = comparison_tables.COMPARISON_SCHEMA
        staged = comparison_tables.staged_comparison(DESTINATION, LAUNCH)
        return found | {staged: comparison_tables.STAGED_COMPARISON_SCHEMA, JOINED: JOINED_SCHEMA}

    def _table(self, name, schema):
        from zetasql.api import TableBuilder

        table = TableBuilder(name)
        for field in schema:
            table.add_column(field.name, self._type(field))
        return table.build()

    def _jobs(self):
        from zetasql.api import TableBuilder

        string = self._type(bigquery.SchemaField("", "STRING"))
        statistics = [("index_usage_mode", string), ("index_unused_reasons", self._type(INDEX_UNUSED_REASONS))]
        table = TableBuilder("JOBS")
        table.add_column("job_id", string)
        table.add_column("creation_time", self._type(bigquery.SchemaField("", "TIMESTAMP")))
        table.add_column("total_bytes_billed", self._type(bigquery.SchemaField("", "INTEGER")))
        table.add_column("vector_search_statistics", self._types.create_struct_type(statistics))
        return table.build()

    def _parameter(self, name, type_):
        mode = "REPEATED" if type_.endswith("[]") else "NULLABLE"
        return self._type(bigquery.SchemaField(name, type_.removesuffix("[]"), mode=mode))

    def _type(self, field):
        from zetasql.types import TypeKind

        if field.field_type == "RECORD":
            return self._types.create_array_type(
                self._types.create_struct_type([(inner.name, self._type(inner)) for inner in field.fields])
            )
        kinds = {"INTEGER": TypeKind.TYPE_INT64, "FLOAT": TypeKind.TYPE_DOUBLE, "FLOAT64": TypeKind.TYPE_DOUBLE}
        type_ = self._types.create_simple_type(
            kinds.get(field.field_type) or getattr(TypeKind, f"TYPE_{field.field_type}")
        )
        return self._types.create_array_type(type_) if field.mode == "REPEATED" else type_

    def _vector_search(self):
        """Returns the table function for the towers' tables: GoogleSQL itself has none.

        A function's columns are fixed, so a row is one that has the columns of all towers.
        """
        from zetasql.api import TVFBuilder
        from zetasql.types import FunctionEnums, TypeKind

        row = self._types.create_struct_type(
            [
                *{
                    field.name: (field.name, self._type(field))
                    for tower in TOWERS
                    for field in tables.schema_fields(tower)
                }.values()
            ]
        )
        optional = FunctionEnums.ArgumentCardinality.OPTIONAL
        function = (
            TVFBuilder("VECTOR_SEARCH")
            .add_table_argument("base_table")
            .add_argument("column_to_search", TypeKind.TYPE_STRING)
            .add_table_argument("query_table")
            .add_argument("query_column_to_search", TypeKind.TYPE_STRING, optional)
            .add_argument("top_k", TypeKind.TYPE_INT64, optional)
            .add_argument("distance_type", TypeKind.TYPE_STRING, optional)
            .add_argument("options", TypeKind.TYPE_STRING, optional)
            .set_output_schema([("query", row), ("base", row), ("distance", TypeKind.TYPE_DOUBLE)])
            .build()
        )
        for argument in function.signature.argument:
            argument.num_occurrences = -1  # Not a concrete call; the builder leaves 0, with which the library aborts.
        return function


@pytest.fixture(scope="module")
def google():
    """Compiled once, for half a minute of a processor, and kept from run to run; 1.1 GB, given back in the end."""
    try:
        import wasmtime
        from zetasql.core import ZetaSqlLocalService, wasm_client

        class Config(wasmtime.Config):
            def __init__(self):
                super().__init__()
                self.cache = str(settings)

        CACHE.mkdir(parents=True, exist_ok=True)
        settings = CACHE / "settings.toml"
        settings.write_text(f"[cache]\ndirectory = {json.dumps(str(CACHE / 'modules'))}\n", encoding="utf-8")
        wasm_client.Config = Config
        service = ZetaSqlLocalService.get_instance()
    except (ImportError, OSError, RuntimeError) as error:  # wasmtime on a platform that it does not know
        pytest.skip(f"zetasql does not run here: {error}")
    yield GoogleSql()
    del type(service)._instance


@pytest.mark.parametrize("name", sql_functions())
def test_google_accepts_what_the_functions_make(google, name):
    made = [*made_by(name)]
    assert made
    for sql in made:
        assert google.check(sql), sql


@pytest.mark.parametrize("name", of_a_comparison())
def test_google_accepts_what_a_comparison_makes(google, name):
    for sql in of_a_comparison()[name]:
        kinds = google.check(sql)
        if name == "publish_script":
            assert (kinds[0], kinds[1], kinds[-1]) == ("ResolvedBeginStmt", "ResolvedUpdateStmt", "ResolvedCommitStmt")
            assert {*kinds[2:-1]} <= {"ResolvedDeleteStmt", "ResolvedInsertStmt"}


@pytest.mark.parametrize("name", of_a_history())
def test_google_accepts_what_reads_a_history(google, name):
    for sql in of_a_history()[name]:
        assert google.check(sql), sql


@pytest.mark.parametrize("name", of_indexes())
def test_google_accepts_what_is_said_of_indexes(google, name):
    for sql in of_indexes()[name]:
        (kind,) = google.check(sql)
        assert kind == ("ResolvedCreateIndexStmt" if name.startswith("create") else "ResolvedQueryStmt")


@pytest.mark.parametrize("name", of_a_search())
def test_google_accepts_what_searches(google, name):
    for sql in of_a_search()[name]:
        assert google.check(sql), sql


def test_a_publish_script_is_one_transaction(google):
    for script in [*made_by("publish_script"), *made_by("rollback_script")]:
        begin, lock, *within, commit = google.check(script)
        assert (begin, lock, commit) == ("ResolvedBeginStmt", "ResolvedUpdateStmt", "ResolvedCommitStmt")
        assert {*within} <= {"ResolvedQueryStmt", "ResolvedDeleteStmt", "ResolvedInsertStmt"}  # no DDL, no second BEGIN


def test_google_accepts_the_sql_in_pages(google):
    found = dict(in_documents())
    assert any("VECTOR_SEARCH" in sql for sql in found.values())
    for where, sql in found.items():
        assert google.check(sql.replace("…", "x")), where


def test_a_search_in_a_page_is_in_order():
    """VECTOR_SEARCH returns its rows in no order."""
    searches = [sql for _, sql in in_documents() if "VECTOR_SEARCH(" in sql and "COUNT(" not in sql]
    assert len(searches) > 3
    assert all(re.search(r"\nORDER BY (query.user_id, )?distance(\nLIMIT \d+)?\n$", sql) for sql in searches)


def test_sql_is_made_in_tables_alone(google):
    """What has placeholders is made by functions that the tests above find; what has none is checked as it is."""
    for file, function, has_placeholders, sql in in_code():
        if file == "comparison/tables.py":
            assert function in of_a_comparison(), f"add {function}() of {file} to of_a_comparison()"
        elif file == "history.py":
            assert function in of_a_history(), f"add {function}() of {file} to of_a_history()"
        elif file == "indexes.py":
            assert function in of_indexes(), f"add {function}() of {file} to of_indexes()"
        elif file == "sql.py":
            assert function in of_a_search(), f"add {function}() of {file} to of_a_search()"
        elif file == "tables.py":
            assert function in sql_functions(), f"{function}() in tables.py makes SQL: end its name in _sql or _script"
        elif "pragma_version" in sql:  # DuckDB's
            continue
        else:
            assert not has_placeholders, f"{file}, {function}(): make {sql!r} in tables.py, by a function …_sql()"
            assert google.check(sql.replace("raw_dev.", "raw_prod.")), file


@pytest.mark.parametrize(
    ("function", "right", "wrong", "message"),
    [
        ("audit_sql", "training", "mlflow_run_id", "Unrecognized name: mlflow_run_id"),
        ("publish_script", "(published_at, ", "(", "Inserted row has wrong column count"),
        ("publish_script", "WHERE TRUE;", "WHERE TRUE", "Syntax error"),
        ("partitions_sql", "@last", "@until", "Query parameter 'until' not found"),
        ("duplicates_sql", "DATE '2026-03-01'", "20260301", "No matching signature for operator = for argument types"),
    ],
)
def test_google_refuses_what_is_wrong(google, function, right, wrong, message):
    for sql in made_by(function):
        assert right in sql
        with pytest.raises(Exception, match=re.escape(message)):
            google.check(sql.replace(right, wrong))
