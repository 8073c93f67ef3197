"""Servers that are killed, hang, answer garbage or are slow, and updates in which they do so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from aiohttp import web
from server_support import API_KEY, EOS, changed, descendants, model_config, reference_logprobs, server_config, tensors
from transformers import PreTrainedModel

from megatron_mapo.config import RolloutConfig, SyncConfig, SyncMode
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import ServersLost, ServersOut, WeightSyncError
from megatron_mapo.rollout.client import RolloutClient, Sampling
from megatron_mapo.rollout.pool import ServerPool, State
from megatron_mapo.rollout.sampler import Sampler
from megatron_mapo.rollout.scoring import Scores
from megatron_mapo.rollout.server import Server, ServerGroup
from megatron_mapo.rollout.supervisor import Supervisor
from megatron_mapo.rollout.weight_sync import WeightSync
from megatron_mapo.rollout.weight_transport import _Group

MIB = "megatron_mapo.rollout.weight_sync.MIB"


@dataclass(frozen=True)
class Question:
    id: int
    token_ids: list[int]


PROMPTS = [Question(i, [3 + i, 9, 20 + i]) for i in range(12)]


async def score(prompt: Question, responses: list[list[int]]) -> Scores:
    return Scores([sum(tokens) % 2 for tokens in responses])


class Fleet:
    """Servers under a supervisor, and the trainer's side of them."""

    def __init__(self, group: ServerGroup, supervisor: Supervisor, model_path: Path, folder: Path) -> None:
        self.group, self.supervisor, self.model_path, self.folder = group, supervisor, model_path, folder
        self.lines: list[str] = []
        self.version = 0
        self.model: PreTrainedModel | None = None

    @contextlib.contextmanager
    def trainer(self, extra: tuple[str, ...] = (), **options: object) -> Iterator[ServerPool]:
        """Fresh pool, sampler and weight sync; all servers hold new weights."""
        self.pool = ServerPool([*self.group.urls, *extra], max_failures=2, log=self.lines.append)
        config = RolloutConfig(responses_per_prompt=4, max_response_tokens=48, max_prompt_tokens=8)
        client = RolloutClient(self.pool, API_KEY, timeout=60, vocab_size=512, probe_timeout=8.0)
        self.sampler = Sampler(client, config, score, [EOS])
        sync = SyncConfig(**{"timeout": 40.0, "bucket_mb": 1} | options)  # type: ignore[arg-type]
        folder, cpu = self.folder, torch.device("cpu")
        self.sync = WeightSync(sync, self.pool, API_KEY, self.model_path, folder, cpu, probe_timeout=8.0)
        try:
            self.all_serve()
            yield self.pool
        finally:
            self.sampler.close()
            self.sync.close()

    def all_serve(self) -> None:
        """Wait for servers that are being started again, and update until all take part."""
        wait_until(lambda: all(server.ready() for server in self.group.servers))
        self.update()
        wait_until(lambda: self.serving() == set(self.group.urls) or self.update())

    def update(self, during: Callable[[int], None] = lambda index: None) -> None:
        """New weights; ``during`` is called before each tensor with its number."""
        self.version += 1
        self.model = changed(self.model_path, self.version)

        def stream():
            for index, item in enumerate(tensors(self.model)):
                during(index)
                yield item

        self.sync.update(stream(), self.version)

    def sample(self, seed: int = 5) -> SequenceBatch:
        return self.sampler.sample(PROMPTS, self.version, seed)

    def serving(self) -> set[str]:
        return set(self.pool.in_state(State.serving))

    def assert_serve_the_new_weights(self, urls: set[str]) -> None:
        """Log-probs from each of these servers are those of the model that was sent last."""

        async def generate(url: str):
            client = RolloutClient([url], API_KEY)
            try:
                return (await client.generate([5, 6, 7], 1, Sampling(8, 0.0, (EOS,))))[0]
            finally:
                await client.close()

        assert self.serving() == urls, self.lines
        for url in urls:
            response = asyncio.run(generate(url))
            assert set(response.weight_versions) == {self.version}
            reference = reference_logprobs(self.model, [5, 6, 7], response.token_ids)
            torch.testing.assert_close(torch.tensor(response.logprobs), reference, atol=1e-3, rtol=0)


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.2)


