"""A tiny model, a tiny task, and one real SGLang server for the whole folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import API_KEY
from tiny_models import make_tiny_model

from megatron_mapo.config import Dtype, ModelConfig, ServerConfig
from megatron_mapo.rollout.server import ServerGroup

VERIFIERS = '''"""Verifiers for a model that only babbles."""
import time
from pathlib import Path


def even(response, answer, metadata):
    """About half of all responses are right, whatever the model says."""
    return sum(map(ord, response)) % 2 == 0


def slowly_even(response, answer, metadata):
    """Seconds a step, so that a run stands still enough to be disturbed, until the file `calm` is there."""
    if not Path(__file__).with_name("calm").exists():
        time.sleep(0.4)
    return even(response, answer, metadata)


def broken(response, answer, metadata):
    raise ValueError("no such answer")


def fails_in_the_second_step(response, answer, metadata):
    """Of steps with 16 responses; good again when the file `calm` is there."""
    with Path(__file__).with_name("judged").open("a") as judged:
        judged.write("x")
        judged.flush()
        if judged.tell() > 20 and not Path(__file__).with_name("calm").exists():
            raise ValueError("no judgement in the second step")
    return even(response, answer, metadata)


def hanging(response, answer, metadata):
    time.sleep(3600)
'''


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the model, the data, the verifiers and ``config.yaml``."""
    folder = tmp_path_factory.mktemp("e2e")
    make_tiny_model(folder / "model")
    (folder / "verifiers.py").write_text(VERIFIERS)
    rows = [{"question": f"What is {a} plus {a * 7 % 5}?", "answer": str(a + a * 7 % 5)} for a in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    (folder / "config.yaml").write_text(
        f"""
run: {{name: base, output_dir: {folder / "runs"}}}
model: {{path: {folder / "model"}, dtype: float32}}
data: {{train: train.jsonl, eval: heldout.jsonl}}
reward: {{name: "{folder / "verifiers.py"}:even", timeout: 20}}
actor: {{optim: {{lr: 1.0e-3}}, microbatch_tokens: 512}}
rollout:
  prompts_per_step: 4
  responses_per_prompt: 4
  max_prompt_tokens: 128
  max_response_tokens: 12
  timeout: 60
  retries: 1
  server: {{port: 0, threads: 1, max_total_tokens: 8192, startup_timeout: 240}}
  sync: {{timeout: 60}}
trainer: {{steps: 3, save_interval: 1, threads: 1, evaluation: {{samples: 2}}}}
tracking: {{plots: false}}
"""
    )
    return folder


@pytest.fixture(scope="session")
def server_url(workspace: Path) -> Iterator[str]:
    """A server that outlives the runs."""
    config = ServerConfig(port=0, threads=1, max_total_tokens=8192, startup_timeout=240.0)
    model = ModelConfig(path=str(workspace / "model"), dtype=Dtype.float32)
    with ServerGroup(config, model, workspace / "logs", API_KEY) as group:
        yield group.urls[0]
