"""A checkpoint is data: one that holds a call is refused, and nothing of it runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from megatron_mapo.config import Config, Dtype
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron import checkpoint
from megatron_mapo.megatron.policy import Policy
from megatron_mapo.megatron.runtime import Runtime


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def policy(runtime: Runtime, model: Path) -> Policy:
    config = Config()
    config.model.dtype = Dtype.float32
    return Policy(config, runtime, model, total_updates=6)


Save = Callable[[dict[str, Any]], Path]


@pytest.fixture
def save(policy: Policy, runtime: Runtime, tmp_path: Path) -> Save:
    return lambda state: checkpoint.save(policy, runtime, tmp_path, 1, state, keep=1)


def in_index(save: Save, mark: Path, _: pytest.MonkeyPatch) -> Path:
    """The index of the tensors, which rank 0 reads first."""
    path = save({})
    (path / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    return path


def beside_index(save: Save, mark: Path, _: pytest.MonkeyPatch) -> Path:
    """A whole index, with something more in it."""
    path = save({})
    index = pickle.loads((path / ".metadata").read_bytes())
    index.planner_data = Payload(mark)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    return path


def in_object(save: Save, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rank's RNG state, which is an object among the tensors."""
    monkeypatch.setattr(checkpoint, "_rng_state", lambda runtime: {"torch": Payload(mark)})
    path = save({})
    monkeypatch.undo()
    return path


def in_common(save: Save, mark: Path, _: pytest.MonkeyPatch) -> Path:
    """The loop's own state."""
    path = save({})
    file = path / "common.pt"
    torch.save({**torch.load(file), "loop": Payload(mark)}, file)
    return path


@pytest.mark.parametrize("place", [in_index, beside_index, in_object, in_common])
def test_a_payload_is_refused_and_not_run(
    place: Any, policy: Policy, runtime: Runtime, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it ran"
    # Some environments set this for older programs; it must not open this door.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = place(save, mark, monkeypatch)
    with pytest.raises(CheckpointError, match=f"cannot resume from {path}: .*posix.mkdir"):
        checkpoint.load(policy, runtime, path)
    assert not mark.exists()


def test_weights_alone_are_read_as_carefully(
    policy: Policy, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it ran"
    path = in_index(save, mark, monkeypatch)
    with pytest.raises(CheckpointError, match=f"cannot read {path}: .*posix.mkdir"):
        checkpoint.load_model(policy.chunks, path)
    assert not mark.exists()


UNPATCHED = """
import sys
import torch.distributed as dist
from megatron_mapo.patches import megatron_core
from megatron_mapo.patches.megatron_core import fixups
for table in (fixups.CPU_ONLY, fixups.EVERYWHERE):
    for key in table:
        table[key] = [f for f in table[key] if f.__name__ != sys.argv[2]]
megatron_core.apply()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron.core import dist_checkpointing
dist_checkpointing.load_tensors_metadata(sys.argv[1])
"""


@pytest.mark.parametrize("without", ["nothing", "_index_without_code"])
def test_megatron_alone_runs_it(without: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is needed: a process without it runs what the index holds."""
    mark = tmp_path / "it ran"
    path = in_index(save, mark, monkeypatch)
    command = [sys.executable, "-c", UNPATCHED, str(path), without]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0, "neither is an index"
    assert mark.exists() is (without == "_index_without_code"), done.stderr
