"""The sixteen benchmarks: each rule on cases made by hand, each published layout through the whole
of repair_eval.py, averages and intervals against figures computed elsewhere."""
import base64
import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from judge import answer, intervals, probing, report, score
from pivot import images, records, tensors
from conftest import make_wild, run

OPTIONS = {"A": "dog", "B": "cat"}


# ------------------------------------------------------------------------------------- the rules

@pytest.mark.parametrize("prediction,right", [
    ("B", True), ("b", True), ("B.", True), ("(B)", True), ("(b) cat", True), ("B. cat", True),
    ("B: cat", True), ("B)", True), ("B\ncat", True), ("Answer: B.", True), ("answer is B", True),
    ("Not A. The answer is (B).", True), ("cat", True), ("Cat.", True), ("It is a cat.", True),
    ("a cat", True), ("A", False), ("A, B", False), ("A and B", False), ("B or A", False),
    ("cat or dog", False), ("category", False), ("Because of its tail", False), ("", False),
    ("B\nThe dog is left of the cat.", True), ("**B**", True), ("b \n\nNot a dog.", True), ("B .", True),
    ("A\nIt is not a cat.", False), ("  \n", False), ("C", False), ("café", False), ("Ⓑ", False), ("BB", False)])
def test_letter(prediction, right):
    """The gold is B, a cat."""
    assert score.letter(prediction, "B", OPTIONS) == right


FOUR = {"A": "dog", "B": "cat", "C": "cow", "D": "fox"}


def chosen(prediction, options=FOUR):
    """All options that a prediction is credited with: one at most."""
    return "".join(k for k in options if score.letter(prediction, k, options))


@pytest.mark.parametrize("prediction", [
    "Option B", "The correct option is B.", "[B]", '"B"', "`B`", "\\boxed{B}", "B!", "B</s>", "B?",
    "<answer>B</answer>", "B。", "（B）", "答案：B", "答案是B。", "选B", "Ｂ", "【B】", "「B」", "“B”", "_B_",
    "$B$", "{B}", "- B", "> B", "B<|im_end|>", "<answer>\nB\n</answer>", "B项",
    "Answer: (B)", "Answer - B", "Answer B", "ANSWER: b", "**Answer:** B", "**Answer**: B",
    "The answer is: **B**", "Correct answer: B", "The answer is option B", "The best answer is B.",
    "The answer would be B", "The answer to the question is B", "The correct choice is (B).",
    "$\\boxed{\\text{B}}$", "The answer is \\boxed{B}.", "<|begin_of_box|>B<|end_of_box|>",
    "Final Answer\nB", "**Final Answer**\n\n**B**", "## Answer\nB", "The answer is\nB",
    "Answer: B\nExplanation: A is wrong because of the cow.", "The answer is B. Option A is a dog.",
    "Answer: B. The other option is A.", "B. The answer is clear from the tail.",
    "Answer: B\n\nThis answer is supported by the dog.", "Answer: the cat. The other option is A.",
    "B because the dog is small", "B is right", "B, not A", "B, A is wrong", "B and not A",
    "B, a cat", "B - cat", "B.cat", "B: dog", "Option B: cat", "I choose B.", "It is B.",
    "I would go with option B", "<think>The cow? A?</think>\nB", "<think>A</think>B</s>"])
def test_one_letter_said_is_chosen(prediction):
    assert chosen(prediction) == "B"


@pytest.mark.parametrize("prediction", [
    "A and B", "A, B", "A or B", "B or A", "A/B", "A & B", "A + B", "A B", "A\nB", "A;B", "[A, B]",
    "A、B", "A, B, C", "A, B and C", "Both A and C", "Either A or B", "A or B?", "(A) and (B)",
    "**A** or **B**", "Option A or B", "Option A and Option B", "A and B are right",
    "A, B are both right", "The answer is A and B", "The answer is A or B.", "Answer: A, C",
    "Neither", "Neither A nor B", "None of A, B", "Not B", "The answer is not B", "AB", "B's",
    "B-cell", "Because", "Beta", "Ⓑ", "", "</s>", "<think>B", "<think>The cat is B", "cat or dog"])
def test_no_letter_or_two_choose_nothing(prediction):
    assert chosen(prediction) == ""


@pytest.mark.parametrize("prediction,letter", [
    ("The answer is B because the cat is small.", "B"), ("B because the cat is small", "B"),
    ("A because of the dog", "A"), ("The answer is A because the dog barks.", "A"),
    ("A is right, no dog is", "A"), ("A - not the dog", "A"), ("Option A dog", "A"),
    ("A cat", "A"), ("A dog", "B"), ("I see a dog", "B"), ("The answer is a dog.", "B"),
    ("Answer: A dog", "B"), ("<think>The cat?</think> B", "B"), ("<think>A</think>the dog", "B")])
def test_a_letter_goes_before_a_text_unless_it_is_a_word(prediction, letter):
    assert chosen(prediction, {"A": "cat", "B": "dog"}) == letter


def test_options_in_latex_or_full_width_are_named_as_they_stand():
    options = {"A": "$5\\text{ cm}$", "B": "（一）", "C": "$7\\text{ cm}$"}
    for letter, text in options.items():
        assert chosen(text, options) == chosen(f"The answer is {text}.", options) == letter


def test_yes_goes_before_the_no_of_a_sentence():
    options = {"A": "Yes", "B": "No"}
    assert [chosen(x, options) for x in ("Yes, there is no cat", "No, yes is wrong", "yes or no",
                                         "there is no cat", "A", "Answer: No, not yes.")] == \
        ["A", "B", "", "B", "A", "B"]


def test_an_option_that_names_letters_is_named_by_its_whole_text():
    options = {"A": "1", "B": "2", "C": "Both A and B", "D": "A or B"}
    assert [chosen(x, options) for x in ("A or B", "Both A and B.", "A and B", "D", "The answer is "
                                         "A or B.")] == ["D", "C", "", "D", "D"]


def test_an_option_inside_another_one():
    options = {"A": "red", "B": "dark red", "C": "$5 (five)"}
    assert score.letter("it is dark red", "B", options)
    assert not score.letter("it is dark red", "A", options)
    assert score.letter("red", "A", options) and score.letter("$5 (five)", "C", options)


