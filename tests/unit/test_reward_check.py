"""``megatron-mapo reward-check``: verifiers over files of responses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_cli import assert_fails, run

from megatron_mapo.errors import ConfigError, DataError
from megatron_mapo.reward_check import Request, reward_check

ROWS = [
    {"question": "6*7?", "answer": "42", "response": "\\boxed{42}", "label": True, "source": "a"},
    {"question": "6*7?", "answer": "42", "response": "\\boxed{40+2}", "label": True, "source": "b"},
    {"question": "6*7?", "answer": 42, "response": "It is 41.", "label": False, "source": "c"},
    {"question": "6*7?", "answer": "42", "response": "about 42", "label": False, "source": "d"},
]
VERIFIERS = """
import time

def verify(response, answer, metadata, *, strict=False):
    if "sleep" in response:
        time.sleep(1000)
    if "raise" in response:
        raise ValueError("cannot judge")
    return metadata["source"] == "a" if strict else answer in response
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(VERIFIERS)
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_report_and_the_file(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run(
        *("reward-check", "--data", str(data), "--reward", "math", "--reward", "exact", "--against", "math_verify"),
        *("--label-key", "label", "--output", str(out)),
    )
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "4 responses" in text
    assert "math 2 50.0% 0 50.0% 1 1 0 0 0" in text
    assert "math_verify 3 75.0% 0 75.0% 1 0 0 0 0" in text
    assert "exact 0 0.0% 0 50.0% 0 2 0 0 0" in text
    assert "exact differs from math_verify: 3 of 4" in text
    assert "math differs from the label: 2 of 4" in text
    assert "math differs from math_verify: 1 of 4" in text
    assert "line 2 6*7? 42 \\boxed{40+2} wrong: ≈42.0000000000 right: 2 + 40" in text
    rows = lines(out)
    assert [row["response"] for row in rows] == [row["response"] for row in ROWS]
    assert rows[1]["verdicts"]["math"] == {
        "right": False,
        "reward": 0.0,
        "rewards": {},
        "extracted": "≈42.0000000000",
        "failure": None,
    }
    assert [row["label"] for row in rows] == [True, True, False, False]


def test_failures_are_counted_and_shown_and_no_reason_to_fail(data: Path, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "response": text} for text in ("42", "sleep", "raise", "raise again", "41")]
    mine, out = write(tmp_path / "odd.jsonl", rows), tmp_path / "out.jsonl"
    result = run(
        *("reward-check", "--data", str(mine), "--reward", f"{tmp_path}/mine.py:verify", "--output", str(out)),
        "reward.timeout=1",
    )
    assert result.returncode == 0, result.stderr
    assert "1 20.0% - 1 0 2" in " ".join(result.stdout.split())
    assert "3 failures; the first" in result.stdout
    assert "took longer than reward.timeout=1 s" in result.stdout
    (verdicts,) = zip(*(row["verdicts"].values() for row in lines(out)), strict=True)
    kinds = [verdict["failure"] and verdict["failure"]["kind"] for verdict in verdicts]
    assert kinds == [None, "timeout", "ValueError", "ValueError", None]


def test_a_file_of_samples_of_a_run(tmp_path: Path) -> None:
    columns = {"step": 1, "answer": "42", "advantage": 0.5, "group": 0, "truncated": False}
    rows = [{"prompt": "6*7?", "response": r, "reward": v, **columns} for r, v in (("42", 1.0), ("41", 0.0))]
    (outcome,) = reward_check(Request(write(tmp_path / "samples.jsonl", rows), ["exact"], label_key="reward"))
    assert (outcome.name, outcome.right) == ("exact", [True, False])


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_other_files(data: Path, suffix: str) -> None:
    path = data.with_suffix(suffix)
    table = [{**row, "answer": str(row["answer"])} for row in ROWS]
    if suffix == ".json":
        path.write_text(json.dumps(table))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    assert reward_check(Request(path, ["gsm8k"], limit=3))[0].right == [True, False, False]


