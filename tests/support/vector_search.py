"""A BigQuery that knows the statements of a search: VECTOR_SEARCH by brute force, over tables that a test gives it.

Each statement has to have the form that BigQuery documents; what is not of that form is refused.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
from google.api_core.exceptions import BadRequest, NotFound

_STRING = r'"(?:[^"\\]|\\.)*"'
_SELECT = (
    rf"SELECT (?P<{{0}}columns>[\w, ]+) FROM `(?P<{{0}}table>[^`]+)`\s+WHERE train_date = DATE '(?P<{{0}}day>[\d-]+)'"
    rf"(?: AND mlflow_run_id = (?P<{{0}}run>{_STRING}))?(?: AND (?P<{{0}}column>\w+) = (?P<{{0}}id>{_STRING}))?"
)
_VECTOR = re.compile(_SELECT.format("q_"))
_SEARCH = re.compile(
    r"SELECT base\.(?P<id>\w+) AS id, (?P<value>-distance AS score|distance)\nFROM VECTOR_SEARCH\(\s*"
    rf"\({_SELECT.format('b_')}\), '(?P<vector>\w+)',\s*\({_SELECT.format('q_')}\),\s*"
    r"query_column_to_search => '(?P<query_vector>\w+)', top_k => (?P<top_k>\d+), distance_type => '(?P<distance>\w+)'"
    r"(?:,\s*options => '(?P<options>[^']+)')?\)"
    rf"(?:\nWHERE base\.(?P=id) != (?P<without>{_STRING}))?"
    r"\nORDER BY (?P<order>score DESC|distance), id\nLIMIT (?P<limit>\d+)"
)


class VectorSearch:
    """Takes the place of a client.

    Attributes:
        asked: every statement that was run.
        zero_vectors: what the log says; None where there is no log.
    """

    def __init__(self, zero_vectors=0, total_bytes=1 << 30):
        self._tables = {}
        self._bytes = total_bytes
        self.zero_vectors = zero_vectors
        self.asked = []

    def add(self, table, tower, day, run_id, vectors):
        """Adds a training: {id: vector}."""
        rows = self._tables.setdefault(table, [])
        rows += [
            {"train_date": day, "mlflow_run_id": run_id, f"{tower}_id": name, f"{tower}_embedding": [*vector]}
            for name, vector in vectors.items()
        ]

    def query(self, sql, job_config):
        assert job_config.dry_run
        assert _SEARCH.fullmatch(sql)
        return SimpleNamespace(total_bytes_processed=self._bytes)

    def query_and_wait(self, sql, job_config=None):
        self.asked.append(sql)
        if sql.startswith("SELECT zero_vectors FROM"):
            if self.zero_vectors is None:
                raise NotFound("no log")
            return [_row(self.zero_vectors)]
        if found := _SEARCH.fullmatch(sql):
            return self._search(found.groupdict())
        if found := _VECTOR.fullmatch(sql):
            return [_row(row[found["q_columns"]]) for row in self._rows(found.groupdict(), "q_")]
        raise BadRequest(f"Syntax error: {sql}")

    def _rows(self, found, side):
        return [
            row
            for row in self._tables[found[f"{side}table"]]
            if row["train_date"] == found[f"{side}day"]
            and found[f"{side}run"] in (None, json.dumps(row["mlflow_run_id"], ensure_ascii=False))
            and (found[f"{side}id"] is None or row[found[f"{side}column"]] == json.loads(found[f"{side}id"]))
        ]

    def _search(self, found):
        assert {found["id"], found["vector"]} == {*found["b_columns"].split(", ")}
        assert found["q_columns"] == found["query_vector"]
        # What an index does not store is filtered after the search, unless none is used.
        assert found["b_run"] is None or json.loads(found["options"]) == {"use_brute_force": True}
        (query,) = (np.array(row[found["query_vector"]]) for row in self._rows(found, "q_"))
        near = []
        for row in self._rows(found, "b_"):
            vector = np.array(row[found["vector"]])
            if found["distance"] == "COSINE":
                if not vector.any() or not query.any():
                    raise BadRequest("Cannot compute cosine distance against zero vector.")
                distance = 1 - vector @ query / np.sqrt(vector @ vector * (query @ query))
            elif found["distance"] == "EUCLIDEAN":
                distance = np.sqrt(((vector - query) ** 2).sum())
            else:
                distance = -(vector @ query)
            near.append((distance, row[found["id"]]))
        near = sorted(near)[: int(found["top_k"])]
        if found["without"]:
            near = [one for one in near if one[1] != json.loads(found["without"])]
        sign = -1 if found["value"].startswith("-") else 1
        assert (found["order"] == "score DESC") == (sign == -1)
        return [_row(name, sign * distance) for distance, name in near[: int(found["limit"])]]


def _row(*values):
    return SimpleNamespace(values=lambda: values)
