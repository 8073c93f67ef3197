"""``megatron-mapo doctor`` on a server that is up."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_support import API_KEY

from megatron_mapo.config import Config
from megatron_mapo.doctor import network
from megatron_mapo.doctor.finding import Status


@pytest.mark.parametrize(
    ("key", "status"),
    [(API_KEY, Status.ok), ("another-key", Status.fails), (None, Status.fails)],
    ids=["right", "wrong", "none"],  # pytest tells its children the name of the test, and no key may be read there
)
def test_a_server_answers_to_its_key_only(servers, key, status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MAPO_API_KEY", raising=False)
    config = Config()
    config.rollout.urls = list(servers.urls)
    if key is not None:
        file = tmp_path / "key"
        file.write_text(key)
        file.chmod(0o600)
        config.rollout.api_key_file = str(file)
    (finding,) = [finding for finding in network.check(config) if finding.name == "rollout.urls"]
    assert finding.status is status
    assert (status is Status.ok) or "status 401" in finding.detail
