"""The page: from the result tables alone, looked at by a browser."""

import re
import shutil
import subprocess
from datetime import date, timedelta

import numpy as np
import pytest
import worlds
from pages import NASTY, checked

from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import measures, page, values
from beam_pipeline.comparison.results import Result
from beam_pipeline.comparison.tables import COMPARISON_SCHEMA, Pair, Trained
from beam_pipeline.comparison.work import Comparison, Facts, Joined, Measured

DESTINATION = Destination("my-project", "raw_prod", "EU", "two_tower")


def rows(number, after, ids=("user-{}", "item-{}"), labels=None):
    """Returns the rows of a pair, as the job makes them: {tower: columns}."""
    before = worlds.towers(users=200, items=120)
    fitted = worlds.fit(before, after)
    days = [date(2026, 1, 4) + timedelta(days=7 * n) for n in (number, number + 1)]
    pair = Pair(*(Trained(day, f"run{n}", NASTY, NASTY, {}) for day, n in zip(days, (number, number + 1), strict=True)))
    comparison = Comparison(DESTINATION, (pair,), "user", "item", "gs://b/t", "token")
    joined, totals = {}, {}
    for tower, template in zip(("user", "item"), ids, strict=True):
        n = len(before[tower])
        joined[tower] = Joined("launch", 0, tower, "p.d.t", n, n, n, n, 16, 16)
        one = worlds.rows(before[tower], after[tower], [template.format(i) for i in range(n)])
        if labels:
            one = measures.Rows(
                *(getattr(one, f) for f in ("ids", "before", "after", "has_before", "has_after")), labels(n)
            )
        _, totals[tower] = measures.measure(one, tower, fitted, 25)
    facts = Facts(joined, "", "", 0.9, {"user": 0.9, "item": 0.9}, fitted.turn, {})
    (finished,) = values.finish(
        None, comparison, (0, {"measured": [Measured(facts, totals, {"user": 0, "item": 0})], "found": []})
    )
    empty = {field.name: [] if field.mode == "REPEATED" else None for field in COMPARISON_SCHEMA}
    return {
        tower: empty | row | {"train_date": pair.after.train_date, "previous_train_date": pair.before.train_date}
        for tower, row in finished.rows.items()
    }


def history_of(count, **options):
    """Returns the results of so many pairs."""
    found, earlier, farthest = [], {"user": [], "item": []}, {"user": [], "item": []}
    random = np.random.default_rng(1)
    for number in range(count):
        after = {t: v + 0.3 * random.normal(size=v.shape) for t, v in worlds.towers(users=200, items=120).items()}
        if number == count - 1:
            after["item"][:3] = random.normal(size=(3, 16))
        for tower, row in rows(number, after, **options).items():
            found.append(
                Result(row, measures.usual(earlier[tower]), {"item-0": (0.1, 3)}, max(farthest[tower], default=None))
            )
            earlier[tower].append(row["score_change_p99"])
            farthest[tower].append(row["most_moved"][0]["score_change"])
    return found


def test_a_page_has_no_script_and_asks_nobody():
    html = page.render(history_of(7), DESTINATION)
    checker = checked(html)
    assert not {"script", "link", "img", "iframe", "object"} & {*checker.tags}
    for name, value in checker.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", html)
    assert checker.tags.count("svg") == 10
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len({*ids})  # a chart refers to its own clip paths and markers


def test_names_are_text():
    html = page.render(
        history_of(3, ids=(NASTY + "{}", NASTY + "{}"), labels=lambda n: np.full(n, NASTY, object)), DESTINATION
    )
    checker = checked(html)
    assert "script" not in checker.tags
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; $x_1$" in html


def test_what_a_page_says():
    found = history_of(7)
    html = page.render(found, DESTINATION)
    assert "Unusual: the 99th percentile of score change is" in html
    assert '0.10 <span class="dim">(3)</span>' in html
    assert "my-project.raw_prod.two_tower_embedding_comparison" in html
    assert html.index("<h2>Users") < html.index("<h2>Items")
    for mover in found[-1].values["most_moved"]:
        assert f">{mover['id']}<" in html
    assert "7 pairs in" in html
    first = page.render(found[:2], DESTINATION)
    assert "Too few trainings to say whether this is usual (0 of 5)." in first
    assert "the pair before</th>" not in first


def test_a_page_of_little():
    """No distance, no score change, no ids: every value that can be missing is."""
    (_, item) = history_of(1)
    nothing = {
        key: []
        if isinstance(value, list)
        else value
        if key.startswith(("train", "prev", "mlflow", "tower", "ids_", "dimension", "job", "pipeline"))
        else None
        for key, value in item.values.items()
    }
    html = page.render([Result(nothing, measures.usual([]))], DESTINATION)
    checked(html)
    assert "No verdict: no id has a value." in html
    assert "None" not in html
    assert "nan" not in html


def test_twenty_trainings_are_small():
    html = page.render(history_of(20), DESTINATION)
    assert len(html.encode()) < 2_000_000


@pytest.fixture
def browser(tmp_path):
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if not found:
        pytest.skip("no Chromium here; apt-get install chromium")

    def run(path, *flags):
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chromium", *flags]
        done = subprocess.run([*command, f"file://{path}"], capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_browser_renders_it(tmp_path, browser):
    path = tmp_path / "page.html"
    path.write_text(page.render(history_of(20), DESTINATION), encoding="utf-8")
    # A page of our own says when the other one was there.
    timer = tmp_path / "timer.html"
    timer.write_text(
        "<body><script>const t = performance.now(); const f = document.createElement('iframe'); f.width = 1100; "
        "f.onload = () => { document.title = 'loaded'; document.body.dataset.ms = performance.now() - t }; "
        f"f.src = 'file://{path}'; document.body.append(f)</script>"
    )
    dom = browser(timer, "--dump-dom", "--virtual-time-budget=10000", "--allow-file-access-from-files")
    assert float(re.search(r'data-ms="([\d.]+)"', dom)[1]) < 1000
    for name, flags in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        shot = tmp_path / f"{name}.png"
        browser(path, *flags, "--hide-scrollbars", "--window-size=1200,2000", f"--screenshot={shot}")
        from matplotlib.image import imread

        pixels = imread(shot)[..., :3]
        background = pixels[5, 5]
        assert (background > 0.95).all() if name == "light" else (background < 0.2).all()
        assert pixels[:1500].std() > 0.05  # there is something on it
    printed = tmp_path / "page.pdf"
    browser(path, f"--print-to-pdf={printed}")
    assert printed.read_bytes().startswith(b"%PDF")
