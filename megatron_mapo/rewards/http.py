"""Verifier ``http``: a service judges the response.

It is sent ``POST {"prompt", "response", "answer", ...the row's other columns}`` and answers with the status 200 and
``{"reward": number}`` or ``{"correct": true or false}``. Anything else is a failure (``reward.on_failure``). The key
goes into the header ``Authorization: Bearer KEY`` and into no message.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import aiohttp

MAX_ANSWER_BYTES = 1 << 20
RETRY_SECONDS = 0.5
"""Wait before the first retry; doubled for each further one."""
_SHOWN = 200

_session: aiohttp.ClientSession | None = None


class Refused(Exception):
    """The service cannot be used, or answered with something that is no judgement."""


class Unavailable(Refused):
    """Another try may go better."""


async def verify(
    response: str,
    answer: str,
    metadata: dict[str, Any],
    prompt: str,
    *,
    url: str,
    timeout: float = 5.0,
    retries: int = 2,
    api_key_env: str | None = None,
    api_key_file: str | None = None,
) -> bool | float:
    """What the service at ``url`` says of a response.

    Args:
        response: the response.
        answer: reference answer.
        metadata: the row's other columns.
        prompt: the question.
        url: address, ``http`` or ``https``. Redirects are not followed.
        timeout: seconds for one try. All tries together have ``reward.timeout``.
        retries: further tries after no answer, or the statuses 429, 500, 502, 503 and 504.
        api_key_env: environment variable that holds the key.
        api_key_file: file that holds the key; nobody else may read it.

    Raises:
        Refused: no try gave a judgement.
    """
    key = _read_key(api_key_env, api_key_file)
    body = json.dumps(metadata | {"prompt": prompt, "response": response, "answer": answer}).encode()
    for attempt in range(retries + 1):
        try:
            return _judgement(await _post(url, body, key, timeout))
        except Unavailable:
            if attempt == retries:
                raise
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
    raise AssertionError("the last try returns or raises")


def check_options(
    *,
    url: str,
    timeout: float = 5.0,
    retries: int = 2,
    api_key_env: str | None = None,
    api_key_file: str | None = None,
) -> None:
    """Raise ``ValueError`` for an address or a setting that cannot be used, or a key that cannot be read."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url must be an address such as http://host:8000/judge, got {_without_user(parts)!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"url must not hold a user or password, use api_key_env or api_key_file: {parts.hostname}")
    if not _is_number(timeout) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be greater than 0 and finite, got {timeout!r}")
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ValueError(f"retries must be 0 or more, got {retries!r}")
    if api_key_env is not None and api_key_file is not None:
        raise ValueError("api_key_env and api_key_file are both set; unset one")
    _read_key(api_key_env, api_key_file)


def _without_user(parts: urllib.parse.SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _read_key(variable: str | None, file: str | None) -> str | None:
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ValueError(f"api_key_env: the environment has no {variable}")
    elif file is not None:
        path = Path(file).expanduser()
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"api_key_file: others may read {file}; run chmod 600 {file}")
        key = path.read_text().strip()
        if not key:
            raise ValueError(f"api_key_file: {file} is empty")
    else:
        return None
    if not key.isascii() or not key.isprintable():
        raise ValueError("the API key has characters that a header cannot hold")
    return key


async def _post(url: str, body: bytes, key: str | None, timeout: float) -> bytes:
    """The body of the service's answer."""
    global _session
    if _session is None:  # one a process: it has one event loop, and ends with it
        # A few compressed bytes could become many; reward.concurrency bounds the connections.
        _session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    limit = aiohttp.ClientTimeout(total=timeout)
    try:
        async with _session.post(url, data=body, headers=headers, timeout=limit, allow_redirects=False) as answer:
            text = await _bounded(answer)
    except TimeoutError as error:
        raise Unavailable(f"the service did not answer within {timeout:g} s") from error
    except aiohttp.ClientError as error:
        raise Unavailable(f"the service did not answer: {type(error).__name__}: {_hidden(str(error), key)}") from error
    if answer.status != 200:
        kind = Unavailable if answer.status in (429, 500, 502, 503, 504) else Refused
        shown = _hidden(text.decode(errors="replace"), key)[:_SHOWN]
        raise kind(f"the service answered with status {answer.status}: {shown}")
    return text


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    """The body, of which no more is read than a judgement can have."""
    text = bytearray()
    async for part in answer.content.iter_chunked(1 << 16):
        text += part
        if len(text) > MAX_ANSWER_BYTES:
            raise Refused(f"the service's answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(text)


def _hidden(text: str, key: str | None) -> str:
    """``text`` without the key: a service may send back what it got."""
    return text.replace(key, "***") if key else text


def _judgement(body: bytes) -> bool | float:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("the service's answer is no JSON") from error
    found = {"reward", "correct"} & set(answer) if isinstance(answer, dict) else set()
    if len(found) != 1:
        raise Refused('the service\'s answer must be an object with either "reward" or "correct"')
    (name,) = found
    value = answer[name]
    if name == "correct" and isinstance(value, bool):
        return value
    if name == "reward" and _is_number(value) and abs(value) <= sys.float_info.max:
        return float(value)
    wanted = "true or false" if name == "correct" else "a finite number"
    raise Refused(f'"{name}" in the service\'s answer must be {wanted}, not a {type(value).__name__}')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
