"""The image and the Flex Template, as far as they go without a Docker engine.

The Dockerfile is read by a small interpreter: it copies into a folder and runs the RUN lines with a new virtual
environment in place of /usr/local; the layer of dependencies is kept from run to run, as Docker keeps it. What other
images bring is stood in for by programs that say how they were called.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import environments
import pytest
from google.cloud import storage
from google.cloud.dataflow_v1beta3.types import TemplateMetadata
from job import MARCH_1

from beam_pipeline.launch.options import parse, parser

ROOT = Path(__file__).parents[2]
LOCK = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
STANDS_IN = """#!/bin/sh
printf '%s\\n' "$0" "$@"
"""


def instructions():
    """Returns (word, rest) of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


class Image:
    """The stage `pipeline` of the Dockerfile, which the last one is, built into a folder that stands for the root of the image.

    Attributes:
        env: what ENV sets.
        workdir: where WORKDIR leaves it.
        entrypoint: of the image.
    """

    def __init__(self, folder):
        self._root = folder / "root"
        self._venv = folder / "venv"
        self._copied = []
        self.env, self.workdir, self.entrypoint = {}, Path("/"), []
        lines = instructions()
        stages = [at for at, (word, _) in enumerate(lines) if word == "FROM"]
        first = next(at for at in stages if lines[at][1].endswith(" AS pipeline"))
        for word, rest in lines[first + 1 : min(at for at in stages if at > first)]:
            getattr(self, f"_{word.lower()}")(rest)

    def here(self, text):
        """Returns a command with the image's paths as they are on this machine."""
        text = re.sub(r"(?<![\w.])/(opt|template)\b", rf"{self._root}/\1", text)
        return text.replace("/usr/local/", f"{self._venv}/")

    def run(self, command, **env):
        """Runs a command as a container would, in the folder that WORKDIR says."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self._venv}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            [self.here(part) for part in command],
            cwd=self.here(str(self.workdir)),
            env={**inherited, **{name: self.here(value) for name, value in self.env.items()}, "PATH": path, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def packages(self):
        """Returns the folder of installed packages."""
        (folder,) = self._venv.glob("lib/python*/site-packages")
        return folder

    def _workdir(self, rest):
        self.workdir = self.workdir / rest
        Path(self.here(str(self.workdir))).mkdir(parents=True, exist_ok=True)

    def _env(self, rest):
        self.env |= dict(pair.split("=", 1) for pair in rest.split())

    def _run(self, rest):
        if self._venv.exists():
            self.run(["/bin/sh", "-c", rest])
        else:
            venv, key = self._venv, [*instructions(), *((ROOT / name).read_text() for name in self._copied)]
            environments.create(venv, "image", key, lambda folder: self._first_layer(folder, rest))
            self._venv = venv

    def _first_layer(self, folder, rest):
        self._venv = folder
        self.run(["/bin/sh", "-c", rest])

    def _copy(self, rest):
        *sources, target = rest.split()
        into = Path(self.here(str(self.workdir / target)))
        if sources[0].startswith("--from="):
            program = into / "boot" if sources[1] == "/opt/apache/beam" else into
            program.parent.mkdir(parents=True)
            program.write_text(STANDS_IN)
            program.chmod(0o755)
            return
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        for source in sources:
            assert f"!{source.split('/')[0]}" in ignored, f"{source} is not sent to the engine: see .dockerignore"
            self._copied.append(source)
            if (ROOT / source).is_dir():  # A folder's content, with its times, as Docker does it.
                shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / source, into)

    def _entrypoint(self, rest):
        self.entrypoint = json.loads(rest)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    yield Image(folder)
    shutil.rmtree(folder)


# What the Dockerfile says.


def test_base_images_are_pinned_and_match_the_lock():
    images = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    beam, template, python, *stages = images
    assert set(stages) == {"pipeline"}
    assert beam == f"apache/beam_python3.11_sdk:{LOCK['apache-beam']}"
    assert re.fullmatch(r"gcr\.io/dataflow-templates-base/python311-template-launcher-base:\d{8}_RC\d\d", template)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", python)


def test_nothing_is_installed_when_a_template_or_a_worker_starts():
    environment = {name for word, rest in instructions() if word == "ENV" for name in re.findall(r"(\w+)=", rest)}
    assert "FLEX_TEMPLATE_PYTHON_PY_FILE" in environment
    assert "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT" in environment
    assert not {name for name in environment if name.endswith(("_REQUIREMENTS_FILE", "_SETUP_FILE"))}


# What it builds.

installs = pytest.mark.timeout(600)  # on a new machine pip downloads 300 MB


@installs
def test_the_image_holds_the_code_and_nothing_but_locked_packages(image):
    installed = image.packages() / "beam_pipeline"
    for source in (ROOT / "beam_pipeline").rglob("*.py"):
        assert (installed / source.relative_to(ROOT / "beam_pipeline")).read_bytes() == source.read_bytes()
    listed = json.loads(image.run(["python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]))
    versions = {re.sub("[-_.]+", "-", package["name"].lower()): package["version"] for package in listed}
    lock = {re.sub("[-_.]+", "-", name): version for name, version in LOCK.items()}
    assert {name: version for name, version in versions.items() if lock.get(name) != version}.keys() == {
        "beam-pipeline",
        "pip",
    }
    assert {"apache-beam", "mlflow"} <= versions.keys()
    assert not versions.keys() & {"tensorflow", "keras", "tf-keras", "bqemulator", "pytest"}


@installs
def test_the_image_holds_bytecode(image):
    modules = [path for path in image.packages().rglob("*.py") if "pip" not in path.parts]
    assert len(modules) > 5000
    tag = sys.implementation.cache_tag
    assert [path for path in modules if not (path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc").exists()] == []


@installs
@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (
            ["--id=1-1", "--logging_endpoint=localhost:1", "--control_endpoint=localhost:2", "--semi_persist_dir=/a b"],
            "/opt/apache/beam/boot",
        ),
        (["--id=1-1", "--provision_endpoint=localhost:1"], "/opt/apache/beam/boot"),  # the other endpoints come from it
        (["--provision_endpoint=localhost:1"], "/opt/apache/beam/boot"),  # which says that there is no id
        (["-id", "1-1", "-provision_endpoint", "localhost:1"], "/opt/apache/beam/boot"),
        (["--worker_pool"], "/opt/apache/beam/boot"),
        (["--setup_only", "--artifacts", "/a"], "/opt/apache/beam/boot"),
        ([], "/opt/google/dataflow/python_template_launcher"),
        (["--run_id=it's a run"], "/opt/google/dataflow/python_template_launcher"),
        (["--run_id=1", "--note=see --id=1 and --worker_pool"], "/opt/google/dataflow/python_template_launcher"),
    ],
)
def test_the_entry_point_starts_a_worker_or_a_template(image, arguments, program):
    called = image.run([*image.entrypoint, *arguments]).splitlines()
    assert called == [image.here(program), *arguments]


@installs
def test_the_image_launches_as_a_template_does(image, job, store, models):
    """The template launcher's command line, as its log shows it, with options of ours of every kind."""
    run_id = store.log(models("special"), "from a template", MARCH_1, bucket=True)
    folder = f"gs://warehouse/{job.dataset}"
    parameters = {
        "run_id": run_id,
        "tracking_uri": store.uri,
        "dataset": job.dataset,
        "tower": "user=user_layer,item=item_layer",
        "include_oov": "true",
        "allow_dimension_change": "false",
        "if_partition_taken": "replace",
        "sdk_container_image": "europe-docker.pkg.dev/my-project/images/beam_pipeline:1",
    }
    by_the_launcher = {
        "runner": "DataflowRunner",
        "job_name": "from-a-template",
        "project": job.client.project,
        "region": "europe-west1",
        "temp_location": f"{folder}/tmp",
        "staging_location": f"{folder}/staging",
        "template_location": f"{folder}/staging/template_launches/1/job_object",
        "service_account_email": "worker@my-project.iam.gserviceaccount.com",
        "machine_type": "n1-standard-1",
        "labels": '{"goog-dataflow-provided-template-type": "flex"}',
    }
    flags = [f"--{name}={value}" for name, value in (by_the_launcher | parameters).items()]
    image.run(["python", image.env["FLEX_TEMPLATE_PYTHON_PY_FILE"], *flags, "--no_auth"])
    blob = storage.Client().bucket("warehouse").blob(f"{job.dataset}/staging/template_launches/1/job_object")
    request = json.loads(blob.download_as_bytes())
    assert request["name"] == "from-a-template"
    assert request["labels"]["goog-dataflow-provided-template-type"] == "flex"
    assert request["labels"]["run_id"] == run_id


