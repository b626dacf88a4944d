"""A BigQuery that does nothing, fast: the service that the benchmark's ways talk to.

It keeps names of tables and jobs. Every job is done as soon as it is submitted; a load job reads nothing, but the
sizes of its files are noted, so the benchmark knows what was written and that it was submitted. The audit's query gets
the numbers that the benchmark expects; every other query has one row at most.

    python fake_bigquery.py BUCKET_FOLDER      prints its port; gs://bench/… are the files below the folder

Two paths are the benchmark's own: POST /reset with {"counts": {tower: rows}} forgets everything, GET /seen returns
{"jobs", "files", "bytes"} of the load jobs since.
"""

import json
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

BUCKET = "gs://bench/"
LOCATION = "US"
TRAIN_DATE = "2026-03-01"
"""On which make_model.py says that all models were trained."""


class Service:
    """What is known: tables, jobs, and the files of load jobs."""

    def __init__(self, folder):
        self._folder = folder
        self.reset({})

    def reset(self, counts):
        """Forgets everything; `counts` are the rows that each tower of the run is said to have."""
        self._counts = counts
        self._tables = {}
        self._jobs = {}
        self._results = {}
        self.seen = {"jobs": 0, "files": 0, "bytes": 0}

    def answer(self, method, path, body):
        """Returns (status, body)."""
        if path == "/reset":
            self.reset(body["counts"])
            return 200, {}
        if path == "/seen":
            return 200, self.seen
        if path.startswith("/storage/"):
            return 200, {"name": "bench", "location": LOCATION, "items": []}
        parts = path.split("/bigquery/v2/projects/", 1)[-1].split("/")
        project, rest = parts[0], parts[1:]
        if rest[0] == "datasets":
            return self._dataset(method, project, rest[1:], body)
        if rest[0] == "queries" and method == "POST":
            job_id = body.get("requestId") or f"query_{len(self._jobs)}"
            self._insert(project, job_id, {"query": {"query": body["query"]}})
            return 200, self._results[job_id]
        if method == "POST":
            job_id = body.get("jobReference", {}).get("jobId") or f"job_{len(self._jobs)}"
            return self._insert(project, job_id, body["configuration"])
        found = (self._results if rest[0] == "queries" else self._jobs).get(rest[1])
        return (200, found) if found else _not_found(f"Job {project}:{rest[1]}")

    def _dataset(self, method, project, rest, body):
        dataset = rest[0] if rest else body["datasetReference"]["datasetId"]
        if len(rest) < 2:
            return 200, {"datasetReference": {"projectId": project, "datasetId": dataset}, "location": LOCATION}
        if len(rest) == 2:
            if method == "GET":
                return 200, {"tables": list(self._tables.values()), "totalItems": len(self._tables)}
            name = body["tableReference"]["tableId"]
            self._tables[name] = {**body, "type": "TABLE", "location": LOCATION}
            return 200, self._tables[name]
        name = rest[2]
        if name not in self._tables:
            return _not_found(f"Table {project}:{dataset}.{name}")
        if method == "DELETE":
            del self._tables[name]
            return 204, None
        if method in ("PATCH", "PUT"):
            self._tables[name] |= body
        return 200, self._tables[name]

    def _insert(self, project, job_id, configuration):
        reference = {"projectId": project, "jobId": job_id, "location": LOCATION}
        (kind,) = {"load", "query", "copy"} & set(configuration)
        if kind == "load":
            uris = configuration["load"]["sourceUris"]
            self.seen["jobs"] += 1
            self.seen["files"] += len(uris)
            self.seen["bytes"] += sum(os.path.getsize(uri.replace(BUCKET, f"{self._folder}/", 1)) for uri in uris)
        self._jobs[job_id] = {
            "kind": "bigquery#job",
            "id": f"{project}:{LOCATION}.{job_id}",
            "jobReference": reference,
            "configuration": {"jobType": kind.upper(), **configuration},
            "statistics": {kind: {"statementType": "SCRIPT"}} if kind == "query" else {},
            "status": {"state": "DONE"},
        }
        row = self._row(configuration.get("query", {}).get("query", ""))
        self._results[job_id] = {
            "jobReference": reference,
            "jobComplete": True,
            "schema": {
                "fields": [
                    {"name": f"f{at}_", "type": "DATE" if isinstance(value, str) else "INTEGER"}
                    for at, value in enumerate(row)
                ]
            },
            "rows": [{"f": [{"v": str(value)} for value in row]}] if row else [],
            "totalRows": str(bool(row) + 0),
        }
        return 200, self._jobs[job_id]

    def _row(self, sql):
        audit = re.match(r"SELECT train_date, \w+, COUNT\(\*\), COUNT\(DISTINCT (\w+)_id\)", sql)
        if audit:
            return [TRAIN_DATE, 0, *[self._counts[audit[1]]] * 2]
        return [1] if sql.startswith("SELECT COUNT(*)") else []


def _not_found(what):
    message = f"Not found: {what}"
    return 404, {"error": {"code": 404, "message": message, "errors": [{"message": message, "reason": "notFound"}]}}


def main():
    """Serves until it is killed."""
    service = Service(sys.argv[1])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self):
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = service.answer(self.command, urlparse(self.path).path, json.loads(data) if data else {})
            answer = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
