"""The Hub, as far as ``datasets`` asks it for the files of one data set, on a port of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_COMMIT = "1" * 40


@contextmanager
def serving(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """The address, and the paths that were asked for; ``name`` is that of the data set, with its owner."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            for prefix in (f"/datasets/{name}/resolve/main/", f"/datasets/{name}/resolve/{_COMMIT}/"):
                if path.removeprefix(prefix) in files:
                    return self._answer(200, files[path.removeprefix(prefix)])
            tree = f"/api/datasets/{name}/tree/{_COMMIT}"
            if path.startswith(tree):
                return self._answer(200, _json(_tree(files, path.removeprefix(tree).strip("/"))))
            if path == f"/api/datasets/{name}/revision/{_COMMIT}":
                return self._answer(200, _json({"id": name, "sha": _COMMIT, "siblings": []}))
            return self._answer(404, b"", error="EntryNotFound" if f"datasets/{name}/" in path else "RepoNotFound")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

        def _answer(self, status: int, content: bytes, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", _COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _tree(files: dict[str, bytes], directory: str) -> list[dict[str, Any]]:
    """The files that are in a directory itself."""
    return [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in files.items()
        if name.rpartition("/")[0] == directory
    ]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
