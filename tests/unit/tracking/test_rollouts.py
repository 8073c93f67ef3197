"""All sequences of a step as a table: what stands in it, and that no step is lost or doubled."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import make_tokenizer

from megatron_mapo.config import AdvNormConfig, TrackingConfig
from megatron_mapo.data.prompts import Prompt
from megatron_mapo.data.sequences import SequenceBatch
from megatron_mapo.errors import DataError
from megatron_mapo.rollout.records import rollout_columns
from megatron_mapo.tracking import Tracker
from megatron_mapo.tracking.rollouts import COLUMNS, RolloutWriter, read_rollouts, rollout_files, step_of

QUIET = {"tensorboard": False, "plots": False, "progress": False}


def columns(response: str = "x", rows: int = 2) -> dict[str, list]:
    kinds = {"string": response, "bool": False}
    return {name: [kinds.get(kind, 1)] * rows for name, kind in COLUMNS.items() if name != "step"}


def steps_in(folder: Path) -> list[int]:
    """The step of every row of every file, so that a doubled or a lost one shows."""
    return [step for file in rollout_files(folder) for step in read_rollouts(file)["step"].to_pylist()]


class TestColumns:
    def test_text_reward_group_and_differences_by_hand(self):
        tokenizer = make_tokenizer()
        prompts = [Prompt(7, [5, 6], "2+2?", "4", {}), Prompt(3, [5], "1+1?", "2", {})]
        answers = [[*tokenizer.encode(text, add_special_tokens=False), 2] for text in ("4", "five", "2", "2")]
        answers[1] = answers[1][:-1]
        lens = [len(a) for a in answers]
        batch = SequenceBatch.from_responses(
            [[5, 6], [5, 6], [5], [5]],
            answers,
            rollout_logprobs=[[-1.0] * n for n in lens],
            weight_versions=[[4] * lens[0], [3] + [4] * (lens[1] - 1), [4] * lens[2], [4] * lens[3]],
            rewards=[1.0, 0.0, 1.0, 1.0],
            group_ids=[0, 0, 1, 1],
            truncated=[False, True, False, False],
        )
        trainer = torch.full_like(batch.rollout_logprobs, math.nan)
        trainer[: lens[0]] = -1.25
        trainer[lens[0] : lens[0] + lens[1]] = torch.tensor([-0.5, -1.5, -1.0, -1.0])[: lens[1]]
        advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
        found = rollout_columns(batch, advantages, trainer, prompts, tokenizer, AdvNormConfig())
        assert list(found) == [name for name in COLUMNS if name != "step"]
        assert found["response"] == ["4<|im_end|>", "five", "2<|im_end|>", "2<|im_end|>"]
        assert found["prompt"] == ["2+2?", "2+2?", "1+1?", "1+1?"]
        assert found["prompt_id"] == [7, 7, 3, 3]
        assert found["answer"] == ["4", "4", "2", "2"]
        assert found["p"] == [0.5, 0.5, 1.0, 1.0]
        assert found["lambda"] == [0.0, 0.0, 1.0, 1.0]
        assert found["weight_version_min"] == [4, 3, 4, 4]
        assert found["weight_version_max"] == [4, 4, 4, 4]
        assert found["length"] == lens
        assert found["prompt_length"] == [2, 2, 1, 1]
        assert found["logprob_diff_mean"] == [0.25, 0.0, None, None]
        assert found["logprob_diff_abs_mean"] == [0.25, 0.25, None, None]


class TestFiles:
    def test_a_file_a_step_with_the_types_that_it_promises(self, tmp_path):
        writer = RolloutWriter(tmp_path / "rollouts", 0)
        for step in (1, 2):
            writer.write(step, lambda step=step: columns(f"你好 {step}\n"))
        writer.close()
        table = read_rollouts(tmp_path / "rollouts/step_000002.parquet")
        assert dict(zip(table.column_names, map(str, table.schema.types), strict=True)) == {
            name: kind.replace("float32", "float") for name, kind in COLUMNS.items()
        }
        assert table["response"].to_pylist() == ["你好 2\n"] * 2
        assert steps_in(tmp_path / "rollouts") == [1, 1, 2, 2]

    @pytest.mark.parametrize(("finished", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
    def test_files_of_lost_steps_are_removed(self, finished, kept, tmp_path):
        first = Tracker(tmp_path, TrackingConfig(**QUIET), 9, 0)
        for step in (1, 2, 3):
            first.log_rollouts(step, lambda: columns(rows=1))
        first.flush()
        second = Tracker(tmp_path, TrackingConfig(**QUIET), 9, finished)
        assert steps_in(tmp_path / "rollouts") == kept
        second.log_rollouts(finished + 1, lambda: columns(rows=1))
        second.close()
        assert steps_in(tmp_path / "rollouts") == [*kept, finished + 1]

    def test_off_writes_nothing(self, tmp_path):
        tracker = Tracker(tmp_path, TrackingConfig(rollouts=False, **QUIET), 9, 0)
        tracker.log_rollouts(1, lambda: pytest.fail("nobody asked for them"))
        tracker.close()
        assert not (tmp_path / "rollouts").exists()

    def test_the_step_does_not_wait_for_its_own_file(self, tmp_path):
        writer = RolloutWriter(tmp_path / "rollouts", 0)
        release = tmp_path / "go"

        def slow() -> dict[str, list]:
            while not release.exists():
                time.sleep(0.01)
            return columns()

        writer.write(1, slow)  # returns although the file cannot be written yet
        assert rollout_files(tmp_path / "rollouts") == []
        release.touch()
        writer.flush()
        assert [step_of(file) for file in rollout_files(tmp_path / "rollouts")] == [1]
        writer.close()

    @pytest.mark.parametrize("when", ["write", "flush", "close"])
    def test_a_failure_is_not_silent(self, when, tmp_path):
        writer = RolloutWriter(tmp_path / "rollouts", 0)
        writer.write(1, lambda: {"group": [1, 2]} | {"reward": [1.0]})
        with pytest.raises((ValueError, KeyError)):
            {"write": lambda: writer.write(2, columns), "flush": writer.flush, "close": writer.close}[when]()

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "step_000001.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(DataError, match=r"step_000001\.parquet"):
            read_rollouts(tmp_path / "step_000001.parquet")

    def test_kill_9_leaves_only_complete_files(self, tmp_path):
        """A writer that is killed at some moment: every file that is there can be read, and no step is missing."""
        code = (
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
            "from test_rollouts import columns; from megatron_mapo.tracking.rollouts import RolloutWriter\n"
            "writer = RolloutWriter(Path(sys.argv[1]), 0)\n"
            "for step in range(1, 100000): writer.write(step, lambda: columns('text ' * 2000, 300))\n"
        )
        folder = tmp_path / "rollouts"
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen([sys.executable, "-c", code, str(folder), str(here)], env=environment)
        try:
            while len(rollout_files(folder)) < 5:
                assert child.poll() is None
                time.sleep(0.005)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        found = [step_of(file) for file in rollout_files(folder)]
        assert found == list(range(1, len(found) + 1))
        assert all(len(read_rollouts(file)) == 300 for file in rollout_files(folder))


def test_starts_are_kept_when_a_run_goes_on(tmp_path):
    from megatron_mapo.tracking.jsonl import read_rows

    for finished in (0, 3, 2):
        tracker = Tracker(tmp_path, TrackingConfig(**QUIET), 9, finished)
        tracker.log_start({"ranks": 2})
        tracker.close()
    assert [(row["step"], row["ranks"]) for row in read_rows(tmp_path / "starts.jsonl")] == [(0, 2), (3, 2), (2, 2)]
