"""The verifiers' judgement, case by case."""

import random

import pytest
import reasoning_gym as gym
from reasoning_gym.factory import DATASETS

from megatron_mapo.rewards import choice, exact, gsm8k, math, reasoning_gym

# (response, reference answer, right). The same for `gsm8k` and `math`.
NUMBERS = [
    # bare answers, as "Answer with just the number." asks for
    ("12", "12", True),
    (" 12 ", "12", True),
    ("12.", "12", True),
    ("12.0", "12", True),
    ("12!", "12", True),
    ("**12**", "12", True),
    ("12\n", "12", True),
    ("13", "12", False),
    ("", "12", False),
    ("twelve", "12", False),
    ("112", "12", False),
    ("1 2", "12", False),
    ("-12", "12", False),
    ("12 or 13", "12", False),
    ("12 or 13", "13", False),
    ("12 or maybe 13", "13", False),
    ("Either 12 apples or 13 apples", "13", False),
    # working is allowed; the last number counts
    ("7+5=12", "12", True),
    ("7 + 5 = 12", "12", True),
    ("7 + 5", "5", False),
    ("7 + 5", "12", False),
    ("20-8", "8", False),
    ("10-12", "12", False),
    ("It is 12, because 7 and 5 make 12.", "12", True),
    ("9 10 11 12 13", "12", False),
    ("12 12 12 13", "12", False),
    ("There are 5 well-behaved dogs and 7 cats, so 12", "12", True),
    ("12x", "12", False),
    ("\\boxed{x + 12}", "12", False),
    ("\\boxed{\\pi \\cdot 12}", "12", False),
    ("\\boxed{\\frac{a}{b-12}}", "12", False),
    ("the answer is x = -12", "-12", True),
    ("x2", "2", False),
    ("2\\sqrt{3}", "3", False),
    ("I bought 5 apples. I have 12 apples now", "12", True),
    # marked answers
    ("#### 42", "42", True),
    ("6*7=42\n#### 42", "42", True),
    ("####42", "42", True),
    ("#### 43\nBut 42 it should be", "42", False),
    ("The answer is 42.\n\n#### Check\n6 times 7 is 40 and 2", "42", True),
    ("\\boxed{42}", "42", True),
    ("$\\boxed{42}$.", "42", True),
    ("\\boxed{\\text{42 apples}}", "42", True),
    ("\\boxed{x = 42}", "42", True),
    ("\\boxed{41} no, \\boxed{42}", "42", True),
    ("\\boxed{42} no, \\boxed{41}", "42", False),
    ("\\boxed{41}\\boxed{42}\\boxed{43}", "42", False),
    ("\\boxed{41, 42}", "42", False),
    ("\\boxed{41, 42}", "41", False),
    ("\\boxed{42 \\text{ or } 43}", "42", False),
    ("\\boxed{40+2}", "42", False),
    ("\\boxed{40+2}", "40", False),
    ("\\boxed{42", "42", True),
    ("\\boxed{}", "42", False),
    ("\\boxed{\\frac{84}{2}}", "42", True),
    ("\\boxed{2^{42}}", "42", False),
    ("The answer is 42.", "42", True),
    ("The answer is: 42", "42", True),
    ("the final answer is $42$.", "42", True),
    ("The answer is \\(42\\).", "42", True),
    ("**Answer:** 42", "42", True),
    ("**Answer**: 42", "42", True),
    ("Answer:\n42", "42", True),
    ("Answer = 42", "42", True),
    ("The answer is 42, since 6*7=42. That took 5 steps.", "42", True),
    ("The answer is 42. It took me 3 minutes.", "42", True),
    ("The answer is 42. It took me 3 minutes.", "3", False),
    ("The answer is 41. Wait, the answer is 42.", "42", True),
    ("The answer is 42. Wait, the answer is 41.", "42", False),
    ("The answer is 42 or 43.", "42", False),
    ("The answer is 41, 42, 43.", "42", False),
    ("The answer is between 41 and 42.", "42", False),
    ("The answer is 7*6 = 42 apples", "42", True),
    ("The answer is 42 apples", "42", True),
    ("The answer is unclear.", "42", False),
    # thousands, decimals, fractions, signs, currency, units
    ("1,234", "1234", True),
    ("1234", "1,234", True),
    ("1,234,567.50", "1234567.5", True),
    ("\\boxed{1{,}234}", "1234", True),
    ("\\boxed{1\\,234}", "1234", True),
    ("1,23", "123", False),
    ("0.5", ".5", True),
    ("12.50", "12.5", True),
    ("12.05", "12.5", False),
    ("1/2", "0.5", True),
    ("\\frac{1}{2}", "0.5", True),
    ("$\\dfrac{3}{4}$", "3/4", True),
    ("\\frac34", "0.75", True),
    ("-\\frac{3}{4}", "-0.75", True),
    ("\\frac{-3}{4}", "-0.75", True),
    ("3 1/2", "3.5", True),
    ("3\\frac{1}{2}", "3.5", True),
    ("1/3", "0.333", False),
    ("1/0", "0", False),
    ("-5", "-5", True),
    ("−5", "-5", True),
    ("x = -5", "-5", True),
    ("x = - 5", "-5", True),
    ("5", "-5", False),
    ("The answer is -5.", "-5", True),
    ("- 5", "5", True),
    ("$18", "18", True),
    ("\\$18.00", "$18", True),
    ("-$18", "-18", True),
    ("€18", "18", True),
    ("18 dollars", "18", True),
    ("18", "18 dollars", True),
    ("The answer is 18km.", "18", True),
    ("50%", "50", True),
    ("50\\%", "50%", True),
    ("0.5", "50%", False),
    ("1.5e3", "1500", True),
    ("1e3", "3", False),
    ("90^\\circ", "90", True),
    # whole GSM8K solutions as the reference
    ("72", "He sold 48/2 = <<48/2=24>>24 clips.\n#### 72", True),
    ("24", "He sold 48/2 = <<48/2=24>>24 clips.\n#### 72", False),
    ("1000", "#### 1,000", True),
    # thinking
    ("<think>maybe 41</think>42", "42", True),
    ("maybe \\boxed{41}</think>42", "42", True),
    ("<think>so \\boxed{42}", "42", False),
    ("<think>42</think>", "42", False),
    ("The answer is - 18", "-18", True),
    ("\\boxed{- 18}", "18", False),
    ("Answer: –18", "-18", True),
    ("Answer:\n- 18", "18", True),
    # a sign or a scale in words
    ("The answer is negative 18.", "-18", True),
    ("The answer is negative 18.", "18", False),
    ("The answer is minus $18", "-18", True),
    ("It is minus 18", "18", False),
    ("20 minus 18", "18", False),
    ("20 minus 18", "-18", False),
    ("The answer is not 18, it is 19", "18", False),
    ("It isn't 18", "18", False),
    ("Answer: She is not a baker, so she makes 18", "18", True),
    ("#### 2 thousand", "2000", True),
    ("#### 2 thousand", "2", False),
    ("The answer is 2 million dollars", "2,000,000", True),
    ("The answer is 2 million dollars", "2", False),
    ("1500000", "$1.5 million", True),
    ("2 hundred thousand", "200000", True),
    ("$2M", "2", False),
    ("2 dozen", "2", True),
    # not a plain number
    ("\\boxed{x<12}", "12", False),
    ("\\boxed{x >= 12}", "12", False),
    ("\\boxed{x \\neq 12}", "12", False),
    ("The answer is at least 12", "12", False),
    ("The answer is 12 or more", "12", False),
    ("\\boxed{\\pm 12}", "12", False),
    ("\\boxed{\\log 12}", "12", False),
    ("sqrt(144)", "144", False),
    ("half of 12", "12", False),
    ("12 squared", "12", False),
    ("\\boxed{12!}", "12", False),
    ("The answer is **12**!", "12", True),
    ("\\boxed{12:1}", "12", False),
    ("The ratio is 3:4", "4", False),
    ("\\boxed{12.\\overline{3}}", "12", False),
    ("\\boxed{12 i}", "12", False),
    ("\\boxed{12 \\text{ and } x}", "12", False),
    ("The answer is 12 and a half", "12", False),
    ("\\boxed{\\infty, 12}", "12", False),
    ("\\boxed{x, 12}", "12", False),
    ("\\boxed{12_8}", "12", False),
    ("\\boxed{x = 11 \\text{ or } x = 12}", "12", False),
    # hedges
    ("The answer is 18 (or 19)", "18", False),
    ("The answer is 18, perhaps 19", "18", False),
    ("The answer is 18. Or 19.", "18", False),
    ("The answer is 18. Wait, it is 19.", "18", False),
    ("18 (or 19)", "19", False),
    ("18, but it could be 19", "19", False),
    ("18. Or 19.", "19", False),
    ("\\boxed{18} or 19", "18", False),
    ("\\boxed{18} or \\boxed{19}", "19", False),
    ("\\boxed{18}, or maybe \\boxed{19}", "19", False),
    ("\\boxed{18}\n\n\\boxed{18}", "18", True),
    ("\\boxed{18}. Wait, let me check: 9*2=18.", "18", True),
    ("Answer: 3/4, or 0.75", "0.75", True),
    # as models write
    ("Final Answer: The final answer is $18$. I hope it is correct.", "18", True),
    ("\\[ 9 \\times 2 = 18 \\]\n\nTherefore, Janet makes $\\boxed{18}$ dollars every day.", "18", True),
    ("So Janet makes \\( 9 \\times 2 = \\$18 \\) per day.", "18", True),
    ("**Final Answer:** \\(\\boxed{18}\\)", "18", True),
    ("### Final Answer\n\\[\n\\boxed{18}\n\\]", "18", True),
    ("Janet makes **$18** every day at the farmers' market.", "18", True),
    ("The answer would be 18.", "18", True),
    ("<answer>The answer is 18.</answer>", "18", True),
    ("The answer is 18.</s>", "18", True),
    ("The answer is 18<|im_end|>", "18", True),
    ("The answer is Rs. 18", "18", True),
    ("The answer is 18 apples per day for 3 days.", "18", True),
    ("Answer: 18 dollars (Janet sells 9 eggs at 2 dollars)", "18", True),
    ("The answer is 18, which is 2 more than 16.", "18", True),
    ("The answer is 18 apples and oranges", "18", True),
    ("The answer is 12 times", "12", True),
    ("The answer is 18 - easy", "18", True),
    ("She needs at least 18 boxes.", "18", True),
    ("\\boxed{\\$18}", "18", True),
    ("\\boxed{18 \\text{ cm}^2}", "18", True),
    ("\\boxed{18~\\mathrm{m}}", "18", True),
    ("\\boxed{18^{\\circ}}", "18", True),
    ("\\boxed{\\text{\\textbf{18}}}", "18", True),
    ("\\boxed{AB = 18}", "18", True),
]

