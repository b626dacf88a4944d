"""What the pages promise: sizes, links, flags and commands that exist, and options as the parsers have them."""

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import beam_pipeline
from beam_pipeline import rollback
from beam_pipeline.comparison.command import parser as compare_parser
from beam_pipeline.launch.options import parser
from beam_pipeline.retrieval.command import parser as search_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")}
PAGES |= {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}

BEAMS = """
    --runner --project --region --temp_location --job_name --setup_file --sdk_container_image --max_num_workers
    --dataflow_kms_key --direct_running_mode --direct_num_workers --environment_type --environment_config --job_endpoint
    --prism_location
"""
OTHER_PROGRAMS = """
    --location --soft-delete-duration --impersonate-service-account --service-account-email --tag --rm --user
    --entrypoint --image --sdk-language --metadata-file --template-file-gcs-location --staging-location
    --temp-location --parameters --serve-artifacts --strict --service_port --container_executable --port
    --flink-master --runs --ways
"""
REPORTS = "--output"  # of python -m beam_pipeline.report


def fenced(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 170
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_begins_with_which_vector_and_two_commands():
    beginning, commands = README.split("```\n")[:2]
    assert "that the model serves" in beginning
    assert "--embedding_rows" in beginning
    assert [line.split("#")[0].split() for line in commands.splitlines()] == [["make", "demo"], ["make", "test"]]


def test_every_page_is_reached_from_the_readme():
    for page in PAGES.keys() - {"README.md"}:
        assert f"]({page})" in README, page
    assert "](LICENSE)" in README


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https:)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    known = {*f"{BEAMS} {OTHER_PROGRAMS} {REPORTS}".split()}
    known |= {
        flag
        for made in (parser(), compare_parser(), search_parser(), rollback.parser())
        for action in made._actions
        for flag in action.option_strings
    }
    code = [*re.findall(r"`([^`\n]+)`", PAGES[page]), *fenced(PAGES[page], "")]
    assert {flag for text in code for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)} - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^|[A-Z]=\S+ )make ([a-z-]+)", PAGES[page], re.MULTILINE)
    assert {*named} <= {*targets}


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_files_that_are_named_exist(page):
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = {Path(line).name for line in tracked.stdout.splitlines()}
    gcp = (ROOT / "tests/gcp/test_gcp.py").read_text()
    for named in re.findall(r"`(test_\w+)`", PAGES[page]):
        assert f"def {named}(" in gcp, named
    for named in re.findall(r"`([\w/.]+\.py)`", PAGES[page]):
        assert Path(named).name in names, named


@pytest.mark.parametrize("page", PAGES)
def test_python_on_a_page_is_python(page):
    for code in fenced(PAGES[page], "python"):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page):
    assert [name for name in re.findall(r"\bbp\.(\w+)", PAGES[page]) if not hasattr(beam_pipeline, name)] == []


def test_options_are_those_of_the_parsers():
    spec = importlib.util.spec_from_file_location("write_options", ROOT / "docs/write_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PAGES["docs/options.md"] == module.page(), "run: python docs/write_options.py"


def test_nothing_of_ci_is_elsewhere():
    """The workflow calls what is called by hand, for each version that setup.py allows and pyproject.toml names."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    versions = re.findall(r'"(3\.\d+)"', workflow)
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert versions == classifiers == ["3.11", "3.12", "3.13"]
    assert "run: .ci/run" in workflow
