"""Uploads, against an HTTP server that speaks the endpoints of the hub which they need."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model

from megatron_mapo.errors import ConfigError, HubError

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: ``repositories[name]`` is ``{"private": ..., "files": {path: bytes}}``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._is_known():
            return
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if parts[4] == "commit":
            return self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        return self._answer({"error": f"no endpoint {self.path}"}, 404)

    def do_GET(self) -> None:
        if self._is_known():
            self._answer({"sha": "0" * 40, "id": "someone/model", "siblings": []})

    def _is_known(self) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known:
            self._answer({"error": "who are you?"}, 401)
        return known

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        self.server.repositories.setdefault(name, {"private": asked.get("visibility") == "private", "files": {}})
        self._answer({"url": f"{self.server.url}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        repository = self.server.repositories[name]
        repository["files"] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        sha = "1" * 40
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    make_tiny_model(folder / "model", "llama")
    done = run(folder, "", "import", str(folder / "model"), str(folder / "imported"))
    assert done.returncode == 0, done.stderr
    return folder / "imported"


def run(home: Path, url: str, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command line, with another hub and another home, so that no real token is near."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "WORLD_SIZE", "RANK")}
    environment |= {"HF_ENDPOINT": url or "http://127.0.0.1:9", "HF_HOME": str(home / "hf"), "HF_TOKEN": token}
    command = [sys.executable, "-m", "megatron_mapo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_an_export_is_uploaded(hub: Hub, imported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(tmp_path, hub.url, "export", str(imported), str(out), "--push-to-hub", "someone/model", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out), f"{hub.url}/someone/model"]
    found = hub.repositories["someone/model"]
    assert found["private"] is True
    assert found["files"] == {file.name: file.read_bytes() for file in out.iterdir()}
    source = imported.parent / "model"
    assert found["files"] == {file.name: file.read_bytes() for file in source.iterdir()}, "there and back again"


@pytest.mark.parametrize(
    ("name", "token", "error", "message"),
    [
        ("someone/model", "", ConfigError, "HF_TOKEN"),
        ("someone/model", "hf_wrong", HubError, "401"),
        ("some/one/model", TOKEN, HubError, "some/one/model"),
    ],
)
def test_what_cannot_be_uploaded_is_not_exported(
    name: str, token: str, error: type, message: str, hub: Hub, imported: Path, tmp_path: Path
) -> None:
    arguments = ("export", str(imported), str(tmp_path / "out"), "--push-to-hub", name)
    done = run(tmp_path, hub.url, *arguments, token=token)
    assert done.returncode == error.exit_code
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert TOKEN not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not hub.repositories


def test_a_hub_that_cannot_be_reached(imported: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "", "export", str(imported), str(tmp_path / "out"), "--push-to-hub", "someone/model")
    assert done.returncode == HubError.exit_code
    assert done.stderr.count("\n") == 1
