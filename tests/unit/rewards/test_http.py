"""The verifier ``http`` against a real service on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from megatron_mapo.config import OnFailure, RewardConfig
from megatron_mapo.errors import ConfigError, RewardError
from megatron_mapo.rewards import http
from megatron_mapo.rewards.pool import RewardPool

KEY = "sk-loopback-0123456789"
BODIES = {
    "no JSON": "right",
    "a list": "[true]",
    "nothing": "{}",
    "both": '{"reward": 1, "correct": true}',
    "reward of text": '{"reward": "1"}',
    "reward true": '{"reward": true}',
    "reward null": '{"reward": null}',
    "reward NaN": '{"reward": NaN}',
    "reward infinite": '{"reward": 1e999}',
    "reward of 400 digits": '{"reward": 1' + "0" * 400 + "}",
    "correct 1": '{"correct": 1}',
    "deep": "[" * 100_000,
    "not UTF-8": b"\xff\xfe",
}


class Service:
    """Judges in the way that the response asks for, and keeps what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.tries: dict[str, int] = {}
        self.at_work = self.most_at_work = 0
        self.redirected = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    async def _start(self) -> str:
        app = web.Application(client_max_size=1 << 25)
        app.router.add_post("/judge", self._judge)
        app.router.add_route("*", "/elsewhere", self._elsewhere)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/judge"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _elsewhere(self, request: web.Request) -> web.Response:
        self.redirected = True
        return web.json_response({"correct": True})

    async def _judge(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        wanted = body["response"]
        self.tries[wanted] = self.tries.get(wanted, 0) + 1
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            return await self._answer(request, wanted, body["answer"])
        finally:
            self.at_work -= 1

    async def _answer(self, request: web.Request, wanted: str, answer: str) -> web.StreamResponse:
        if wanted in BODIES:
            text = BODIES[wanted]
            return web.Response(body=text if isinstance(text, bytes) else text.encode())
        if wanted.startswith("status "):
            return web.Response(status=int(wanted.split()[1]), text=f"no: {request.headers.get('Authorization')}")
        if wanted == "redirect":
            raise web.HTTPTemporaryRedirect("/elsewhere")
        if wanted == "wait":
            await asyncio.sleep(1000)
        if wanted == "hang up":
            request.transport.abort()
        if wanted == "endless":
            stream = web.StreamResponse()
            await stream.prepare(request)
            while True:
                await stream.write(b" " * (1 << 16))
        if wanted == "third time" and self.tries[wanted] < 3:
            return web.Response(status=503)
        if wanted == "compressed":
            packed = web.json_response({"correct": True})
            packed.enable_compression(web.ContentCoding.gzip)
            return packed
        if wanted.startswith("score "):
            return web.json_response({"reward": float(wanted.split()[1])})
        await asyncio.sleep(0.1)
        return web.json_response({"correct": wanted == answer, "comment": "extra keys are no harm"})


@pytest.fixture
def service() -> Iterator[Service]:
    one = Service()
    yield one
    one.close()


def open_pool(service, *, on_failure=OnFailure.error, limit=20.0, **options) -> RewardPool:
    options = {"url": service.url, "timeout": 10.0, "retries": 0} | options
    return RewardPool(RewardConfig(name="http", options=options, timeout=limit, on_failure=on_failure))


def judge(pool, responses, metadata=None, prompts=None):
    n = len(responses)
    return asyncio.run(pool.judge(responses, ["42"] * n, metadata or [{}] * n, prompts or ["6*7?"] * n))


def rewards(pool, responses):
    return [verdict.reward for verdict in judge(pool, responses)]


def test_judgements_and_scores(service):
    with open_pool(service) as pool:
        assert rewards(pool, ["42", "41", "score 0.25", "score -3"]) == [1.0, 0.0, 0.25, -3.0]


def test_the_service_sees_the_row(service):
    row = {"level": 3, "tags": ["a"], "answer": "a column of this name does not hide the reference"}
    odd = "\ud800 \x00 ü <|im_end|>"
    with open_pool(service) as pool:
        judge(pool, [odd], [row], ["What?"])
    assert service.bodies == [{"level": 3, "tags": ["a"], "answer": "42", "prompt": "What?", "response": odd}]
    assert "Authorization" not in service.headers[0]


def test_many_requests_are_in_flight(service):
    with open_pool(service) as pool:
        assert rewards(pool, ["42", "41"] * 8) == [1.0, 0.0] * 8
    assert 1 < service.most_at_work <= RewardConfig().concurrency


@pytest.mark.parametrize("source", ["environment", "file"])
def test_the_key_is_sent_and_shown_nowhere(service, source, monkeypatch, tmp_path, caplog, capfd):
    if source == "environment":
        monkeypatch.setenv("JUDGE_KEY", KEY)
        options = {"api_key_env": "JUDGE_KEY"}
    else:
        (tmp_path / "key").write_text(f"{KEY}\n")
        (tmp_path / "key").chmod(0o600)
        options = {"api_key_file": str(tmp_path / "key")}
    with open_pool(service, **options) as pool:
        assert rewards(pool, ["42"]) == [1.0]
        assert service.headers[0]["Authorization"] == f"Bearer {KEY}"
        for response in ("status 403", "no JSON"):  # the first is answered with the header itself
            with pytest.raises(RewardError) as error:
                rewards(pool, [response])
            assert KEY not in str(error.value)
    assert KEY not in caplog.text + "".join(capfd.readouterr())


def test_a_key_file_that_others_can_read_is_refused(service, tmp_path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"reward\.options: api_key_file: others may read") as error:
        open_pool(service, api_key_file=str(tmp_path / "key"))
    assert KEY not in str(error.value)


NO_JUDGEMENT = dict.fromkeys(BODIES, r"raised Refused: .*the service's answer") | {
    "status 404": "raised Refused: the service answered with status 404: no",
    "status 500": "answered with status 500",
    "status 204": "answered with status 204",
    "redirect": "answered with status 307",
    "hang up": "the service did not answer",
    "wait": r"did not answer within 2 s",
    "endless": "more than 1048576 bytes",
    "compressed": "no JSON",
}


def test_anything_but_a_judgement_is_a_failure(service):
    with open_pool(service, timeout=2.0, on_failure=OnFailure.wrong) as pool:
        processes = pool.process_ids()
        for verdict, (response, message) in zip(judge(pool, list(NO_JUDGEMENT)), NO_JUDGEMENT.items(), strict=True):
            assert verdict.reward == 0.0, response
            assert re.search(message, verdict.failure.text), response
            assert len(verdict.failure.text) < 700
        assert pool.failures == len(NO_JUDGEMENT)
        assert rewards(pool, ["42"]) == [1.0]
        assert pool.process_ids() == processes
    assert not service.redirected


def test_a_failure_stops_a_run_unless_told_otherwise(service):
    with open_pool(service) as pool, pytest.raises(RewardError, match=r"reward\.name='http'.*reward\.on_failure=wrong"):
        rewards(pool, ["42", "no JSON"])


def test_what_may_pass_is_tried_again(service):
    with open_pool(service, retries=2, on_failure=OnFailure.wrong) as pool:
        rewards(pool, ["third time"])
        assert service.tries["third time"] == 3
        rewards(pool, ["status 503", "status 429", "status 400", "no JSON"])
    assert {name: service.tries[name] for name in ("status 503", "status 429", "status 400", "no JSON")} == {
        "status 503": 3,
        "status 429": 3,
        "status 400": 1,
        "no JSON": 1,
    }


def test_all_tries_together_have_the_time_limit_of_the_verifier(service):
    with (
        open_pool(service, retries=100, limit=1.5) as pool,
        pytest.raises(RewardError, match=r"took longer than reward\.timeout=1.5 s"),
    ):
        rewards(pool, ["status 503"])


def test_nobody_listens(service):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with open_pool(service, url=url) as pool, pytest.raises(RewardError, match="the service did not answer"):
            rewards(pool, ["42"])


def test_the_judgement_is_read_strictly():
    assert http._judgement(b'{"correct": false}') is False
    assert http._judgement(b'{"reward": 1}') == 1.0
    assert isinstance(http._judgement(json.dumps({"reward": 3}).encode()), float)
