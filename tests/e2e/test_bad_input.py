"""What users get wrong: one clear line, the right exit code, nothing left running or half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import command, run

from megatron_mapo.config import ServerConfig
from megatron_mapo.rollout.server import choose_ports

CASES = {
    "unknown key": (["trainer.stepps=3"], 2, "trainer.steps"),
    "wrong type": (["trainer.steps=many"], 2, "trainer.steps"),
    "mix with an overlong penalty": (["reward.overlong_penalty=0.5"], 2, "reward.overlong_penalty"),
    "no model": (["model.path=nowhere"], 3, "model.path"),
    "no data": (["data.train=nowhere.jsonl"], 3, "data.train"),
    "broken verifier": (["reward.name={verifiers}:broken"], 4, "no such answer"),
    "hanging verifier": (["reward.name={verifiers}:hanging", "reward.timeout=1"], 4, "reward.timeout"),
    "unknown verifier": (["reward.name=nothing"], 2, "reward.name"),
    "prompt too long": (["rollout.max_prompt_tokens=8"], 3, "rollout.max_prompt_tokens"),
    "sequence longer than a microbatch": (["actor.microbatch_tokens=16"], 2, "actor.microbatch_tokens"),
    "layout does not divide": (["actor.parallel.tensor=2"], 2, "actor.parallel"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case: str, workspace: Path, server_url: str) -> None:
    overrides, code, text = CASES[case]
    name = case.replace(" ", "-")
    filled = [o.replace("{verifiers}", str(workspace / "verifiers.py")) for o in overrides]
    done = run(command(workspace, f"rollout.urls=[{server_url}]", f"run.name={name}", *filled))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((workspace / "runs" / name).glob("checkpoints/*"))


def test_malformed_row_names_its_line(workspace: Path, server_url: str, tmp_path: Path) -> None:
    lines = (workspace / "train.jsonl").read_text().splitlines()
    lines[6] = '{"question": "What is 1 plus 1?", "answer": '
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    done = run(command(workspace, f"rollout.urls=[{server_url}]", "run.name=row", f"data.train={tmp_path}/bad.jsonl"))
    assert done.returncode == 3
    assert "bad.jsonl:7" in done.stderr or "line 7" in done.stderr


def test_no_server_is_an_error_that_names_it(workspace: Path) -> None:
    port = choose_ports(ServerConfig(port=0))[0]
    waits = "rollout.wait_timeout=1"
    done = run(command(workspace, f"rollout.urls=[http://127.0.0.1:{port}]", "run.name=alone", waits))
    assert done.returncode == 5
    assert waits in done.stderr
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
