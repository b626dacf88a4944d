"""A small BigQuery that answers as the real one does where emulators do not: 409, conflicts, lost answers.

It keeps query jobs. What becomes of each submitted job is taken from a script: a list of outcomes, used up one by one.
A job still runs when it is first looked at, and has ended at the next request about it: whoever waits with
getQueryResults gets the failure of the job as a failed request, with the status that its reason has there.
Bodies are as BigQuery sends them (https://cloud.google.com/bigquery/docs/error-messages; the texts of conflicts are
from public reports of dlt-hub/dlt#2892, estuary/connectors#111 and confluentinc/kafka-connect-bigquery#279).
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

ABORTED = {
    "reason": "invalidQuery",
    "location": "query",
    "message": "Query error: Transaction is aborted due to concurrent update against table "
    "my-project:raw_prod.two_tower_embedding_lock. Transaction ID: 61e30eea-0000-2dab-8e60-94eb2c1b1a92 at [2:1]",
}
NOT_SERIALIZABLE = {
    "reason": "invalidQuery",
    "location": "q",
    "message": "Could not serialize access to table my-project:raw_prod.two_tower_embedding_lock due to concurrent update",
}
TAKEN = {
    "reason": "invalidQuery",
    "location": "query",
    "message": "Query error: partition taken: my-project.raw_prod.two_tower_user_embedding at [3:1]",
}
DENIED = {
    "reason": "accessDenied",
    "message": "Access Denied: Table my-project:raw_prod.two_tower_user_embedding: User does not have permission",
}
BACKEND = {
    "reason": "jobBackendError",
    "message": "The job encountered an error during execution. Retrying the job may solve the problem.",
}
INTERNAL = {
    "reason": "jobInternalError",
    "message": "An internal error occurred and the request could not be completed. Error: 80324028",
}
RATE = {
    "reason": "jobRateLimitExceeded",
    "message": "Job exceeded rate limits: Your job exceeded the rate limit. Retrying the job may solve the problem.",
}
# These three may be of the request or of the job, so the client asks again for ten minutes, then raises RetryError.
AMBIGUOUS_BACKEND = {"reason": "backendError", "message": "Error encountered during execution. Retrying may solve it."}
AMBIGUOUS_INTERNAL = {"reason": "internalError", "message": "An internal error occurred during execution."}
AMBIGUOUS_RATE = {"reason": "rateLimitExceeded", "message": "Exceeded rate limits: too many table update operations"}
DONE = None
LOST_ANSWER = "the job runs, and the connection breaks before the answer is there"

# https://cloud.google.com/bigquery/docs/error-messages
_STATUS = {"accessDenied": 403, "rateLimitExceeded": 403, "backendError": 503, "internalError": 500}


class FakeBigQuery:
    """State of the service.

    Attributes:
        outcomes: what becomes of the next jobs: DONE, an error result, or LOST_ANSWER.
        jobs: job id → error result, of every job that was submitted.
        submitted: every request to submit a job, refused ones too.
        hidden: how many more requests for a job are answered 404 although it is there, as for some seconds after it
            was submitted (https://github.com/googleapis/python-bigquery/issues/2134).
        down: whether every request is answered 503.
        tables: names of tables that can be deleted, if `may_delete`.
        created: the bodies of all requests to create a table.
    """

    def __init__(self, outcomes):
        self.outcomes = list(outcomes)
        self.jobs = {}
        self.submitted = []
        self.hidden = 0
        self.down = False
        self.tables = set()
        self.created = []
        self.may_delete = True
        self._running = set()

    def insert(self, job_id):
        """Returns (status, body), or None where the answer is lost."""
        if self.down:
            return _DOWN
        self.submitted.append(job_id)
        if job_id in self.jobs:
            return 409, error(409, "duplicate", f"Already Exists: Job my-project:EU.{job_id}", "ALREADY_EXISTS")
        outcome = self.outcomes.pop(0)
        self.jobs[job_id] = None if outcome == LOST_ANSWER else outcome
        self._running.add(job_id)
        return None if outcome == LOST_ANSWER else (200, self.job(job_id))

    def job(self, job_id):
        status = {"state": "RUNNING" if job_id in self._running else "DONE"}
        if status["state"] == "DONE" and self.jobs[job_id]:
            status |= {"errorResult": self.jobs[job_id], "errors": [self.jobs[job_id]]}
        return {
            "kind": "bigquery#job",
            "id": f"my-project:EU.{job_id}",
            "jobReference": {"projectId": "my-project", "jobId": job_id, "location": "EU"},
            "configuration": {"jobType": "QUERY", "query": {"query": "BEGIN TRANSACTION", "useLegacySql": False}},
            "statistics": {"query": {"statementType": "SCRIPT"}},
            "status": status,
        }

    def create(self, table):
        self.created.append(table)
        self.tables.add(table["tableReference"]["tableId"])
        return 200, table

    def delete(self, path):
        table = path.rsplit("/", 1)[1]
        if table not in self.tables:
            return 404, error(404, "notFound", f"Not found: Table {table}", "NOT_FOUND")
        if not self.may_delete:
            denied = f"Access Denied: Table {table}: Permission bigquery.tables.delete denied"
            return 403, error(403, "accessDenied", denied, "PERMISSION_DENIED")
        self.tables.remove(table)
        return 204, None

    def get(self, path):
        if self.down:
            return _DOWN
        kind, job_id = path.split("/")[-2:]
        hidden, self.hidden = self.hidden, max(0, self.hidden - 1)
        if job_id not in self.jobs or hidden:
            return 404, error(404, "notFound", f"Not found: Job my-project:EU.{job_id}", "NOT_FOUND")
        if kind == "jobs":
            answer = 200, self.job(job_id)
            self._running.discard(job_id)
            return answer
        self._running.discard(job_id)
        if failed := self.jobs[job_id]:
            status = _STATUS.get(failed["reason"], 400)
            return status, error(status, failed["reason"], failed["message"], "FAILED")
        return 200, {"jobReference": self.job(job_id)["jobReference"], "jobComplete": True, "totalRows": "0"}


def error(code, reason, message, status):
    details = [{"message": message, "domain": "global", "reason": reason}]
    return {"error": {"code": code, "message": message, "errors": details, "status": status}}


_DOWN = 503, error(503, "backendError", "Visibility check was unavailable. Please retry the request", "UNAVAILABLE")


@contextmanager
def serve(*outcomes):
    """Yields (FakeBigQuery, a client of it)."""
    fake = FakeBigQuery(outcomes)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            creates = urlparse(self.path).path.endswith("/tables")
            self.answer(fake.create(body) if creates else fake.insert(body["jobReference"]["jobId"]))

        def do_GET(self):
            self.answer(fake.get(urlparse(self.path).path))

        def do_DELETE(self):
            self.answer(fake.delete(urlparse(self.path).path))

        def answer(self, answer):
            if answer is None:
                self.connection.close()
                return
            status, body = answer
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield (
            fake,
            bigquery.Client(
                project="my-project",
                location="EU",
                credentials=AnonymousCredentials(),
                client_options=ClientOptions(api_endpoint=f"http://127.0.0.1:{server.server_port}"),
            ),
        )
    finally:
        server.shutdown()
        server.server_close()
