"""A small Cloud Storage: serves the files of a folder by Google's JSON API, and counts what is asked of it.

It knows generations, ranges and preconditions, and nothing but reading. What an emulator does not show: how many bytes
and requests a read takes, and what becomes of an object that is replaced meanwhile.
"""

import argparse
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Storage:
    """What was asked so far.

    Attributes:
        url: where it answers.
        fetched: bytes of objects sent, by name.
        ranges: requests for bytes, by name.
        lookups: requests for metadata, by name.
        connections: that were opened.
        refusals: statuses to answer the next requests for bytes with.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.lock = threading.Lock()
        self.refusals = []
        self.connections = 0
        self.forget()

    def forget(self):
        self.fetched, self.ranges, self.lookups = Counter(), Counter(), Counter()

    @property
    def requests(self):
        return self.ranges.total() + self.lookups.total()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.server.storage.lock:
            self.server.storage.connections += 1

    def do_GET(self):
        storage, url = self.server.storage, urlsplit(self.path)
        if url.path == "/seen":
            self._send(200, json.dumps({"fetched": storage.fetched.total(), "requests": storage.requests}).encode())
            return
        query = parse_qs(url.query)
        bucket, _, name = url.path.rstrip("/").removesuffix("/o").partition("/b/")[2].partition("/o/")
        if not name:
            self._list(bucket, query.get("prefix", [""])[0])
            return
        name = unquote(name)
        path = storage.folder / bucket / name
        if not path.is_file():
            self._send(
                404, json.dumps({"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}).encode()
            )
            return
        state = path.stat()
        generation = str(state.st_mtime_ns)
        if query.get("alt") != ["media"]:
            with storage.lock:
                storage.lookups[name] += 1
            about = {"name": name, "bucket": bucket, "size": str(state.st_size), "generation": generation}
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
            return
        with storage.lock:
            storage.ranges[name] += 1
            refusal = storage.refusals.pop(0) if storage.refusals else None
        if query.get("ifGenerationMatch", [generation]) != [generation]:
            refusal = 412
        if refusal:
            self._send(refusal, json.dumps({"error": {"code": refusal, "message": "not now"}}).encode())
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else state.st_size, state.st_size)
        self._send(206, None, {"Content-Range": f"bytes {start}-{end - 1}/{state.st_size}"}, end - start)
        with path.open("rb") as file:
            file.seek(start)
            while start < end and (block := file.read(min(1 << 20, end - start))):
                start += len(block)
                with storage.lock:  # Before it is sent: who has it may ask at once what was fetched.
                    storage.fetched[name] += len(block)
                self.wfile.write(block)

    def _list(self, bucket, prefix):
        """What lies in a folder, for who asks with the delimiter `/`."""
        found = sorted((self.server.storage.folder / bucket / prefix).glob("*"))
        files = [{"name": prefix + path.name, "size": str(path.stat().st_size)} for path in found if path.is_file()]
        folders = [f"{prefix}{path.name}/" for path in found if path.is_dir()]
        self._send(
            200, json.dumps({"items": files, "prefixes": folders}).encode(), {"Content-Type": "application/json"}
        )

    def _send(self, status, body, headers=None, length=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(body) if length is None else length}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True


@contextmanager
def serve(folder):
    """Serves the folders in a folder as buckets; gives the Storage."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.storage = Storage(folder)
    server.storage.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.storage
    finally:
        server.shutdown()
        server.server_close()


def main():
    """Serves until it is killed; prints the port. What was asked since it began is at /seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    with serve(parser.parse_args().folder) as storage:
        print(storage.url.rpartition(":")[2], flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
