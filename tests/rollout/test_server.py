"""Starting and ending servers: clear errors, and no orphans however the parent ends."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from aiohttp import web
from fleet import served
from server_support import API_KEY, alive, child_environment, descendants, model_config, server_config

from megatron_mapo.errors import RolloutError
from megatron_mapo.patches import sglang_cpu
from megatron_mapo.rollout.client import RolloutClient, Sampling, read_api_key
from megatron_mapo.rollout.server import Server, ServerGroup


def start(tmp_path: Path, model_path: Path, key: str | None = None, **options) -> ServerGroup:
    return ServerGroup(server_config(**options), model_config(model_path), tmp_path, key).start()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.05)


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path, model_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RolloutError, match=rf"port {port} .* in use.*rollout\.server\.port"):
            start(tmp_path, model_path, port=port)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(RolloutError, match=r"model\.path=.*nowhere"):
        start(tmp_path, tmp_path / "nowhere")


def test_the_network_needs_a_key(tmp_path, model_path):
    with pytest.raises(RolloutError, match=r"rollout\.server\.host=0\.0\.0\.0.*API key"):
        start(tmp_path, model_path, host="0.0.0.0")


def test_a_server_that_ends_at_start_shows_its_log(tmp_path, model_path):
    with pytest.raises(RolloutError, match=r"(?s)ended with status 2.*--no-such-option"):
        start(tmp_path, model_path, extra_args=["--no-such-option"])


def test_a_server_that_is_late_is_ended_and_named(tmp_path, model_path):
    group = ServerGroup(server_config(startup_timeout=1.0), model_config(model_path), tmp_path)
    with pytest.raises(RolloutError, match=r"rollout\.server\.startup_timeout=1 s"):
        group.start()
    assert group.servers == []
    log = next(tmp_path.iterdir())
    assert not any(str(log) in "".join(map(str, files(pid))) for pid in descendants(os.getpid()))


def files(pid: int) -> list[Path]:
    """Files that a process has open."""
    return [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]


def test_the_key_is_nowhere_to_be_read(servers):
    pids = [servers.servers[0].pid, *descendants(servers.servers[0].pid)]
    assert len(pids) >= 3  # keeper, server and at least one worker
    for pid in pids:
        assert API_KEY not in Path(f"/proc/{pid}/cmdline").read_text()
        assert API_KEY not in Path(f"/proc/{pid}/environ").read_text()
    assert API_KEY not in servers.servers[0].log.read_text()


def test_a_request_without_the_key_is_refused(servers):
    request = urllib.request.Request(f"{servers.urls[0]}/generate", b"{}", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 401


def test_a_key_file_that_others_can_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o644)
    with pytest.raises(RolloutError, match=r"rollout\.api_key_file.*chmod 600"):
        read_api_key(str(file))
    file.chmod(0o600)
    assert read_api_key(str(file)) == "secret"
    monkeypatch.setenv("MAPO_API_KEY", "other")
    assert read_api_key(None) == "other"


def test_another_version_of_sglang_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.22")
    monkeypatch.setattr(sglang_cpu, "needed", lambda: True)
    with pytest.raises(RolloutError, match=r"sglang 0\.5\.22 is installed, .* fits 0\.5\.23 only"):
        sglang_cpu.environment({}, 1)


def test_nothing_is_changed_on_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(sglang_cpu, "needed", lambda: False)
    assert sglang_cpu.environment({"A": "b"}, 1) == {"A": "b"}


def test_readiness_is_asked_of_the_server_alone(tmp_path, monkeypatch):
    """No proxy of the environment gets the key, or stands in the way; and nonsense is no answer."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    keys = []

    async def model_info(request: web.Request) -> web.Response:
        keys.append(request.headers["Authorization"])
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/model_info", model_info)
    with served(app) as url:
        assert Server(url, tmp_path / "log", [], API_KEY, {}).ready()
    assert keys == [f"Bearer {API_KEY}"]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection = listener.accept()[0]
            connection.recv(1 << 16)
            connection.sendall(b"this is not HTTP\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert not Server(url, tmp_path / "log", [], API_KEY, {}).ready()
        thread.join()


PARENT = """
    import sys, time
    sys.path[:0] = {paths!r}
    from pathlib import Path
    from server_support import model_config, server_config
    from megatron_mapo.rollout.server import ServerGroup
    group = ServerGroup(server_config(), model_config(Path({model!r})), {logs!r}).start()
    print(group.urls[0], group.servers[0].pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def orphan_candidate(tmp_path, model_path):
    """A parent process with a running server: (parent, url, all its descendants)."""
    here = Path(__file__).parent
    code = textwrap.dedent(PARENT).format(
        paths=[str(here), str(here.parent)], model=str(model_path), logs=str(tmp_path)
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=child_environment())
    assert parent.stdout is not None
    url, keeper = parent.stdout.readline().split()
    pids = descendants(parent.pid)
    assert int(keeper) in pids
    yield parent, url, int(keeper), pids
    parent.kill()
    parent.wait()


def test_nothing_outlives_a_killed_parent(orphan_candidate):
    parent, url, _, pids = orphan_candidate
    assert len(pids) >= 4  # keeper, server, scheduler, detokenizer
    urllib.request.urlopen(f"{url}/model_info").read()
    os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_server_that_dies_while_sampling_is_a_clear_error(tmp_path, model_path):
    """The keeper is killed too: then nothing but the kernel ends the server."""
    group = start(tmp_path, model_path)
    pids = descendants(group.servers[0].pid)

    async def work():
        client = RolloutClient(group.urls, retries=1)
        task = asyncio.create_task(client.generate([5, 6, 7], 1, Sampling(900), seeds=[1]))
        await asyncio.sleep(0.3)
        os.kill(group.servers[0].pid, signal.SIGKILL)
        try:
            await task
        finally:
            await client.close()

    with pytest.raises(RolloutError, match=f"{group.urls[0]} is out"):
        asyncio.run(work())
    with pytest.raises(RolloutError, match=r"ended with status -9; the end of"):
        group.check()
    wait_until(lambda: not any(alive(pid) for pid in pids))
    group.stop()
