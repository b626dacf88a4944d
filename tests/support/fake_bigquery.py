"""A small BigQuery that answers as the real one does where emulators do not: 409, conflicts, lost answers.

It keeps query jobs and tables. What becomes of each submitted job is taken from a script: a list of outcomes, used up one by one.
A job still runs when it is first looked at, and has ended at the next request about it: whoever waits with
getQueryResults gets the failure of the job as a failed request, with the status that its reason has there.
Bodies are as BigQuery sends them (https://cloud.google.com/bigquery/docs/error-messages; the texts of conflicts are
from public reports of dlt-hub/dlt#2892, estuary/connectors#111 and confluentinc/kafka-connect-bigquery#279).

It runs no SQL: each query that returns rows is answered as the test has said.
"""

import json
import threading
from contextlib import contextmanager
from datetime import date
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
        looks: how many looks at jobs find them running; one if not set.
        down: whether every request is answered 503.
        tables: names of tables that can be listed, and deleted if `may_delete`.
        resources: name → table, of those that can be looked at; created ones are added.
        life, partition_life: the dataset's defaults, which tables inherit: when they expire, and their partitions.
        created: the bodies of all requests to create a table.
        is_taken: whether another launch creates each table a moment before.
        dataset: in which `tables` are.
        has_dataset: whether tables can be created at all.
        rows: SQL → the rows that it returns.
        queries: the SQL of all queries, in order.
        configurations: of all jobs that were submitted.
    """

    def __init__(self, outcomes):
        self.outcomes = list(outcomes)
        self.resources = {}
        self.life = self.partition_life = None
        self.is_taken = False
        self.has_dataset = True
        self.dataset = "my-project.raw_prod"
        self.rows = {}
        self.queries = []
        self.configurations = []
        self.jobs = {}
        self.submitted = []
        self.hidden = 0
        self.looks = 1
        self.down = False
        self.tables = set()
        self.created = []
        self.may_delete = True
        self.sql = {}
        self._running = set()

    def job_ended(self, job_id):
        self._running.discard(job_id)

    def insert(self, job_id, configuration=None):
        """Returns (status, body), or None where the answer is lost."""
        if self.down:
            return _DOWN
        if configuration:
            self.configurations.append(configuration)
            self.sql[job_id] = configuration["query"]["query"]
        self.submitted.append(job_id)
        if job_id in self.jobs:
            return 409, error(409, "duplicate", f"Already Exists: Job my-project:EU.{job_id}", "ALREADY_EXISTS")
        if not self.outcomes and self.sql.get(job_id) not in self.rows:
            return 400, error(400, "invalidQuery", "the test expects no further job", "INVALID_ARGUMENT")
        outcome = DONE if self.sql.get(job_id) in self.rows else self.outcomes.pop(0)
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
        name = table["tableReference"]["tableId"]
        if not self.has_dataset:
            return 404, error(404, "notFound", "Not found: Dataset my-project:raw_prod", "NOT_FOUND")
        self.created.append(table)
        self.tables.add(name)
        made = {**table, **({"expirationTime": self.life} if self.life else {})}
        if self.partition_life and "timePartitioning" in made:
            made["timePartitioning"] = {"expirationMs": self.partition_life} | made["timePartitioning"]
        self.resources[name] = made
        if self.is_taken:
            return 409, error(409, "duplicate", f"Already Exists: Table {name}", "ALREADY_EXISTS")
        return 200, made

    def table(self, name):
        if name not in self.resources:
            return 404, error(404, "notFound", f"Not found: Table {name}", "NOT_FOUND")
        return 200, self.resources[name]

    def listed(self, path):
        _, project, _, dataset, _ = path.rsplit("/", 4)
        if f"{project}.{dataset}" != self.dataset:
            return 404, error(404, "notFound", f"Not found: Dataset {project}:{dataset}", "NOT_FOUND")
        reference = {"projectId": project, "datasetId": dataset}
        return 200, {"tables": [{"tableReference": {**reference, "tableId": name}} for name in sorted(self.tables)]}

    def query(self, sql):
        """Answers a query at once, as jobs.query does a short one."""
        self.queries.append(sql)
        return 200, {"jobReference": {"projectId": "my-project", "jobId": "query", "location": "EU"}} | self.result(sql)

    def result(self, sql):
        rows = self.rows.get(sql, [])
        kinds = {int: "INTEGER", date: "DATE"}
        fields = [
            {"name": f"f{at}_", "type": kinds.get(type(v), "STRING")} for at, v in enumerate(rows[0] if rows else ())
        ]
        values = [{"f": [{"v": None if value is None else str(value)} for value in row]} for row in rows]
        return {"jobComplete": True, "totalRows": str(len(rows)), "rows": values} | (
            {"schema": {"fields": fields}} if fields else {}
        )

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
            self.looks -= 1
            if not self.looks > 0:
                self.job_ended(job_id)
            return answer
        self.job_ended(job_id)
        if failed := self.jobs[job_id]:
            status = _STATUS.get(failed["reason"], 400)
            return status, error(status, failed["reason"], failed["message"], "FAILED")
        return 200, {"jobReference": self.job(job_id)["jobReference"]} | self.result(self.sql.get(job_id))


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
            path = urlparse(self.path).path
            if path.endswith("/tables"):
                self.answer(fake.create(body))
            elif path.endswith("/queries"):
                self.answer(fake.query(body["query"]))
            else:
                self.answer(fake.insert(body["jobReference"]["jobId"], body["configuration"]))

        def do_GET(self):
            path = urlparse(self.path).path
            if path.endswith("/tables"):
                self.answer(fake.listed(path))
            elif "/tables/" in path:
                self.answer(fake.table(path.rsplit("/", 1)[1]))
            else:
                self.answer(fake.get(path))

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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it ends
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
