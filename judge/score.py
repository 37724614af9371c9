"""Benchmarks: what is asked, how an answer is scored, how scores are averaged. Pure functions.

`BENCHES` knows a benchmark by the name of its VLMEvalKit file. Every score is on the paper's scale:

    score = 100 × mean over strata of (mean over units of a value in [0, 1])

A *unit* is what an interval (intervals.py) resamples: a question; an image of MME (half accuracy,
half "all of its questions right", so that the mean over the ten perception categories is
perception ÷ 20); all rotations of a MMBench question; a pair of MMVP. Strata: MME's categories, the
sources of CV-Bench.

Rules follow Cambrian-1's evaluation code where it and VLMEvalKit differ, unless a docstring says
otherwise. No judge model anywhere; groups go by ids in the file, never by the order of its lines.
"""
import ast
import math
import re
import unicodedata
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ONLY = "Please answer directly with only the letter of the correct option and nothing else."
SHORT = "Answer the question using a single word or phrase."
NUMBER = "Answer the question using a single number or phrase."
DIRECT = "Give the short answer directly."
GROUPS = ("General", "Knowledge", "OCR & Chart", "Vision-Centric")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
HANDWRITTEN_MATHS = "Handwritten Mathematical Expression Recognition"


# ------------------------------------------------------------------------------- what a row says

def listed(cell):
    """A cell that holds a Python list, as pandas writes one: its items as text. Else None."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            items = ast.literal_eval(cell)            # literals alone: nothing is executed
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        return [str(i) for i in items] if isinstance(items, list) and items else None


def options_of(row):
    """The options of a row: {"A": text, …}, from its columns A, B, … or its list of `choices` or
    `options`."""
    options = {c: row[c].strip() for c in "ABCDEFGHI" if (row.get(c) or "").strip()}
    for column in ("choices", "options"):
        options = options or dict(zip("ABCDEFGHI", listed(row.get(column) or "") or []))
    return options


def gold_letter(row, options):
    """The letter of the right option, given as "B", "(b)" or by its text; raises SystemExit."""
    answer = (row.get("answer_option") or row["answer"]).strip()
    bare = answer.strip("(). ").upper()
    if bare in options:
        return bare
    named = [k for k, v in options.items() if plain(v) == plain(answer)]
    if len(named) != 1:
        raise SystemExit(f"error: {row.get('where')}: answer {answer!r} is not one of the options "
                         f"{', '.join(options)}; is it an old copy of the file?")
    return named[0]


def references(name, row):
    """All answers that count as right: one letter where there are options. raises SystemExit where
    the answer is none of them."""
    if options := options_of(row):
        return [gold_letter(row, options)]
    many = BENCHES[name].many and listed(row["answer"].strip())
    return many or [row["answer"]]


def prompt_of(name, row, ocr_tokens=False):
    """The one fixed prompt of a benchmark: hint, question, options, suffix.

    CV-Bench brings its own wording (`prompt`), MathVista's question its choices: those are not
    listed again. MMMU's `<image 1>` marks go: there is one image, and it comes first.
    """
    bench, options = BENCHES[name], options_of(row)
    own = row.get(bench.column) if bench.column != "question" else None
    lines = [(row.get("hint") or "").strip(), (own or row["question"]).strip()]
    if not own and "\nChoices:" not in lines[1]:
        lines += [f"{k}. {v}" for k, v in options.items()]
    if ocr_tokens and row.get("ocr_tokens"):
        lines.append("Reference OCR tokens: " + ", ".join(listed(row["ocr_tokens"]) or
                                                         [row["ocr_tokens"]]))
    lines.append(bench.letter if options else bench.suffix)
    return re.sub(r" *<image \d+> *", " ", "\n".join(x for x in lines if x)).strip()


# ------------------------------------------------------------------------------------- the rules

def plain(text):
    """Lower case, one space between words, no final full stop, accents composed."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split()).rstrip(". ")


END_MARK = re.compile(r"(</s>|<eos>|<end_of_turn>|<\|(?:im_end|eo[ts]|end)\w*\|>)")