def test_a_configuration_with_a_mixture_and_options(data: Path, tmp_path: Path) -> None:
    name = f"{tmp_path}/mine.py:verify"
    (tmp_path / "run.yaml").write_text(
        "data: {prompt_key: question, train: nowhere.jsonl}\nmodel: {path: nowhere}\n"
        "reward:\n  success: strict\n  mixture:\n"
        f"    - {{name: gsm8k, weight: 0.5}}\n    - {{name: '{name}', options: {{strict: true}}, label: strict}}\n"
    )
    request = Request(data, config=str(tmp_path / "run.yaml"), against="exact")
    mixture, _ = reward_check(request)
    assert mixture.name == "mixture"
    assert mixture.right == [True, False, False, False]
    assert [v.reward for v in mixture.verdicts] == [1.5, 0.0, 0.0, 0.5]
    (strict,) = reward_check(replace(request, rewards=["strict"], against=None))
    assert strict.right == [True, False, False, False]


def test_odd_responses_do_not_steer_the_terminal(tmp_path: Path) -> None:
    odd = ["\x1b[2J\x1b]0;owned\x07", "\ud800 \x00 [red]x[/red]", "a" * 100_000 + "end"]
    rows = [{**ROWS[0], "question": text, "response": text} for text in odd]
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    result = run("reward-check", "--data", str(data), "--reward", "gsm8k", "--label-key", "label", "--output", str(out))
    assert result.returncode == 0, result.stderr
    assert not {"\x1b", "\x07", "\x00"} & set(result.stdout)
    assert "\\x1b[2J" in result.stdout
    assert "[red]x[/red]" in result.stdout
    assert len(result.stdout) < 10_000
    assert [row["response"] for row in lines(out)] == odd


def test_the_number_of_rows_shown(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward_check(Request(data, ["exact"], against="gsm8k", show=1))
    shown = capsys.readouterr().out
    assert "(1 more: --show N, or --output FILE for all)" in shown
    assert "line 1" in shown
    assert "line 4" not in shown


MALFORMED = [
    ("[1]", ["line 1", "an object with columns"]),
    ("{", ["line 1", "not a JSON object"]),
    ("", ["has no rows"]),
    ('{"question": "q", "answer": "1"}', ["line 1", "no column 'response'", "columns: question, answer"]),
    ('{"question": "q", "response": "1"}', ["line 1", "no column 'answer'", "data.answer_key"]),
    ('{"answer": "1", "response": "1"}', ["line 1", "no column 'question'", "data.prompt_key"]),
    ('{"question": "q", "answer": "1", "response": 1}', ["line 1", "'response'", "must be text, got 1"]),
    ('{"question": 3, "answer": "1", "response": "1"}', ["line 1", "'question'", "must be text, got 3"]),
    ('{"question": "q", "answer": [1], "response": "1"}', ["line 1", "'answer'", "data.answer_key", "got [1]"]),
]


@pytest.mark.parametrize(("text", "words"), MALFORMED)
def test_malformed_rows_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{text}\n")
    with pytest.raises(DataError) as error:
        reward_check(Request(path))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("label", [None, "yes", [True]])
def test_a_label_is_a_truth_value_or_a_reward(tmp_path: Path, label: object) -> None:
    data = write(tmp_path / "rows.jsonl", [{**ROWS[0], "label": label}])
    with pytest.raises(DataError, match=r"line 1: column 'label' \(--label-key\) must be true, false or a reward"):
        reward_check(Request(data, label_key="label"))


def test_wrong_requests(data: Path, tmp_path: Path) -> None:
    assert_fails(run("reward-check", "--data", "nowhere.jsonl"), DataError.exit_code, "--data: no such file")
    with pytest.raises(DataError, match=r"endings \.jsonl"):
        reward_check(Request(tmp_path / "mine.py"))
    for request, words in (
        (Request(data, ["nothing"]), "reward.name='nothing' is unknown"),
        (Request(data, ["regex"]), "reward.options.pattern"),
        (Request(data, ["math"], against="math"), "named twice"),
        (Request(data, against="math"), "--against: math is what the configuration has"),
        (Request(data, overrides=["reward.nme=x"]), "reward.nme"),
        (Request(data, output=tmp_path / "no/such/out.jsonl"), "--output: there is no folder"),
    ):
        with pytest.raises(ConfigError) as error:
            reward_check(request)
        assert words in str(error.value)
