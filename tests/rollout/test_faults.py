"""Servers that are killed, hang, answer garbage or are slow, and updates in which they do so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from fleet import GARBAGE, Fleet, at_work, kill, served, stopped, wait_until
from server_support import API_KEY, model_config, server_config, tensors

from megatron_mapo.config import SyncMode
from megatron_mapo.errors import ServersLost, ServersOut, WeightSyncError
from megatron_mapo.rollout.client import RolloutClient
from megatron_mapo.rollout.pool import State
from megatron_mapo.rollout.server import ServerGroup
from megatron_mapo.rollout.supervisor import Supervisor
from megatron_mapo.rollout.weight_transport import _Group

MIB = "megatron_mapo.rollout.weight_sync.MIB"


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
        with at_work({victim.url: lambda: kill(victim)}):
            batch = fleet.sample()
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
            with at_work({victim.url: stop}):
                batch = fleet.sample()
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
        act = lambda: [kill(server) for server in fleet.group.servers]  # noqa: E731
        with at_work({first.url: act}), pytest.raises(ServersOut, match="no generation server serves"):
            fleet.sample()
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


@contextlib.contextmanager
def bad_server(version: Callable[[], int]) -> Iterator[tuple[str, list[str]]]:
    """A server that reports the right version and generates garbage; its address, and the paths that were asked for."""
    calls: list[str] = []

    async def generate(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.Response(text=GARBAGE[len(calls) % len(GARBAGE)], content_type="application/json")

    async def model_info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(version())})

    async def anything(request: web.Request) -> web.Response:
        return web.Response(body=b"\xff\xfe\x00", content_type="text/plain")

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_get("/model_info", model_info)
    app.router.add_route("*", "/{path:.*}", anything)
    with served(app) as url:
        yield url, calls