def kill(server: Server, sig: signal.Signals = signal.SIGKILL) -> None:
    """A signal to the server and its workers, not to their keeper."""
    for pid in descendants(server.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[Callable[[], None]]:
    """Gives a function that makes the server hang; afterwards it goes on."""
    try:
        yield lambda: kill(server, signal.SIGSTOP)
    finally:
        kill(server, signal.SIGCONT)


def once_busy(server: Server, act: Callable[[], None]) -> threading.Thread:
    """Do ``act`` as soon as the server decodes."""
    before = server.log.read_text().count("Prefill batch")

    def wait() -> None:
        deadline = time.monotonic() + 60
        while server.log.read_text().count("Prefill batch") < before + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def fleet(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    config = server_config(count=3, restarts=20, restart_delay=0.1, hang_timeout=60.0)
    lines: list[str] = []
    with (
        ServerGroup(config, model_config(model_path), folder, API_KEY) as group,
        Supervisor(group, lines.append) as supervisor,
    ):
        yield Fleet(group, supervisor, model_path, folder)


def test_a_batch_is_complete_and_the_same_when_a_server_is_killed(fleet: Fleet) -> None:
    with fleet.trainer() as pool:
        undisturbed = fleet.sample()
        victim = fleet.group.servers[1]
        thread = once_busy(victim, lambda: kill(victim))
        batch = fleet.sample()
        thread.join()
        assert batch.tokens.tolist() == undisturbed.tokens.tolist()
        assert batch.weight_versions.unique().tolist() == [fleet.version]
        assert pool[victim.url].state is State.out
        assert pool.metrics()["rollout/retries"] > 0
        # started again with the weights of the model folder, it does not serve before it has the trainer's
        wait_until(victim.ready)
        fleet.sample()
        assert victim.url not in fleet.serving()
        fleet.update()
        fleet.assert_serve_the_new_weights(set(fleet.group.urls))
        assert pool.metrics()["servers/restarts"] == 1


@pytest.mark.slow
def test_a_server_that_hangs_loses_its_requests_to_others(fleet: Fleet) -> None:
    with fleet.trainer() as pool:
        undisturbed = fleet.sample()
        victim = fleet.group.servers[0]
        with stopped(victim) as stop:
            thread = once_busy(victim, stop)
            batch = fleet.sample()
            thread.join()
            assert batch.tokens.tolist() == undisturbed.tokens.tolist()
            assert "no answer within 8 s" in pool[victim.url].reason
            fleet.update()
            fleet.assert_serve_the_new_weights(set(fleet.group.urls) - {victim.url})
        wait_until(victim.ready)
        fleet.update()
        fleet.assert_serve_the_new_weights(set(fleet.group.urls))


def test_a_server_that_lost_its_version_is_not_believed(fleet: Fleet) -> None:
    with fleet.trainer() as pool:
        other = fleet.group.urls[2]
        body = {"new_version": "999999", "abort_all_requests": False}

        async def rename() -> None:
            client = RolloutClient([other], API_KEY)
            await client.on_all("/update_weight_version", body)
            await client.close()

        asyncio.run(rename())
        batch = fleet.sample()
        assert batch.weight_versions.unique().tolist() == [fleet.version]
        assert "weight version 999999" in pool[other].reason
        fleet.update()
        fleet.assert_serve_the_new_weights(set(fleet.group.urls))


@pytest.mark.parametrize("mode", [SyncMode.distributed, pytest.param(SyncMode.disk, marks=pytest.mark.slow)])
def test_an_update_goes_on_without_a_server_that_is_killed_in_it(fleet: Fleet, mode, monkeypatch) -> None:
    monkeypatch.setattr(MIB, 20_000)
    with fleet.trainer(mode=mode):
        victim = fleet.group.servers[2]
        fleet.update(during=lambda index: kill(victim) if index == 6 else None)
        fleet.assert_serve_the_new_weights(set(fleet.group.urls) - {victim.url})
        assert fleet.sample().weight_versions.unique().tolist() == [fleet.version]


@pytest.mark.slow
def test_an_update_goes_on_without_a_server_that_hangs_in_it(fleet: Fleet, monkeypatch) -> None:
    monkeypatch.setattr(MIB, 20_000)
    with fleet.trainer() as pool:
        victim = fleet.group.servers[1]
        with stopped(victim) as stop:
            fleet.update(during=lambda index: stop() if index == 6 else None)
            fleet.assert_serve_the_new_weights(set(fleet.group.urls) - {victim.url})
            assert "weight sync, send" in pool[victim.url].reason


def test_a_group_that_cannot_form_names_the_other_mode(fleet: Fleet, monkeypatch) -> None:
    with fleet.trainer():
        fleet.sync._runner.run(fleet.sync._transport.leave())
        join = _Group.join

        async def nccl(self) -> None:
            self._backend = "nccl"  # which servers on a CPU do not have
            await join(self)

        monkeypatch.setattr(_Group, "join", nccl)
        with pytest.raises(WeightSyncError, match=r"'connect'.*twice with .*rollout\.sync\.mode=disk"):
            fleet.update()
        monkeypatch.undo()
        fleet.update()
        fleet.assert_serve_the_new_weights(set(fleet.group.urls))


def test_garbage_is_not_taken_and_the_server_is_out(fleet: Fleet) -> None:
    with bad_server(lambda: fleet.version) as (url, calls), fleet.trainer() as pool:
        undisturbed = fleet.sample()
        pool.set_members([*fleet.group.urls, url])
        pool.admit(url, fleet.version)
        batch = fleet.sample()
        assert calls
        assert batch.tokens.tolist() == undisturbed.tokens.tolist()
        assert pool[url].state is State.out
        assert "2 failures in a row" in pool[url].reason
        # it does not get past the weight sync either
        fleet.update()
        assert url not in fleet.serving()


@pytest.mark.slow
def test_when_all_are_gone_the_batch_is_finished_by_those_that_come_back(fleet: Fleet) -> None:
    with fleet.trainer() as pool:
        undisturbed = fleet.sample()
        first = fleet.group.servers[0]
        thread = once_busy(first, lambda: [kill(server) for server in fleet.group.servers])
        with pytest.raises(ServersOut, match="no generation server serves"):
            fleet.sample()
        thread.join()
        with pytest.raises(ServersLost, match=r"(?s)rollout\.wait_timeout=0\.\d.*is out: .*Start servers again"):
            fleet.sync.await_servers(0.1)
        fleet.sync.await_servers(120.0)
        version, model = fleet.version, fleet.model
        fleet.sync.update(tensors(model), version)
        batch = fleet.sample()
        assert batch.tokens.tolist() == undisturbed.tokens.tolist()
        assert pool.stalled_since is None


def test_servers_join_and_leave(fleet: Fleet) -> None:
    urls = fleet.group.urls
    with fleet.trainer() as pool:
        pool.set_members(urls[:2])
        fleet.update()
        fleet.assert_serve_the_new_weights(set(urls[:2]))
        pool.set_members(urls[1:])
        assert fleet.sample().weight_versions.unique().tolist() == [fleet.version]
        assert fleet.serving() == {urls[1]}
        fleet.update()
        fleet.assert_serve_the_new_weights(set(urls[1:]))


GARBAGE = [
    "{not json",
    "[]",
    '[{"output_ids": [1, 2]}, 7, null, {}]',
    '[{"output_ids": ["a"], "meta_info": {}}]',
]


@contextlib.contextmanager
def bad_server(version: Callable[[], int]) -> Iterator[tuple[str, list[str]]]:
    """A server that reports the right version and generates garbage; its address, and the paths that were asked for."""
    calls: list[str] = []
    ready, url = threading.Event(), []
    loop = asyncio.new_event_loop()

    async def generate(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.Response(text=GARBAGE[len(calls) % len(GARBAGE)], content_type="application/json")

    async def model_info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(version())})

    async def anything(request: web.Request) -> web.Response:
        return web.Response(body=b"\xff\xfe\x00", content_type="text/plain")

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/generate", generate)
        app.router.add_get("/model_info", model_info)
        app.router.add_route("*", "/{path:.*}", anything)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield url[0], calls
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