SYMBOLIC = [
    ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}", True),
    ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}", True),
    ("\\boxed{2\\sqrt{2}}", "2\\sqrt{3}", False),
    ("The answer is $x^2 + 2x + 1$.", "(x+1)^2", True),
    ("\\boxed{(1, 2)}", "(1,2)", True),
    ("\\boxed{(2, 1)}", "(1,2)", False),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", True),
    ("\\boxed{x=5}", "x=5", True),
    ("\\boxed{5}", "x=5", True),
    ("\\boxed{3\\pi}", "3\\pi", True),
    ("\\boxed{3}", "3\\pi", False),
    ("3\\pi", "$3\\pi$", True),
    ("\\boxed{2x}", "2x", True),
    ("\\boxed{2}", "2x", False),
    ("\\boxed{\\text{Tuesday}}", "Tuesday", True),
    ("The answer is tuesday.", "Tuesday", True),
    ("The answer is Monday.", "Tuesday", False),
    ("\\boxed{(-\\infty, 3]}", "(-\\infty,3]", True),
    ("\\boxed{2\\sqrt{3}} or rather \\boxed{7}", "2\\sqrt{3}", False),
    ("", "2\\sqrt{3}", False),
    ("\\boxed{\\frac{1}{}}", "2\\sqrt{3}", False),
    ("first line 2\\sqrt{3}\nno idea", "2\\sqrt{3}", False),
    ("42", "the solution is \\boxed{42}", True),
]


