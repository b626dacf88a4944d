"""--impersonate_service_account: real Google clients, with a small IAM that gives tokens, and gates that read them."""

import json
from http.server import BaseHTTPRequestHandler

import google.auth
import pytest
from apache_beam.internal.gcp import auth
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from google.auth import _default, iam
from google.cloud import bigquery
from job import MARCH_1
from tracking import gate, service_account_key, serving

from beam_pipeline import credentials
from beam_pipeline.bigquery import publication
from beam_pipeline.bigquery.tables import Destination
from beam_pipeline.comparison import reading
from beam_pipeline.emulators import connect
from beam_pipeline.errors import ConfigError
from beam_pipeline.launch import preflight
from beam_pipeline.launch.launcher import launch
from beam_pipeline.launch.options import parse
from beam_pipeline.tracking.auth import _Auth

FIRST, SECOND, LAST = (f"{name}@p.iam.gserviceaccount.com" for name in ("first", "second", "last"))


class Iam(BaseHTTPRequestHandler):
    """Tokens for the starter's key and for accounts that it may impersonate, and Resource Manager.

    `server.may` says whether it may, `server.delegates` are the chains that were asked for, `server.asked_as` the
    Authorization of each request to Resource Manager.
    """

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
        account, _, method = self.path.rsplit("/", 1)[1].rpartition(":")
        if method == "token":
            self._answer({"access_token": "the starter", "expires_in": 3600, "token_type": "Bearer"})
        elif method == "testIamPermissions":
            self.server.asked_as.append(self.headers["Authorization"])
            self._answer({"permissions": json.loads(sent)["permissions"]})
        elif not self.server.may or self.headers["Authorization"] != "Bearer the starter":
            self._answer({"error": {"code": 403, "message": "iam.serviceAccounts.getAccessToken denied"}}, 403)
        else:
            self.server.delegates.append((method, json.loads(sent)["delegates"]))
            self.server.sent = json.loads(sent)
            self._answer(
                {"accessToken": account, "expireTime": "2999-01-01T00:00:00Z"}
                if method == "generateAccessToken"
                else {"token": f"e30.{'eyJleHAiOjMyNTAzNjgwMDAwfQ'}.{'c2lnbmF0dXJl'}"}  # {"exp": 32503680000}
            )

    def _answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def google_iam(tmp_path, monkeypatch):
    """IAM, and this process as one that has just started, outside of any emulator, with the starter's key."""
    with serving(Iam, may=True, delegates=[], asked_as=[], sent=None) as server:
        key = service_account_key(tmp_path / "key.json", f"{server.url}/:token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", key)
        monkeypatch.delenv("BIGQUERY_EMULATOR_HOST", raising=False)
        monkeypatch.setattr(google.auth, "default", _default.default)
        for name in ("ENDPOINT", "IDTOKEN_ENDPOINT"):
            method = getattr(iam, f"_IAM_{name}").rsplit(":", 1)[1]
            monkeypatch.setattr(iam, f"_IAM_{name}", f"{server.url}/{{}}:{method}")
        monkeypatch.setattr(preflight, "_RESOURCE_MANAGER", server.url)
        monkeypatch.setattr(auth._Credentials, "_credentials_init", False)
        monkeypatch.setattr(auth._Credentials, "_credentials", None)
        monkeypatch.setattr(credentials, "_impersonated", None)
        yield server


def options(*accounts):
    flags = [f"--impersonate_service_account={account}" for account in accounts]
    return PipelineOptions(list(parse(["--run_id=1", *flags]).beam_args))


# The flag.


@pytest.mark.parametrize(
    ("given", "chain"),
    [
        ([LAST], LAST),
        ([f"{FIRST},{SECOND},{LAST}"], f"{FIRST},{SECOND},{LAST}"),  # Airflow's impersonation_chain
        ([FIRST, SECOND, LAST], f"{FIRST},{SECOND},{LAST}"),  # a list among Airflow's pipeline_options
        ([f"{FIRST}, {LAST}"], f"{FIRST},{LAST}"),
        ([""], None),
        ([], None),
    ],
)
def test_a_chain_in_any_form(given, chain):
    assert options(*given).view_as(GoogleCloudOptions).impersonate_service_account == chain


@pytest.mark.parametrize("given", [f"('{FIRST}', '{LAST}')", f'["{LAST}"]', "last", f"{FIRST};{LAST}", f"{FIRST},last"])
def test_what_is_no_account(given, capsys):
    with pytest.raises(SystemExit):
        options(given)
    assert "is no account: NAME@PROJECT.iam.gserviceaccount.com" in capsys.readouterr().err


