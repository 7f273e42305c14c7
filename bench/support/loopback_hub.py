"""A hub of models on the loopback interface that notes which files it is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves a folder as the repository `org/model`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        """The files that were asked for with their contents, in order."""
        self.gated = False
        """Whether only those who have accepted its terms are given files."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:  # noqa: N802
                hub.answer(self, body=False)

            def do_GET(self) -> None:  # noqa: N802
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def files(self) -> list[Path]:
        """What the repository has."""
        return sorted(file.relative_to(self.folder) for file in self.folder.rglob("*") if file.is_file())

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answers a request: with the headers alone, or also with the `body`."""
        path = handler.path.partition("?")[0]
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(prefix) and self.gated:
            self._refuse(handler, 403, "GatedRepo")
        elif path.startswith(prefix):
            self._file(handler, path[len(prefix) :], body=body)
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._json(handler, [self._entry(file) for file in self.files()])
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": file.as_posix()} for file in self.files()]
            self._json(handler, {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/"):
            self._refuse(handler, 401, "RepoNotFound")
        else:
            handler.send_error(404)

    def _refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        """An error with a name, as the hub answers."""
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _entry(self, file: Path) -> dict[str, Any]:
        data = (self.folder / file).read_bytes()
        return {"type": "file", "path": file.as_posix(), "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, handler: BaseHTTPRequestHandler, value: object) -> None:
        data = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _file(self, handler: BaseHTTPRequestHandler, name: str, *, body: bool) -> None:
        data = (self.folder / name).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if body:
            self.fetched.append(name)
            handler.wfile.write(data)

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which huggingface_hub asks this hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()
