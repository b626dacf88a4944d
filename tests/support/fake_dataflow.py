"""A small Dataflow that takes jobs, keeps them and runs none: the REST calls of Beam's runner and of Airflow's hook.

It knows what matters for a launch: a name is taken while a job of that name is active, a request that is sent again is
the same job, and every look at a job brings it one state further. The refusal is what Dataflow answers
(https://github.com/apache/beam/issues/21121).

    python fake_dataflow.py      serves until interrupted, for --dataflow_endpoint=http://localhost:PORT --no_auth
"""

import json
import re
import threading
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

STATES = ["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_DONE"]
TYPES = ["JOB_TYPE_UNKNOWN", "JOB_TYPE_BATCH", "JOB_TYPE_STREAMING"]
ENDED = ("JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED")

_JOBS = re.compile(r"/v1b3/projects/([^/]+)/locations/([^/]+)/jobs(?:/([^/]+)(/messages)?)?")


class FakeDataflow:
    """State of the service; a context manager that serves it.

    Attributes:
        url: for --dataflow_endpoint. Beam speaks REST with "localhost" only, and gRPC with any other name.
        jobs: job id → job, oldest first.
        states: what becomes of jobs, one state for each time they are looked at.
        sizes: bytes of each request to make a job, refused ones too.
    """

    def __init__(self, states=STATES):
        self.states = states
        self.jobs = {}
        self.sizes = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"dataflow": self}))
        self.url = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method, path, body):
        """Returns HTTP status and body."""
        found = _JOBS.fullmatch(path)
        if not found:
            return _error(404, "NOT_FOUND", f"{path} is not served here")
        project, region, job_id, messages = found.groups()
        with self._lock:
            if not job_id:
                return self._create(project, region, body)
            job = self.jobs.get(job_id)
            if not job or (job["projectId"], job["location"]) != (project, region):
                return _error(404, "NOT_FOUND", f"Information about job {job_id} could not be found")
            if messages:
                return 200, {"jobMessages": []}
            if method == "PUT":
                job["currentState"] = body["requestedState"]
            elif job["currentState"] not in ENDED:
                job["currentState"] = self.states[self.states.index(job["currentState"]) + 1]
            return 200, job

    def _create(self, project, region, body):
        self.sizes.append(len(json.dumps(body)))
        for job in self.jobs.values():
            if (job["projectId"], job["location"], job["name"]) != (project, region, body["name"]):
                continue
            if job["clientRequestId"] == body["clientRequestId"]:
                return 200, job
            if job["currentState"] not in ENDED:
                cause = f"There is already an active job named {body['name']}."
                return _error(
                    409,
                    "ALREADY_EXISTS",
                    f"({uuid.uuid4().hex[:16]}): The workflow could not be created. Causes: ({uuid.uuid4().hex[:16]}): "
                    f"{cause} If you want to submit a second job, try again by setting a different name.",
                )
        now = datetime.now(UTC)
        job_id = f"{now:%Y-%m-%d_%H_%M_%S}-{uuid.uuid4().int % 10**19}"
        self.jobs[job_id] = {
            **body,
            # Beam sends enums as numbers; Dataflow tells their names.
            "type": TYPES[body["type"]] if isinstance(body["type"], int) else body["type"],
            "id": job_id,
            "projectId": project,
            "location": region,
            "currentState": self.states[0],
            "createTime": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}",
        }
        return 200, self.jobs[job_id]


def _error(code, status, message):
    return code, {"error": {"code": code, "status": status, "message": message}}


class _Handler(BaseHTTPRequestHandler):
    dataflow: FakeDataflow

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or "{}")
        status, answer = self.dataflow.answer(self.command, urlsplit(self.path).path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    with FakeDataflow() as dataflow:
        print(dataflow.url, flush=True)
        threading.Event().wait()
