"""What the package uses of libraries that their authors may move without notice: each by name, in one place, capped.

An upgrade that moves one fails here with its name, before a job does. `argparse` and `os` come with Python: capped by
`python_requires` and the versions that are tested.
"""

import argparse
import ast
import inspect
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "beam_pipeline"


def _beam_parser():
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    parser = _BeamArgumentParser(allow_abbrev=False)
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    return parser


def beam_add_argparse_args():
    assert any("--temp_location" in action.option_strings for action in _beam_parser()._actions)


def beam_argument_parser():
    _, unknown = _beam_parser().parse_known_args(["--temp_location=gs://b/t", "--tmp_location=gs://b/t"])
    assert unknown == ["--tmp_location=gs://b/t"]


def beam_write_files():
    from apache_beam.io.gcp.bigquery_file_loads import BigQueryBatchFileLoads

    found = inspect.signature(BigQueryBatchFileLoads._write_files)
    assert [*found.parameters] == ["self", "destination_data_kv_pc", "file_prefix_pcv"]
    assert "self._write_files(" in inspect.getsource(BigQueryBatchFileLoads.expand)


def beam_bigquery_client():
    from apache_beam.io.gcp.bigquery_tools import BigQueryWrapper

    assert [*inspect.signature(BigQueryWrapper._bigquery_client).parameters] == ["pipeline_options"]


def beam_base_url():
    from apache_beam.io.gcp.internal.clients.bigquery import BigqueryV2

    assert BigqueryV2.BASE_URL.endswith("/bigquery/v2/")
    assert "BASE_URL" in inspect.getsource(BigqueryV2.__init__)


def beam_file_systems_options():
    from apache_beam.io.filesystems import FileSystems

    assert hasattr(FileSystems, "_pipeline_options")
    assert "cls._pipeline_options = pipeline_options" in inspect.getsource(FileSystems.set_options)


def beam_option_parsing():
    """tests/support/beam_caches.py: what options are is decided by their class and the flags."""
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    assert [*inspect.signature(PipelineOptions.__init__).parameters] == ["self", "flags", "kwargs"]
    parsed = [StandardOptions(["--streaming"]) for _ in range(2)]
    assert vars(parsed[0]).keys() == {"_flags", "_visible_options", "_all_options"}
    parsed[0].streaming = False
    assert parsed[1].streaming


def beam_method_arguments():
    """tests/support/beam_caches.py: arguments of methods are asked for where they can be replaced."""
    from apache_beam.transforms import core

    assert "return get_function_args_defaults(f)" in inspect.getsource(core.get_function_arguments)
    assert core.get_function_args_defaults(_Adding().add) == (["number"], [1])
    assert core.get_function_args_defaults(_Adding.add) == (["self", "number"], [1])


class _Adding:
    def add(self, number=1):
        return number


def beam_disassembly():
    """tests/support/beam_caches.py: types are inferred from what `dis` says of the code."""
    from apache_beam.typehints import trivial_inference

    assert "dis.get_instructions(f" in inspect.getsource(trivial_inference.infer_return_type_func)
    assert trivial_inference.infer_return_type(lambda number: str(number), [int]) is str


def google_auth_default():
    import google.auth

    # Google's clients look the function up in the module each time; replaced there, it is replaced for all.
    from google.cloud import client

    assert callable(google.auth.default)
    assert "google.auth.default(" in inspect.getsource(client)


def argparse_actions():
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="store_true")
    assert [(action.option_strings, action.nargs) for action in parser._actions] == [
        (["-h", "--help"], 0),
        (["--flag"], 0),
    ]


def argparse_actions_container():
    assert isinstance(argparse.ArgumentParser().add_argument_group("group"), argparse._ActionsContainer)


def pyfive_attr_value():
    import pyfive

    method = inspect.unwrap(pyfive.dataobjects.DataObjects._attr_value)
    assert [*inspect.signature(method).parameters] == ["self", "ptype", "buf", "count", "offset"]


def pyfive_dataobjects():
    import pyfive

    assert "self._dataobjects" in inspect.getsource(pyfive.Group)
    assert "self.offset" in inspect.getsource(pyfive.dataobjects.DataObjects.__init__)


def mlflow_auth_registry():
    from mlflow.tracking.request_auth import registry

    assert isinstance(registry._request_auth_provider_registry._registry, list)


