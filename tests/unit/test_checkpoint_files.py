"""Manifest, integrity, names, retention and recovery, on plain files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from megatron_mapo import checkpoint_files as files
from megatron_mapo.checkpoint_files import Manifest, Measure, Retention
from megatron_mapo.errors import CheckpointError


def write_partial(folder: Path, step: int, score: float | None = None) -> Path:
    """All of a checkpoint but its manifest."""
    partial = files.partial_folder(folder, step)
    partial.mkdir(parents=True)
    (partial / "common.pt").write_bytes(b"common")
    (partial / "__0_0.distcp").write_bytes(bytes(range(256)) * step)
    return partial


def complete(partial: Path, step: int, score: float | None = None) -> Path:
    """Add the manifest."""
    entries = {file.name: files.hash_file(file) for file in sorted(partial.iterdir())}
    layout = {"world_size": 4, "tensor": 2, "pipeline": 1, "data": 2}
    parts = {"weights": 1, "optimizer": 2, "other": 3}
    files.write_manifest(
        partial, Manifest(step, "2025-01-01T00:00:00+00:00", layout, {}, {}, "", score, parts, entries)
    )
    return partial


def write(folder: Path, *steps: int, **scores: float) -> list[Path]:
    """Complete checkpoints, published in this order."""
    return [files.publish(complete(write_partial(folder, s), s, scores.get(f"s{s}"))) for s in steps]


def steps(folder: Path) -> list[int]:
    return [step for step, _ in files.complete_checkpoints(folder)]


class TestManifest:
    def test_comes_back(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3, s3=0.25)
        manifest = files.verify(path)
        assert manifest is not None
        assert (manifest.step, manifest.score, manifest.layout["tensor"]) == (3, 0.25, 2)
        data = bytes(range(256)) * 3
        assert manifest.files["__0_0.distcp"] == files.FileEntry(768, xxhash.xxh3_128_hexdigest(data))
        assert set(manifest.files) == {"common.pt", "__0_0.distcp"}

    def test_of_a_version_that_did_not_say_of_what_a_score_is(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3, s3=0.25)
        tree = json.loads((path / "manifest.json").read_text())
        assert tree.pop("measure") is None
        (path / "manifest.json").write_text(json.dumps(tree))
        manifest = files.verify(path)
        assert manifest is not None
        assert (manifest.score, manifest.measure) == (0.25, None)
        measure = Measure("pass_at_1", 8, "abc")
        files.add_score(tmp_path, 3, 0.5, measure)
        assert files.verify(path) == replace(manifest, score=0.5, measure=measure)

    def test_of_an_earlier_version_is_missing(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3)
        (path / "manifest.json").unlink()
        assert files.verify(path) is None

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "files": {"a": {"size": 1}}}'])
    def test_that_cannot_be_read_is_named(self, tmp_path: Path, text: str) -> None:
        (path,) = write(tmp_path, 3)
        (path / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"step_000003/manifest.json is damaged"):
            files.verify(path)

    def test_of_a_later_format_is_refused(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3)
        (path / "manifest.json").write_text(json.dumps({"format": 2}))
        with pytest.raises(CheckpointError, match="another version"):
            files.read_manifest(path)


class TestIntegrity:
    def test_a_short_file(self, tmp_path: Path) -> None:
        older, path = write(tmp_path, 3, 4)
        (path / "__0_0.distcp").write_bytes(b"short")
        manifest = files.read_manifest(path)
        assert manifest is not None
        with pytest.raises(CheckpointError) as error:
            files.check_sizes(path, manifest)
        for part in (
            f"{path}/__0_0.distcp",
            "5 bytes, 1024 were",
            "run.resume_step (there are: 3)",
            f"remove the folder {path}",
        ):
            assert part in str(error.value)
        assert files.verify(older) is not None

    def test_a_missing_file(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3)
        (path / "common.pt").unlink()
        with pytest.raises(CheckpointError, match=r"common.pt is missing. To go on without this checkpoint, remove"):
            files.verify(path)

    def test_a_flipped_bit_shows_in_the_checksum_only(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3)
        data = bytearray((path / "__0_0.distcp").read_bytes())
        data[100] ^= 1
        (path / "__0_0.distcp").write_bytes(data)
        manifest = files.read_manifest(path)
        assert manifest is not None
        files.check_sizes(path, manifest)
        assert files.damaged(path, manifest, ["common.pt"]) is None
        assert "__0_0.distcp is damaged: its checksum" in str(files.damaged(path, manifest, ["__0_0.distcp"]))
        with pytest.raises(CheckpointError, match="checksum"):
            files.verify(path)


class TestChoose:
    def test_the_newest_or_the_one_asked_for(self, tmp_path: Path) -> None:
        assert files.choose(tmp_path, None) is None
        _, second, third = write(tmp_path, 2, 4, 1000000)
        assert files.choose(tmp_path, None) == (1000000, third)
        assert files.choose(tmp_path, 4) == (4, second)
        with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are: 2, 4, 1000000"):
            files.choose(tmp_path, 3)

    def test_a_start_goes_back_once(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoints"
        _, second, third = write(folder, 2, 4, 6)
        assert files.choose_start(folder, None) == (6, third)
        assert files.choose_start(folder, 4) == (4, second)
        assert files.choose_start(folder, 4) == (4, second), "it was killed before it went back"
        files.set_aside_newer(folder, 4)
        files.note_return(folder, 4)
        (again,) = write(folder, 8)
        assert files.choose_start(folder, 4) == (8, again)
        files.remove(second)
        files.note_return(folder, 4)
        assert files.choose_start(folder, 4) == (8, again), "it need not be there any more"
        assert files.choose_start(folder, 2) == (2, folder / "step_000002"), "another one"
        files.forget_return(folder)
        with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
            files.choose_start(folder, 4)

    def test_only_complete_ones(self, tmp_path: Path) -> None:
        for name in ("step_000009.partial", "step_000008.removed", "step_000007.aside", "step_12", "steps_000001"):
            (tmp_path / name).mkdir()
        (tmp_path / "step_000006").write_text("a file")
        assert files.complete_checkpoints(tmp_path) == []
        assert files.complete_checkpoints(tmp_path / "nowhere") == []


class TestRetention:
    def test_the_newest_stay(self, tmp_path: Path) -> None:
        write(tmp_path, 1, 2, 3, 4)
        files.retain(tmp_path, Retention(last=2))
        assert steps(tmp_path) == [3, 4]
        assert files.read_pointer(tmp_path, "latest") == "step_000004"
        assert files.read_pointer(tmp_path, "best") is None

    def test_every_nth_and_the_best_stay(self, tmp_path: Path) -> None:
        scores = {"s1": 0.5, "s2": 0.9, "s3": 0.9, "s4": float("nan")}
        write(tmp_path, 1, 2, 3, 4, 5, 6, 7, 8, 9, **scores)
        files.retain(tmp_path, Retention(last=1, every=4, best=True))
        assert steps(tmp_path) == [2, 4, 8, 9], "of equal scores the earliest"
        assert files.read_pointer(tmp_path, "best") == "step_000002"
        write(tmp_path, 10, s10=0.95)
        files.retain(tmp_path, Retention(last=1, every=4, best=True))
        assert steps(tmp_path) == [4, 8, 10]
        assert files.read_pointer(tmp_path, "best") == "step_000010"
        files.retain(tmp_path, Retention(last=1))
        assert files.read_pointer(tmp_path, "best") is None, "it would name a folder that may go"

    def test_one_whose_score_cannot_be_read_stays_and_is_named(self, tmp_path: Path) -> None:
        write(tmp_path, 1, 2, 3, 4, 5, s1=0.5, s2=0.9, s3=0.7)
        (tmp_path / "step_000002" / "manifest.json").write_text("{")
        (problem,) = files.retain(tmp_path, Retention(last=1, best=True))
        assert "step_000002/manifest.json is damaged" in problem
        assert steps(tmp_path) == [2, 3, 5]
        assert files.read_pointer(tmp_path, "best") == "step_000003"
        assert files.retain(tmp_path, Retention(last=1)) == [], "nobody asks for scores"
        assert steps(tmp_path) == [5]

    def test_a_score_that_comes_later_counts(self, tmp_path: Path) -> None:
        _, path, _ = write(tmp_path, 1, 2, 3, s1=0.5)
        before = files.read_manifest(path)
        assert before is not None
        files.add_score(tmp_path, 2, 0.75)
        files.add_score(tmp_path, 9, 0.99)
        assert files.verify(path) == replace(before, score=0.75)
        files.retain(tmp_path, Retention(last=1, best=True))
        assert steps(tmp_path) == [2, 3]
        assert files.read_pointer(tmp_path, "best") == "step_000002"

    def test_scores_of_another_metric_or_other_data_are_not_compared(self, tmp_path: Path) -> None:
        """The best by each measure stays, and the newest measure's is the best one."""
        write(tmp_path, *range(10, 100, 10), s10=0.3, s20=0.4)
        known = {
            30: (0.9, Measure("pass_at_4", 4, "some")),
            40: (0.8, Measure("pass_at_4", 4, "some")),
            50: (0.7, Measure("pass_at_4", 4, "other")),
            60: (0.5, Measure("pass_at_1", 0, "other")),
            70: (0.1, Measure("pass_at_1", 4, "other")),
            80: (0.2, Measure("pass_at_1", 4, "other")),
        }
        for step, (score, measure) in known.items():
            files.add_score(tmp_path, step, score, measure)
        problems = files.retain(tmp_path, Retention(last=1, best=True))
        assert steps(tmp_path) == [20, 30, 50, 60, 80, 90]
        assert files.read_pointer(tmp_path, "best") == "step_000080"
        for step, problem in zip((60, 50, 30, 20), problems, strict=True):
            assert f"step_0000{step} stays, and its score is not compared" in problem
        assert "pass_at_4 of 4 samples on the data other" in problems[1]
        assert "an earlier version" in problems[3]

    def test_a_checkpoint_written_twice_is_replaced(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3)
        (path / "more").write_text("x")
        assert write(tmp_path, 3) == [path]
        assert not (path / "more").exists()
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["latest", "step_000003"]


