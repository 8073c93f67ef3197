"""Which letter a response states."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mapo.rewards import choice

STATED = [
    # marked
    (r"\boxed{B}", "B"),
    (r"$\boxed{\text{B}}$", "B"),
    (r"\boxed{\textbf{(B)}\ 12}", "B"),
    (r"\boxed{b}", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{B. Paris}", "B"),
    (r"First \boxed{A}, no, \boxed{B}", "B"),
    (r"\boxed{AB}", None),
    (r"\boxed{A, B}", None),
    (r"\boxed{A \text{ or } B}", None),
    (r"\boxed{A/B}", None),
    (r"\boxed{12}", None),
    (r"\boxed{}", None),
    (r"\boxed{\frac{A}{B}}", None),
    ("Answer: (B)", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer**: **B**", "B"),
    ("answer: b", "B"),
    ("Answer: b.", "B"),
    ("Answer: [B]", "B"),
    ("Answer: $B$", "B"),
    ("Answer: \\(B\\)", "B"),
    ("Answer:\nB", "B"),
    ("Final Answer: B) Paris", "B"),
    ("the answer is B", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B), Paris.", "B"),
    ("The answer is B: Paris", "B"),
    ("The answer is B because A is too small.", "B"),
    ("The answer is option B.", "B"),
    ("The answer is the letter B", "B"),
    ("The correct answer is **B**.", "B"),
    ("The answer is C. Wait, the answer is B.", "B"),
    ("The answer is A", "A"),
    ("The answer is A.", "A"),
    ("The answer is A because B is wrong", "A"),
    ("The answer is A, not B", "A"),
    ("The answer is A) a dog", "A"),
    ("The answer is not B", None),
    ("The answer is A or B", None),
    ("The answer is A and B", None),
    ("The answer is A, or maybe B", None),
    ("The answer is (A) or (B).", None),
    ("The answer is A/B", None),
    ("The answer is A & B", None),
    ("The answer is either A or B", None),
    ("The answer is B (or maybe C)", None),
    ("The answer is B (C)", None),
    ("Answer: B C", None),
    ("Answer: B or c", None),
    ("Answer: b or c", None),
    ("Answer: B (or c)", None),
    ("Answer: (A)(B)", None),
    ("Answer: A) Paris or B) Rome", None),
    ("Answer: A: Paris, and maybe B", None),
    ("Answer: B) cats and dogs", "B"),
    ("Answer: B, and I am sure", "B"),
    ("Answer: B - I am sure", "B"),
    ("The answer is B, because A and C are false", "B"),
    ("The answer is B (as A or C would be too large)", "B"),
    ("The answer is B since neither A nor C fits", "B"),
    ("The answer is A dog", None),
    ("The answer is a dog", None),
    ("Answer: I think it is B", None),
    ("Answer: I", "I"),
    ("The answer is Barcelona", None),
    ("The answer is B12", None),
    ("The answer is B'", None),
    ("The answer is B'.", None),
    ("The answer is unclear.", None),
    # in other words
    ("The correct option is B.", "B"),
    ("The correct choice is (B) Paris.", "B"),
    ("**Correct option: B**", "B"),
    ("Hence the correct option is:\n\n**B**", "B"),
    ("Option B is correct.", "B"),
    ("Therefore, B is the right answer.", "B"),
    ("So **B** is the correct answer because A is small.", "B"),
    ("I think B is right.", "B"),
    ("Is B correct? No, A is correct.", "A"),
    ("A is incorrect. B is correct.", "B"),
    ("Statement A is correct. So the answer is C.", "C"),
    ("I choose B", "B"),
    ("I'd go with option (B).", "B"),
    ("The answer should be B", "B"),
    ("B is not correct", None),
    ("A or B is correct", None),
    ("Neither A nor B is correct", None),
    ("Option A is correct, but option B is also correct", None),
    ("I choose A or B", None),
    ("I choose A dog", None),
    ("Vitamin C is the best", None),
    # as models write
    ("The final answer is $\\boxed{B}$.", "B"),
    (r"\boxed{B)}", "B"),
    ("<answer>(B)</answer>", "B"),
    ("B<|im_end|>", "B"),
    ("Answer: B\n\nExplanation: A is wrong because it could be 3.", "B"),
    ("The answer is “B”.", "B"),
    ("The answer is *B*.", "B"),
    ("Option B: Paris", "B"),
    ("It is unlikely that B is correct", None),
    # hedges
    ("I think the answer is B, but C is also possible.", None),
    ("Answer: B (but could be C)", None),
    ("Answer: B... or C", None),
    ("B... or C", None),
    ("The answer is B. Or C.", None),
    ("The answer is B, though it could be C.", None),
    ("Answer: B. Wait, C.", None),
    (r"\boxed{B} or \boxed{C}", None),
    (r"\boxed{B} or C", None),
    # a lone letter
    ("B", "B"),
    (" b \n", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("**B**", "B"),
    ("B) Paris", "B"),
    ("(B) Paris", "B"),
    ("**B.** Paris", "B"),
    ("Option B", "B"),
    ("Paris is the capital.\n\nB", "B"),
    ("Paris is the capital.\n(B)", "B"),
    ("A\nB", None),
    ("A) Rome\nB) Paris", None),
    ("A B", None),
    ("A, B", None),
    ("A dog", None),
    ("I do not know", None),
    ("It could be B", None),
    ("", None),
    ("  \n", None),
    ("12", None),
    # thinking
    ("<think>The answer is A</think>B", "B"),
    ("<think>The answer is A</think>The answer is B", "B"),
    ("<think>The answer is B", None),
    ("<think>B</think>", None),
]


@pytest.mark.parametrize(("response", "letter"), STATED)
def test_the_stated_letter(response, letter):
    assert choice.extract(response) == letter
    for answer in "ABCI":
        assert choice.verify(response, answer, {}) is (letter == answer)


@pytest.mark.parametrize("answer", ["B", "b", " B ", "(B)", "B.", "B) Paris", "[B]", "B: Paris\nand more"])
def test_forms_of_the_reference(answer):
    assert choice.verify("The answer is B", answer, {})
    assert not choice.verify("The answer is C", answer, {})


@pytest.mark.parametrize("answer", ["", "Paris", "1", "AB", "A or B", "É"])
def test_a_reference_without_a_letter_is_an_error(answer):
    with pytest.raises(ValueError, match=r"no letter.*data\.answer_key"):
        choice.verify("B", answer, {})


WORDING = ["\\boxed{{{}}}", "Answer: {}", "Answer: ({})", "The answer is {}.", "The answer is **{}**", "{}", "({})"]


@given(st.sampled_from(string.ascii_uppercase), st.sampled_from(WORDING), st.text(max_size=30))
def test_every_letter_in_every_wording_after_any_thought(letter, wording, thought):
    response = "<think>" + thought + "</think>" + wording.format(letter)
    assert choice.extract(response) == letter


@given(st.sampled_from("ABCDE"), st.sampled_from("ABCDE"), st.sampled_from([" or ", ", ", "/", " and ", " or maybe "]))
def test_two_letters_are_never_one(first, second, join):
    for wording in WORDING:
        assert choice.extract(wording.format(first + join + second)) is None


@given(st.text())
def test_any_text_is_read(text):
    found = choice.extract(text)
    assert found is None or (len(found) == 1 and found in string.ascii_uppercase)
