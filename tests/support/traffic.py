"""A proxy before the emulators: it tells steps of a job apart by their requests, and kills the worker that sends one.

It also keeps the rule of BigQuery's that a retried step relies on and the emulator does not know: a job id is used once,
and its second insert is answered with 409 (https://cloud.google.com/bigquery/docs/running-jobs#generate-jobid).
"""

import http.client
import json
import os
import re
import signal
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "date", "server"}


def step(method, path, body):
    """Returns what a worker does that sends this request; None for what says nothing."""
    kind = f"{method} {path}"
    if "/o/" in path and method == "GET" and "alt=media" in path:
        if "features" in path:
            return "features"
        if re.search(r"variables\.data|weights|\.keras|\.parquet|\.npy", path):
            return "read"
    if method in ("POST", "PUT") and "/upload/" in path:
        return "write"
    if re.search(r"^POST .*/jobs(\?|$)", kind):
        text = body.decode(errors="replace")
        if '"load"' in text:
            return "load"
        if '"copy"' in text:
            return "copy"
        if "BEGIN TRANSACTION" in text:
            return "publish"
        return "audit" if "_staging_" in text else "query"
    if re.search(r"^GET .*/jobs/beam_bq_job", kind):
        return "wait"
    if re.search(r"^GET .*/(jobs|queries)/publish_", kind):
        return "ask after publication"
    if re.search(r"^POST .*/queries", kind):
        return "audit" if "_staging_" in body.decode(errors="replace") else "query"
    if re.search(r"^POST .*/tables(\?|$)", kind):
        return "prepare" if "_staging_" in body.decode(errors="replace") else "shape"
    if re.search(r"^DELETE .*/tables/", kind):
        return "clean"
    return None


class Traffic:
    """Where the emulators are for a job, and what it has asked them.

    Attributes:
        bigquery_url, storage_url: for the job's environment.
        steps: of the requests so far, in order.
        last: step → the id of the process that sent its latest request, None if it is no worker.
        loaded: files of the load jobs that were accepted.
        before, after: called with (step, process id) ahead of a request and once it was carried out, before its answer.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.used = {}
        self.forget()

    def forget(self):
        self.steps, self.loaded, self.last = [], [], {}
        self.before = self.after = lambda step, pid: None

    def workers(self):
        """Returns the ids of the SDK workers that this proxy stands before."""
        mine = f"BIGQUERY_EMULATOR_HOST={self.bigquery_url}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                is_worker = entry.name.isdigit() and b"sdk_worker" in (entry / "cmdline").read_bytes()
                if is_worker and mine in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # It has ended.
                continue
        return found

    def kill(self, pid):
        """Kills a worker with the program that would start it again, as if its machine was gone."""
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"boot" in Path(f"/proc/{parent}/cmdline").read_bytes():
                os.kill(parent, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        except OSError:  # It has ended by itself.
            pass

    def kill_at(self, step, when="before", times=1):
        """Kills the worker that sends the first requests of a step."""
        left = [times]

        def hook(found, pid):
            with self.lock:
                if found != step or not left[0] or not pid:
                    return
                left[0] -= 1
            self.kill(pid)

        setattr(self, when, hook)
        return lambda: times - left[0]


def owner(port, pids):
    """Returns that of the processes whose connection comes from this local port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                socket = f"socket:[{fields[9]}]"
                for pid in pids:
                    try:
                        if any(os.readlink(fd) == socket for fd in Path(f"/proc/{pid}/fd").iterdir()):
                            return pid
                    except OSError:
                        continue
    return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        traffic, target = self.server.traffic, self.server.target
        body = self._body()
        found = step(self.command, self.path, body)
        pid = owner(self.client_address[1], traffic.workers()) if found else None
        job = self._job_id(body) if found in ("load", "copy", "publish", "audit", "query") else None
        with traffic.lock:
            traffic.steps.append(found)
            traffic.last[found] = pid
            again = job is not None and job in traffic.used
            if job is not None:
                traffic.used[job] = True
        traffic.before(found, pid)
        if again:
            message = f"Already Exists: Job {job[0]}:US.{job[1]}"
            error = {"code": 409, "message": message, "errors": [{"reason": "duplicate", "message": message}]}
            self._send(409, {"Content-Type": "application/json"}, json.dumps({"error": error}).encode())
            return
        connection = http.client.HTTPConnection(target, timeout=600)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        connection.request(self.command, self.path, body or None, {**headers, "Host": target, "Connection": "close"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        with traffic.lock:
            if job is not None and answer.status >= 400:
                del traffic.used[job]
            elif found == "load":
                traffic.loaded += re.findall(r"gs://[^\"]+", body.decode())
        traffic.after(found, pid)
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        # The emulators name themselves in links to uploads and downloads.
        kept = {name: value.replace(target, self.headers["Host"]) for name, value in kept.items()}
        if content.startswith(b"{"):
            content = content.replace(target.encode(), self.headers["Host"].encode())
        self._send(answer.status, kept, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _job_id(self, body):
        found = re.search(rb'"jobReference"\s*:\s*(\{[^}]*\})', body)
        reference = json.loads(found[1]) if found else {}
        return (reference.get("projectId", "local"), reference["jobId"]) if reference.get("jobId") else None

    def _send(self, status, headers, content):
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # The worker was killed.
            self.close_connection = True

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # A worker that is killed breaks its connections.


@contextmanager
def watched(bigquery_url, storage_url):
    """Runs the proxy; gives the Traffic."""
    traffic = Traffic()
    servers = []
    for name, url in (("bigquery_url", bigquery_url), ("storage_url", storage_url)):
        server = _Server(("127.0.0.1", 0), _Handler)
        server.traffic, server.target = traffic, urlsplit(url).netloc
        threading.Thread(target=server.serve_forever, daemon=True).start()
        setattr(traffic, name, f"http://127.0.0.1:{server.server_port}")
        servers.append(server)
    try:
        yield traffic
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