def final(prediction):
    """What a prediction says in the end: what follows its last </think>, without end marks such as
    </s>. Nothing, if it opens <think> and never closes it."""
    said = re.split(r"</think(?:ing)?>", prediction, flags=re.I)[-1]
    said = re.sub(r"<think(?:ing)?>.*", "", said, flags=re.I | re.S)
    pieces = END_MARK.split(said)
    while pieces and (not pieces[-1].strip() or END_MARK.fullmatch(pieces[-1])):
        pieces.pop()
    return "".join(pieces)


# A final answer is announced: "the answer is", "**Answer:**", "Final Answer" on a line of its own.
IS = r"\W{0,9}?(?:(?:is|was|(?:would|should|must|will) be)\b|[:=–—\n]|-\s)"
ANSWER = re.compile(rf"answer(?: to [^.:\n]{{0,80}}?| here)?{IS}|答案[是为為]?|<answer>|"
                    r"\\boxed\s*{|<\|begin_of_box\|>", re.I)
# Less clear, for it may speak of another option than the chosen one; a letter must follow.
OPTION = re.compile(rf"(?:option|choice){IS}|\b(?:it is|it's|choose|select|pick|go with)\b|选择?项?",
                    re.I)
END_TAG = re.compile(r"</answer>|<\|end_of_box\|>", re.I)
EDGES = " \n\t:*_`\"'"                                        # of Markdown, quotes


def half_width(text):
    """Full-width letters and marks ！ … ～, among them （Ｂ）, as those of ASCII; 。 and 、, too."""
    text = text.replace("。", ".").replace("、", ",")
    return "".join(chr(ord(c) - 0xFEE0) if "！" <= c <= "～" else c for c in text)


def closed(text):
    """A text up to the brace or tag that ends what it stands in, \\boxed{…} or <answer>…"""
    text, depth = END_TAG.split(text)[0], 0
    for at, mark in enumerate(text):
        depth += (mark == "{") - (mark == "}")
        if depth < 0:
            return text[:at]
    return text


def after(marker, text):
    """What follows the matches of a marker, the last match first: [text, …]."""
    return [closed(text[found.end():]) for found in marker.finditer(text)][::-1]


def conclusion(prediction):
    """The first line after the last "answer is" / "Answer:" (or in the last \\boxed{…}), without
    Markdown or quotes around it; all that is said where nothing is announced."""
    said = final(prediction)
    told = after(ANSWER, said)
    lines = half_width(told[0]).strip(EDGES).splitlines() if told else []
    if not lines:
        return said
    return re.sub(r"^\$(.*)\$$", r"\1", lines[0].rstrip(EDGES + "."))


MARKS = r"(?:\\(?:text|math)[a-z]*|[\s.,:;()\[\]{}<>*_\"'`“”‘’«»「」『』【】《》#$\\/|=~-])*"
# A letter that stands alone: no "because", "don't", "A-frame"; a Chinese character may follow.
ALONE = r"([a-z])(?![^\W_\u4e00-\u9fff]|[_'’-]\w)"
FIRST = re.compile(rf"{MARKS}(?P<named>(?:the )?(?:(?:correct|right|best|final) )?"
                   rf"(?:option|choice|letter|answer)\b{MARKS})?{ALONE}")
SECOND = re.compile(rf"[\s)\]}}\"'`*.]*(,|&|/|\+|\band\b|\bor\b){MARKS}(?:(?:and|or)\b{MARKS})?"
                    rf"(?:option\b{MARKS})?{ALONE}")
# What cannot stand after an article: "A because …" is the letter, "a cat" is not.
NO_NOUN = "and as because by due for given is or since so was which with".split()


def next_word(text):
    """The word after a blank on the same line: "cat" of " cat is", "" of ". cat"."""
    found = re.match(r"[ \t]+(\w+)", text)
    return found[1] if found else ""


