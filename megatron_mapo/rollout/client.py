"""The HTTP protocol of SGLang servers, asynchronous, over one or several of them."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from megatron_mapo.errors import RolloutError

RETRY_SECONDS = 0.5
"""Wait before the first retry; doubled for each further one."""
LOGPROB_SLACK = 1e-3
"""A log-prob may exceed 0 by rounding of the server's softmax, up to this."""


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


class _Retryable(RolloutError):
    """A failure that another try, or another server, may not have."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _logprobs_of(meta: dict[str, Any], token_ids: list[int]) -> list[float]:
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        raise ValueError(f"output_token_logprobs does not fit {len(token_ids)} tokens")
    if [entry[1] for entry in entries] != token_ids:
        raise ValueError("output_token_logprobs is of other tokens than output_ids")
    values = [entry[0] for entry in entries]
    if not all(isinstance(v, float | int) and math.isfinite(v) and v <= LOGPROB_SLACK for v in values):
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


def _version(text: str) -> int:
    # a server that was never updated calls its version "default"
    return 0 if text == "default" else int(text)


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
        urls: base addresses.
        api_key: bearer key, if the servers ask for one.
        timeout: seconds for one request, generation included.
        retries: further tries of a failed generation, on another server where there is one.
        vocab_size: tokens at or above it are refused.

    Raises:
        RolloutError: ``urls`` is empty.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
        vocab_size: int | None = None,
    ) -> None:
        if not urls:
            raise RolloutError("no generation server: set rollout.urls, or start servers with `megatron-mapo serve`")
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout = timeout
        self.retries = retries
        self.vocab_size = vocab_size
        self._load = dict.fromkeys(self.urls, 0)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # concurrency is bounded by the caller; the pool must not bound it again
            self._session = aiohttp.ClientSession(
                headers=self._headers, connector=aiohttp.TCPConnector(limit=0), trust_env=False
            )
        return self._session

    async def request(
        self, url: str, path: str, body: dict[str, Any] | None = None, *, method: str = "POST", timeout: float = 0.0
    ) -> Any:
        """One request to one server.

        Args:
            url: the server's base address.
            path: endpoint, with its slash.
            body: sent as JSON.
            method: HTTP method.
            timeout: seconds; 0 means the client's.

        Returns:
            The decoded JSON, or the text of an answer that is not JSON.

        Raises:
            RolloutError: no connection, no answer in time, or a status other than 200.
        """
        seconds = timeout or self.timeout
        limit = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, 10.0))
        try:
            async with self._open().request(method, url + path, json=body, timeout=limit) as reply:
                text = await reply.text()
                status = reply.status
        except TimeoutError:
            raise _Retryable(f"{url}{path}: no answer within {seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Retryable(f"{url}{path}: {type(error).__name__}: {error}") from error
        if status in (401, 403):
            raise RolloutError(
                f"{url}{path}: the server refused the API key (status {status}); "
                "set rollout.api_key_file or MAPO_API_KEY to the server's key"
            )
        if status != 200:
            kind = _Retryable if status >= 500 else RolloutError
            raise kind(f"{url}{path}: status {status}: {text[:500]}")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    async def on_all(self, path: str, body: dict[str, Any] | None = None, timeout: float = 0.0) -> list[Any]:
        """The same POST to every server at once; the answers in the order of ``urls``.

        Raises:
            RolloutError: of the first server that failed, after all have answered.
        """
        calls = [self.request(url, path, body, timeout=timeout) for url in self.urls]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

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
            RolloutError: all tries failed, or a server answered with something else.
        """
        if seeds is not None and len(seeds) != n:
            raise ValueError(f"{len(seeds)} seeds for {n} responses")
        body = _generate_body(token_ids, n, sampling, seeds)
        failed: list[str] = []
        for attempt in range(self.retries + 1):
            url = self._pick(failed)
            try:
                return await self._generate_on(url, body, n, sampling)
            except _Retryable as error:
                failed.append(url)
                last = error
            if attempt < self.retries:
                await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        raise RolloutError(f"generation failed {len(failed)} times (rollout.retries={self.retries}): {last}")

    def _pick(self, failed: list[str]) -> str:
        """The least loaded server among those that failed least for this request."""
        url = min(self.urls, key=lambda u: (failed.count(u), self._load[u]))
        return url

    async def _generate_on(self, url: str, body: dict[str, Any], n: int, sampling: Sampling) -> list[Response]:
        self._load[url] += n
        try:
            if n > 1:
                # The prompt alone first: requests that arrive together do not find each other in the prefix
                # cache, and the server would compute the same prompt n times.
                prompt_only = {"input_ids": body["input_ids"][0], "sampling_params": {"max_new_tokens": 0}}
                await self.request(url, "/generate", prompt_only)
            answer = await self.request(url, "/generate", body)
        finally:
            self._load[url] -= n
        if not isinstance(answer, list) or len(answer) != n:
            raise RolloutError(f"{url}/generate: not the {n} responses that were asked for")
        try:
            return [parse_response(item, sampling, self.vocab_size) for item in answer]
        except _Retryable as error:
            raise _Retryable(f"{url}/generate: {error}") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RolloutError(f"{url}/generate: {type(error).__name__}: {error}") from error

    async def model_info(self, url: str) -> dict[str, Any]:
        """What ``/model_info`` says: ``model_path``, ``weight_version``, ..."""
        return await self.request(url, "/model_info", method="GET", timeout=min(self.timeout, 30.0))

    async def weight_versions(self) -> list[int]:
        """Version of every server's weights; 0 if it was never updated."""
        return [_version((await self.model_info(url))["weight_version"]) for url in self.urls]

    async def pause(self, timeout: float = 0.0) -> None:
        """Stop generation on all servers. Running requests wait, and keep the tokens they have."""
        await self.on_all("/pause_generation", {"mode": "retract"}, timeout)

    async def resume(self, timeout: float = 0.0) -> None:
        """Let all servers generate again; waiting requests recompute their cache with the weights of now."""
        await self.on_all("/continue_generation", {"torch_empty_cache": False}, timeout)

    async def flush_cache(self, timeout: float = 0.0) -> None:
        """Drop every cached prefix on all servers."""
        await self.on_all("/flush_cache", timeout=timeout)