# metadata.json.

METADATA = json.loads((ROOT / "metadata.json").read_text(encoding="utf-8"))
PARAMETERS = {parameter["name"]: parameter for parameter in METADATA["parameters"]}
NOT_IN_A_TEMPLATE = {
    "help": "prints and ends",
    "version": "prints and ends",
    "warehouse": "a folder of the machine that launches",
    "inspect": "prints on the machine that launches, and stops",
    "plan": "prints on the machine that launches, and stops",
    "shared_files": "not for Dataflow",
    "tag_run": "a template's launcher does not wait for the job",
    "runner": "Beam's; the template launcher sets it",
    "project": "Beam's; the template launcher sets it",
    "impersonate_service_account": "Beam's; a template's launcher acts as the workers' account",
}
BEAMS = {"sdk_container_image"}
"""Parameters that are options of Beam's: a template refuses what its metadata do not declare."""
WHICH = {
    **{key: [] for key in ("run_id", "experiment_name", "model_uri")},
    "all_runs": ["--experiment_name=e"],
    "features": ["--run_id=1", "--compute=user"],
    **{key: ["--experiment_name=e", "--all_runs"] for key in ("since", "until")},
}
"""Flags that say which model, for a flag that does not go with --run_id."""
OPTIONS = {action.dest: action for action in parser()._actions if action.dest not in NOT_IN_A_TEMPLATE}