@pytest.mark.parametrize("rule,prediction,answers,worth", [
    (score.exact, "Red.", ["red"], 1), (score.exact, " dark\n red ", ["Dark red"], 1),
    (score.exact, "cafe\u0301", ["caf\u00e9"], 1), (score.exact, "reddish", ["red"], 0),
    (score.exact, "", ["red"], 0), (score.exact, "two", ["2"], 0),
    (score.yes_no, "Yes", ["Yes"], 1), (score.yes_no, "yes, it is.", ["Yes"], 1),
    (score.yes_no, "No", ["Yes"], 0), (score.yes_no, "yes and no", ["Yes"], 0),
    (score.yes_no, "not", ["No"], 0), (score.yes_no, "", ["No"], 0),
    (score.yes_no, "Yes, there is no cat", ["Yes"], 1), (score.yes_no, "No, yes is wrong", ["No"], 1),
    (score.yes_no, "Yes, there is no cat", ["No"], 0), (score.yes_no, "**Yes**, no cat", ["Yes"], 1),
    (score.yes_no, "Answer: Yes, there is no cat", ["Yes"], 1), (score.yes_no, "Yes/No", ["Yes"], 0),
    (score.yes_no, "Yes or no? Yes", ["Yes"], 0), (score.yes_no, "yes, no", ["Yes"], 0),
    (score.yes_no, "There is no cat", ["No"], 1), (score.yes_no, "It is yes or no", ["No"], 0),
    (score.yes_no, "<think>yes</think> No", ["No"], 1), (score.yes_no, "<think>No", ["No"], 0),
    (score.exact, "<think>blue</think>\nRed.", ["red"], 1), (score.exact, "red</s>", ["red"], 1),
    (score.exact, "<think>red</think>blue", ["red"], 0), (score.exact, "<think>red", ["red"], 0),
    (score.exact, "The answer is red.", ["red"], 0), (score.relaxed, "The answer is 24.", ["24"], 0),
    (score.relaxed, "<think>3</think>105", ["100"], 1), (score.relaxed, "105</s>", ["100"], 1),
    (score.contains, "<think>stop</think>go", ["stop"], 0),
    (score.contains, "<think>go</think>stop", ["stop"], 1),
    (score.anls, "<think>x</think>hello", ["hello"], 1), (score.anls, "hello</s>", ["hello"], 1),
    (score.vqa_soft, "<think>a cat</think>dog", ["dog"] * 10, 1),
    (score.relaxed, "105", ["100"], 1), (score.relaxed, "105.1", ["100"], 0),
    (score.relaxed, "95", ["100"], 1), (score.relaxed, "100", ["105.2"], 1),
    (score.relaxed, "100", ["105.3"], 0),          # 5 % of the gold, not of the prediction
    (score.relaxed, "40%", ["0.4"], 1), (score.relaxed, "40 %", ["41%"], 1),
    (score.relaxed, "40", ["40%"], 0), (score.relaxed, "0", ["0"], 1),
    (score.relaxed, "0.0", ["0"], 1), (score.relaxed, "0.01", ["0"], 0),
    (score.relaxed, "-5", ["5"], 0), (score.relaxed, "-100", ["-101"], 1),
    (score.relaxed, "Yes.", ["yes"], 1), (score.relaxed, "nan", ["5"], 0),
    (score.relaxed, "inf", ["5"], 0), (score.relaxed, "12.", ["12"], 1),
    (score.relaxed, "", ["5"], 0), (score.relaxed, "0.17", ["1/6", "0.167"], 1),
    (score.contains, "The sign says STOP!", ["stop"], 1), (score.contains, "st op", ["stop"], 0),
    (score.contains, "main\nstreet", ["Main Street"], 1), (score.contains, "", ["a"], 0),
    (score.contains, "anything", [""], 0), (score.contains, "b", ["a", "B"], 1),
    (score.anls, "hello", ["Hello"], 1), (score.anls, "helo", ["hello"], 0.8),
    (score.anls, "a  b", ["A B"], 1), (score.anls, "ab", ["abcd"], 0.5),   # a distance of half
    (score.anls, "11", ["12"], 0.5), (score.anls, "ab", ["abcde"], 0),     # beyond it
    (score.anls, "abc", ["abcd"], 0.75), (score.anls, "", ["x"], 0),
    (score.anls, "helo", ["zzz", "hello"], 0.8), (score.anls, "straße", ["strasse"], 5 / 7),
    (score.vqa_soft, "2", ["two"] * 3 + ["2"] * 7, 1), (score.vqa_soft, "A dog.", ["dog"] * 10, 1),
    (score.vqa_soft, "x", list("xyyyyyyyyy"), 0.3), (score.vqa_soft, "x", list("xxyyyyyyyy"), 0.6),
    (score.vqa_soft, "x", list("xxxyyyyyyy"), 0.9), (score.vqa_soft, "x", list("xxxxyyyyyy"), 1),
    (score.vqa_soft, "", ["y"] * 10, 0), (score.vqa_soft, "dont", ["don't"] * 10, 1),
])
def test_rule(rule, prediction, answers, worth):
    assert rule(prediction, answers) == pytest.approx(worth)


@pytest.mark.parametrize("prediction", [
    "24", "The answer is 24.", "Answer: 24\nExplanation: 23 and 1.", "**Answer:** 24", "答案：24。",
    "The answer is: **24**.", "The answer is $24$.", "Final Answer\n24", "<answer>24</answer>",
    "So the final answer is $\\boxed{24}$.", "<think>The answer is 3.</think>The answer is 24.",
    'The answer is "24".', "The answer is 24</s>"])
@pytest.mark.parametrize("name,announced", [
    ("MMMU_DEV_VAL", True), ("RealWorldQA", True), ("MathVista_MINI", True),
    ("GQA_TestDev_Balanced", False), ("ChartQA_TEST", False)])
def test_what_is_announced_counts_where_the_yardstick_extracts_it(name, announced, prediction):
    """Open MMMU and RealWorldQA, and with them MathVista: what follows "answer is"; elsewhere the
    answer must be the whole of what is said, as in Cambrian's own rules."""
    row = {"answer": "24", "where": "x.tsv:2"}
    assert score.value(name, row, prediction) == float(announced or prediction == "24")
    assert score.value(name, row, "The answer is 3, not 24.") == 0
    assert score.value(name, row, "It is not 24. The answer is 3.") == 0


def test_what_is_announced_keeps_its_own_signs():
    for said, told in (("The answer is -3.5.", "-3.5"), ("The answer is $5", "$5"),
                       ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("Answer:", "Answer:"),
                       ("no answer", "no answer")):
        assert score.conclusion(said) == told


def test_handwritten_maths_minds_case_but_no_blanks():
    assert score.contains("\\frac { X } {2}", ["\\frac{X}{2}"], maths=True) == 1
    assert score.contains("\\frac{x}{2}", ["\\frac{X}{2}"], maths=True) == 0


@pytest.mark.parametrize("text,plain", [
    ("The two dogs", "2 dogs"), ("A  cat.", "cat"), ("3.5", "3.5"), ("u.s.", "us"),
    ("1,000", "1000"), ("left/right", "left right"), ("well - done", "well done"),
    ("isnt it?", "isn't it"), ("couldn'tve", "couldn't've"), ("couldntve", "couldntve"),
    ("dog's", "dog 's"), ("none", "0"), ("ten\nmen\t", "10 men"), ("", ""), ("an a the", ""),
    ("Öl & Gas", "öl & gas")])
def test_vqa_normalisation(text, plain):
    """As the EvalAI server has it: by hand from its definition."""
    assert score.vqa_plain(text) == plain


def test_vqa_soft_is_the_mean_over_all_answers_but_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        answers = rng.choice(list("vwxyz"), rng.integers(2, 11)).tolist()
        slow = [min(1, sum(o == "x" for j, o in enumerate(answers) if j != i) / 3)
                for i in range(len(answers))]
        assert score.vqa_soft("x", answers) == pytest.approx(sum(slow) / len(slow))


def test_edit_distance():
    for a, b, d in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2)):
        assert score.edit_distance(a, b) == d


# ------------------------------------------------------ sixteen small files, as they are published