def letters_said(text, options):
    """The option letters that a text begins with: ["B"] of "(B) cat", "B because …", "Option B";
    ["A", "B"] of "A and B", "A, B", "A/B"; none of "a cat", where it may be the article."""
    first = FIRST.match(text)
    if not first:
        return []
    words = re.findall(r"\w+", text[first.end() - 1:])
    if len(set(words)) > 1 and all(word.upper() in options for word in words):
        return [word.upper() for word in words]                                # "A B", "A\nB"
    one, rest = first[2], text[first.end():]
    word = next_word(rest)
    second = SECOND.match(rest)
    if second and second[2].upper() in options and second[2] != one:
        other = next_word(rest[second.end():])
        article = second[2] in "ai" and other and other not in NO_NOUN
        # "B, A is wrong" says B alone, "A, B are right" both
        if not article and (second[1] != "," or other in ("", "and", "or", "are", "both")):
            return [one.upper(), second[2].upper()]
    if word and not first["named"] and one in "ai" and word not in NO_NOUN:
        return []
    return [one.upper()] if not word or one.upper() in options else []


def begins_with(text):
    """Does it begin with a clear yes or no? → "yes", "no" or None. "Yes, there is no cat" does,
    "yes and no", "Yes/No" do not."""
    words = re.findall(r"\w+", text.replace("/", " or "))
    if not words or words[0] not in ("yes", "no"):
        return None
    contrary = "no" if words[0] == "yes" else "yes"
    if contrary in words and set(words) <= {"yes", "no", "and", "or"}:
        return None
    return None if words[1:2] in (["and"], ["or"]) and words[2:3] == [contrary] else words[0]


def is_text_of(text, options):
    """The options whose text is all that is said, if that is more than a letter: "Both A and B"."""
    bare = plain(text)
    return [k for k, v in options.items() if plain(v) == bare and len(re.findall(r"\w", bare)) > 1]