def test_metadata_is_what_dataflow_reads():
    TemplateMetadata.from_json(json.dumps(METADATA))  # refuses a key or a type that Google's message does not have
    assert len(PARAMETERS) == len(METADATA["parameters"])


def described(action):
    """Returns what an option says of itself, as metadata.json has it; label and regexes are for people to write."""
    parameter = {"name": action.dest, "helpText": parser()._get_formatter()._expand_help(action)}
    parameter["isOptional"] = not action.required
    if action.nargs == 0:
        return parameter | {"paramType": "BOOLEAN", "defaultValue": "false"}
    if action.choices:
        parameter |= {"paramType": "ENUM", "enumOptions": [{"value": name, "label": name} for name in action.choices]}
    else:
        parameter["paramType"] = "NUMBER" if action.type is int else "TEXT"
    return parameter | ({} if action.default is None else {"defaultValue": str(action.default)})


def test_every_option_is_a_parameter_and_the_other_way_round():
    missing = [described(OPTIONS[name]) for name in OPTIONS if name not in PARAMETERS]
    assert not missing, f"add to metadata.json, with label and regexes: {json.dumps(missing, ensure_ascii=False)}"
    assert {*PARAMETERS} - {*OPTIONS} == BEAMS, "remove from metadata.json, there are no such options"
    assert {*NOT_IN_A_TEMPLATE} - {action.dest for action in parser()._actions} == set(), "there are no such options"


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in PARAMETERS])
def test_a_parameter_says_what_its_option_says(name):
    parameter = dict(PARAMETERS[name])
    assert parameter.pop("label")
    regexes = parameter.pop("regexes")
    assert parameter == described(OPTIONS[name])
    allowed = [option["value"] for option in parameter.get("enumOptions", [])]
    allowed += [parameter["defaultValue"]] if "defaultValue" in parameter else []
    assert regexes
    for regex in regexes:
        assert regex.startswith("^")
        assert regex.endswith("$")
        assert not re.match(regex, "two\nlines")
        assert [value for value in allowed if not re.match(regex, value)] == []
    for value in allowed:
        parse([*WHICH.get(name, ["--run_id=1"]), f"--{name}={value}"])


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("run_id", ["0123456789abcdef" * 2, "a-b_C"], ["", "a b", "-a", "x/y"]),
        ("experiment_name", ["two tower's é", "/Shared/two_tower"], [""]),
        ("tracking_uri", ["https://mlflow.example.com:5000/a", "databricks"], ["", "https://user:password@mlflow"]),
        ("model_uri", ["runs:/1/model", "models:/two towers@champion", "models:/m-1"], ["", "s3://bucket/model"]),
        ("since", ["2026-03-01"], ["", "2026-3-1", "yesterday", "2026-03-01T00:00"]),
        ("staging_dataset", ["scratch", "my-project.scratch"], ["", "a-b", "p."]),
        ("kms_key", ["projects/p/locations/eu/keyRings/r/cryptoKeys/k"], ["", "key", "projects/p/locations/eu"]),
        ("artifact_path", ["", "model", "a/b c"], []),
        ("tower", ["user=user_layer", "user=a.b,item=item_layer"], ["", "user", "User=a", "a=b,", "a=b, c=d", "a=b=c"]),
        ("compute", ["user", "user,item"], ["", "User", "a,", "a=b"]),
        ("features", ["user=SELECT user_id FROM d.t", '{"user": "gs://b/u/*.parquet"}'], [""]),
        ("include_oov", ["true", "false"], ["", "True ", "yes", "1"]),
        ("env", ["prod"], ["", "live", "prod "]),
        ("dataset", ["raw", "my-project.raw", "example.com:my-project.raw"], ["", "a.b.c`", "a-b", "p."]),
        ("table_prefix", ["two_tower", "_a1"], ["", "1a", "a-b", "x" * 129]),
        ("table_suffix", ["", "_history", "2"], ["-a", "a b", "x" * 129]),
        ("partition_expiration_days", ["1", "365"], ["", "0", "-1", "1.5", "a"]),
    ],
)
def test_a_parameters_regex_takes_what_the_command_line_takes(name, good, bad):
    (regex,) = PARAMETERS[name]["regexes"]
    for value in good:
        assert re.match(regex, value), value
        parse([*WHICH.get(name, ["--run_id=1"]), f"--{name}={value}"])
    for value in bad:
        assert not re.match(regex, value), value


