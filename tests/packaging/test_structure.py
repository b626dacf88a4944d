"""The package's wings: imports go downwards only, and every module says in one sentence what it owns."""

import ast
from pathlib import Path

import pytest

import beam_pipeline

PACKAGE = Path(beam_pipeline.__file__).parent

LAYERS = (
    {"checksums", "errors", "metrics"},
    {"command"},
    {"emulators"},
    {"credentials", "workers", "worker_start"},
    {"files"},
    {"formats"},
    {"training"},
    {"reading"},
    {"model"},
    {"bigquery"},
    {"computing", "tracking"},
    {"pipeline"},
    {"launch"},
    {"comparison", "retrieval", "rollback", "tag", "transforms"},
    {"compare", "report", "search"},
    {"__main__"},
)
"""Wings and modules of the package, the lowest first; docs/architecture.md has the picture."""

UPWARDS = {("launch/launcher.py", "tag")}  # --tag_run does what the command does.

BESIDE = {("worker_start", "workers")}

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def layer(wing):
    return next(number for number, wings in enumerate(LAYERS) if wing in wings)


def wing_of(module):
    return module.partition("/")[0].removesuffix(".py")


def imported(module):
    """Yields the wings that a module imports, at its top or later; the package itself has the version alone."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("beam_pipeline"):
            continue
        parts = node.module.split(".")
        yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names if name.name != "__version__"]


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_imports_go_downwards(module):
    home = wing_of(module)
    not_below = {wing for wing in imported(module) if wing != home and layer(wing) >= layer(home)}
    assert {wing for wing in not_below if (module, wing) not in UPWARDS and (home, wing) not in BESIDE} == set()


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_owns(module):
    said = ast.get_docstring(ast.parse((PACKAGE / module).read_text()))
    assert said, "no docstring"
    assert said.split("\n")[0].endswith((".", ":")), "the first line is no sentence"
