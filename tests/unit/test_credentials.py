"""As whom the launcher's clients come: real clients and real impersonation, before small services that look."""

import json
import re
from functools import partial
from http.server import BaseHTTPRequestHandler

import google.auth
import google.oauth2.credentials
import pytest
from apache_beam.internal.gcp import auth
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from google.auth import iam
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import bigquery, storage
from tracking import serving

from beam_pipeline import credentials
from beam_pipeline.bigquery import publication, storage_read
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import command as comparison
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import bucket, launcher, permissions, selection, session
from beam_pipeline.launch.findings import Findings
from beam_pipeline.launch.options import parse
from beam_pipeline.tracking import stores
from beam_pipeline.tracking.auth import _Auth

DESTINATION = Destination("p", "d", "EU", "two_tower")
CHAIN = "--impersonate_service_account=first@p.iam,second@p.iam,last@p.iam"


class Google(BaseHTTPRequestHandler):
    """Gives tokens that name the account, and keeps as whom everything else was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        caller = self.headers["Authorization"].removeprefix("Bearer ")
        names = {"projectId": "p", "datasetId": "d", "tableId": "t"}
        answer = {"datasetReference": names, "tableReference": names, "location": "EU"}
        status = 200
        if not self.server.may and "serviceAccounts" in self.path:
            status, answer = 403, {"error": {"code": 403, "message": "iam.serviceAccounts.getAccessToken denied"}}
        elif "generateIdToken" in self.path:
            self.server.asked_for = (caller, json.loads(body))
            answer = {"token": "e30.eyJleHAiOjMyNTAzNjgwMDAwfQ.c2lnbmF0dXJl"}  # {"exp": 32503680000}
        elif match := re.search(r"serviceAccounts/([^:]+):generateAccessToken", self.path):
            self.server.chains.add((caller, *json.loads(body)["delegates"], match[1]))
            answer = {"accessToken": f"token of {match[1]}", "expireTime": "2100-01-01T00:00:00Z"}
        else:
            self.server.callers[self.path.split("?")[0]] = caller
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def cloud(monkeypatch):
    """Google Cloud for a person who may impersonate, in a process that has not asked for credentials yet."""
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    person = google.oauth2.credentials.Credentials("token of a person")
    monkeypatch.setattr(google.auth, "default", lambda *_, **__: (person, "p"))
    monkeypatch.setattr(auth._Credentials, "_credentials_init", False)
    monkeypatch.setattr(FileSystems, "_pipeline_options", None)
    with serving(Google, chains=set(), callers={}, may=True, asked_for=None) as running:
        endpoint = {"client_options": {"api_endpoint": running.url}}
        accounts = f"{running.url}/v1/projects/-/serviceAccounts/{{}}"
        monkeypatch.setattr(iam, "_IAM_ENDPOINT", f"{accounts}:generateAccessToken")
        monkeypatch.setattr(iam, "_IAM_IDTOKEN_ENDPOINT", f"{accounts}:generateIdToken")
        monkeypatch.setattr(bigquery, "Client", partial(bigquery.Client, **endpoint))
        monkeypatch.setattr(storage, "Client", partial(storage.Client, **endpoint))
        monkeypatch.setattr(permissions, "_RESOURCE_MANAGER", running.url)
        yield running
    auth._Credentials._credentials_init = False


def ask_everything():
    session._location("p", "p.d")
    publication.make_client(DESTINATION).get_table("p.d.t")
    permissions.project_permissions("p", ["bigquery.jobs.create"])
    permissions.bucket_permissions("p", "b")
    bucket.examine(Findings(), "b", DESTINATION, None)
    list(stores.repository("gs://artifacts/7/run/artifacts", "http://localhost").client.list_blobs("artifacts"))


@pytest.mark.parametrize(
    ("flags", "chain", "account"),
    [
        ([], None, "a person"),
        (["--impersonate_service_account=last@p.iam"], ("token of a person", "last@p.iam"), "last@p.iam"),
        ([CHAIN], ("token of a person", "first@p.iam", "second@p.iam", "last@p.iam"), "last@p.iam"),
    ],
)
def test_every_client_comes_as_who_is_impersonated(cloud, flags, chain, account):
    credentials.follow(PipelineOptions(flags))
    ask_everything()
    asked = {path.split("/")[-1].split(":")[-1] for path in cloud.callers}
    assert asked >= {"d", "t", "testIamPermissions", "testPermissions", "b", "o"}
    assert {*cloud.callers.values()} == {f"token of {account}"}
    assert {tuple(name.replace("projects/-/serviceAccounts/", "") for name in one) for one in cloud.chains} == (
        {chain} if chain else set()
    )


def test_the_storage_read_api_too(cloud):
    credentials.follow(PipelineOptions([CHAIN]))
    found = storage_read.make_client().transport._credentials
    assert found is credentials.credentials()


def test_the_launcher_impersonates_before_it_reads_anything(cloud, monkeypatch):
    """Beam keeps the first credentials of a process, and the first request may be for a model in a bucket."""

    def first(*_):
        stores.repository("gs://artifacts/7", "http://localhost").client.get_bucket("artifacts")
        raise KeyboardInterrupt

    monkeypatch.setattr(selection, "wanted_runs", first)
    config = parse(["--run_id=r", "--project=my-project", "--temp_location=gs://b/t", CHAIN])
    with pytest.raises(KeyboardInterrupt):
        launcher.run(config)
    assert cloud.callers == {"/storage/v1/b/artifacts": "token of last@p.iam"}


def test_identity_tokens_are_those_of_who_is_impersonated(cloud):
    """A person's own login gets none, and IAP knows accounts by their address."""
    credentials.follow(PipelineOptions([CHAIN]))
    assert _Auth(("https", "mlflow.example.com", 443), "audience").token().startswith("e30.")
    caller, asked = cloud.asked_for
    assert caller == "token of a person"
    assert asked["audience"] == "audience"
    assert asked["includeEmail"]
    assert [name.rsplit("/", 1)[-1] for name in asked["delegates"]] == ["first@p.iam", "second@p.iam"]


