"""Save and resume in one process: the same bits, only complete folders, errors that name the folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model
from torch import Tensor

from megatron_mapo import checkpoint_files
from megatron_mapo.config import Config, Dtype, LossAggregation, LRSchedule
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron import checkpoint
from megatron_mapo.megatron.policy import Policy, build_model, token_weights
from megatron_mapo.megatron.runtime import Runtime


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def make_policy(runtime: Runtime, model: Path, dtype: Dtype = Dtype.float32) -> Policy:
    config = Config()
    config.model.dtype = dtype
    config.actor.optim.lr = 1e-2
    config.actor.optim.schedule = LRSchedule.linear
    config.actor.optim.warmup_steps = 2
    return Policy(config, runtime, model, total_updates=6)


def trained_policy(runtime: Runtime, model: Path) -> Policy:
    """After one update: before it the optimizer has no state to save."""
    policy = make_policy(runtime, model)
    train(policy, 1)
    return policy


def train(policy: Policy, updates: int) -> list[Tensor]:
    """Updates on one fixed batch: their numbers, then the weights."""
    batch = SequenceBatch.from_responses([[5, 6, 7]] * 3, [[8, 9], [10], [11, 12, 13]], group_ids=[0] * 3)
    advantages = torch.tensor([1.0, -0.5, 0.3])[batch.response_sequence]
    columns = {"advantages": advantages, "token_weight": token_weights(batch, LossAggregation.token, 8)}
    found = []
    for _ in range(updates):
        result = policy.update(batch, columns)
        found.append(torch.tensor([result.loss, result.grad_norm, result.learning_rate], dtype=torch.float64))
        found.append(result.scores.logprobs)
    return [*found, *(v.clone() for _, v in policy.named_weights())]


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_resuming_goes_on_bit_by_bit(runtime: Runtime, model: Path, tmp_path: Path, dtype: Dtype) -> None:
    policy = make_policy(runtime, model, dtype)
    train(policy, 2)
    torch.manual_seed(17)
    torch.rand(5)
    path = checkpoint.save(policy, runtime, tmp_path, 2, {"cursor": [3, 4], "name": "x"}, keep=2)
    noise, expected = torch.rand(3), train(policy, 3)

    fresh = make_policy(runtime, model, dtype)
    torch.manual_seed(99)
    assert checkpoint.load(fresh, runtime, path) == {"cursor": [3, 4], "name": "x"}
    assert torch.equal(torch.rand(3), noise)
    found = train(fresh, 3)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_only_the_weights(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    policy = make_policy(runtime, model)
    train(policy, 2)
    path = checkpoint.save(policy, runtime, tmp_path, 2, {}, keep=2)
    bare, _ = build_model(policy.config, model, runtime.device)
    before = bare.embedding.word_embeddings.weight.clone()
    checkpoint.load_model(bare, path)
    assert not torch.equal(bare.embedding.word_embeddings.weight, before)
    for a, b in zip(bare.parameters(), policy.actor.parameters(), strict=True):
        assert torch.equal(a, b)


def test_old_checkpoints_are_removed_and_partial_ones_never_listed(
    runtime: Runtime, model: Path, tmp_path: Path
) -> None:
    policy = trained_policy(runtime, model)
    for name in ("step_000009.partial", "step_12", "steps_000001", "step_000007x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000008").write_text("a file")
    for step in (5, 20, 1000000):
        checkpoint.save(policy, runtime, tmp_path, step, {}, keep=2)
    assert checkpoint_files.complete_checkpoints(tmp_path) == [
        (20, tmp_path / "step_000020"),
        (1000000, tmp_path / "step_1000000"),
    ]
    assert (tmp_path / "step_000009.partial").is_dir(), "what is not a checkpoint is not touched"
    assert checkpoint_files.complete_checkpoints(tmp_path / "nowhere") == []


def test_a_partial_folder_of_a_killed_run_is_written_anew(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    policy = trained_policy(runtime, model)
    stale = tmp_path / "step_000003.partial"
    stale.mkdir()
    (stale / "rubbish").write_text("x")
    path = checkpoint.save(policy, runtime, tmp_path, 3, {}, keep=1)
    assert not stale.exists()
    assert not (path / "rubbish").exists()
    again = checkpoint.save(policy, runtime, tmp_path, 3, {"again": True}, keep=1)
    assert checkpoint.load(policy, runtime, again) == {"again": True}


@pytest.mark.parametrize("damage", ["truncated weights", "missing weights", "broken common", "missing common", "empty"])
def test_a_damaged_checkpoint_is_named(runtime: Runtime, model: Path, tmp_path: Path, damage: str) -> None:
    policy = trained_policy(runtime, model)
    path = checkpoint.save(policy, runtime, tmp_path, 4, {}, keep=1)
    weights = max(path.glob("*.distcp"), key=lambda f: f.stat().st_size)
    if damage == "truncated weights":
        with weights.open("r+b") as file:
            file.truncate(1000)
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "broken common":
        (path / "common.pt").write_bytes(b"rubbish")
    elif damage == "missing common":
        (path / "common.pt").unlink()
    else:
        for file in path.iterdir():
            file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step_000004"):
        checkpoint.load(policy, runtime, path)


def test_a_checkpoint_of_another_model_is_refused(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    path = checkpoint.save(trained_policy(runtime, model), runtime, tmp_path, 4, {}, keep=1)
    other = make_tiny_model(tmp_path / "other", "llama", intermediate_size=192)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step_000004"):
        checkpoint.load(make_policy(runtime, other), runtime, path)
    with pytest.raises(CheckpointError, match=r"cannot read .*step_000004"):
        checkpoint.load_model(build_model(Config(), other, runtime.device)[0], path)


def test_a_folder_that_cannot_be_made(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not write .*file/step_000001"):
        checkpoint.save(make_policy(runtime, model), runtime, tmp_path / "file", 1, {}, keep=1)


DISK_FULL = """
import resource, sys
from pathlib import Path
import torch
from megatron_mapo.config import Config
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron import checkpoint, runtime
from megatron_mapo.megatron.policy import Policy

def main():
    ranks = runtime.initialize(Config())
    policy = Policy(Config(), ranks, sys.argv[1], 1)
    batch = SequenceBatch.from_responses([[1]], [[2]])
    policy.update(batch, {"advantages": torch.ones(1), "token_weight": torch.ones(1)})
    # Files end at 64 KiB, with an error like that of a full disk; the helper processes inherit the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    try:
        checkpoint.save(policy, ranks, Path(sys.argv[2]), 1, {}, 1)
    except CheckpointError as error:
        print("refused:", error)
    ranks.close()

if __name__ == "__main__":
    main()
"""


def test_a_full_disk_leaves_no_checkpoint(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "disk_full.py"
    script.write_text(DISK_FULL)
    out = tmp_path / "checkpoints"
    command = [sys.executable, str(script), str(model), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "refused: could not write" in result.stdout
    assert checkpoint_files.complete_checkpoints(out) == []