def test_the_template_on_the_page_has_these_parameters():
    page = (ROOT / "docs/dataflow.md").read_text(encoding="utf-8")
    (given,) = re.findall(r"--parameters=(run_id=\S+)", page)
    names = [pair.split("=")[0] for pair in given.split(",")]
    assert {*names} - {*PARAMETERS} == set()
    assert {*names} >= BEAMS


def test_a_template_takes_the_image_of_its_workers():
    (regex,) = PARAMETERS["sdk_container_image"]["regexes"]
    for image in ("europe-docker.pkg.dev/p/images/beam_pipeline:1", "gcr.io/p/beam@sha256:0123abcd", "registry:5000/a"):
        assert re.match(regex, image)
        parse(["--run_id=1", f"--sdk_container_image={image}"])
    assert not re.match(regex, "two words/a")
    assert PARAMETERS["sdk_container_image"]["isOptional"]  # An environment can name it instead.


@pytest.mark.parametrize(("value", "is_set"), [("", True), ("=true", True), ("=True", True), ("=false", False)])
def test_a_switch_may_have_a_value(value, is_set):
    config = parse(["--run_id=1", f"--include_oov{value}", "--allow_dimension_change"])
    assert config.include_oov is is_set
    assert config.allow_dimension_change


def test_a_switch_takes_no_other_value(capsys):
    with pytest.raises(SystemExit):
        parse(["--run_id=1", "--include_oov=maybe"])
    assert "--include_oov: ignored explicit argument 'maybe'" in capsys.readouterr().err


def test_an_empty_parameter_is_one_that_was_left_out():
    empty = ["--experiment_name=", "--run_name=", "--tracking_uri=", "--dataset="]
    config = parse(["--run_id=1", *empty])
    assert (config.dataset, config.run_id) == ("raw_dev", "1")
    assert not any([config.experiment_name, config.run_name, config.tracking_uri])
