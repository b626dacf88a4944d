"""A real tracking server, a gate in front of it that wants credentials, and Google's sources of identity tokens."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def serving(handler, **state):
    """Runs an HTTP server in a thread; gives it, with a `url` and the given attributes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        for name, value in state.items():
            setattr(server, name, value)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until it ends
        yield server
        server.shutdown()


@contextmanager
def tracking_server(folder):
    """Runs `mlflow server --serve-artifacts`; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--serve-artifacts"]
    command += [f"--artifacts-destination={folder}/artifacts"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while True:
            try:
                _DIRECT.open(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, 9)  # Asked to stop, it waits for clients that keep their connection.
        process.wait()


class Gate(BaseHTTPRequestHandler):
    """Passes on what comes with credentials.

    `server.admits(headers)` decides; `server.target` is behind it; `server.seen` are the headers that were admitted, and
    `server.before(path)` runs ahead of each request.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.admits(self.headers):
            return self._answer(401, {"Content-Type": "text/html"}, b"<h1>Invalid credentials</h1>\nAsk somebody.")
        self.server.seen.append(dict(self.headers))
        if answer := self.server.before(self.path):
            return self._answer(*answer)
        own = ("host", "connection", "authorization", "proxy-authorization", "x-serverless-authorization")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        request = urllib.request.Request(self.server.target + self.path, body or None, headers, method=self.command)
        try:
            answer = _DIRECT.open(request)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return self._answer(answer.status, {"Content-Type": answer.headers["Content-Type"]}, answer.read())

    do_POST = do_GET

    def _answer(self, status, headers, body):
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # The job was interrupted.
            pass

    def log_message(self, *args):
        pass


def gate(target, admits):
    return serving(Gate, target=target, admits=admits, seen=[], before=lambda path: None)


class Tokens(BaseHTTPRequestHandler):
    """Gives identity tokens as Google does: to the holder of a service account's key, and on a machine of Google's.

    `server.life` are the seconds that a token is good for; `server.issued` maps tokens to (audience, expiry).
    """

    def do_POST(self):
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        claims = json.loads(_unpadded(form["assertion"][0].split(".")[1]))
        self._send(json.dumps({"id_token": self._issue(claims["target_audience"])}), "application/json")

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path.endswith("/identity"):
            self._send(self._issue(parse_qs(url.query)["audience"][0]), "text/plain")
        else:
            self._send(json.dumps({"email": "trainer@p.iam.gserviceaccount.com", "scopes": []}), "application/json")

    def _issue(self, audience):
        expiry = time.time() + self.server.life
        claims = {"aud": audience, "exp": int(expiry), "nonce": len(self.server.issued)}
        parts = ({"alg": "RS256"}, claims, f"signature {len(self.server.issued)}")
        token = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        self.server.issued[token] = (audience, int(expiry))
        return token

    def _send(self, text, kind):
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def tokens(life=3600):
    return serving(Tokens, life=life, issued={})


def _unpadded(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def service_account_key(path, token_uri):
    """Writes a key file as Google's console makes them."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    content = {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "1",
        "private_key": key.decode(),
        "client_email": "trainer@p.iam.gserviceaccount.com",
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(content))
    return str(path)
