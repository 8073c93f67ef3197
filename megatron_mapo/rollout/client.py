"""The HTTP protocol of SGLang servers, asynchronous, over one or several of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from megatron_mapo.errors import RolloutError, ServersOut
from megatron_mapo.rollout.pool import NEVER_UPDATED, ServerPool, State
from megatron_mapo.rollout.speeds import Work

RETRY_SECONDS = 0.5
"""Wait before the first retry; doubled for each further one."""
WATCH_SECONDS = 2.0
"""Between two looks at the servers that have requests."""
POLL_SECONDS = 0.05
LOGPROB_SLACK = 1e-3
"""A log-prob may exceed 0 by rounding of the server's softmax, up to this."""
LOWEST_LOGPROB = -3.4e38
"""What a batch's float32 can still hold."""
ANSWER_BYTES = 64 << 20
"""Most that is read of an answer; the longest has a checksum of every parameter on every worker of a server."""
RESPONSE_BYTES, TOKEN_BYTES = 64 << 10, 256
"""Most that a response, and each of its tokens, adds: its id, log-prob, weight version and text, as JSON."""


@dataclass(frozen=True)
class Sampling:
    """How to sample a response.

    Attributes:
        max_tokens: longest response.
        temperature: 0 is greedy.
        stop_token_ids: the response ends with the first of these, which is part of it.
        logprobs: ask for the log-prob of every token, of the tempered distribution.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = True


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        token_ids: sampled tokens, with the stop token if there is one.
        logprobs: log-prob of each token under the tempered distribution (nat); empty if not asked for.
        weight_versions: version of the weights that sampled each token.
        truncated: it hit ``max_tokens`` (or the server's context length).
        finish_reason: ``stop`` or ``length``.
    """

    token_ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]
    truncated: bool
    finish_reason: str


@dataclass(eq=False)
class _Request:
    """A prompt on its way to its responses.

    Attributes:
        body: of ``/generate``.
        n: responses that are asked for.
        sampling: how.
        late: set when another server shall get it too.
        works: servers that work on it.
    """

    body: dict[str, Any]
    n: int
    sampling: Sampling
    late: asyncio.Event = field(default_factory=asyncio.Event)
    works: list[Work] = field(default_factory=list)


class _Retryable(RolloutError):
    """A failure that another try, or another server, may not have."""


