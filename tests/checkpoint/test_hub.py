"""What is fetched from a hub, from one on the loopback interface that notes what it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.support.zoo import make
from edgemoe.quiet import quiet_transformers
from tests.support.checkpoints import edit

REPOSITORY = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves a folder as the repository `org/model`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
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
        return sorted(file.relative_to(self.folder) for file in self.folder.rglob("*") if file.is_file())

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = handler.path.partition("?")[0]
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(prefix):
            self._file(handler, path[len(prefix) :], body=body)
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._json(handler, [self._entry(file) for file in self.files()])
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": file.as_posix()} for file in self.files()]
            self._json(handler, {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})
        else:
            handler.send_error(404)

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

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    with quiet_transformers():
        make("mixtral", folder, max_shard_size="300KB")
    served = Hub(folder)
    yield served
    served.close()


def asked(hub: Hub, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`edgemoe plan` of the repository, with an empty cache of the hub's files at first."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [
        sys.executable,
        "-c",
        "import sys; from edgemoe.cli.main import main; sys.exit(main())",
        "plan",
        "-m",
        REPOSITORY,
        "--device",
        "cpu",
        *more,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_of_several_copies_of_the_weights_one_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """unslothai/unsloth#11227, exo-explore/exo#1800."""
    (hub.folder / "original").mkdir()
    for copy in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        shutil.copy(next(hub.folder.glob("model-*.safetensors")), hub.folder / copy)
    (hub.folder / "original" / "params.json").write_text("{}")
    (hub.folder / "old-00001-of-00002.safetensors").write_bytes(b"left behind")
    done = asked(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.fetched[0] == "config.json"
    shards = {file.name for file in hub.folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    rest = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert set(hub.fetched) == shards | rest
    assert len(hub.fetched) == len(set(hub.fetched)), "each once"


def test_what_is_in_the_cache_needs_no_connection(hub: Hub, tmp_path: Path) -> None:
    assert asked(hub, tmp_path).returncode == 0
    hub.fetched.clear()
    assert asked(hub, tmp_path, "--offline").returncode == 0
    hub.close()
    done = asked(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "nosuch"}}, "is quantised (nosuch)"),
        ({"model_type": "llama"}, "is not a Mixture-of-Experts model"),
        ({"model_type": "nosuch"}, "is of the family nosuch, unknown"),
    ],
)
def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(
    change: dict[str, Any], said: str, hub: Hub, tmp_path: Path
) -> None:
    edit(hub.folder / "config.json", lambda config: config.update(change))
    done = asked(hub, tmp_path)
    assert done.returncode == 3
    assert said in done.stderr
    assert hub.fetched == ["config.json"]
    assert len(done.stderr.splitlines()) == 1