@pytest.mark.parametrize("verifier", [gsm8k, math], ids=["gsm8k", "math"])
@pytest.mark.parametrize(("response", "answer", "right"), NUMBERS)
def test_numbers(verifier, response, answer, right):
    assert verifier.verify(response, answer, {}) is right


@pytest.mark.parametrize(("response", "answer", "right"), SYMBOLIC)
def test_math_symbolic(response, answer, right):
    assert math.verify(response, answer, {}) is right


PAIR = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
SQUARE = r"\begin{bmatrix} \frac{1}{2} & 3 \\ -4 & \sqrt{2} \end{bmatrix}"


@pytest.mark.parametrize(
    ("stated", "answer", "right"),
    [
        (PAIR, PAIR, True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", PAIR, True),
        (PAIR, r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}", PAIR, True),
        (r"\left(\begin{array}{c} 1 \\ 2 \end{array}\right)", PAIR, True),
        (r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", PAIR, False),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", PAIR, False),
        (r"\begin{bmatrix}0.5&3\\-4&\sqrt2\end{bmatrix}", SQUARE, True),
        (r"\begin{bmatrix} \frac{1}{2} & -4 \\ 3 & \sqrt{2} \end{bmatrix}", SQUARE, False),
    ],
)
def test_math_matrices(stated, answer, right):
    assert math.verify(f"\\boxed{{{stated}}}", answer, {}) is right
    assert math.verify(f"The answer is ${stated}$.", answer, {}) is right


def test_gsm8k_words():
    assert gsm8k.verify("The answer is tuesday.", "Tuesday", {})
    assert not gsm8k.verify("The answer is not Tuesday.", "Tuesday", {})


@pytest.mark.parametrize("verifier", [gsm8k, math], ids=["gsm8k", "math"])
def test_empty_reference_is_an_error(verifier):
    with pytest.raises(ValueError, match=r"data\.answer_key"):
        verifier.verify("12", "  ", {})


def test_exact():
    assert exact.verify(" Yes\n", "Yes", {})
    assert not exact.verify("yes", "Yes", {})
    assert not exact.verify("Yes!", "Yes", {})


HOSTILE = [
    "1" * 100_000,
    "1," * 50_000,
    "1/" * 50_000,
    "1,111" * 20_000,
    " " * 100_000 + "12" + " " * 100_000,
    "= - " * 30_000,
    "\\boxed{" * 30_000,
    "{" * 100_000,
    "the answer is " * 10_000,
    "#### " * 30_000,
    "1 or " * 30_000,
    "$" * 100_000 + "1",
    "- " * 50_000 + "1",
    "\\text{" * 30_000,
    "\\frac{1}{" * 20_000,
    "answer" + " " * 100_000,
    "1e999 1e9999 1e99999999 1e999999999999",
    "٣ ² ½ Ⅻ 一 \ud800 \x00",
    "\\frac{1}{0} 1/0 0/0",
    "<think>" * 10_000,
    "{" * 400_000,
    "1" + " million" * 100_000,
    "The answer is 12" + " " * 1_000_000 + "x",
    "\\boxed{1}" + " " * 1_000_000 + "or",
]


# A pattern that takes quadratic time would not end within the limit.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_responses_are_wrong(text):
    assert gsm8k.verify(text, "12345678", {}) is False
    assert math.verify(text, "12345678", {}) is False
    assert choice.verify(text, "B", {}) is False


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = ["1", "23", ",", ".", "/", "-", "−", " ", "\n", "$", "%", "\\frac{", "}", "{", "\\boxed{", "####", "="]
    pieces += ["answer is", " or ", "x", "e5", "^", "\\sqrt", "(", ")", "\\text{", "**", "\\,", "`", ":"]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        assert gsm8k.verify(text, "987654321", {}) is False


def test_reasoning_gym_scores_like_the_task():
    data = gym.create_dataset("chain_sum", size=3, seed=1)
    entry = data[0]
    for metadata in (entry["metadata"], entry):
        for response in (
            entry["answer"],
            f"Let me see. <answer>{entry['answer']}</answer>",
            f"\\boxed{{{entry['answer']}}}",
        ):
            assert reasoning_gym.verify(response, entry["answer"], metadata) == 1.0
        assert reasoning_gym.verify("<answer>nonsense</answer>", entry["answer"], metadata) < 0.1
        assert (
            reasoning_gym.verify(f"<answer>{entry['answer']}</answer> <answer>no</answer>", entry["answer"], metadata)
            < 0.1
        )


SLOW = {"arc_agi", "knight_swap", "group_anagrams", "figlet_font"}
"""Tasks whose entries take half a second to make."""
WRITTEN = {
    "bare": "{}",
    "marked": "I thought about it.\n\n**Answer:**\n{}",
    "on the same line": "The answer is: {}",
    "with a word behind": "Answer:\n{}\n\nThis fits.",
    "in a fence": "Answer:\n```text\n{}\n```\nThis fits.",
    "tagged": "I thought about it. <answer>\n{}\n</answer>",
}


@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"} - SLOW))
def test_reasoning_gym_scores_right_answers_of_every_task(task):
    for entry in gym.create_dataset(task, size=3, seed=3):
        answer = entry["metadata"]["valid_answers"][0] if task == "n_queens" else entry["answer"]
        if answer is None:  # the task knows only how to check one
            continue
        for name, form in WRITTEN.items():
            assert reasoning_gym.verify(form.format(answer), entry["answer"], entry["metadata"]) == 1, name


@pytest.mark.parametrize("task", ["mini_sudoku", "polynomial_multiplication", "chain_sum"])
def test_reasoning_gym_gives_nothing_for_another_answer(task):
    first, second = gym.create_dataset(task, size=2, seed=3)
    for form in WRITTEN.values():
        assert reasoning_gym.verify(form.format(second["answer"]), first["answer"], first["metadata"]) < 0.5


def test_reasoning_gym_what_a_scorer_cannot_read_is_wrong():
    entry = gym.create_dataset("prime_factorization", size=1, seed=3)[0]
    assert reasoning_gym.verify("I do not know.", entry["answer"], entry["metadata"]) == 0
    with pytest.raises(ValueError, match="seven"):
        reasoning_gym.verify("7", "seven", entry["metadata"])


def test_reasoning_gym_needs_its_own_rows():
    with pytest.raises(ValueError, match="source_dataset"):
        reasoning_gym.verify("1", "1", {})