class TestRecovery:
    """A run can be killed between any two operations."""

    def test_while_files_are_written(self, tmp_path: Path) -> None:
        write(tmp_path, 3)
        write_partial(tmp_path, 4)
        (line,) = files.recover(tmp_path)
        assert "step_000004.partial" in line
        assert steps(tmp_path) == [3]
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["latest", "step_000003"]

    def test_before_the_rename(self, tmp_path: Path) -> None:
        write(tmp_path, 3)
        complete(write_partial(tmp_path, 4), 4)
        files.recover(tmp_path)
        assert steps(tmp_path) == [3, 4]
        assert files.read_pointer(tmp_path, "latest") == "step_000004"

    def test_before_latest(self, tmp_path: Path) -> None:
        write(tmp_path, 3, 4)
        (tmp_path / "latest").write_text("step_000003\n")
        assert files.choose(tmp_path, None) == (4, tmp_path / "step_000004")
        files.recover(tmp_path)
        assert files.read_pointer(tmp_path, "latest") == "step_000004"

    def test_in_the_middle_of_a_removal(self, tmp_path: Path) -> None:
        old, new = write(tmp_path, 3, 4)
        old.rename(tmp_path / "step_000003.removed")
        (tmp_path / "step_000003.removed" / "common.pt").unlink()
        (line,) = files.recover(tmp_path)
        assert "removal" in line
        assert files.complete_checkpoints(tmp_path) == [(4, new)]
        assert not (tmp_path / "step_000003.removed").exists()

    def test_while_a_checkpoint_is_written_again(self, tmp_path: Path) -> None:
        (path,) = write(tmp_path, 3)
        complete(write_partial(tmp_path, 3), 3)
        path.rename(tmp_path / "step_000003.removed")
        files.recover(tmp_path)
        assert files.complete_checkpoints(tmp_path) == [(3, path)]
        assert files.verify(path) is not None

    def test_of_what_is_in_order_does_nothing(self, tmp_path: Path) -> None:
        write(tmp_path, 3)
        for name in ("notes.partial", "step_12.partial"):
            (tmp_path / name).mkdir()
        before = sorted(p.name for p in tmp_path.rglob("*"))
        assert files.recover(tmp_path) == []
        assert sorted(p.name for p in tmp_path.rglob("*")) == before
        assert files.recover(tmp_path / "nowhere") == []


def test_newer_checkpoints_are_set_aside(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6)
    (tmp_path / "step_000006.aside").mkdir()
    assert files.set_aside_newer(tmp_path, 2) == [tmp_path / "step_000004.aside", tmp_path / "step_000006.aside"]
    assert steps(tmp_path) == [2]
    assert files.read_pointer(tmp_path, "latest") == "step_000002"
    assert files.verify(tmp_path / "step_000006.aside") is not None
    assert files.set_aside_newer(tmp_path, 2) == []


def test_space_is_asked_for_before_writing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    files.require_space(tmp_path, free // 2)
    with pytest.raises(CheckpointError) as error:
        files.require_space(tmp_path, free + 2**40)
    for part in ("GiB free", f"needs {(free + 2**40) / 2**30:.2f} GiB", "run.output_dir", "trainer.keep_checkpoints"):
        assert part in str(error.value)