def picture(seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


P = [picture(i) for i in range(6)]
Q = "what is it ?"
LETTERS = "A B C D".split()
# name → (columns, rows, what a model says, score by hand)
PUBLISHED = {
    "MME": ("index image image_path category question answer", [
        [1, P[0], "existence/1.jpg", "existence", Q + " Please answer yes or no.", "Yes"],
        [2, P[0], "existence/1.jpg", "existence", Q, "No"],
        [3, P[1], "existence/2.jpg", "existence", Q, "Yes"],
        [4, "3", "existence/2.jpg", "existence", Q, "No"],
        [5, P[2], "count/1.jpg", "count", Q, "Yes"],
        [6, P[3], "code_reasoning/1.png", "code_reasoning", Q, "Yes"],
        [7, "5", "count/1.jpg", "count", Q, "No"]],
        ["Yes", "No.", "yes", "Yes", "Yes", "No", "no"], 100 * ((1 + 0.25) / 2 + 1) / 2),
    "MMBench_DEV_EN": ("index question hint A B C D answer category image source l2-category "
                       "split", [
        [241, Q, "A hint", "dog", "cat", "", "", "A", "ocr", P[0], "x", "fine", "dev"],
        [252, Q, "", "dog", "cat", "", "", "B", "ocr", P[1], "x", "fine", "dev"],
        [1000241, Q, "A hint", "cat", "dog", "", "", "B", "ocr", "241", "x", "fine", "dev"],
        [1000252, Q, "", "cat", "dog", "", "", "A", "ocr", "252", "x", "fine", "dev"]],
        ["A", "B", "dog", "B"], 50),
    "SEEDBench_IMG": ("index image question A B C D answer category", [
        [0, P[0], Q, "One", "Two", "Three", "Four", "B", "Instances Counting"],
        [1, "0", Q, "One", "Two", "Three", "Four", "C", "Instances Counting"]], ["two", "D"], 50),
    "GQA_TestDev_Balanced": ("index image question answer", [
        [201307251, P[0], Q, "no"], [201640614, "201307251", Q, "left"]], ["No.", "right"], 50),
    "ScienceQA_TEST": ("index image question hint A B C D E answer category split", [
        [3, P[0], Q, "Figure: a\nlong one", "ice", "fire", "", "", "", "A", "magnets", "test"],
        [5, "", Q, "", "ice", "fire", "", "", "", "B", "text alone", "test"],
        [7, P[1], Q, "", "ice", "fire", "", "", "", "B", "magnets", "test"]],
        ["A", "-", "fire"], 100),
    "MMMU_DEV_VAL": ("index id image image_path question A B C D answer category l2-category "
                     "split", [
        [1, "dev_Art_1", P[3], "", "Not this", "x", "y", "z", "w", "A", "Art", "Art", "dev"],
        [2, "validation_Art_1", str([P[0], P[1]]), "['a.png', 'b.png']",
         "<image 1> or <image 2> ?", "<image 1>", "<image 2>", "", "", "B", "Art", "Art",
         "validation"],
        [3, "validation_Art_2", "1", "", Q, "", "", "", "", "['1/6', '0.167']", "Art", "Art",
         "validation"],
        [4, "validation_Art_3", P[2], "", Q, "", "", "", "", "24/7", "Art", "Art", "validation"]],
        ["-", "B", "0.17", "247"], 200 / 3),
    "MathVista_MINI": ("index question image answer question_type answer_type choices "
                       "answer_option category task", [
        [1, "Hint: x\nQuestion: How long?", P[0], "1.2", "free_form", "float", "", "", "g", "t"],
        [2, "Hint: x\nQuestion: Is it?\nChoices:\n(A) Yes\n(B) No", P[1], "No", "multi_choice",
         "text", "['Yes', 'No']", "B", "g", "t"],
        [3, "Between?", P[2], "[2007, 2008]", "free_form", "list", "", "", "g", "t"],
        [4, "Is it?\nChoices:\n(A) Yes\n(B) No", "2", "Yes", "multi_choice", "text",
         "['Yes', 'No']", "", "g", "t"]], ["1.25", "(B) No", "[2007, 2008]", "no"], 75),
    "AI2D_TEST": ("index image question A B C D answer category", [
        [0, P[0], Q, "w", "x", "y", "z", "C", "foodWeb"],
        [1, P[1], Q, "1", "2", "3", "4", "B", "foodWeb"]], ["Answer: C.", "2"], 100),
    "ChartQA_TEST": ("index image question answer split", [
        [0, P[0], Q, "14", "test_human"], [1, P[0], Q, "0", "test_human"],
        [2, P[1], Q, "62.5%", "test_augmented"], [3, P[2], Q, "Yes", "test_augmented"]],
        ["14.5", "0.0", "0.62", "No"], 75),
    "OCRBench": ("index image question answer category", [
        [0, P[0], "what is written ?", "['CENTRE']", "Regular Text Recognition"],
        [1, P[1], Q, "['25%', '25 %']", "Doc-oriented VQA"],
        [2, P[2], Q, "['\\\\frac{X}{2}']", score.HANDWRITTEN_MATHS],
        [3, P[3], Q, "['4']", "Key Information Extraction"]],
        ["the centre", "it is 25 %", "\\frac { X } { 2 }", "five"], 75),
    "TextVQA_VAL": ("index image question answer question_id ocr_tokens", [
        [34602, P[0], Q, str(["nokia"] * 2 + ["the nokia"] * 2 + ["dell"] * 6), 34602,
         "['NOKIA', '9']"],
        [34603, P[1], Q, str(["don't"] * 10), 34603, "['12']"]], ["Nokia.", "dont"], 100),
    "DocVQA_VAL": ("index image question answer questionId docId", [
        [0, P[0], Q, "['University of California', 'UC']", 1, 2],
        [1, P[1], Q, "['hello']", 3, 4], [2, P[2], Q, "['abcd']", 5, 6]],
        ["university of\ncalifornia", "helo", "zz"], 60),
    "MMVP": ("index image question A B answer", [
        [1, P[0], Q, "Open", "Closed", "(a)"], [2, P[1], Q, "Open", "Closed", "(b)"],
        [3, P[2], Q, "Yes", "No", "(a)"], [4, P[3], Q, "Yes", "No", "(b)"]],
        ["(a)", "Closed", "Yes", "Yes"], 50),
    "RealWorldQA": ("index image question A B C answer", [
        [0, P[0], Q, "Left", "Right", "Ahead", "C"], [1, P[1], Q, "", "", "", "Two"]],
        ["C. Ahead", "two"], 100),
    "CV-Bench-2D": ("index image question A B C D answer prompt source type task split", [
        [0, P[0], Q, "1", "2", "0", "3", "(A)", Q + " Select.\n(A) 1\n(B) 2\n(C) 0\n(D) 3",
         "ADE20K", "2D", "Count", "2D"],
        [1, P[1], Q, "1", "2", "0", "3", "B", Q + " Select.\n(A) 1\n(B) 2\n(C) 0\n(D) 3",
         "ADE20K", "2D", "Count", "2D"],
        [2, P[2], Q, "1", "2", "0", "3", "C", Q + " Select.\n(A) 1\n(B) 2\n(C) 0\n(D) 3",
         "ADE20K", "2D", "Count", "2D"],
        [3, P[3], Q, "left", "right", "", "", "B", Q + " Select.\n(A) left\n(B) right",
         "COCO", "2D", "Relation", "2D"]], ["A", "C", "D", "right"], 100 * (1 / 3 + 1) / 2),
    "CV-Bench-3D": ("index image question A B answer prompt source type task split", [
        [2638, P[0], Q, "chair", "desk", "A", Q + " Select.\n(A) chair\n(B) desk", "Omni3D", "3D",
         "Depth", "3D"]], ["the chair"], 100)}


def write_tsv(path, columns, rows):
    """As pandas writes it: quoted where it must be."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns.split(), *rows])


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """The folder --bench points to."""
    folder = tmp_path_factory.mktemp("bench")
    for name, (columns, rows, *_) in PUBLISHED.items():
        write_tsv(folder / f"{name}.tsv", columns, rows)
    return folder


@pytest.fixture(scope="module")
def scored(stage1, sixteen, tmp_path_factory):
    """A run folder whose model has answered all sixteen, in batches of three. Its LLM is the toy's
    shape with wild random weights: what it says hangs on every token and pixel."""
    from pivot import model_io
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(stage1 / "pretrain/final", folder / "m/final")
    model, tokenizer = model_io.load_mllm(folder / "m/final")
    make_wild(model)
    model_io.save_mllm(model, tokenizer, folder / "m/final", True)
    out = run(*command(folder / "m", sixteen), "--eval-batch", 3)
    return folder / "m", out.stdout


def command(model, bench):
    return ["repair_eval.py", "--mllm", model / "final", "--llm", "toy-lm", "--bench", bench,
            "--workers", 0, "--max-new-tokens", 6]


def results(model):
    return json.loads((model / "bench/results.json").read_text())


def test_the_sixteen_are_those_of_the_paper():
    assert list(PUBLISHED) == [n for n, b in score.BENCHES.items() if b.suite == "paper"]
    groups = [[b.group for b in score.BENCHES.values() if b.suite == "paper"].count(g)
              for g in score.GROUPS]
    assert groups == [4, 4, 4, 4]


@pytest.mark.parametrize("name", PUBLISHED)
def test_hand_made_answers_get_the_score_computed_by_hand(sixteen, name):
    rows, _ = answer.read_tsv(sixteen / f"{name}.tsv")
    _, all_rows, said, worth = PUBLISHED[name]
    said = {str(r[0]): s for r, s in zip(all_rows, said)}
    assert score.score_of(score.units(name, rows, said)) == pytest.approx(worth)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert score.score_of(score.units(name, shuffled, said)) == pytest.approx(worth), \
        "the order of lines decides"


def test_all_sixteen_through_the_whole_script(scored, sixteen):
    """Answered by a model, then scored anew from hand-made answers, with the weights gone."""
    model, out = scored
    r = results(model)
    assert list(r["groups"]) == list(score.GROUPS) and r["missing"] == []
    assert set(r["benchmarks"]) == set(PUBLISHED) and "not scored" not in out
    text = (model / "bench/report.txt").read_text()
    for words in ("SigLIP2-So400m + PIVOT", score.LETTER_ONLY, "pairs; labels as in the file",
                  "1 questions on cognition answered, left out", "1 rows without an image left out",
                  "1 rows not of the validation split left out", "no OCR tokens",
                  "1 questions have several images", "circular: all rotations",
                  "sources: ADE20K, COCO", "no questions on position"):
        assert words in text, words

    copy = model.parent / "rescored"
    shutil.copytree(model, copy)
    (copy / "final/model.safetensors").unlink()
    for name, (_, rows, said, _) in PUBLISHED.items():
        (copy / f"bench/{name}.0.jsonl").write_text("".join(
            json.dumps({"index": str(r[0]), "prediction": s}) + "\n" for r, s in zip(rows, said)))
    run(*command(copy, sixteen), "--rescore")
    r = results(copy)
    assert r["model"] == results(model)["model"]
    for name, (*_, worth) in PUBLISHED.items():
        assert r["benchmarks"][name]["score"] == pytest.approx(worth), name
    assert r["average"] == pytest.approx(np.mean([w for *_, w in PUBLISHED.values()]))
    compared = run("repair_eval.py", "--compare", model, copy).stdout
    gain = r["average"] - results(model)["average"]
    assert re.search(rf"\nAverage +\+{gain:.1f} \[", compared), compared


@pytest.mark.parametrize("processes,batch", [(1, 1), (1, 64), (2, 3), (4, 2)])
def test_neither_batches_nor_processes_change_an_answer(scored, sixteen, tmp_path, processes,
                                                        batch):
    """Token for token as one by one: what is stored is the text of every token up to the stop."""
    said, asked = set(), set()
    for name in PUBLISHED:
        said |= set(answer.predictions(scored[0] / "bench", name).values())
        asked |= {(score.prompt_of(name, r), r["image_id"])
                  for r in answer.read_tsv(sixteen / f"{name}.tsv")[0]}
    assert len(said) >= 0.9 * len(asked) > 30, "answers that are all alike would prove nothing"
    shutil.copytree(scored[0] / "final", tmp_path / "m/final")
    run(*command(tmp_path / "m", sixteen), "--eval-batch", batch, processes=processes)
    for name in PUBLISHED:
        a, b = (answer.predictions(m / "bench", name) for m in (scored[0], tmp_path / "m"))
        assert a == b and len(a) >= 1, name
    assert results(tmp_path / "m")["benchmarks"] == results(scored[0])["benchmarks"]


def test_a_changed_file_costs_the_answers_of_its_changed_rows(scored, sixteen, tmp_path):
    """A mended picture and a mended question are asked again, a mended gold answer is not; nor is
    anything of the other files. --rescore says what is missing."""
    shutil.copytree(scored[0], tmp_path / "m")
    shutil.copytree(sixteen, tmp_path / "bench")
    folder, name = tmp_path / "m/bench", "ChartQA_TEST"
    columns, rows, *_ = PUBLISHED[name]
    rows = [list(r) for r in rows]
    rows[0][2], rows[2][1], rows[3][3] = "how high ?", P[5], "No"
    before = {f.name: f.read_text() for f in folder.glob("*.jsonl")}
    old = answer.predictions(folder, name)
    (folder / f"{name}.0.jsonl").rename(folder / f"{name}.1.jsonl")    # two processes had answered
    write_tsv(tmp_path / "bench" / f"{name}.tsv", columns, rows)
    line = command(tmp_path / "m", tmp_path / "bench")
    done = run(*line, "--rescore", check=False)
    assert done.returncode and "holds no answer to 2 of 4 questions of ChartQA_TEST, first: " \
        "index 0; without --rescore they are answered" in done.stdout + done.stderr
    assert f"{name}: 2 of 4 rows have changed since they were answered" in run(*line).stdout
    after = {f.name: f.read_text() for f in folder.glob("*.jsonl")}
    again = [json.loads(x)["index"] for x in after.pop(f"{name}.0.jsonl").splitlines()]
    assert sorted(again) == ["0", "2"]
    assert after.pop(f"{name}.1.jsonl") == before.pop(f"{name}.0.jsonl")
    assert {k: v for k, v in after.items() if v} == before
    whole = answer.asked_of(tmp_path / "bench" / f"{name}.tsv",
                            *[answer.read_tsv(tmp_path / "bench" / f"{name}.tsv")[0]] * 2, False)
    new = answer.predictions(folder, name, whole)
    assert len(new) == 4 and [new[i] for i in "13"] == [old[i] for i in "13"]
    assert [new[i] for i in "02"] != [old[i] for i in "02"], "what was asked first counts no more"
    assert "rows have changed" not in run(*line).stdout
    run(*command(tmp_path / "m", sixteen), "--rescore")        # the file as it was: all are there
    assert results(tmp_path / "m")["benchmarks"] == results(scored[0])["benchmarks"]
    (tmp_path / "m/final/extra.safetensors").write_bytes(
        (tmp_path / "m/final/model.safetensors").read_bytes())
    done = run(*line, "--max-new-tokens", 7, check=False)
    assert "(max_new_tokens: 6, now 7)" in done.stdout + done.stderr


def test_answers_that_do_not_say_what_was_asked_are_for_the_whole_file(scored, sixteen, tmp_path):
    """Those of older versions: they count for the file that they were given to, and for no other."""
    shutil.copytree(scored[0], tmp_path / "m")
    shutil.copytree(sixteen, tmp_path / "bench")
    file = tmp_path / "m/bench/ChartQA_TEST.0.jsonl"
    items = [json.loads(x) for x in file.read_text().splitlines()]
    assert all(len(x.pop("asked")) == 16 for x in items)
    file.write_text("".join(json.dumps(x) + "\n" for x in items))
    line = command(tmp_path / "m", tmp_path / "bench")
    run(*line)
    assert len(file.read_text().splitlines()) == len(items), "none is asked again"
    columns, rows, *_ = PUBLISHED["ChartQA_TEST"]
    write_tsv(tmp_path / "bench/ChartQA_TEST.tsv", columns, rows[::-1])
    done = run(*line, check=False)
    assert "holds the answers of another model or setting (ChartQA_TEST.tsv: " in \
        done.stdout + done.stderr


def test_what_was_asked_is_the_prompt_and_the_picture_shown(tmp_path):
    """Not where the files lie, not the gold answer; of a picture in a file, its bytes."""
    for name in "ab":
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images/1.png").write_bytes(base64.b64decode(P[0]))
        write_tsv(tmp_path / name / "RealWorldQA.tsv", "index image image_path question answer", [
            [1, "", "1.png", Q, name], [2, P[1], "", Q, name], [3, P[3], "", Q, name]])

    def asked(name, swap=False):
        path = tmp_path / name / "RealWorldQA.tsv"
        rows, _ = answer.read_tsv(path)
        return answer.asked_of(path, rows, rows[::-1] if swap else rows, False)
    assert asked("a") == asked("b") and len(set(asked("a").values())) == 3
    assert list(asked("a", swap=True).values()) == list(asked("a").values())[::-1]
    (tmp_path / "b/images/1.png").write_bytes(base64.b64decode(P[2]))
    assert [asked("a")[i] == asked("b")[i] for i in "123"] == [False, True, True]


def test_an_interrupted_evaluation_goes_on(scored, sixteen, tmp_path):
    """Some answers are there, the last one cut off; the others are asked, by two processes."""
    shutil.copytree(scored[0], tmp_path / "m")
    bench = tmp_path / "m/bench"
    for file in bench.glob("*.0.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:1]) + lines[-1][:9])
    for name in ("results.json", "units.json", "wrong.html"):
        (bench / name).unlink()
    run(*command(tmp_path / "m", sixteen), processes=2)
    assert results(tmp_path / "m")["benchmarks"] == results(scored[0])["benchmarks"]
    for name in PUBLISHED:
        assert answer.predictions(bench, name) == answer.predictions(scored[0] / "bench", name)


def test_a_missing_benchmark_is_named_and_left_out(scored, sixteen, tmp_path):
    shutil.copytree(scored[0], tmp_path / "m")
    shutil.copytree(sixteen, tmp_path / "bench", ignore=lambda *_: ["MME.tsv", "DocVQA_VAL.tsv"])
    out = run(*command(tmp_path / "m", tmp_path / "bench"), "--rescore").stdout
    r, whole = results(tmp_path / "m"), results(scored[0])
    assert r["missing"] == ["MME", "DocVQA_VAL"]
    assert "left out of the means: MME, DocVQA_VAL" in out
    inside = [whole["benchmarks"][n]["score"] for n in PUBLISHED if n != "MME"
              and score.BENCHES[n].group == "General"]
    assert r["groups"]["General"] == pytest.approx(sum(inside) / 3)


def test_wrong_image_changes_pictures_and_is_kept_apart(scored, tmp_path):
    """Every picture another one's, the same for any --limit; answers in a folder of their own."""
    write_tsv(tmp_path / "GQA_TestDev_Balanced.tsv", "index image question answer",
              [[i, P[i % 4], f"{Q} {i}", "x"] for i in range(8)])
    shutil.copytree(scored[0] / "final", tmp_path / "m/final")
    line = command(tmp_path / "m", tmp_path)
    run(*line)
    run(*line, "--wrong-image", "--limit", 3)
    run(*line, "--wrong-image")
    right, wrong = (answer.predictions(tmp_path / "m" / f, "GQA_TestDev_Balanced")
                    for f in ("bench", "bench-wrong-image"))
    assert len(right) == len(wrong) == 8 and sum(right[i] != wrong[i] for i in right) >= 6
    shutil.rmtree(tmp_path / "m/bench-wrong-image")
    run(*line, "--wrong-image")
    assert answer.predictions(tmp_path / "m/bench-wrong-image", "GQA_TestDev_Balanced") == wrong


def test_drawn_answers_depend_on_seed_and_question_alone(scored, tmp_path):
    name = "GQA_TestDev_Balanced"
    write_tsv(tmp_path / f"{name}.tsv", "index image question answer",
              [[i, P[i % 4], f"{Q} {i}", "x"] for i in range(12)])
    found = {}
    for key, more, processes in (("greedy", [], 1), ("drawn", ["--temperature", 1], 2), (
            "again", ["--temperature", 1, "--eval-batch", 5], 1), (
            "other", ["--temperature", 1, "--seed", 7], 1)):
        shutil.copytree(scored[0] / "final", tmp_path / key / "final")
        run(*command(tmp_path / key, tmp_path), *more, processes=processes)
        folder = tmp_path / key / ("bench-drawn" if more else "bench")
        found[key] = answer.predictions(folder, name)
    assert found["drawn"] == found["again"]
    assert found["greedy"] != found["drawn"] != found["other"]


# ------------------------------------------------------------------------------- files and prompts

def test_prompts_are_the_published_wording(sixteen):
    def first(name, n=0, **named):
        return score.prompt_of(name, answer.read_tsv(sixteen / f"{name}.tsv")[0][n], **named)
    assert first("MMBench_DEV_EN") == f"A hint\n{Q}\nA. dog\nB. cat\n{score.LETTER}"
    assert first("MMMU_DEV_VAL") == f"or ?\nA. \nB. \n{score.LETTER}"
    assert first("MMMU_DEV_VAL", 1) == f"{Q}\n{score.SHORT}"
    assert first("ScienceQA_TEST").endswith(score.LETTER_ONLY)
    assert first("MathVista_MINI", 1).endswith(f"Choices:\n(A) Yes\n(B) No\n{score.LETTER}")
    assert first("CV-Bench-3D") == f"{Q} Select.\n(A) chair\n(B) desk\n{score.LETTER}"
    assert first("ChartQA_TEST") == f"{Q}\n{score.NUMBER}"
    assert first("TextVQA_VAL") == f"{Q}\n{score.SHORT}"
    assert first("TextVQA_VAL", ocr_tokens=True) == \
        f"{Q}\nReference OCR tokens: NOKIA, 9\n{score.SHORT}"


def test_pictures_are_read_when_asked_for(sixteen):
    """By the place of their record: base64, another row's, the first of several; text alone stays
    in memory."""
    path = sixteen / "MMMU_DEV_VAL.tsv"
    rows, dropped = answer.read_tsv(path)
    assert [r["index"] for r in rows] == ["2", "3", "4"]
    got = [answer.picture_of(path, r) for r in rows]
    assert got == [base64.b64decode(P[i]) for i in (0, 3, 2)]
    assert dropped == {"not of the validation split": 1}
    path = sixteen / "MME.tsv"
    got = [answer.picture_of(path, r) for r in answer.read_tsv(path)[0]]
    assert got == [base64.b64decode(P[i]) for i in (0, 0, 1, 1, 2, 3, 2)]


def test_a_file_is_streamed(tmp_path):
    """24 MB of pictures are indexed in a few hundred kB: one record at a time is in memory."""
    import tracemalloc
    rng = np.random.default_rng(0)
    cells = [base64.b64encode(rng.bytes(150_000)).decode() for _ in range(120)]
    write_tsv(tmp_path / "GQA_TestDev_Balanced.tsv", "index image question answer",
              [[i, c, Q, "x"] for i, c in enumerate(cells)])
    tracemalloc.start()
    rows, _ = answer.read_tsv(tmp_path / "GQA_TestDev_Balanced.tsv")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 400_000 and peak < 3_000_000
    picture = answer.picture_of(tmp_path / "GQA_TestDev_Balanced.tsv", rows[77])
    assert picture == base64.b64decode(cells[77])


def test_wrong_pictures_are_other_pictures_wherever_they_lie():
    """Half the file away is the same picture here: the next one that is not is shown."""
    rows = [{"image_id": x, "where": "x.tsv:1"} for x in "abababaa"]
    shown = answer.wrong_pictures(rows)
    assert not [i for i, r in enumerate(shown) if rows[i]["image_id"] == r["image_id"]]
    with pytest.raises(SystemExit, match="x.tsv: --wrong-image needs two"):
        answer.wrong_pictures(rows[:1] * 3)


def test_image_path_alone(tmp_path):
    (tmp_path / "images/MME/count").mkdir(parents=True)
    (tmp_path / "images/MME/count/1.png").write_bytes(base64.b64decode(P[0]))
    head = "index image_path category question answer"
    write_tsv(tmp_path / "MME.tsv", head, [[1, "count/1.png", "count", Q, "Yes"]])
    rows, _ = answer.read_tsv(tmp_path / "MME.tsv")
    assert images.load_image(answer.picture_of("", rows[0]), None, "here").shape == (3, 20, 24)
    write_tsv(tmp_path / "MME.tsv", head, [[1, "../../MME.tsv", "count", Q, "Yes"]])
    with pytest.raises(records.BadRecord, match=r"MME.tsv:2: image ../../MME.tsv leaves its folder"):
        answer.read_tsv(tmp_path / "MME.tsv")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images/MME/count/1.png").rename(tmp_path / "elsewhere/1.png")
    (tmp_path / "images/MME/linked").symlink_to(tmp_path / "elsewhere")
    write_tsv(tmp_path / "MME.tsv", head, [[1, "linked/1.png", "count", Q, "Yes"]])
    with pytest.raises(records.BadRecord, match="by a link; --follow-links allows it"):
        answer.read_tsv(tmp_path / "MME.tsv")
    rows, _ = answer.read_tsv(tmp_path / "MME.tsv", follow_links=True)
    assert images.load_image(answer.picture_of("", rows[0]), None, "here").shape == (3, 20, 24)


@pytest.mark.parametrize("name,columns,rows,words", [
    ("AI2D_TEST", "index image question A B answer", [[1, P[0], Q, "x", "y", "E"]],
     "AI2D_TEST.tsv:2: answer 'E' is not one of the options A, B"),
    ("MMVP", "index image question A B answer", [["one", P[0], Q, "x", "y", "A"]],
     "MMVP.tsv:2: index 'one' is not a whole number"),
    ("MMBench_DEV_EN", "index image question A B answer",      # the second row counts, too
     [[i, P[0], Q, "x", "y", "A"] for i in ("1", "1.5")],
     "MMBench_DEV_EN.tsv:3: index '1.5' is not a whole number"),
    ("OCRBench", "index image question answer", [[1, "", Q, "['x']"]],
     "OCRBench.tsv: no question in it; 1 without an image")])
def test_what_cannot_be_scored_is_refused_before_it_is_asked(tmp_path, name, columns, rows, words):
    write_tsv(tmp_path / f"{name}.tsv", columns, rows)
    with pytest.raises(SystemExit, match=re.escape(words)):
        answer.read_tsv(tmp_path / f"{name}.tsv")


def test_pictures_as_data_uris_and_without_padding_are_read(tmp_path):
    """The same picture, however it is written, has the same id."""
    png = base64.b64decode(P[0])
    whole = base64.b64encode(png + b"\0" * ((1 - len(png)) % 3)).decode()
    assert whole.endswith("==")
    uri = f"data:image/png;base64,{whole}"
    cells = [whole, whole.rstrip("="), uri, uri.rstrip("="), str([uri, P[1]]), whole[:70] + "\n"
             + whole[70:]]
    path = tmp_path / "GQA_TestDev_Balanced.tsv"
    write_tsv(path, "index image question answer", [[i, c, Q, "x"] for i, c in enumerate(cells)])
    rows, _ = answer.read_tsv(path)
    assert {answer.picture_of(path, r) for r in rows} == {base64.b64decode(whole)}
    assert len({r["image_id"] for r in rows}) == 1
    assert images.load_image(answer.picture_of(path, rows[3]), None, "here").shape == (3, 20, 24)


@pytest.mark.parametrize("cell", ["?" * 99, P[0][:90] + "*", "A" * 97, "data:image/svg+xml,<svg/>",
                                  str(["?" * 99, P[0]])])
def test_every_picture_cell_is_checked_before_the_first_answer(tmp_path, cell):
    path = tmp_path / "GQA_TestDev_Balanced.tsv"
    write_tsv(path, "index image question answer", [[1, P[0], Q, "x"], [2, cell, Q, "x"]])
    with pytest.raises(records.BadRecord, match="Balanced.tsv:3: 'image' is not base64; mend"):
        answer.read_tsv(path)


def test_a_cell_that_says_nan_is_empty(tmp_path):
    """As pandas writes an empty one; the answer alone may be that word."""
    path = tmp_path / "AI2D_TEST.tsv"
    write_tsv(path, "index image image_path hint question A B C D answer", [
        [1, P[0], "nan", "nan", Q, "x", "y", "nan", "NaN", "B"],
        [2, "nan", "nan", "nan", Q, "x", "y", "nan", "nan", "A"]])
    rows, dropped = answer.read_tsv(path)
    assert score.options_of(rows[0]) == {"A": "x", "B": "y"}
    assert score.prompt_of("AI2D_TEST", rows[0]) == f"{Q}\nA. x\nB. y\n{score.LETTER}"
    assert dropped == {"without an image": 1} and len(rows) == 1
    path = tmp_path / "MathVista_MINI.tsv"
    write_tsv(path, "index image question choices answer_option answer", [
        [1, P[0], Q, "nan", "nan", "nan"], [2, P[0], Q, "['u', 'v']", "nan", "v"]])
    open_one, choice = answer.read_tsv(path)[0]
    assert score.value("MathVista_MINI", open_one, "nan") == 1 and not score.options_of(open_one)
    assert score.references("MathVista_MINI", choice) == ["B"]
    write_tsv(path, "index image question answer", [[1, P[0], "nan", "x"]])
    with pytest.raises(SystemExit, match="MathVista_MINI.tsv:2: no 'question'"):
        answer.read_tsv(path)


def test_a_column_of_options_is_read_as_choices(tmp_path):
    path = tmp_path / "MMMU_DEV_VAL.tsv"
    write_tsv(path, "index image question options answer split", [
        [1, P[0], Q, "['left', 'right']", "B", "validation"],
        [2, P[0], Q, "[]", "7", "validation"]])
    (choice, open_one), _ = answer.read_tsv(path)
    assert score.prompt_of("MMMU_DEV_VAL", choice) == f"{Q}\nA. left\nB. right\n{score.LETTER}"
    assert [score.value("MMMU_DEV_VAL", choice, x) for x in ("B", "right", "A")] == [1, 1, 0]
    assert score.value("MMMU_DEV_VAL", open_one, "7") == 1


def test_a_quote_left_open_does_not_read_on_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "MAX_CELL", 10_000)
    (tmp_path / "MMVP.tsv").write_text('index\timage\n1\t"open\n' + "2\tx\n" * 10_000)
    with pytest.raises(SystemExit, match="MMVP.tsv:2: not a TSV"):
        answer.read_tsv(tmp_path / "MMVP.tsv")


