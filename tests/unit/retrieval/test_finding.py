"""A search on BigQuery's side and by comparing with every vector: the same answers."""

import re
from datetime import date

import numpy as np
import pyarrow as pa
import pytest
from google.api_core.exceptions import BadRequest
from vector_search import VectorSearch

from beam_pipeline.bigquery.history import Trained
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.errors import DimensionChangedError, IdMissingError, SearchError, ZeroVectorError
from beam_pipeline.retrieval import exact, finding, sql
from beam_pipeline.retrieval.sql import Search

DESTINATION = Destination("p", "d", "EU", "two_tower")
DAY = "2026-03-08"
TRAINING = Trained(date(2026, 3, 8), "r1", "weekly", "two_tower", {"user": 5, "item": 40})
NASTY = "é\"; \\ --\n\x01\t'`"


def search(**changes):
    kept = {"tower": "item", "id": "i7", "among": "item", "k": 5, "distance": "COSINE", "alone": True}
    return Search(destination=DESTINATION, training=TRAINING, **{**kept, **changes})


@pytest.fixture
def vectors():
    random = np.random.default_rng(1)
    items = {**{f"i{n}": random.normal(size=6) for n in range(39)}, NASTY: random.normal(size=6)}
    return {"item": items, "user": {f"u{n}": random.normal(size=6) for n in range(5)}}


@pytest.fixture
def bigquery(vectors):
    result = VectorSearch()
    for tower, of_tower in vectors.items():
        result.add(DESTINATION.table(tower), tower, DAY, "r1", of_tower)
        result.add(DESTINATION.table(tower), tower, "2026-03-01", "r0", {name: -v for name, v in of_tower.items()})
    return result


def pages(of_tower, rows):
    names, values = [*of_tower], [*of_tower.values()]
    for at in range(0, len(names), rows):
        yield pa.array(names[at : at + rows]), pa.array([[*v] for v in values[at : at + rows]], pa.list_(pa.float64()))


def exactly(what, vectors, rows=7):
    return exact.nearest(pages(vectors[what.among], rows), what, vectors[what.tower][what.id])


@pytest.mark.parametrize("distance", ["COSINE", "DOT_PRODUCT", "EUCLIDEAN"])
@pytest.mark.parametrize(
    ("tower", "id_", "among"),
    [("item", "i7", "item"), ("item", NASTY, "item"), ("user", "u3", "item"), ("user", "u0", "user")],
)
@pytest.mark.parametrize("k", [1, 4])
def test_both_ways_give_the_same(bigquery, vectors, distance, tower, id_, among, k):
    what = search(tower=tower, id=id_, among=among, k=k, distance=distance)
    vector = finding.find_vector(bigquery, what)
    assert vector == [*vectors[tower][id_]]
    found = finding.find(bigquery, what, vector, emulated=False)
    wanted = exactly(what, vectors)
    assert [one.id for one in found] == [name for name, _ in wanted]
    assert [one.value for one in found] == pytest.approx([value for _, value in wanted], abs=1e-12)
    assert len(found) == k
    assert tower != among or id_ not in [one.id for one in found]


def test_a_score_is_a_dot_product_and_the_highest_is_first(vectors):
    what = search(tower="user", id="u3", distance="DOT_PRODUCT", k=40)
    scores = {name: float(v @ vectors["user"]["u3"]) for name, v in vectors["item"].items()}
    found = exactly(what, vectors)
    assert dict(found) == pytest.approx(scores)
    assert [name for name, _ in found] == sorted(scores, key=scores.get, reverse=True)


@pytest.mark.parametrize("rows", [1, 2, 39, 40, 41])
@pytest.mark.parametrize("k", [1, 38, 39])
def test_pages_of_any_length(vectors, rows, k):
    what = search(k=k)
    found, wanted = exactly(what, vectors, rows), exactly(what, vectors, 1000)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert len(found) == k


def test_equally_near_ids_are_in_order_and_not_too_many():
    same = {f"i{n:03}": np.ones(3) for n in range(500)}
    what = search(id="i100", k=3, distance="EUCLIDEAN")
    assert [name for name, _ in exactly(what, {"item": same}, 50)] == ["i000", "i001", "i002"]


def test_of_two_runs_of_a_date_one_is_searched(bigquery, vectors):
    other = {name: -v for name, v in vectors["item"].items()}
    bigquery.add(DESTINATION.table("item"), "item", DAY, NASTY, other)
    what = search(alone=False)
    found = finding.find(bigquery, what, finding.find_vector(bigquery, what), emulated=False)
    assert [one.id for one in found] == [name for name, _ in exactly(what, vectors)]
    assert "use_brute_force" in bigquery.asked[-1]
    assert "use_brute_force" not in sql.search_sql(search())


def test_an_unknown_id(bigquery):
    with pytest.raises(IdMissingError, match=r"there is no item 'i99' in training 2026-03-08 weekly \(r1\)"):
        finding.find_vector(bigquery, search(id="i99"))


def test_zero_vectors(bigquery, vectors):
    bigquery.add(DESTINATION.table("item"), "item", DAY, "r1", {"zero": np.zeros(6)})
    with pytest.raises(ZeroVectorError, match=r"the vector of item 'zero' in .* is zero, .* --distance=DOT_PRODUCT"):
        finding.find_vector(bigquery, search(id="zero"))
    assert finding.find_vector(bigquery, search(id="zero", distance="EUCLIDEAN")) == [0] * 6
    # Somewhere in the tower: the log says so, before BigQuery reads the table; without a log, BigQuery does.
    what = search()
    vector = finding.find_vector(bigquery, what)
    bigquery.zero_vectors = 3
    with pytest.raises(
        ZeroVectorError, match="tower 'item' of training 2026-03-08 weekly has 3 or more vectors of zeros"
    ):
        finding.find(bigquery, what, vector, emulated=False)
    assert not any("VECTOR_SEARCH" in asked for asked in bigquery.asked)
    bigquery.zero_vectors = None
    with pytest.raises(SearchError, match="BigQuery refuses the search: Cannot compute cosine distance against zero"):
        finding.find(bigquery, what, vector, emulated=False)
    with pytest.raises(ZeroVectorError, match="has 1 or more vectors of zeros"):
        exactly(what, {"item": {**vectors["item"], "zero": np.zeros(6)}})
    assert finding.find(bigquery, search(distance="EUCLIDEAN"), vector, emulated=False)


def test_vectors_of_another_length(vectors):
    with pytest.raises(DimensionChangedError, match="there are vectors of 2 values, and the id's own has 6"):
        exactly(search(), {"item": {**vectors["item"], "short": np.ones(2)}}, 1)


def test_a_plan_says_bytes_and_dollars(bigquery):
    table, reads = finding.plan(bigquery, search(), emulated=False)
    assert table == "table       p.d.two_tower_item_embedding, partition 2026-03-08"
    assert reads == "reads       1.074 GB: about $0.0061 at $6.25/TiB"
    assert "emulators do not say" in finding.plan(bigquery, search(), emulated=True)[1]
    assert bigquery.asked == []


def test_what_bigquery_refuses_is_one_line(bigquery, monkeypatch):
    def refuse(*_, **__):
        raise BadRequest("Quota exceeded\nat line 2")

    monkeypatch.setattr(bigquery, "query_and_wait", refuse)
    with pytest.raises(SearchError, match=re.escape("BigQuery refuses the search: Quota exceeded") + "$"):
        finding.find_vector(bigquery, search())
