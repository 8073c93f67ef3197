"""Responses that are programs: whatever a verifier does with them, it does not run them."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import reasoning_gym as tasks

from megatron_mapo.rewards import math, math_verify, reasoning_gym

GUARDED = sorted(reasoning_gym.EVALUATED_AS_PYTHON | reasoning_gym.EVALUATED_BY_SYMPY)
# Modules that evaluate text of their own, at most: problems that they made, reference answers.
OWN_TEXT = {
    *("codeio", "number_sorting", "generators_00_49", "generators_50_99", "bitwise_arithmetic"),
    *("basic_arithmetic", "propositional_logic"),
}


def hostile(mark: Path) -> list[str]:
    call = f"__import__('os').mkdir({str(mark)!r})"
    nested = call.replace("'", '"')
    return [
        *(
            call,
            f"({call})",
            f"[{call}]",
            f"\t{call}",
            f" \f{call}",
            f"1 + {call}",
            f"5! + {call}",
            f"[{call} for _ in [1]]",
        ),
        *(f"(lambda: {call})()", f'f"{{{nested}}}"', f"sin('{nested}')", f"sqrt({call})", f"x.__class__({call})"),
        *(f"1 if {call} else 2", f"[1, *{call}]", f"{{1: {call}}}", f"sin(x, evaluate={call})", f"eval('{nested}')"),
    ]


@pytest.mark.parametrize("task", GUARDED)
def test_no_task_runs_a_response(task: str, tmp_path: Path) -> None:
    entry = tasks.create_dataset(task, size=1, seed=1)[0]
    mark = tmp_path / "it ran"
    for text in hostile(mark):
        for form in ("<answer>{}</answer>", "{}", "Answer:\n{}", "Answer: 1\n\n{}", "Answer:\n```\n{}\n```"):
            response = form.replace("{}", text)
            score = reasoning_gym.verify(response, entry["answer"], entry["metadata"])
            # The first sentence may be a number: "5! + ..." is 5 to two of the scorers.
            assert score == 0 if form.startswith("<") else score < 0.1
            assert not mark.exists(), response


@pytest.mark.parametrize("task", GUARDED)
def test_right_answers_stay_right(task: str) -> None:
    for entry in tasks.create_dataset(task, size=20, seed=2):
        answer = entry["answer"]
        if task == "n_queens":
            answer = entry["metadata"]["valid_answers"][0]
        assert reasoning_gym.verify(f"<answer>{answer}</answer>", entry["answer"], entry["metadata"]) == 1


def test_a_list_is_still_read() -> None:
    entry = tasks.create_dataset("spiral_matrix", size=1, seed=1)[0]
    listed = [int(number) for number in entry["answer"].split()]
    assert reasoning_gym.verify(f"<answer>{listed}</answer>", entry["answer"], entry["metadata"]) == 0.1


def test_every_task_that_evaluates_answers_is_known() -> None:
    """A new version of the package may bring more."""
    found = set()
    for file in Path(tasks.__file__).parent.rglob("*.py"):
        if re.search(r"(?<![\w])(eval|exec|parse_expr|sympify)\(", file.read_text()):
            found.add(file.stem)
    assert found - OWN_TEXT == set(GUARDED)


@pytest.mark.parametrize("verifier", [math, math_verify])
@pytest.mark.parametrize("reference", ["12", "x+1", "(1,2)", r"\frac{1}{2}"])
def test_math_runs_nothing(verifier: ModuleType, reference: str, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    for text in hostile(mark):
        for response in (text, f"\\boxed{{{text}}}", f"The answer is ${text}$"):
            assert not verifier.verify(response, reference, {})
            verifier.extract(response)
            assert not mark.exists(), response
