"""The run folder's files: rows, cutting on resume, curves, progress lines."""

from __future__ import annotations

import json
import math
import os
import pty
import threading
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mapo.config import TrackingConfig
from megatron_mapo.errors import DataError
from megatron_mapo.tracking import Tracker, plot_run
from megatron_mapo.tracking.jsonl import JsonlWriter, read_rows
from megatron_mapo.tracking.plots import running_mean
from megatron_mapo.tracking.progress import StatusText, duration

QUIET = TrackingConfig(tensorboard=False, plots=False, progress=False)


def metrics(step: int) -> dict[str, float]:
    return {
        "reward/mean": 0.1 * step,
        "reward/accuracy": 0.1 * step,
        "response/length_mean": 20.0 - step,
        "response/length_min": 1.0,
        "response/length_max": 24.0,
        "loss/entropy": 1.0 / step,
        "mismatch/abs_mean": 0.02,
        "mismatch/abs_p99": 0.1,
        "optim/grad_norm": 0.5,
        "seconds/rollout": 3.0,
        "seconds/update": 2.0,
        "seconds/step": 6.0,
        "speed/tokens_per_second": 1234.0,
    }


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


class TestRows:
    def test_a_row_is_there_at_once(self, tmp_path):
        tracker = Tracker(tmp_path, QUIET, 5, 0)
        tracker.log(1, {"reward/mean": 0.25, "loss/total": math.nan, "loss/ratio_max": math.inf})
        (row,) = read_rows(tmp_path / "metrics.jsonl")
        assert row == {"step": 1, "time": row["time"], "reward/mean": 0.25, "loss/total": None, "loss/ratio_max": None}
        tracker.close()

    def test_samples_and_evaluations(self, tmp_path):
        tracker = Tracker(tmp_path, QUIET, 5, 0)
        tracker.log_samples(1, [{"prompt": "2+2?", "response": "vier 你好\n", "reward": 0.0}] * 2)
        tracker.log_evaluation(0, {"greedy_accuracy": 0.5, "name": "held-out"}, [{"sample": 0}, {"sample": "greedy"}])
        assert read_rows(tmp_path / "evaluation_samples/step_000000.jsonl") == [{"sample": 0}, {"sample": "greedy"}]
        tracker.close()
        assert read_rows(tmp_path / "samples.jsonl")[1]["response"] == "vier 你好\n"
        assert steps_of(tmp_path / "samples.jsonl") == [1, 1]
        assert read_rows(tmp_path / "evaluations.jsonl")[0]["greedy_accuracy"] == 0.5

    def test_closing_twice_is_harmless(self, tmp_path, capsys):
        tracker = Tracker(tmp_path, QUIET, 5, 0)
        tracker.close()
        tracker.close()
        assert capsys.readouterr().out.count("no step finished") == 1


