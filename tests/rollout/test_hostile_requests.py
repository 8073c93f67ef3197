"""Requests that no client of ours sends: refused one by one, and the server goes on."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from server_support import API_KEY

GOOD = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
MIB = 1 << 20


def post(url: str, body: bytes, key: str | None = API_KEY) -> tuple[int, bytes]:
    """Status and answer of one request to ``/generate``."""
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def url(servers: Any) -> Any:
    """The server, which must still generate afterwards."""
    yield servers.urls[0]
    servers.check()
    status, answer = post(servers.urls[0], json.dumps(GOOD).encode())
    assert status == 200
    assert len(json.loads(answer)["output_ids"]) == 1


@pytest.mark.parametrize(
    "key",
    [None, "", "a-key-for-test", API_KEY + "x", API_KEY.upper()],
    ids=["none", "empty", "shorter", "longer", "capitals"],
)
@pytest.mark.parametrize(
    "path", ["/generate", "/update_weights_from_disk", "/flush_cache", "/model_info", "/abort_request"]
)
def test_another_key_opens_nothing(url: str, key: str | None, path: str) -> None:
    request = urllib.request.Request(f"{url}{path}", b"{}", {"Content-Type": "application/json"})
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 401


MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    b'{"input_ids": [5, 6, 7], "sampling_params": ',
    b'{"input_ids": "abc"}',
    b'{"input_ids": [5, "six"]}',
    b'{"input_ids": [5, -1]}',
    b'{"input_ids": [100000000]}',
    b'{"input_ids": [5], "sampling_params": {"temperature": "hot"}}',
    b'{"input_ids": [5], "sampling_params": {"max_new_tokens": -3}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_body_is_refused(url: str, body: bytes) -> None:
    status, _ = post(url, body)
    assert 400 <= status < 600


def test_an_oversized_body_is_refused(url: str) -> None:
    """A prompt of millions of tokens, far beyond the context."""
    status, _ = post(url, b'{"input_ids": [' + b"5," * (8 * MIB) + b"5]}")
    assert status == 400


def test_without_the_key_a_body_is_not_even_read(url: str) -> None:
    """The answer comes when only the headers, which announce a body of 1 GiB, have been sent."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/generate")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer another-key", "Content-Length": 1024 * MIB}
    for name, value in headers.items():
        connection.putheader(name, str(value))
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()