def named_in(text, options):
    """The options whose text stands in what is said."""
    bare, texts = plain(text), {k: plain(v) for k, v in options.items() if plain(v)}
    said = begins_with(text)                                     # where the options are yes and no
    if said in texts.values():
        return [k for k, v in texts.items() if v == said]
    found = [k for k, v in texts.items() if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", bare)]
    return [k for k in found if not any(     # "dark red" names "dark red", not "red" as well
        texts[k] != texts[o] and texts[k] in texts[o] for o in found)]


def letter(prediction, answer, options):
    """Does the prediction choose option `answer`? "B", "(b)", "Answer: B.", "B. cat", "cat" do.

    Cambrian: what follows the last "answer is" / "answer:" counts, its first character decides.
    Ours wants that character to stand alone, lest "Because" be B, and takes an earlier "answer is"
    where no letter follows the last; two letters ("A and B") choose nothing. Before a blank A and I
    may be words ("a cat", "I see"): there an option named by its text goes first. Without a letter
    the text of one option alone must be named.
    """
    said = half_width(final(prediction)).lower()
    options = {k: half_width(v) for k, v in options.items()}
    told, others = after(ANSWER, said), after(OPTION, said)
    for reading, texts in ((is_text_of, told[:1]), (letters_said, told), (named_in, told[:1]),
                           (letters_said, others), (is_text_of, [said]), (letters_said, [said]),
                           (named_in, [said])):
        for text in texts:
            found = reading(text, options)
            if found:
                return found == [answer]
    article = re.match(r"[ .():]*([a-z])\s", plain(told[0] if told else said))
    return bool(article) and article[1].upper() == answer


def exact(prediction, answers):
    """Equal but for case, blanks, a final full stop."""
    return float(plain(final(prediction)) in map(plain, answers))


def yes_no(prediction, answers):
    """Says yes or no, and the right one: the one that it begins with, else (VLMEvalKit's reading)
    the only one of both that it says."""
    text = final(prediction).lower()
    said = begins_with(text)
    if not said and after(ANSWER, text):
        said = begins_with(after(ANSWER, text)[0])
    both = {"yes", "no"} & set(re.findall(r"\w+", text))
    if not said and len(both) == 1:
        said = both.pop()
    return float(bool(said) and said in map(plain, answers))


def number(text):
    """"12", "-3.5", "40%" (= 0.4) → float, anything else → None."""
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed(prediction, answers):
    """Within 5 % of the gold number (of a gold 0: equal to it); words must match exactly."""
    def right(answer):
        p, g = number(plain(final(prediction))), number(plain(answer))
        if p is None or g is None:
            return exact(prediction, [answer])
        return abs(p - g) <= 0.05 * abs(g) + 1e-12
    return float(any(map(right, answers)))


def contains(prediction, answers, maths=False):
    """OCRBench: some gold string stands in the prediction; lower case, newlines are blanks.
    Handwritten maths: case counts, blanks do not."""
    def fold(text):
        return "".join(text.split()) if maths else text.lower().strip().replace("\n", " ")
    said = fold(final(prediction))
    return float(any(fold(a) and fold(a) in said for a in answers))


def edit_distance(a, b):
    """Levenshtein: insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def anls(prediction, answers):
    """DocVQA: 1 − edit distance ÷ longer length to the nearest answer; beyond a distance of half
    the length, 0 (at half of it, one half, as VLMEvalKit and lmms-eval have it)."""
    def near(answer):
        a, p = (" ".join(x.lower().split()) for x in (answer, final(prediction)))
        far = edit_distance(a, p) / max(len(a), len(p), 1)
        return 1 - far if far <= 0.5 else 0.0
    return max(map(near, answers))


def vqa_soft(prediction, answers):
    """VQA accuracy: min(1, matches ÷ 3) over every choice of all answers but one, averaged.
    Ten annotators; equality after `vqa_plain`."""
    said, given = vqa_plain(final(prediction)), Counter(map(vqa_plain, answers))
    same, n = given[said], len(answers)
    if n == 1:
        return float(same)
    return (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


def letter_or_exact(prediction, gold):
    """The option's letter, where the gold answer is one ("B", "(b)."); another one: exact."""
    option = gold.strip("(). ").upper()
    options = dict.fromkeys("ABCDEFGHI", "")
    if option not in options:
        return exact(prediction, [gold])
    return float(letter(prediction, option, options))


# By a name: what an answer is worth beside one gold answer, (text, text) → 0 … 1.
RULES = {"exact": lambda said, gold: exact(said, [gold]), "letter": letter_or_exact,
         "relaxed": lambda said, gold: relaxed(said, [gold]),
         "anls": lambda said, gold: anls(said, [gold]),
         "vqa": lambda said, gold: vqa_soft(said, [gold])}


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTIONS = {word[:m.start()] + word[m.end():]: word for word in (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've "
    "you'd you'd've you'll you're you've").split() for m in re.finditer("'", word)}


def vqa_plain(text):
    """The normalisation of the VQA and EvalAI servers: punctuation, number words, articles,
    contractions written without their apostrophe."""
    text = re.sub("[,?]", "", text.lower()).replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole = text
    for mark in ";/[]\"{}()=+\\_-><@`!":          # between two words a mark is a blank
        beside_blank = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(w, w) for w in text.split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


# ---------------------------------------------------------------------------------- the benchmarks

class Bench(NamedTuple):
    """suite: those that are averaged together. rule: of open questions; with options it is always
    the letter. suffix: of open questions, letter: of those with options. column: where the prompt
    stands. many: `answer` may be a list. announced: of an open answer what follows "answer is"
    counts. note: what the report says of labels and wording."""
    group: str
    suite: str = "paper"
    rule: object = exact
    suffix: str = SHORT
    letter: str = LETTER
    column: str = "question"
    many: bool = True
    announced: bool = False
    note: str = ""


BENCHES = {
    "MME": Bench("General", rule=yes_no, note="perception ÷ 20, accuracy and accuracy+ by image"),
    "MMBench_DEV_EN": Bench("General", note="English dev"),
    "SEEDBench_IMG": Bench("General", note="images alone, no video"),
    "GQA_TestDev_Balanced": Bench("General"),
    "ScienceQA_TEST": Bench("Knowledge", letter=LETTER_ONLY, note="questions with an image"),
    "MMMU_DEV_VAL": Bench("Knowledge", rule=relaxed, announced=True, note="validation, the first "
                          "image; open questions: what follows \"answer is\", exact or within 5 %"),
    "MathVista_MINI": Bench("Knowledge", rule=relaxed, many=False, announced=True, note="testmini, "
                            "no judge: what follows \"answer is\", exact or within 5 % of the "
                            "gold, letter or text of the option"),
    "AI2D_TEST": Bench("Knowledge", note="the file with masked labels, not NO_MASK"),
    "ChartQA_TEST": Bench("OCR & Chart", rule=relaxed, suffix=NUMBER, note="within 5 %"),
    "OCRBench": Bench("OCR & Chart", rule=contains, suffix=DIRECT, note="of 1000, ÷ 10"),
    "TextVQA_VAL": Bench("OCR & Chart", rule=vqa_soft, note="VQA soft accuracy"),
    "DocVQA_VAL": Bench("OCR & Chart", rule=anls, suffix=DIRECT, note="validation, ANLS at 0.5"),
    "MMVP": Bench("Vision-Centric", note="pairs; labels as in the file, none corrected"),
    "RealWorldQA": Bench("Vision-Centric", announced=True, note="open questions: what follows "
                         "\"answer is\""),
    "CV-Bench-2D": Bench("Vision-Centric", column="prompt", note="mean of its two sources"),
    "CV-Bench-3D": Bench("Vision-Centric", column="prompt"),
    "ToyGeneral": Bench("General", "toy", suffix=""),
    "ToyKnowledge": Bench("Knowledge", "toy", suffix=""),
    "ToyOCR": Bench("OCR & Chart", "toy", suffix=""),
    "ToyVision": Bench("Vision-Centric", "toy", suffix=""),
    "EasyVQA": Bench("General", "EasyVQA", suffix=""),
}


def value(name, row, prediction):
    """One answer's worth, in [0, 1]."""
    options, rule, right = options_of(row), BENCHES[name].rule, references(name, row)
    if options:
        return float(letter(prediction, *right, options))
    if BENCHES[name].announced:
        prediction = conclusion(prediction)
    more = {"maths": row.get("category") == HANDWRITTEN_MATHS} if rule is contains else {}
    return float(rule(prediction, right, **more))


def whole_number(row):
    try:
        return int(row["index"])
    except ValueError:
        raise SystemExit(f"error: {row.get('where')}: index {row['index']!r} is not a whole "
                         f"number, by which this benchmark groups its questions")


def ask_the_same(rows, base):
    """Refuse MMVP rows whose pairs, by their indices from `base` on, ask two different questions:
    where the first row is lost, 2 would be paired with 3. A typing error is no difference."""
    first = {}
    for row in sorted(rows, key=whole_number):
        pair, asked = (whole_number(row) - base) // 2, plain(row.get("question", ""))
        other, index = first.setdefault(pair, (asked, row["index"]))
        most = max(len(asked), len(other)) / 4
        if asked != other and edit_distance(asked, other) > most:
            raise SystemExit(f"error: {row.get('where')}: index {row['index']} and {index} are a "
                             f"pair of MMVP and ask two different things; is the file's first row "
                             f"lost? take the published file")


def unit_of(name, rows):
    """→ a function from a row to (stratum, unit), or to None where the row does not count.

    MMVP's published indices start at 1, its pairs are (1, 2), (3, 4), …; a file that starts at 0
    has (0, 1), (2, 3), … raises SystemExit where the two of a pair do not ask the same.
    """
    if name == "MME":
        return lambda r: (r["category"], r.get("image_path") or r["image_id"]) \
            if r.get("category") in PERCEPTION else None
    if name == "MMBench_DEV_EN":
        return lambda r: ("", whole_number(r) % 1_000_000)
    if name == "MMVP":
        base = min(map(whole_number, rows)) % 2
        ask_the_same(rows, base)
        return lambda r: ("", (whole_number(r) - base) // 2)
    if name == "CV-Bench-2D":
        return lambda r: (r.get("source") or "", r["index"])
    return lambda r: ("", r["index"])


def units(name, rows, predictions):
    """[(stratum, unit, value in [0, 1]), …]. predictions: {index: text}, one for every row."""
    groups, unit = defaultdict(list), unit_of(name, rows)
    for row in rows:
        if key := unit(row):
            groups[key].append(value(name, row, predictions[row["index"]]))
    whole = {k: min(v) for k, v in groups.items()}        # all right
    if name == "MME":
        whole = {k: (sum(v) / len(v) + (min(v) == 1)) / 2 for k, v in groups.items()}
    return [(*k, v) for k, v in whole.items()]


def strata(units):
    """{stratum: values (n,)}"""
    found = defaultdict(list)
    for stratum, _, v in units:
        found[stratum].append(v)
    return {s: np.array(v, np.float64) for s, v in found.items()}


def score_of(units):
    """100 × mean over strata of the mean over units; None where nothing counts."""
    means = [v.mean() for v in strata(units).values()]
    return 100 * float(np.mean(means)) if means else None


def unit_differences(ours, theirs):
    """{stratum: ours − theirs (n,)}, unit by unit; None where the two did not answer the same
    questions."""
    theirs = {(stratum, unit): v for stratum, unit, v in theirs}
    if not ours or {(stratum, unit) for stratum, unit, _ in ours} != theirs.keys():
        return None
    return strata([(stratum, unit, v - theirs[stratum, unit]) for stratum, unit, v in ours])


def constant(name, rows):
    """The predictions of a model that always gives the most frequent answer of each kind of
    question (category, with or without options): what *chance* stands for."""
    def kind(row):
        return row.get("category"), bool(options_of(row))
    answers = defaultdict(Counter)
    for row in rows:
        answers[kind(row)][plain(references(name, row)[0])] += 1
    return {row["index"]: answers[kind(row)].most_common(1)[0][0] for row in rows}


def notes(name, rows, dropped={}, ocr_tokens=False):
    """What a reader of this score must know: labels, pairs, pictures, what was left out, here or
    (dropped: {why: rows}) when the file was read."""
    said, sizes = [BENCHES[name].note], Counter(map(unit_of(name, rows), rows))
    left_out = sizes.pop(None, 0)
    odd = sum(n != 2 for n in sizes.values())
    if name == "MME":
        found = {category for category, _ in sizes}
        missing = [category for category in PERCEPTION if category not in found]
        if left_out:
            said.append(f"{left_out} questions on cognition answered, left out")
        if missing:
            said.append(f"no questions on {', '.join(missing)}")
        if odd:
            said.append(f"{odd} images without exactly two questions")
    if name == "MMBench_DEV_EN" and max(sizes.values()) > 1:
        said.append("circular: all rotations of a question right")
    elif name == "MMBench_DEV_EN":
        said.append("no rotations in the file: plain accuracy, not circular")
    if name == "MMVP" and odd:
        said.append(f"{odd} of {len(sizes)} pairs incomplete")
    if name == "CV-Bench-2D":
        sources = sorted({source for source, _ in sizes} - {""})
        said.append(f"sources: {', '.join(sources) or 'none named'}")
    said += [f"{n} rows {why} left out" for why, n in dropped.items()]
    if several := sum(bool(r.get("more_images")) for r in rows):
        said.append(f"{several} questions have several images, the first was shown")
    if name == "TextVQA_VAL":
        said.append(f"{'with' if ocr_tokens else 'no'} OCR tokens")
    return "; ".join(note for note in said if note)


def summarise(scores):
    """{bench: score} → group means, the average, and which of the same suite are missing.

    The average is the plain mean over benchmarks (= mean of group means, when all are in). What is
    missing is left out of its group's mean, and named.
    """
    inside = {g: [s for name, s in scores.items() if BENCHES[name].group == g] for g in GROUPS}
    suites = {BENCHES[name].suite for name in scores}
    return {"groups": {g: sum(s) / len(s) for g, s in inside.items() if s},
            "average": sum(scores.values()) / len(scores),
            "missing": [n for n, b in BENCHES.items() if b.suite in suites and n not in scores]}
