"""Save and resume in one process: the same bits, only complete folders, errors that name the folder."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model
from torch import Tensor

from megatron_mapo import checkpoint_files
from megatron_mapo.algorithms.aggregation import token_weights
from megatron_mapo.checkpoint_files import Retention
from megatron_mapo.config import Config, Dtype, LoraConfig, LossAggregation, LRSchedule, load_config
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import CheckpointError
from megatron_mapo.megatron import checkpoint
from megatron_mapo.megatron.checkpoint import Checkpointer
from megatron_mapo.megatron.hf_folder import weights_fingerprint
from megatron_mapo.megatron.policy import Policy, build_model
from megatron_mapo.megatron.runtime import Runtime


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def make_config(dtype: Dtype = Dtype.float32, distributed_optimizer: bool = True) -> Config:
    config = Config()
    config.model.dtype = dtype
    config.actor.optim.lr = 1e-2
    config.actor.optim.schedule = LRSchedule.linear
    config.actor.optim.warmup_steps = 2
    config.actor.optim.distributed = distributed_optimizer
    return config


def make_policy(
    runtime: Runtime, model: Path, dtype: Dtype = Dtype.float32, distributed_optimizer: bool = True
) -> Policy:
    return Policy(make_config(dtype, distributed_optimizer), runtime, model, total_updates=6)


def trained_policy(runtime: Runtime, model: Path) -> Policy:
    """After one update."""
    policy = make_policy(runtime, model)
    train(policy, 1)
    return policy


def train(policy: Policy, updates: int) -> list[Tensor]:
    """Updates on one fixed batch: their numbers, then the weights."""
    batch = SequenceBatch.from_responses([[5, 6, 7]] * 3, [[8, 9], [10], [11, 12, 13]], group_ids=[0] * 3)
    advantages = torch.tensor([1.0, -0.5, 0.3])[batch.response_sequence]
    weights = token_weights(batch.response_lens, LossAggregation.token, 8).float()
    columns = {"advantages": advantages, "token_weight": weights}
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


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("distributed", [True, False])
def test_the_optimizer_of_now_goes_on(
    runtime: Runtime, model: Path, tmp_path: Path, distributed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy(runtime, model, distributed_optimizer=distributed)
    train(policy, 3)
    path = checkpoint.save(policy, runtime, tmp_path, 3, {}, keep=1)
    config = make_config(distributed_optimizer=distributed)
    optim = config.actor.optim
    optim.lr, optim.schedule, optim.warmup_steps = 0.25, LRSchedule.cosine, 4
    optim.beta1, optim.beta2, optim.eps, optim.weight_decay = 0.8, 0.7, 1e-5, 0.125
    config.trainer.steps, config.reward.name, config.trainer.threads = 10, "exact", 1
    resumed = Policy(config, runtime, model, total_updates=10)
    checkpoint.load(resumed, runtime, path)
    found = [float(numbers[2]) for numbers in train(resumed, 7)[0:14:2]]
    assert found == pytest.approx([0.25, *(0.125 * (1 + math.cos(math.pi * k / 7)) for k in range(1, 7))])
    assert [g["weight_decay"] / g["wd_mult"] for g in resumed.optimizer.param_groups if g["wd_mult"]] == [0.125]
    for group in resumed.optimizer.param_groups:
        assert (*group["betas"], group["eps"]) == (0.8, 0.7, 1e-5)
    assert capsys.readouterr().out.splitlines() == [
        "actor.optim.lr is 0.25 now; the checkpoint was written with 0.01",
        "actor.optim.schedule is cosine now; the checkpoint was written with linear",
        "actor.optim.warmup_steps is 4 now; the checkpoint was written with 2",
        "actor.optim.beta1 is 0.8 now; the checkpoint was written with 0.9",
        "actor.optim.beta2 is 0.7 now; the checkpoint was written with 0.95",
        "actor.optim.eps is 1e-05 now; the checkpoint was written with 1e-08",
        "actor.optim.weight_decay is 0.125 now; the checkpoint was written with 0.0",
        "trainer.steps is 10 now; the checkpoint was written with 100",
        "other keys that are not as they were in the checkpoint: reward.name=exact (math)",
    ]


class SlowWriter:
    """The real writer, which waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        real = checkpoint.write

        def write(*arguments: Any) -> Any:
            assert self.go.wait(timeout=60)
            return real(*arguments)

        monkeypatch.setattr(checkpoint, "write", write)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_training_goes_on_while_the_state_of_the_start_is_written(
    runtime: Runtime, model: Path, tmp_path: Path, dtype: Dtype, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(runtime, model, dtype, distributed)
    train(policy, 1)
    writer = SlowWriter(monkeypatch)
    checkpointer = Checkpointer(runtime, tmp_path, Retention(last=2))
    checkpointer.start(policy, 1, {"step": 1})
    expected = train(policy, 3)
    assert checkpointer.poll() is None
    assert checkpoint_files.complete_checkpoints(tmp_path) == []
    writer.go.set()
    path = checkpointer.wait()
    assert path == tmp_path / "step_000001"
    assert checkpointer.poll() is None
    assert checkpointer.wait() is None
    checkpointer.close()

    fresh = make_policy(runtime, model, dtype, distributed)
    assert checkpoint.load(fresh, runtime, path) == {"step": 1}
    assert_equal(train(fresh, 3), expected)


def test_poll_finishes_what_has_been_written(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    checkpointer = Checkpointer(runtime, tmp_path, Retention(last=1))
    policy = trained_policy(runtime, model)
    for step in (1, 2):
        checkpointer.start(policy, step, {})
        deadline = time.monotonic() + 60
        while (path := checkpointer.poll()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert checkpoint_files.complete_checkpoints(tmp_path) == [(step, path)]
        assert checkpoint_files.read_pointer(tmp_path, "latest") == path.name
    checkpointer.close()


def test_the_next_save_waits_for_the_one_before(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    checkpointer = Checkpointer(runtime, tmp_path, Retention(last=1, best=True))
    policy = trained_policy(runtime, model)
    for step, score in ((1, 0.5), (2, None), (3, 0.25)):
        checkpointer.start(policy, step, {}, score)
        assert not list(tmp_path.glob(f"step_{step - 1:06d}.partial"))
    checkpointer.wait()
    checkpointer.close()
    assert [step for step, _ in checkpoint_files.complete_checkpoints(tmp_path)] == [1, 3]
    assert checkpoint_files.read_pointer(tmp_path, "best") == "step_000001"


def test_what_is_wrong_with_old_ones_does_not_fail_a_save(
    runtime: Runtime, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer = Checkpointer(runtime, tmp_path, Retention(last=1, best=True))
    policy = trained_policy(runtime, model)

    def save(step: int, score: float | None) -> str:
        checkpointer.start(policy, step, {}, score)
        assert checkpointer.wait() == tmp_path / f"step_{step:06d}"
        return capsys.readouterr().out

    assert save(1, 0.5) == ""
    (tmp_path / "step_000001" / "manifest.json").write_text("{")
    assert "warning: " in (said := save(2, 0.25))
    assert "step_000001/manifest.json is damaged" in said
    assert [step for step, _ in checkpoint_files.complete_checkpoints(tmp_path)] == [1, 2]
    shutil.rmtree(tmp_path / "step_000001")
    (tmp_path / "step_000003.removed").write_text("in the way")
    assert save(3, None) == ""
    checkpointer.add_score(3, 0.125)
    assert "warning: cannot remove old checkpoints" in save(4, None)
    assert checkpoint_files.read_pointer(tmp_path, "best") == "step_000002"
    checkpointer.add_score(4, 0.75)
    assert checkpoint_files.read_pointer(tmp_path, "best") == "step_000004"
    (tmp_path / "step_000004" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot write the score of step 4 .*manifest.json is damaged"):
        checkpointer.add_score(4, 0.75)
    checkpointer.close()


def test_a_checkpoint_that_is_given_up(
    runtime: Runtime, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SlowWriter(monkeypatch)
    checkpointer = Checkpointer(runtime, tmp_path, Retention(last=1))
    checkpointer.start(trained_policy(runtime, model), 1, {})
    threading.Timer(0.2, writer.go.set).start()
    checkpointer.close()
    assert checkpoint_files.complete_checkpoints(tmp_path) == []
    assert len(checkpoint_files.recover(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("distributed", [True, False])
def test_before_the_first_update(runtime: Runtime, model: Path, tmp_path: Path, distributed: bool) -> None:
    policy = make_policy(runtime, model, distributed_optimizer=distributed)
    path = checkpoint.save(policy, runtime, tmp_path, 0, {}, keep=1)
    fresh = make_policy(runtime, model, distributed_optimizer=distributed)
    checkpoint.load(fresh, runtime, path)
    expected = train(make_policy(runtime, model, distributed_optimizer=distributed), 3)
    assert_equal(train(policy, 3), expected)
    assert_equal(train(fresh, 3), expected)


def test_the_manifest_says_what_was_saved(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    policy = trained_policy(runtime, model)
    path = checkpoint.save(policy, runtime, tmp_path, 4, {}, keep=1)
    manifest = checkpoint_files.verify(path)
    assert manifest is not None
    numbers = sum(p.numel() for p in policy.chunks[0].parameters())
    assert manifest.parts["weights"] == 4 * numbers
    assert manifest.parts["optimizer"] == 3 * 4 * numbers, "master weights and two moments"
    assert manifest.parts["other"] > 0
    assert manifest.step == 4
    assert manifest.layout == {
        **{
            "world_size": 1,
            "tensor": 1,
            "pipeline": 1,
            "virtual_pipeline": 1,
            "context": 1,
            "expert": 1,
            "expert_tensor": 1,
            "data": 1,
        }
    }
    weights = weights_fingerprint(model)
    assert manifest.model == {
        **{"type": "llama", "dtype": "float32", "path": str(model)},
        **{"vocab_size": 512, "weights": weights},
    }
    assert load_config(path / "config.yaml", ["model.path=m", "data.train=d"]).actor == policy.config.actor
    assert "config.yaml" in manifest.files
    assert {file.name for file in path.iterdir()} == {*manifest.files, "manifest.json"}


def test_too_little_space_is_known_before_anything_is_written(
    runtime: Runtime, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = trained_policy(runtime, model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(CheckpointError, match=r"0.00 GiB free and the checkpoint needs 0.06 GiB.*trainer.keep_checkpo"):
        checkpoint.save(policy, runtime, tmp_path, 4, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_verification(runtime: Runtime, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.save(trained_policy(runtime, model), runtime, tmp_path, 4, {}, keep=1)
    weights = max(path.glob("*.distcp"), key=lambda f: f.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    checkpoint.verify(runtime, path, checksums=False)
    with pytest.raises(CheckpointError, match=rf"{weights.name} is damaged: its checksum"):
        checkpoint.verify(runtime, path, checksums=True)
    weights.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{weights.name} is damaged: it has"):
        checkpoint.verify(runtime, path, checksums=False)
    assert capsys.readouterr().out == ""
    (path / "manifest.json").unlink()
    checkpoint.verify(runtime, path, checksums=True)
    assert "has no manifest" in capsys.readouterr().out


def test_only_the_weights(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    policy = make_policy(runtime, model)
    train(policy, 2)
    path = checkpoint.save(policy, runtime, tmp_path, 2, {}, keep=2)
    chunks, _ = build_model(policy.config, model, runtime.device)
    before = chunks[0].embedding.word_embeddings.weight.clone()
    checkpoint.load_model(chunks, path)
    assert not torch.equal(chunks[0].embedding.word_embeddings.weight, before)
    for a, b in zip(chunks[0].parameters(), policy.chunks[0].parameters(), strict=True):
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


def test_a_model_of_other_weights_or_vocabulary_is_refused(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    path = checkpoint.save(trained_policy(runtime, model), runtime, tmp_path, 4, {}, keep=1)
    moved = shutil.copytree(model, tmp_path / "moved")
    checkpoint.load(make_policy(runtime, moved), runtime, path)
    others = {
        "weights": make_tiny_model(tmp_path / "weights", "llama", seed=1),
        "vocab_size": make_tiny_model(tmp_path / "vocab_size", "llama", vocab=520),
    }
    for what, other in others.items():
        with pytest.raises(CheckpointError, match=rf"cannot resume from .*step_000004: model\.path: .*{what}"):
            checkpoint.load(make_policy(runtime, other), runtime, path)


LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("key", "value"), [("alpha", 16.0), ("targets", ["q_proj"]), ("rank", 2), ("rank", 0), ("rank", None)]
)
def test_adapters_of_other_settings_are_refused(
    runtime: Runtime, model: Path, tmp_path: Path, key: str, value: Any
) -> None:
    def adapted(settings: dict[str, Any]) -> Policy:
        config = make_config()
        config.actor.lora = LoraConfig(**settings)
        return Policy(config, runtime, model, total_updates=6)

    without, changed = LORA | {"rank": 0}, LORA | {key: value}
    then, now = (without, LORA) if value is None else (LORA, changed)
    path = checkpoint.save(adapted(then), runtime, tmp_path, 4, {}, keep=1)
    same = then | {"targets": then["targets"][::-1]} | ({"alpha": 1.0} if value is None else {})
    checkpoint.load(adapted(same), runtime, path)
    with pytest.raises(CheckpointError, match=rf"cannot resume from .*step_000004: actor\.lora\.{key} is "):
        checkpoint.load(adapted(now), runtime, path)


def test_a_checkpoint_without_configuration_loads(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    """Earlier versions wrote none, and knew the model by its type and its folder alone."""
    policy = trained_policy(runtime, model)
    path = checkpoint.save(policy, runtime, tmp_path, 4, {"a": 1}, keep=1)
    (path / "config.yaml").unlink()
    tree = json.loads((path / "manifest.json").read_text())
    tree["files"].pop("config.yaml")
    for name in ("vocab_size", "weights"):
        del tree["model"][name]
    (path / "manifest.json").write_text(json.dumps(tree))
    checkpoint.verify(runtime, path, checksums=True)
    assert checkpoint.load(make_policy(runtime, model), runtime, path) == {"a": 1}


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
    # Files end at 64 KiB, with an error like that of a full disk.
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
    assert "File too large" in result.stdout
    assert list(out.iterdir()) == []