class TestResume:
    @pytest.mark.parametrize(("finished", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
    def test_rows_of_lost_steps_are_cut(self, finished, kept, tmp_path):
        first = Tracker(tmp_path, QUIET, 9, 0)
        first.log_evaluation(0, {"greedy_accuracy": 0.1})
        for step in range(1, 5):
            first.log(step, metrics(step))
            first.log_samples(step, [{"response": "x"}] * 2)
        first.log_evaluation(4, {"greedy_accuracy": 0.2})
        # No close(): the first process was killed.
        second = Tracker(tmp_path, QUIET, 9, finished)
        assert steps_of(tmp_path / "metrics.jsonl") == kept
        assert steps_of(tmp_path / "samples.jsonl") == [s for s in kept for _ in range(2)]
        evaluated = [s for s in (0, 4) if 0 < finished >= s]
        assert steps_of(tmp_path / "evaluations.jsonl") == evaluated
        files = sorted(file.name for file in (tmp_path / "evaluation_samples").iterdir())
        assert files == [f"step_{s:06d}.jsonl" for s in evaluated]
        second.log(finished + 1, metrics(finished + 1))
        assert steps_of(tmp_path / "metrics.jsonl") == [*kept, finished + 1]
        second.close()

    @pytest.mark.parametrize("tail", ['{"step": 3, "rew', '{"step": 3}', "\x00\x00\x00"])
    def test_a_torn_last_line_is_dropped(self, tail, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
        assert steps_of(path) == [1, 2]
        writer = JsonlWriter(path, 5)
        writer.write({"step": 3})
        writer.close()
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'

    @pytest.mark.parametrize("line", ["{broken", "[1]"])
    def test_damage_in_the_middle_is_an_error(self, line, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
            Tracker(tmp_path, QUIET, 5, 2)

    def test_tensorboard_shows_every_step_once(self, tmp_path):
        config = TrackingConfig(tensorboard=True, plots=False, progress=False)
        first = Tracker(tmp_path, config, 9, 0)
        for step in (1, 2, 3):
            first.log(step, {"reward/mean": 1.0, "loss/total": math.nan})
        first.close()
        second = Tracker(tmp_path, config, 9, 2)
        second.log(3, {"reward/mean": 2.0})
        second.log_evaluation(3, {"greedy_accuracy": 0.5, "note": "text is left out"})
        second.close()
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        found = [(event.step, event.value) for event in events.Scalars("reward/mean")]
        assert found == [(1, 1.0), (2, 1.0), (3, 2.0)]
        assert [event.step for event in events.Scalars("eval/greedy_accuracy")] == [3]
        assert "loss/total" not in events.Tags()["scalars"]


class TestProgress:
    def test_without_a_terminal_a_step_is_one_plain_line(self, tmp_path, capsys):
        tracker = Tracker(tmp_path, TrackingConfig(tensorboard=False, plots=False), 11, 0)
        tracker.log_evaluation(0, {"greedy_accuracy": 0.25, "prompts": 24.0})
        tracker.log(1, metrics(1))
        evaluation, line = capsys.readouterr().out.splitlines()
        assert evaluation == "evaluation after step 0:  greedy_accuracy 0.250"
        assert line == ("step 1/11  reward 0.100  accuracy 0.100  tokens/s 1,234  s/step 6.0  left 1:00  mismatch 0.02")
        tracker.log(2, metrics(2))
        tracker.log_evaluation(2, {"greedy_accuracy": 0.75})
        tracker.close()
        summary = capsys.readouterr().out
        assert "step 2 of 11" in summary
        assert "0.100 -> 0.200" in summary
        assert "greedy_accuracy 0.750 (step 2)" in summary

    def test_on_a_terminal_a_bar_shows_the_same_numbers(self, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setenv("TERM", "xterm")
        reader, writer = pty.openpty()
        received: list[bytes] = []

        def collect() -> None:
            try:
                while part := os.read(reader, 4096):
                    received.append(part)
            except OSError:  # Linux says so when the other end is closed
                return

        thread = threading.Thread(target=collect)
        thread.start()
        with os.fdopen(writer, "w") as terminal:
            monkeypatch.setattr("sys.stdout", terminal)
            tracker = Tracker(tmp_path, TrackingConfig(tensorboard=False, plots=False), 11, 3)
            tracker.log(4, metrics(4))
            tracker.log_evaluation(4, {"greedy_accuracy": 0.25})
            tracker.close()
        thread.join(timeout=10)
        os.close(reader)
        text = b"".join(received).decode()
        assert "step 4/11" in text
        assert "mismatch 0.02" in text
        assert "evaluation after step 4" in text
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor must come back"

    def test_one_slow_step_does_not_change_the_time_left(self):
        status = StatusText(105)
        for step in (1, 2, 3, 4):
            status.of(step, {"seconds/step": 6.0})
        assert "left 10:00" in status.of(5, {"seconds/step": 600.0})

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0, "0 s"), (59.6, "1:00"), (185, "3:05"), (7385, "2:03:05"), (-1, "0 s")]
    )
    def test_duration(self, seconds, text):
        assert duration(seconds) == text


class TestPlots:
    @pytest.mark.parametrize("steps", [1, 40])
    def test_curves_of_a_run(self, steps, tmp_path):
        tracker = Tracker(tmp_path, TrackingConfig(tensorboard=False, progress=False), steps, 0)
        tracker.log_evaluation(0, {"greedy_accuracy": 0.2, "greedy_accuracy_low": 0.1, "greedy_accuracy_high": 0.3})
        for step in range(1, steps + 1):
            tracker.log(step, metrics(step) | {"loss/entropy": math.nan} if step == 2 else metrics(step))
        tracker.close()
        image = matplotlib.image.imread(tmp_path / "curves.png")
        assert image.shape[0] > 500
        assert image.shape[1] > 1000
        assert image[..., :3].std() > 0.02, "an empty picture"
        assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []

    def test_more_data_changes_the_picture(self, tmp_path):
        rows = [{"step": step, **metrics(step)} for step in range(1, 7)]
        pictures = []
        for count in (3, 6):
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
            pictures.append(matplotlib.image.imread(plot_run(tmp_path, tmp_path / "out.png")))
        assert not np.array_equal(*pictures)

    def test_few_metrics_are_enough(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": null}\n')
        assert plot_run(tmp_path).name == "curves.png"

    def test_a_run_without_metrics(self, tmp_path):
        with pytest.raises(DataError, match=r"no metrics\.jsonl"):
            plot_run(tmp_path)

    def test_therunning_mean_leaves_gaps_out(self):
        values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
        assert running_mean(values, 3).tolist() == [2.0, 2.0, 4.0, 6.0, 6.0]
        assert np.isnan(running_mean(np.full(4, np.nan), 3)).all()
