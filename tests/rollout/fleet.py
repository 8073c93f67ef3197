"""Servers under a supervisor, the trainer's side of them, and faults: what the tests of faults share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
from aiohttp import web
from server_support import API_KEY, EOS, changed, descendants, reference_logprobs, tensors
from transformers import PreTrainedModel

from megatron_mapo.config import RolloutConfig, SyncConfig
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.rollout.client import RolloutClient, Sampling
from megatron_mapo.rollout.pool import ServerPool, State
from megatron_mapo.rollout.sampler import Sampler
from megatron_mapo.rollout.scoring import Scores
from megatron_mapo.rollout.server import Server, ServerGroup
from megatron_mapo.rollout.supervisor import Supervisor
from megatron_mapo.rollout.weight_sync import WeightSync


@dataclass(frozen=True)
class Question:
    id: int
    token_ids: list[int]


PROMPTS = [Question(i, [3 + i, 9, 20 + i]) for i in range(12)]


async def score(prompt: Question, responses: list[list[int]]) -> Scores:
    return Scores([sum(tokens) % 2 for tokens in responses])


class Fleet:
    """Servers under a supervisor, and the trainer's side of them.

    Args:
        urls: where the trainer finds the servers; None: where they listen.
        timeout: seconds that a request of the trainer may take.
        probe_timeout: seconds that a server may take to say who it is.
    """

    def __init__(
        self,
        group: ServerGroup,
        supervisor: Supervisor,
        model_path: Path,
        folder: Path,
        urls: Sequence[str] | None = None,
        timeout: float = 60.0,
        probe_timeout: float = 8.0,
    ) -> None:
        self.timeout, self.probe_timeout = timeout, probe_timeout
        self.group, self.supervisor, self.model_path, self.folder = group, supervisor, model_path, folder
        self.urls = list(urls or group.urls)
        self.lines: list[str] = []
        self.version = 0
        self.model: PreTrainedModel | None = None

    @contextlib.contextmanager
    def trainer(self, extra: tuple[str, ...] = (), **options: object) -> Iterator[ServerPool]:
        """Fresh pool, sampler and weight sync; all servers hold new weights."""
        self.pool = ServerPool([*self.urls, *extra], max_failures=2, log=self.lines.append)
        config = RolloutConfig(responses_per_prompt=4, max_response_tokens=48, max_prompt_tokens=8)
        client = RolloutClient(self.pool, API_KEY, self.timeout, vocab_size=512, probe_timeout=self.probe_timeout)
        self.sampler = Sampler(client, config, score, [EOS])
        sync = SyncConfig(**{"timeout": 40.0, "bucket_mb": 1} | options)  # type: ignore[arg-type]
        folder, cpu = self.folder, torch.device("cpu")
        self.sync = WeightSync(sync, self.pool, API_KEY, self.model_path, folder, cpu, self.probe_timeout)
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
        wait_until(lambda: self.serving() == set(self.urls) or self.update())

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


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> None:
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


@contextlib.contextmanager
def at_work(acts: Mapping[str, Callable[[], None]]) -> Iterator[None]:
    """Inside, do ``acts[url]`` when that server has a request, just before it is sent the second one.

    So the second one meets what was done, however fast the server is.
    """
    original, asked = RolloutClient._generate_on, Counter[str]()

    async def generate(self: RolloutClient, url: str, *args: Any) -> Any:
        asked[url] += 1
        if asked[url] == 2 and url in acts:
            acts[url]()
        return await original(self, url, *args)

    RolloutClient._generate_on = generate  # type: ignore[method-assign]
    try:
        yield
    finally:
        RolloutClient._generate_on = original  # type: ignore[method-assign]
    assert all(asked[url] >= 2 for url in acts), asked


GARBAGE = [
    "{not json",
    "[]",
    '[{"output_ids": [1, 2]}, 7, null, {}]',
    '[{"output_ids": ["a"], "meta_info": {}}]',
    "[" * 200_000,
    "9" * 5_000,
    '["\\ud800"]',
    f'[{{"output_ids": [{10**400}], "meta_info": {{}}}}]',
    '[{"output_ids": [Infinity], "meta_info": {"weight_version": Infinity}}]',
]


@contextlib.contextmanager
def served(app: web.Application) -> Iterator[str]:
    """Serve ``app`` on a free loopback port in a thread; gives its address."""
    ready, url = threading.Event(), []
    loop, done = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()
        await done.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


class Proxy:
    """Stands before a real server and passes everything on, but for what ``/generate`` is made to do.

    Attributes:
        garbage: answer nonsense with status 200.
        delay: seconds that an answer is held back.
        asked: calls of ``/generate``.
        wrong: requests for responses that were answered with nonsense.
    """

    def __init__(self, target: str) -> None:
        self.target, self.garbage, self.delay = target, False, 0.0
        self.asked = self.wrong = 0
        self.app = web.Application()
        self.app.router.add_route("*", "/{path:.*}", self._pass_on)

    async def _pass_on(self, request: web.Request) -> web.Response:
        generates = request.path == "/generate"
        self.asked += generates
        if generates and self.garbage:
            # not those that only bring a prompt into the server's cache: their answer is not looked at
            self.wrong += isinstance((await request.json())["sampling_params"], list)
            return web.Response(text=GARBAGE[self.asked % len(GARBAGE)], content_type="application/json")
        headers = {name: value for name, value in request.headers.items() if name in ("Authorization", "Content-Type")}
        sent = {"headers": headers, "data": await request.read()}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.request(request.method, self.target + request.path_qs, **sent) as reply,
            ):
                status, body, kind = reply.status, await reply.read(), reply.content_type
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))
        if generates:
            await asyncio.sleep(self.delay)
        return web.Response(status=status, body=body, content_type=kind)