# The clients.


def test_all_that_the_launcher_asks_it_asks_as_the_impersonated_account(
    google_iam, warehouse, store, models, monkeypatch, capsys
):
    """BigQuery, Cloud Storage by Beam, by the report and by MLflow, and Resource Manager; the run is on a bucket."""
    run = store.log(models("longer"), "impersonated", MARCH_1, bucket=True)
    client = bigquery.Client(
        "local", google.auth.credentials.AnonymousCredentials(), client_options={"api_endpoint": warehouse.bigquery_url}
    )
    client.create_dataset("impersonated", exists_ok=True)
    with (
        gate(warehouse.bigquery_url, lambda headers: True) as for_bigquery,
        gate(warehouse.storage_url, lambda headers: True) as for_storage,
    ):
        monkeypatch.setattr(bigquery._http.Connection, "DEFAULT_API_ENDPOINT", for_bigquery.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", for_storage.url)
        flags = [
            f"--run_id={run}",
            f"--tracking_uri={store.uri}",
            "--project=local",
            "--dataset=impersonated",
            "--plan",
        ]
        flags += ["--temp_location=gs://warehouse/tmp", "--runner=DataflowRunner", "--region=europe-west1"]
        flags += [f"--impersonate_service_account={account}" for account in (FIRST, SECOND, LAST)]
        assert launch(parse(flags)) == 0
        assert len(for_bigquery.seen) > 3
        assert len(for_storage.seen) > 5
        for headers in [*for_bigquery.seen, *for_storage.seen]:
            sent = {name.lower(): value for name, value in headers.items()}
            assert sent.get("authorization") == f"Bearer {LAST}", headers
    assert google_iam.asked_as == [f"Bearer {LAST}"]
    assert {*map(str, google_iam.delegates)} == {str(("generateAccessToken", [FIRST, SECOND]))}
    assert "this account, not the workers'" in capsys.readouterr().out


def test_steps_that_run_here_act_as_it_too(google_iam):
    credentials.impersonate(options(LAST))
    client = publication.make_client(Destination("p", "d", "EU", "t"))
    assert client._credentials is credentials.impersonated()
    assert reading.make_client().transport._credentials.signer_email == LAST
    assert client._credentials is auth.get_service_credentials(PipelineOptions([])).get_google_auth_credentials()


def test_identity_tokens_are_the_impersonated_accounts(google_iam):
    """IAP and Cloud Run see it, by its address; a person's own login, which gets no token itself, gets one so."""
    credentials.impersonate(options(FIRST, LAST))
    token = _Auth(("https", "mlflow", 443), "audience").token()
    assert token.startswith("e30.")
    assert google_iam.delegates[-1] == ("generateIdToken", [FIRST])
    assert google_iam.sent == {"audience": "audience", "delegates": [FIRST], "includeEmail": True}


def test_without_the_flag_clients_find_the_default_account(google_iam):
    credentials.impersonate(options())
    assert credentials.impersonated() is None
    assert publication.make_client(Destination("p", "d", "EU", "t"))._credentials.service_account_email.startswith("tr")


# What goes wrong.


def test_an_account_that_may_not_be_impersonated(google_iam, capsys):
    google_iam.may = False
    assert launch(parse(["--run_id=1", f"--impersonate_service_account={FIRST},{LAST}"])) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: --impersonate_service_account={FIRST},{LAST}: Unable to acquire impersonated cred")
    assert "needs roles/iam.serviceAccountTokenCreator on it (in a chain on the first, and each on the next)" in line
    assert credentials.impersonated() is None


@pytest.mark.timeout(20)
def test_nobody_who_could_impersonate(google_iam, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match=f"--impersonate_service_account={LAST}: File .*nowhere.json was not found"):
        credentials.impersonate(options(LAST))


def test_a_process_acts_as_one_account(google_iam):
    """Beam would go on with its first credentials, in silence."""
    credentials.impersonate(options(LAST))
    credentials.impersonate(options(LAST))
    for others in ([FIRST], []):
        with pytest.raises(ConfigError, match=r"acts as another account already than .*; start a new one"):
            credentials.impersonate(options(*others))


def test_emulators_know_no_accounts(google_iam, warehouse, monkeypatch):
    """A DAG that impersonates in production runs against emulators too."""
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", warehouse.bigquery_url)
    connect()
    beams = auth.get_service_credentials(options(LAST)).get_google_auth_credentials()
    assert isinstance(beams, google.auth.credentials.AnonymousCredentials)
    assert credentials.impersonated() is None