def mlflow_download_file():
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    found = inspect.signature(ArtifactRepository._download_file)
    assert [*found.parameters] == ["self", "remote_file_path", "local_path"]


def gcp_storage_emulator_port():
    from gcp_storage_emulator.server import Server, create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    assert isinstance(server, Server)
    server.start()
    try:
        assert server._api._httpd.server_port > 0
    finally:
        server.stop()


# (distribution, name in the code, module that uses it, what it has to do here)
USED = [
    ("apache-beam", "_add_argparse_args", "launch/options.py", beam_add_argparse_args),
    ("apache-beam", "_BeamArgumentParser", "launch/options.py", beam_argument_parser),
    ("apache-beam", "_write_files", "bigquery/avro.py", beam_write_files),
    ("apache-beam", "_bigquery_client", "bigquery/staging.py", beam_bigquery_client),
    ("apache-beam", "BASE_URL", "emulators/__init__.py", beam_base_url),
    ("apache-beam", "_pipeline_options", "credentials.py", beam_file_systems_options),
    ("google-auth", "google.auth.default", "emulators/__init__.py", google_auth_default),
    ("python", "_actions", "launch/options.py", argparse_actions),
    ("python", "_ActionsContainer", "launch/options.py", argparse_actions_container),
    ("pyfive", "_attr_value", "formats/keras/weights.py", pyfive_attr_value),
    ("pyfive", "_dataobjects", "formats/keras/weights.py", pyfive_dataobjects),
    ("mlflow", "_request_auth_provider_registry", "tracking/auth.py", mlflow_auth_registry),
    ("mlflow", "_registry", "tracking/auth.py", mlflow_auth_registry),
    ("mlflow", "_download_file", "tracking/download.py", mlflow_download_file),
    ("gcp-storage-emulator", "_api", "emulators/__init__.py", gcp_storage_emulator_port),
    ("gcp-storage-emulator", "_httpd", "emulators/__init__.py", gcp_storage_emulator_port),
]
USED_BY_TESTS = [
    ("apache-beam", "PipelineOptions.__init__", beam_option_parsing),
    ("apache-beam", "get_function_args_defaults", beam_method_arguments),
    ("python", "dis.get_instructions", beam_disassembly),
]
"""What tests/support/beam_caches.py replaces."""

PUBLIC = {"_exit"}
"""Documented in spite of its name: os._exit."""


@pytest.mark.parametrize("holds", [pytest.param(row[-1], id=f"{row[0]}:{row[1]}") for row in (*USED, *USED_BY_TESTS)])
def test_it_is_where_it_was(holds):
    holds()


def found_in(path):
    """Yields the private names of others that a module uses, and what it assigns to in other modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    inherited = {
        item.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "BigQueryBatchFileLoads" in map(ast.unparse, node.bases)
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    }
    yield from (name for name in inherited if name.startswith("_") and not name.startswith("__"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and ast.unparse(node.value) not in ("self", "cls") and node.attr not in own | PUBLIC:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("beam_pipeline"):
            yield from (
                alias.name for alias in node.names if alias.name.startswith("_") and node.module != "__future__"
            )
        if isinstance(node, ast.Assign):
            targets = [ast.unparse(target) for target in node.targets if isinstance(target, ast.Attribute)]
            yield from (target for target in targets if target == "google.auth.default")
            yield from ("BASE_URL" for target in targets if target.endswith(".BASE_URL"))


def test_all_are_listed_and_each_is_used_in_one_place():
    found = {
        (name, str(path.relative_to(PACKAGE))) for path in sorted(PACKAGE.rglob("*.py")) for name in found_in(path)
    }
    assert found == {(name, module) for _, name, module, _ in USED}


def test_their_libraries_are_capped():
    """The next major version, or what the library calls so, is not installed unseen."""
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [node.value for node in setup.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    texts = [
        *ast.literal_eval(keywords["install_requires"]),
        *(text for texts in ast.literal_eval(keywords["extras_require"]).values() for text in texts),
    ]
    requirements = {requirement.name: requirement for requirement in map(Requirement, texts)}
    for library in {library for library, *_ in USED} - {"python"}:
        assert not requirements[library].specifier.contains("9999"), f"{library} has no upper limit in setup.py"