def test_code_in_a_cell_is_not_run(tmp_path):
    cell = "[__import__('os').mkdir('" + str(tmp_path / "made") + "')]"
    assert score.listed(cell) is None and score.references("OCRBench", {"answer": cell}) == [cell]
    assert not (tmp_path / "made").exists()


def test_mmvp_pairs_start_at_the_first_published_index():
    """1-based files pair (1, 2), (3, 4); 0-based ones (0, 1), (2, 3)."""
    for first in (1, 0):
        rows = [{"index": str(i + first), "answer": "A", "A": "x", "B": "y"} for i in range(4)]
        said = {r["index"]: a for r, a in zip(rows, "AABA")}
        assert sorted(v for *_, v in score.units("MMVP", rows, said)) == [0, 1]
        assert "incomplete" not in score.notes("MMVP", rows)
        assert "1 of 2 pairs incomplete" in score.notes("MMVP", rows[:3])


def test_pairs_of_mmvp_ask_the_same_or_the_file_is_refused(tmp_path):
    """Without its first row a file would pair (2, 3), (4, 5): every pair of two questions."""
    path, asked = tmp_path / "MMVP.tsv", ("is the door open ?", "how many legs has the dog ?")
    rows = [[i, P[i], asked[(i - 1) // 2], "x", "y", "(a)"] for i in (1, 2, 3, 4)]
    write_tsv(path, "index image question A B answer", rows)
    assert len(score.units("MMVP", answer.read_tsv(path)[0], dict.fromkeys("1234", "A"))) == 2
    for left in (rows[1:], rows[::-1][:3]):
        write_tsv(path, "index image question A B answer", left)
        with pytest.raises(SystemExit, match="MMVP.tsv:[23]: index 3 and 2 are a pair of MMVP and "
                           "ask two different things; is the file's first row lost"):
            answer.read_tsv(path)
    rows[1][2] = "Is the door opne?"                            # a typing error is no difference
    write_tsv(path, "index image question A B answer", rows)
    assert len(answer.read_tsv(path)[0]) == 4


def test_mmbench_without_rotations_is_plain_accuracy_and_says_so():
    rows = [{"index": str(i), "answer": "A", "A": "x", "B": "y"} for i in range(4)]
    said = {r["index"]: a for r, a in zip(rows, "AABA")}
    assert score.score_of(score.units("MMBench_DEV_EN", rows, said)) == 75
    assert "not circular" in score.notes("MMBench_DEV_EN", rows)


# ------------------------------------------------------------------------------ averages, intervals

def test_compare_says_whether_encoders_were_repaired_alike(tmp_path):
    """Same LLM and data order by their digests, same arguments; a difference is named."""
    def config(name, **facts):
        (tmp_path / name).write_text(json.dumps({
            "stage": "repair", "llm_digest": "l", "data_digest": ["d", "e"],
            "arguments": {"seed": 0, "lr": 0, "encoder": name}, **facts}))
        return tmp_path / name
    a, b = config("a"), config("b")
    assert report.alike({"a": a, "b": b}, set())[1] == "Re-paired alike: LLM l, data d e, seed 0"
    for what, facts in (("LLM", {"llm_digest": "m"}), ("data", {"data_digest": ["e", "d"]}),
                        ("--seed", {"arguments": {"seed": 1, "lr": 0}}),
                        ("--lr", {"arguments": {"seed": 0, "lr": 1}})):
        assert report.alike({"a": a, "c": config("c", **facts)}, set())[1] == \
            f"NOT a controlled comparison: re-paired with another {what}"
    stage1 = config("p", stage="pretrain")          # has the same digests, and is no such pair
    assert report.alike({"a": a}, set()) == [] == report.alike({"a": a, "x": tmp_path / "none"},
                                                            set()) == \
        report.alike({"a": stage1, "b": stage1}, set())


def test_evidence_gives_the_interval_that_compare_gives(tmp_path):
    """DPO − SFT of the re-paired encoders: paired by question, cell by cell as --compare prints it;
    – while one of the two has not been scored."""
    rng, run_dir = np.random.default_rng(0), tmp_path / "toy"
    (run_dir / "pretrain").mkdir(parents=True)
    (run_dir / "pretrain/config.json").write_text(json.dumps(
        {"arguments": {"encoder": "toy-vit", "llm": "toy-lm", "data": "data/toy"}}))

    def repaired(name):
        units = {b: [["", str(i), float(v)] for i, v in enumerate(rng.integers(0, 2, 80))]
                 for b in ("ToyGeneral", "ToyOCR")}
        scores = {b: score.score_of(u) for b, u in units.items()}
        bench = run_dir / "repair" / name / "bench"
        bench.mkdir(parents=True)
        (bench / "units.json").write_text(json.dumps(units))
        (bench / "results.json").write_text(json.dumps({"benchmarks": {
            b: {"score": s, "n": 80, "chance": 50.0, "ci95": 1.0} for b, s in scores.items()},
            **score.summarise(scores)}))
        return scores

    def lines():
        text = run("-m", "tools.evidence", "--run", run_dir).stdout.splitlines()
        return {x[:13].strip(): x[13:].strip() for x in text if re.match("  [A-Z]", x)}
    sft = repaired("sft")
    assert [re.split(" {2,}", x) for x in lines().values()] == \
        [["–", f"{x:.1f}", "–", "–"] for x in (*sft.values(), sum(sft.values()) / 2)]
    dpo = repaired("dpo")
    out = report.compare([run_dir / "repair/sft", run_dir / "repair/dpo"], set())
    apart = {x[:12].strip(): x[12:].strip() for x in out[out.index(""):] if "[" in x}
    found = lines()
    assert list(found) == ["General", "OCR & Chart", "Average"]
    for label, line in found.items():
        assert line.endswith(apart[label]) and "[" in apart[label]
    change = (sum(dpo.values()) - sum(sft.values())) / 2
    assert re.split(" {2,}", found["Average"])[-1].startswith(f"{change:+.1f} [")


def test_our_averaging_gives_the_printed_averages():
    """The paper's table, to the rounding of what it prints (groups ± 0.05, average ± 0.05); and
    Cambrian-1-8B's row, from its sixteen scores."""
    stand_in = {b.group: n for n, b in score.BENCHES.items() if b.suite == "paper"}
    assert len(report.PAPER) == 19
    for name, (average, *groups) in report.PAPER.items():
        means = score.summarise({stand_in[g]: v for g, v in zip(report.PAPER_ORDER, groups)})
        assert abs(means["average"] - average) < 0.05 + 0.05, name
    row = [1547.1 / 20, 75.9, 74.7, 64.6, 80.4, 42.7, 49.0, 73.0,
           73.3, 62.4, 71.7, 77.8, 51.3, 64.2, 72.3, 72.0]
    means = score.summarise(dict(zip(PUBLISHED, row)))
    assert [round(means["groups"][g], 1) for g in score.GROUPS] == [73.1, 61.3, 71.3, 65.0]
    assert means["average"] == pytest.approx(np.mean(list(means["groups"].values())))
    assert means["missing"] == []


def test_mme_is_perception_over_20():
    """Ten categories: the mean is (sum of 100 · accuracy + 100 · accuracy+) ÷ 20."""
    rng, units, total = np.random.default_rng(0), [], 0
    rows, said = [], {}
    for c in (*score.PERCEPTION, "numerical_calculation"):
        right = rng.random((9, 2)) < 0.7
        total += (100 * right.mean() + 100 * right.all(1).mean()) * (c in score.PERCEPTION)
        for i, pair in enumerate(right):
            for j, r in enumerate(pair):
                index = f"{c}-{i}-{j}"
                rows.append({"index": index, "category": c, "image_path": f"{c}/{i}.png",
                             "answer": "Yes"})
                said[index] = "Yes" if r else "No"
    units = score.units("MME", rows, said)
    assert len(units) == 90 and score.score_of(units) == pytest.approx(total / 20)


def half_width(units):
    return intervals.stratified(list(score.strata(units).values()))


def resampled(ours, theirs):
    change = score.unit_differences(ours, theirs)
    return None if change is None else intervals.stratified_bootstrap(change, "GQA")


def test_intervals_cover_and_pairing_narrows_them():
    """Half-width = the binomial one for plain accuracy; the paired bootstrap agrees with theory."""
    rng = np.random.default_rng(1)
    a = [("", i, float(x)) for i, x in enumerate(rng.random(900) < 0.6)]
    p = np.mean([v for *_, v in a])
    assert half_width(a) == pytest.approx(196 * (p * (1 - p) / 900) ** 0.5)
    b = [(s, u, v if rng.random() < 0.9 else 1 - v) for s, u, v in a]
    draws = resampled(b, a)
    change = np.array([x[2] - y[2] for x, y in zip(b, a)])
    assert draws.mean() == pytest.approx(100 * change.mean(), abs=0.15)
    assert draws.std() == pytest.approx(100 * change.std() / 30, rel=0.1)
    alone = np.hypot(half_width(a), half_width(b)) / 1.96
    assert draws.std() < 0.6 * alone, "differences are paired"
    assert np.array_equal(draws, resampled(b, a)), "the same figures every time"
    assert resampled(b[1:], a) is None and resampled([], []) is None
    assert np.all(resampled(a, a[::-1]) == 0), "paired by id, not by order"


def test_each_benchmark_resamples_with_a_seed_of_its_own_name():
    """Two of one size do not draw the same units: their mean is as sure as theory has it."""
    values = np.random.default_rng(2).normal(size=400)
    names = [n for n, b in score.BENCHES.items() if b.suite == "paper"]
    draws = [intervals.stratified_bootstrap({"": values}, n) for n in names]
    apart = np.corrcoef(draws)[np.triu_indices(len(names), 1)]
    assert np.abs(apart).max() < 0.1
    assert np.mean(draws, 0).std() == pytest.approx(draws[0].std() / len(names) ** 0.5, rel=0.1)

    units = {n: [["", str(i), float(v)] for i, v in enumerate(values > 0)] for n in names[:2]}
    none = {n: [[s, u, 0.0] for s, u, _ in rows] for n, rows in units.items()}
    columns = {who: {"benchmarks": {n: {"score": x} for n in names[:2]}, "groups": {}, "average": x}
               for who, x in (("a", 0.0), ("b", 50.0))}
    table = report.differences(columns, {"a": none, "b": units})
    cells = {row[0].strip(): row[1] for row in table}
    assert cells[names[0]] != cells[names[1]], "the same values, but not the same draws"


def test_strata_weigh_the_same():
    units = [("ADE20K", i, 1.0) for i in range(90)] + [("COCO", i, 0.0) for i in range(10)]
    assert score.score_of(units) == 50
    assert np.all(resampled(units, [(s, u, 0.0) for s, u, _ in units]) == 50)


def test_chance_is_the_most_frequent_answer_of_each_question_type():
    rows = [{"index": i, "answer": a, "category": c} for i, (a, c) in enumerate(
            [("red", "colour")] * 3 + [("blue", "colour")] + [("1", "n"), ("2", "n")])]
    said = score.constant("ToyVision", rows)
    assert score.score_of(score.units("ToyVision", rows, said)) == pytest.approx(100 * (3 + 1) / 6)


# ---------------------------------------------------------------------------------------- the page

def test_the_page_of_wrong_answers_runs_nothing(tmp_path):
    """Escaped in question, option and prediction; pictures are made anew; no link outside."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    svg = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(3)'/>")
    write_tsv(tmp_path / "AI2D_TEST.tsv", "index image question A B answer", [
        [f"1{evil}", P[0], evil, evil, "y", "A"], ["2", svg.decode(), Q, "left", "up", "A"],
        ["3", P[1], Q, "x", "y", "A"]])
    path = tmp_path / "AI2D_TEST.tsv"
    rows, _ = answer.read_tsv(path)
    said = {r["index"]: f"</pre>{evil[8:]}" for r in rows} | {"3": "A"}
    page = report.wrong_page(evil, [(path, rows, rows, said)], 50)
    tags = set(re.findall(r"<\s*(\w+)", page))
    assert tags == {"html", "meta", "title", "style", "h1", "h2", "div", "img", "pre", "b"}
    assert re.findall(r"<img[^>]*>", page) == re.findall(
        r'<img alt="" src="data:image/jpeg;base64,[A-Za-z0-9+/=]+">', page)
    assert "2 of 3 not fully right" in page and "cannot be read" in page and "http:" not in page
    assert "default-src 'none'" in page
    assert "the first 1" in report.wrong_page("m", [(path, rows, rows, said)], 1)


# ------------------------------------------------------------- two encoders, re-used projectors

def tiny_encoder(kind, size, patch, width, seed=0):
    import torch
    import transformers as t
    torch.manual_seed(seed)
    facts = dict(hidden_size=width, num_hidden_layers=3, num_attention_heads=2,
                 intermediate_size=48, image_size=size, patch_size=patch)
    return {"siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**facts)),
            "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**facts)),
            "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**facts))}[kind]()


def test_two_encoders_see_what_each_sees_alone(tmp_path):
    """Channels side by side; the second's 6 × 6 grid resampled to the first's 4 × 4; each gets the
    picture squashed for its own size, its own statistics and its own prefix dropped."""
    import torch
    from pivot import published
    for name, vision in (("a", tiny_encoder("clip", 32, 8, 32)),
                         ("b", tiny_encoder("dinov2", 48, 8, 16, 1))):
        vision.save_pretrained(tmp_path / name)
    two = published.load_encoder(f"{tmp_path}/a+{tmp_path}/b").eval()
    a, b = (published.load_encoder(str(tmp_path / n)).eval() for n in "ab")
    raw = [base64.b64decode(p) for p in P[:2]]
    pixels = torch.from_numpy(np.stack([images.load_image(x, two.image_size, "here") for x in raw]))
    assert pixels.shape == (2, 3 * 32 ** 2 + 3 * 48 ** 2) and pixels.dtype == torch.uint8
    got = two(pixels)
    assert got.shape == (2, 16, 48) == (2, two.num_tokens, two.hidden_size)
    x, y = (e(torch.from_numpy(np.stack([images.load_image(r, e.image_size, "here") for r in raw])))
            for e in (a, b))
    assert torch.equal(got[..., :32], x)
    grid = y.view(2, 6, 6, 16)
    for row, column in ((0, 0), (1, 2), (3, 3)):       # centres: 0.25, 1.75, 3.25, 4.75 of 6
        r, c = (1.5 * i + 0.25 for i in (row, column))
        (r0, r1), (c0, c1) = ((int(v), min(int(v) + 1, 5)) for v in (r, c))
        p, q = r - r0, c - c0
        want = ((1 - p) * ((1 - q) * grid[:, r0, c0] + q * grid[:, r0, c1])
                + p * ((1 - q) * grid[:, r1, c0] + q * grid[:, r1, c1]))
        assert torch.allclose(got[:, 4 * row + column, 32:], want, atol=1e-5)
    names = [n for n, _ in two.named_parameters()]
    assert len(names) == len(set(names)) == sum(len(list(e.parameters())) for e in (a, b))
    assert {n.split(".", 2)[2] for n in names if n.split(".", 1)[1].startswith(two.family.frozen)} \
        == {"post_layernorm.weight", "post_layernorm.bias", "embeddings.mask_token"}


def test_two_encoders_are_repaired_saved_and_read_again(stage1, world, tmp_path):
    """The whole script with A+B; both stay as they were; transformers refuses the folder, load_mllm
    reads it; a second call finds it finished."""
    import torch
    from transformers import AutoModelForImageTextToText
    from pivot import model_io, published
    from conftest import COMMON
    tiny_encoder("dinov2", 32, 8, 16).save_pretrained(tmp_path / "dino")
    line = ["repair_eval.py", "--run-dir", tmp_path / "r", "--encoder", f"toy-vit+{tmp_path}/dino",
            *COMMON, "--data", world, "--max-steps", 2, "--limit", 4, "--save-every", 1]
    run(*line, "--activation-checkpointing", processes=2)
    folder = tmp_path / "r/repair/toy-vit+dino"
    model, _ = model_io.load_mllm(folder / "final")
    for part, name in zip(model.encoder.parts, ("toy-vit", str(tmp_path / "dino"))):
        for key, p in published.load_encoder(name).state_dict().items():
            assert torch.equal(p, part.state_dict()[key]), key
    assert model.projector.linear_1.in_features == 128 + 16
    with pytest.raises(SystemExit, match="final has two encoders: probe each by itself"):
        probing.single_encoder(model, folder / "final")
    pixels = torch.randint(0, 256, (2, 3 * 48 ** 2 + 3 * 32 ** 2), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model.encoder(pixels), published.load_encoder(line[4]).eval()(pixels))
    with pytest.raises(Exception, match="pivot_two_encoders"):
        AutoModelForImageTextToText.from_pretrained(folder / "final")
    assert report.alike(dict.fromkeys("ab", folder / "config.json"), set())[1].startswith("Re-paired ")
    one = results(folder)
    (folder / "bench/results.json").unlink()
    [p.unlink() for p in (folder / "bench").glob("*.jsonl")]
    run(*line)
    assert results(folder)["benchmarks"] == one["benchmarks"], "from one process, read anew"


def test_reused_layers_start_where_pivot_left_them(stage1, world, tmp_path):
    """"1+1": linear_1 is the trained one, linear_2 fresh, bit by bit, before the first step."""
    import torch
    from pivot import model_io
    import repair_eval
    from conftest import COMMON
    shutil.copytree(stage1 / "pretrain/final", tmp_path / "run/dpo/final")
    trained, _ = model_io.load_mllm(tmp_path / "run/dpo/final")
    trained.encoder.vision.save_pretrained(tmp_path / "run/dpo/encoder")
    eye = str(tmp_path / "run/dpo/encoder")
    for layers in (1, 2):
        fresh, _ = model_io.build_mllm(eye, "toy-lm", 0)
        model, _ = model_io.build_mllm(eye, "toy-lm", 0)
        repair_eval.reuse_projector(model, eye, layers)
        for i, name in ((1, "linear_1"), (2, "linear_2")):
            source, other = (trained, fresh) if i <= layers else (fresh, trained)
            for p, same, not_this in zip(*(getattr(x.projector, name).parameters()
                                           for x in (model, source, other))):
                assert torch.equal(p, same) and not torch.equal(p, not_this)
    run("repair_eval.py", "--encoder", eye, *COMMON, "--data", world, "--max-steps", 1, "--limit",
        2, "--projector-lr", 0.01, "--reuse-projector-layers", 2)
    config = json.loads((tmp_path / "run/repair/dpo-projector2/config.json").read_text())
    assert config["projector_digest"] == tensors.tensors_digest(trained.projector)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    with pytest.raises(SystemExit, match="holds another encoder than"):
        repair_eval.reuse_projector(model, eye, 1)
