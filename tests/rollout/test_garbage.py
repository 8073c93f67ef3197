"""What a server may answer instead of responses: each is a failed request, none is a crash of the trainer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from fleet import GARBAGE, served

from megatron_mapo.config import SyncConfig
from megatron_mapo.errors import RolloutError, ServersLost
from megatron_mapo.rollout import client as client_module
from megatron_mapo.rollout.client import RolloutClient, Sampling
from megatron_mapo.rollout.pool import State
from megatron_mapo.rollout.weight_sync import WeightSync

FAILED = "generation failed 1 times"
KNOWN = '{"weight_version": "default"}'
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def says(text: str, info: str | None = None, kind: str = "application/json") -> Handler:
    """Answers with ``text``, but who it is with ``info``."""

    async def answer(request: web.Request) -> web.Response:
        chosen = info if info is not None and request.path == "/model_info" else text
        return web.Response(body=chosen.encode(), headers={"Content-Type": kind})

    return answer


def ask(handler: Handler, work: Callable[[RolloutClient], Awaitable[Any]], **options: Any) -> Any:
    """``work`` with a client of a server that answers everything with ``handler``."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)

    async def inside(url: str) -> Any:
        client = RolloutClient([url], **{"timeout": 20.0, "retries": 0} | options)
        try:
            return await work(client)
        finally:
            await client.close()

    with served(app) as url:
        return asyncio.run(inside(url))


def generate(client: RolloutClient) -> Awaitable[Any]:
    return client.generate([5, 6, 7], 1, Sampling(2))


def good(**changes: Any) -> list[dict[str, Any]]:
    """An answer of two tokens, with ``changes`` in its ``meta_info``."""
    meta = {"finish_reason": {"type": "length"}, "weight_version": "default"}
    meta["output_token_logprobs"] = [[-0.5, 8, None], [-0.25, 9, None]]
    return [{"output_ids": [8, 9], "meta_info": meta | changes}]


def test_a_good_answer_is_taken() -> None:
    (response,) = ask(says(json.dumps(good())), generate)
    assert (response.token_ids, response.logprobs, response.weight_versions) == ([8, 9], [-0.5, -0.25], [-1, -1])


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: text[:12])
def test_garbage_is_a_failed_request(text: str) -> None:
    with pytest.raises(RolloutError, match=FAILED):
        ask(says(text, KNOWN), generate)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_token_logprobs": [[-(10**400), 8], [0, 9]]},
        {"output_token_logprobs": [[10**400, 8], [0, 9]]},
        {"output_token_logprobs": [[-1e300, 8], [0, 9]]},  # infinite as a batch holds it
        {"weight_version": float("inf")},
        {"weight_version": True},
        {"weight_versions": [{"version": float("inf"), "start": 0, "end": 2}]},
        {"finish_reason": {"type": "abort", "message": "\ud800"}},
    ],
    ids=range(7),
)
def test_numbers_and_texts_that_python_cannot_hold_are_a_failed_request(changes: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match=FAILED) as failed:
        ask(says(json.dumps(good(**changes)), KNOWN), generate)
    str(failed.value).encode()  # it can be printed


@pytest.mark.parametrize(
    "version", ["9" * 5000, f'"{"9" * 5000}"', "Infinity", "NaN", "1e400", "true", "[1]"], ids=range(7)
)
def test_a_version_that_is_none_takes_a_server_out(version: str) -> None:
    async def probe(client: RolloutClient) -> State:
        await client.probe(client.urls[0])
        return client.pool[client.urls[0]].state

    assert ask(says(f'{{"weight_version": {version}}}'), probe) is State.out


def test_a_mistake_in_the_watch_of_servers_is_not_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: RolloutClient, url: str) -> None:
        raise ZeroDivisionError("a bug")

    async def watch(client: RolloutClient) -> None:
        client.pool[client.urls[0]].load = 1
        async with client.watched():
            await asyncio.sleep(0.1)

    monkeypatch.setattr(RolloutClient, "probe", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        ask(says("[]"), watch)


@pytest.mark.parametrize("workers", ["true", "0", '"1"', "1.5", "[1]"])
def test_a_server_with_a_number_of_workers_that_is_none_takes_no_part(workers: str, tmp_path: Path) -> None:
    info = f'{{"tp_size": {workers}, "pp_size": 1, "dp_size": 1, "device": "cpu", "dtype": "float32"}}'
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", says(info, KNOWN))
    with served(app) as url:
        sync = WeightSync(SyncConfig(), [url], None, tmp_path, tmp_path, torch.device("cpu"))
        try:
            with pytest.raises(ServersLost, match=r"/server_info is not that of an SGLang server"):
                sync.await_servers(0.0)
        finally:
            sync.close()


def test_a_text_in_a_code_that_is_none_is_read_as_utf8() -> None:
    (response,) = ask(says(json.dumps(good()), kind="application/json; charset=hex"), generate)
    assert response.token_ids == [8, 9]


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_end_is_not_read_to_its_end(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where few bytes of the network would be many."""
    monkeypatch.setattr(client_module, "ANSWER_BYTES", 1 << 20)
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        reply = web.StreamResponse()
        if packed:
            reply.enable_compression(web.ContentCoding.gzip)
        await reply.prepare(request)
        while sent < 200 << 20:
            await reply.write(b" " * (1 << 20))
            sent += 1 << 20
        return reply

    with pytest.raises(RolloutError, match=r"an answer of more than \d+ bytes|UnicodeDecodeError"):
        ask(endless, generate)