class Refused(RolloutError):
    """The server answered that it will not do this (a status from 400 to 499)."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _logprobs_of(meta: dict[str, Any], token_ids: list[int]) -> list[float]:
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        raise ValueError(f"output_token_logprobs does not fit {len(token_ids)} tokens")
    if [entry[1] for entry in entries] != token_ids:
        raise ValueError("output_token_logprobs is of other tokens than output_ids")
    values = [entry[0] for entry in entries]
    # comparisons and no math.isfinite: an int may be too large for a float
    if not all(isinstance(v, float | int) and LOWEST_LOGPROB <= v <= LOGPROB_SLACK for v in values):
        raise ValueError("a log-prob is not a finite number at most 0")
    return [min(float(v), 0.0) for v in values]


def _versions_of(meta: dict[str, Any], count: int) -> list[int]:
    spans = meta.get("weight_versions")
    if spans is None:
        spans = [{"version": meta["weight_version"], "start": 0, "end": count}]
    edges = [0, *(span["end"] for span in spans)]
    if [span["start"] for span in spans] != edges[:-1] or edges[-1] != count or any(a > b for a, b in pairwise(edges)):
        raise ValueError(f"weight_versions does not cover {count} tokens")
    return [_version(span["version"]) for span in spans for _ in range(span["end"] - span["start"])]


def _version(found: Any) -> int:
    # a server that was never updated calls its version "default"
    if not isinstance(found, str) and not _is_int(found):
        raise ValueError(f"{found!r} is no weight version")
    return NEVER_UPDATED if found == "default" else int(found)


def _decoded(text: str) -> Any:
    """The JSON of an answer, or the text where it is none that could be used or shown."""
    try:
        answer = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair can be written as JSON, and then not be printed
            json.dumps(answer, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # besides errors of syntax: numbers of too many digits, nesting too deep
        return text
    return answer


async def _bounded(reply: aiohttp.ClientResponse, limit: int) -> str:
    """The body of an answer, of which no more than ``limit`` bytes are read."""
    body = bytearray()
    async for part in reply.content.iter_chunked(1 << 16):
        body += part
        if len(body) > limit:
            raise ValueError(f"an answer of more than {limit} bytes")
    return body.decode()


def parse_response(item: Any, sampling: Sampling, vocab_size: int | None = None) -> Response:
    """Check one element of ``/generate``'s answer and turn it into a ``Response``.

    Raises:
        ValueError, KeyError, TypeError, IndexError: it is not what was asked for.
    """
    token_ids, meta = item["output_ids"], item["meta_info"]
    if not isinstance(token_ids, list) or not all(_is_int(t) and t >= 0 for t in token_ids):
        raise ValueError("output_ids is not a list of token ids")
    if vocab_size is not None and any(t >= vocab_size for t in token_ids):
        raise ValueError(f"output_ids has a token outside the vocabulary of {vocab_size}")
    if not 0 < len(token_ids) <= sampling.max_tokens:
        raise ValueError(f"{len(token_ids)} tokens where 1 to {sampling.max_tokens} were asked for")
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        message = f"generation ended with {reason!r}: {meta['finish_reason'].get('message', '')}"
        raise _Retryable(message) if reason == "abort" else ValueError(message)
    return Response(
        token_ids=token_ids,
        logprobs=_logprobs_of(meta, token_ids) if sampling.logprobs else [],
        weight_versions=_versions_of(meta, len(token_ids)),
        truncated=reason == "length",
        finish_reason=reason,
    )


def _generate_body(token_ids: Sequence[int], n: int, sampling: Sampling, seeds: Sequence[int] | None) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.stop_token_ids),
        "skip_special_tokens": False,
        "ignore_eos": False,
    }
    # n copies and not `n`: every sample has a seed of its own
    each = [params if seeds is None else {**params, "sampling_seed": seed} for seed in (seeds or [0] * n)]
    return {
        "input_ids": [list(token_ids)] * n,
        "sampling_params": each,
        "return_logprob": sampling.logprobs,
        "stream": False,
    }


async def _first_good(tries: Iterable[asyncio.Task[list[Response]]]) -> list[Response]:
    """What the first of ``tries`` gives that does not fail; the failure of the last if all do."""
    pending = set(tries)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        task = min(done, key=lambda task: task.exception() is not None)
        if task.exception() is None or not pending:
            return task.result()


def read_api_key(path: str | None) -> str | None:
    """The servers' API key: the content of ``path``, else the environment's ``MAPO_API_KEY``, else none.

    Raises:
        RolloutError: the file cannot be read, is empty, or others than its owner can read it.
    """
    if path is None:
        return os.environ.get("MAPO_API_KEY") or None
    try:
        mode = Path(path).stat().st_mode
        key = Path(path).read_text().strip()
    except OSError as error:
        raise RolloutError(f"rollout.api_key_file={path}: {error.strerror}") from error
    if mode & 0o077:
        raise RolloutError(f"rollout.api_key_file={path}: others can read it; chmod 600 {path}")
    if not key:
        raise RolloutError(f"rollout.api_key_file={path}: the file is empty")
    return key


class RolloutClient:
    """Talks to SGLang servers. All calls must come from one event loop; ``close`` when done.

    Args:
        servers: base addresses, or the pool of servers that others share.
        api_key: bearer key, if the servers ask for one.
        timeout: seconds for one request, generation included.
        retries: further tries of a failed generation, on another server where there is one.
        vocab_size: tokens at or above it are refused.
        probe_timeout: seconds to answer ``/model_info``.

    Raises:
        RolloutError: ``servers`` is empty.
    """

    def __init__(
        self,
        servers: ServerPool | Sequence[str],
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
        vocab_size: int | None = None,
        probe_timeout: float = 30.0,
    ) -> None:
        self.pool = ServerPool.of(servers)
        if not self.pool.urls:
            raise RolloutError("no generation server: set rollout.urls, or start servers with `megatron-mapo serve`")
        self.timeout = timeout
        self.retries = retries
        self.vocab_size = vocab_size
        self.probe_timeout = min(probe_timeout, timeout)
        self._running: dict[str, set[asyncio.Task]] = {}
        self._requests: set[_Request] = set()
        # not compressed: a short body could be a long answer
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    @property
    def urls(self) -> list[str]:
        """Addresses of all servers."""
        return self.pool.urls

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # concurrency is bounded by the caller; the pool must not bound it again
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(
                headers=self._headers, connector=connector, trust_env=False, auto_decompress=False
            )
        return self._session

    async def request(
        self,
        url: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        method: str = "POST",
        timeout: float = 0.0,
        longest: int = ANSWER_BYTES,
    ) -> Any:
        """One request to one server.

        Args:
            url: the server's base address.
            path: endpoint, with its slash.
            body: sent as JSON.
            method: HTTP method.
            timeout: seconds; 0 means the client's.
            longest: bytes that the answer may have.

        Returns:
            The decoded JSON, or the text of an answer that is not JSON.

        Raises:
            RolloutError: no connection, no answer in time, one that is too long, or a status other than 200.
        """
        seconds = timeout or self.timeout
        limit = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, 10.0))
        try:
            async with self._open().request(method, url + path, json=body, timeout=limit) as reply:
                text = await _bounded(reply, longest)
                status = reply.status
        except TimeoutError:
            raise _Retryable(f"{url}{path}: no answer within {seconds:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: no text, or too long
            raise _Retryable(f"{url}{path}: {type(error).__name__}: {error}") from error
        if status in (401, 403):
            raise Refused(
                f"{url}{path}: the server refused the API key (status {status}); "
                "set rollout.api_key_file or MAPO_API_KEY to the server's key"
            )
        if status != 200:
            kind = _Retryable if status >= 500 else Refused
            raise kind(f"{url}{path}: status {status}: {text[:500]}")
        return _decoded(text)

    async def on_each(
        self, urls: Iterable[str], path: str, body: dict[str, Any] | None = None, timeout: float = 0.0
    ) -> tuple[dict[str, Any], dict[str, RolloutError]]:
        """The same POST to several servers at once: their answers, and the failures of those without one."""
        chosen = list(urls)
        calls = [self.request(url, path, body, timeout=timeout) for url in chosen]
        answers: dict[str, Any] = {}
        failures: dict[str, RolloutError] = {}
        for url, answer in zip(chosen, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, RolloutError):
                failures[url] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                answers[url] = answer
        return answers, failures

    async def on_all(self, path: str, body: dict[str, Any] | None = None, timeout: float = 0.0) -> list[Any]:
        """The same POST to every server at once; the answers in the order of ``urls``.

        Raises:
            RolloutError: of the first server that failed, after all have answered.
        """
        answers, failures = await self.on_each(self.urls, path, body, timeout)
        for failure in failures.values():
            raise failure
        return list(answers.values())

    async def generate(
        self, token_ids: Sequence[int], n: int, sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Response]:
        """Sample ``n`` responses to one prompt.

        Args:
            token_ids: the prompt.
            n: how many.
            sampling: how.
            seeds: one per response. Servers on CPU, and servers on CUDA that were started with
                ``--enable-deterministic-inference``, sample the same tokens for the same seed.

        Returns:
            ``n`` responses, in the order of ``seeds``.

        Raises:
            ServersOut: no server serves (any more).
            RolloutError: all tries failed, or every server refused the request.
        """
        if seeds is not None and len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} responses")
        request = _Request(_generate_body(token_ids, n, sampling, seeds), n, sampling)
        self._requests.add(request)
        tries = {asyncio.ensure_future(self._persist(request))}
        late = asyncio.ensure_future(request.late.wait())
        try:
            await asyncio.wait({*tries, late}, return_when=asyncio.FIRST_COMPLETED)
            if request.late.is_set() and request.works:
                self.pool.copied()
                tries.add(asyncio.ensure_future(self._persist(request, [work.url for work in request.works])))
            return await _first_good(tries)
        finally:
            self._requests.discard(request)
            for task in (*tries, late):
                task.cancel()
            await asyncio.gather(*tries, late, return_exceptions=True)

    async def _persist(self, request: _Request, besides: Sequence[str] = ()) -> list[Response]:
        """Try one server after the other, those of ``besides`` last."""
        failed: list[str] = []
        refused: list[str] = []
        while True:
            url = await self._pick([*besides, *failed])
            try:
                return await self._try(request, url)
            except (_Retryable, Refused) as error:
                failed.append(url)
                refused += [url] if isinstance(error, Refused) else []
                await self._count(url, failed, refused, error)
            await asyncio.sleep(RETRY_SECONDS * 2 ** (len(failed) - 1))

    async def _try(self, request: _Request, url: str) -> list[Response]:
        """One try of a request on a server."""
        member, speeds = self.pool[url], self.pool.speeds
        member.load += request.n  # before the next request looks for a server
        work = speeds.begin(url, request.sampling.max_tokens)
        request.works.append(work)
        try:
            responses = await self._cancellable(url, self._generate_on(url, request.body, request.n, request.sampling))
            longest = max(len(response.token_ids) for response in responses)
            speeds.answered(work, longest)
            for other in request.works:
                if other is not work:
                    speeds.beaten(other, longest)
            self.pool.succeeded(url)
            return responses
        finally:
            request.works.remove(work)
            speeds.drop(work)
            member.load -= request.n

    async def _count(self, url: str, failed: list[str], refused: list[str], error: RolloutError) -> None:
        """After a failed try: think about the server, and give the request up if that was its last one."""
        serving = [u for u in self.pool.in_state(State.serving) if u != url]
        if isinstance(error, Refused) and all(u in refused for u in serving):
            raise error
        if self.pool.failed(url, str(error)):
            await self.probe(url)
        elif url in self.pool and self.pool[url].state is State.out:
            self._give_up(url)
        # A request is not to blame for a server that was found to be out of order.
        counted = [u for u in failed if u in self.pool and self.pool[u].state is not State.out]
        if len(counted) > self.retries:
            raise RolloutError(
                f"generation failed {len(counted)} times (rollout.retries={self.retries}): {error}"
            ) from error

    async def _pick(self, failed: Sequence[str]) -> str:
        """A server for a request that has failed on the servers ``failed``."""
        while (url := self.pool.pick(failed)) is None:
            if not self.pool.in_state(State.suspect):
                raise ServersOut(f"no generation server serves: {self.pool.describe()}")
            await asyncio.sleep(POLL_SECONDS)  # somebody is asking the suspects
        return url

    async def _cancellable(self, url: str, work: Coroutine[Any, Any, list[Response]]) -> list[Response]:
        """Do ``work`` on a server, and give it up when the server is taken out."""
        task = asyncio.ensure_future(work)
        running = self._running.setdefault(url, set())
        running.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or current.cancelling():
                raise
            raise _Retryable(f"{url}/generate: given up, the server is out") from None
        finally:
            running.discard(task)

    # --------------------------------------------------------------------------------------- health

    async def probe(self, url: str) -> None:
        """Ask a server who it is: a right answer clears a suspect, anything else takes it out."""
        try:
            version = await self.weight_version(url)
        except RolloutError as error:
            self.take_out(url, str(error))
            return
        if self.pool.expects(version):
            self.pool.clear(url)
        else:
            self.take_out(url, f"it has weight version {version}, expected {self.pool.version}")

    def take_out(self, url: str, reason: str) -> None:
        """No more requests for a server; those that it has go to others."""
        self.pool.take_out(url, reason)
        self._give_up(url)

    def _give_up(self, url: str) -> None:
        """Cancel what a server is working on."""
        for task in self._running.get(url, set()) - {asyncio.current_task()}:
            task.cancel()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside, servers with requests, and suspects, are asked every ``WATCH_SECONDS`` whether they are there.

        Requests of slow ones go to others too.
        """

        async def ask() -> None:
            while True:
                busy = [u for u in self.urls if self.pool[u].load and self.pool[u].state is State.serving]
                await asyncio.gather(*map(self.probe, [*busy, *self.pool.in_state(State.suspect)]))
                await asyncio.sleep(WATCH_SECONDS)

        async def compare() -> None:
            while True:
                await asyncio.sleep(WATCH_SECONDS)
                self._find_late()

        tasks = [asyncio.create_task(ask()), asyncio.create_task(compare())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):  # a bug: nobody has watched since
                    raise outcome

    def _find_late(self) -> None:
        """Requests that only slow servers work on go to another one too. There is one: not all can be slow."""
        slow = self.pool.name_slow()
        for request in self._requests:
            if request.works and all(work.url in slow for work in request.works):
                request.late.set()

    async def _generate_on(self, url: str, body: dict[str, Any], n: int, sampling: Sampling) -> list[Response]:
        if n > 1:
            # The prompt alone first: requests that arrive together do not find each other in the prefix
            # cache, and the server would compute the same prompt n times.
            prompt_only = {"input_ids": body["input_ids"][0], "sampling_params": {"max_new_tokens": 0}}
            await self.request(url, "/generate", prompt_only)
        longest = ANSWER_BYTES + n * (RESPONSE_BYTES + sampling.max_tokens * TOKEN_BYTES)
        answer = await self.request(url, "/generate", body, longest=longest)
        if not isinstance(answer, list) or len(answer) != n:
            raise _Retryable(f"{url}/generate: not the {n} responses that were asked for")
        try:
            responses = [parse_response(item, sampling, self.vocab_size) for item in answer]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _Retryable(f"{url}/generate: {type(error).__name__}: {error}") from error
        except _Retryable as error:
            raise _Retryable(f"{url}/generate: {error}") from None
        for version in {version for response in responses for version in response.weight_versions}:
            if not self.pool.expects(version):
                reason = f"it sampled with weight version {version}, expected {self.pool.version}"
                self.take_out(url, reason)
                raise _Retryable(f"{url}/generate: {reason}")
        return responses

    async def model_info(self, url: str) -> dict[str, Any]:
        """What ``/model_info`` says: ``model_path``, ``weight_version``, ..."""
        return await self.request(url, "/model_info", method="GET", timeout=self.probe_timeout)

    async def weight_version(self, url: str) -> int:
        """Version of a server's weights; ``NEVER_UPDATED`` if they are those that it was started with.

        Raises:
            RolloutError: no answer, or one without a version.
        """
        info = await self.model_info(url)
        try:
            return _version(info["weight_version"])
        except (KeyError, TypeError, ValueError) as error:
            raise RolloutError(f"{url}/model_info: no weight version in the answer ({error!r})") from error

    async def weight_versions(self) -> list[int]:
        """``weight_version`` of every server."""
        return [await self.weight_version(url) for url in self.urls]

    async def pause(self, timeout: float = 0.0) -> None:
        """Stop generation on all servers. Running requests wait, and keep the tokens they have."""
        await self.on_all("/pause_generation", {"mode": "retract"}, timeout)