def test_who_may_not_impersonate_is_told_the_role(cloud):
    cloud.may = False
    words = (
        r"=first@p.iam,second@p.iam,last@p.iam: Unable to acquire .*needs roles/iam.serviceAccountTokenCreator on it"
    )
    with pytest.raises(ConfigError, match=words):
        credentials.follow(PipelineOptions([CHAIN]))


def test_a_process_acts_as_one_account(cloud):
    """Beam keeps the first credentials, and would go on with them in silence."""
    credentials.follow(PipelineOptions([CHAIN]))
    with pytest.raises(ConfigError, match=r"already acts as an account other than other@p\.iam; start a new one"):
        credentials.follow(PipelineOptions(["--impersonate_service_account=other@p.iam"]))


def test_emulators_know_no_accounts(cloud, monkeypatch):
    """A DAG that impersonates in production runs against emulators too."""
    for name in ("BIGQUERY_EMULATOR_HOST", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://localhost:1")
    options = PipelineOptions([CHAIN])
    credentials.follow(options)
    assert cloud.chains == set()
    assert auth.get_service_credentials(options).get_google_auth_credentials().token == "token of a person"


@pytest.mark.parametrize("command", [parse, comparison.parse])
@pytest.mark.parametrize(
    "given",
    [
        [CHAIN],  # Airflow's impersonation_chain, which the operator joins
        [f"--impersonate_service_account={name}@p.iam" for name in ("first", "second", "last")],  # a list of options
        [CHAIN.replace(",", ", ")],
    ],
)
def test_a_chain_in_any_form(command, given):
    model = ["--run_id=r"] if command is parse else []
    assert command([*model, *given, "--impersonate_service_account="]).beam_args == (CHAIN,)


@pytest.mark.parametrize("given", ["('a@p.iam', 'b@p.iam')", '["a@p.iam"]', "a", "a@p.iam;b@p.iam", "a@p.iam,b"])
def test_what_is_no_account(given, capsys):
    with pytest.raises(SystemExit):
        parse(["--run_id=r", f"--impersonate_service_account={given}"])
    assert "is not an account: NAME@PROJECT.iam.gserviceaccount.com" in capsys.readouterr().err


def test_a_warehouse_has_nobody_to_impersonate(capsys):
    with pytest.raises(SystemExit):
        parse(["--run_id=r", "--warehouse=w", CHAIN])
    assert (
        "--warehouse makes no requests to Google Cloud; leave out --impersonate_service_account"
        in capsys.readouterr().err
    )


def test_without_credentials_there_is_an_error_at_once(cloud, monkeypatch):
    def none(*_, **__):
        raise DefaultCredentialsError("not found")

    monkeypatch.setattr(google.auth, "default", none)
    with pytest.raises(DefaultCredentialsError):
        credentials.credentials()
