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
from beam_pipeline.bigquery import publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import reading
from beam_pipeline.launch import launcher, preflight, selection
from beam_pipeline.launch.options import parse
from beam_pipeline.tracking import stores

DESTINATION = Destination("p", "d", "EU", "two_tower")
CHAIN = "--impersonate_service_account=first@p.iam,second@p.iam,last@p.iam"


class Google(BaseHTTPRequestHandler):
    """Gives tokens that name the account, and keeps as whom everything else was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        caller = self.headers["Authorization"].removeprefix("Bearer ")
        names = {"projectId": "p", "datasetId": "d", "tableId": "t"}
        answer = {"datasetReference": names, "tableReference": names, "location": "EU"}
        if match := re.search(r"serviceAccounts/([^:]+):generateAccessToken", self.path):
            self.server.chains.add((caller, *json.loads(body)["delegates"], match[1]))
            answer = {"accessToken": f"token of {match[1]}", "expireTime": "2100-01-01T00:00:00Z"}
        else:
            self.server.callers[self.path.split("?")[0]] = caller
        data = json.dumps(answer).encode()
        self.send_response(200)
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
    with serving(Google, chains=set(), callers={}) as running:
        endpoint = {"client_options": {"api_endpoint": running.url}}
        monkeypatch.setattr(
            iam, "_IAM_ENDPOINT", f"{running.url}/v1/projects/-/serviceAccounts/{{}}:generateAccessToken"
        )
        monkeypatch.setattr(bigquery, "Client", partial(bigquery.Client, **endpoint))
        monkeypatch.setattr(storage, "Client", partial(storage.Client, **endpoint))
        monkeypatch.setattr(preflight, "_RESOURCE_MANAGER", running.url)
        yield running
    auth._Credentials._credentials_init = False


def ask_everything():
    preflight._location("p", "p.d", make=False)
    publication.make_client(DESTINATION).get_table("p.d.t")
    preflight._project_permissions("p", ["bigquery.jobs.create"])
    preflight._bucket_permissions("p", "b")
    preflight.examine_bucket(preflight.Findings(), "b", DESTINATION, None)
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
    found = reading.make_client().transport._credentials
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


def test_without_credentials_there_is_an_error_at_once(cloud, monkeypatch):
    def none(*_, **__):
        raise DefaultCredentialsError("not found")

    monkeypatch.setattr(google.auth, "default", none)
    with pytest.raises(DefaultCredentialsError):
        credentials.credentials()
