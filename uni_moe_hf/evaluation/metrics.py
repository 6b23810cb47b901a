"""
Scores of answers, each by its published rule. Functions of texts alone: no model, no files, no network.

What rows bring to a figure is a [`~statistics.Contributions`]; `METRICS` names what tasks can ask for.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .statistics import Contributions, mean_of, ratio_of


@dataclass(frozen=True)
class Answered:
    """
    An answer of a model and what it is compared with.

    Args:
        prediction (`str`): What the model said.
        references (`list[str]`): Right answers: of each annotator one, or captions, or the letter of an option.
        options (`dict[str, str]`, *optional*): Letter -> text, where it was a choice.
        question (`str`, *optional*): As written or spoken.
        group (`str`, *optional*): What it is counted with.
        judgement (`dict`, *optional*): What a judge said: `correct` (`bool`) and `score`, 0 to 5.
    """

    prediction: str
    references: list[str]
    options: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    group: str = ""
    judgement: Mapping[str, Any] | None = None


# --- Short answers

# How the official scripts write contractions; a form without (some of) its apostrophes counts as the form with them.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that'd that'd've that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd "
    "you'd've you'll you're you've"
).split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _without_some_apostrophes(word: str) -> Iterable[str]:
    """The forms in which one or all of its apostrophes are missing."""
    yield word.replace("'", "")
    places = [index for index, character in enumerate(word) if character == "'"]
    yield from (word[:index] + word[index + 1 :] for index in places)


FULL_FORM = {short: word for word in CONTRACTIONS for short in _without_some_apostrophes(word)}
DIGIT = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}


def normalize_answer(text: str) -> str:
    """
    A short answer as the VQA evaluation compares it: in small letters, without articles and punctuation, numbers up to
    ten as digits, contractions with their apostrophe. A comma or point between digits stays (`1,000` loses its comma).

    Source: `vqaEval.py` of https://github.com/GT-Vision-Lab/VQA. Its table also turns "somebody'd" into "somebodyd",
    an error that is left out here.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        stands_free = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if stands_free or has_number else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (DIGIT.get(word, word) for word in cleaned.lower().split())
    return " ".join(FULL_FORM.get(word, word) for word in words if word not in ARTICLES)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """
    1.0 where the normalised answer equals any of the references, else 0.0.

    Source: "EM" of the paper, which does not say how ten annotators count; its figures fit any of them.
    """
    if not prediction.strip():
        return 0.0
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(reference) for reference in references))


def vqa_soft_accuracy(prediction: str, references: Sequence[str]) -> float:
    """
    Share of what three agreeing annotators are worth, averaged over leaving out each annotator: `min(1, others / 3)`.

    Raises:
        ValueError: fewer than four annotators, with whom nothing can count in full.

    Source: https://visualqa.org/evaluation.html; `m4c_evaluator.py` of the original for TextVQA.
    """
    if len(references) < 4:
        raise ValueError(
            f"soft accuracy compares with the answers of at least 4 annotators, usually 10, and a row has "
            f"{len(references)}; use exact_match"
        )
    if not prediction.strip():
        return 0.0
    answer = normalize_answer(prediction)
    agree = [answer == normalize_answer(reference) for reference in references]
    return sum(min(1.0, (sum(agree) - mine) / 3) for mine in agree) / len(agree)


# --- Choices


def parse_choice(prediction: str, options: Mapping[str, str]) -> str | None:
    r"""
    The letter that a free answer means, or another label where options have others. The first rule that applies
    decides; where it finds several, nothing is meant.

    1. The answer is a letter: `B`, `(B)`, `B.`, `**B**`.
    2. It begins with a letter and a mark: `B. a bird`, `B) ...`, `(B) ...`, `B: ...`.
    3. It says so: `the answer is B`, `Answer: (B)`, `option B`, `choice B`; before another word `A` and `I` are words.
    4. It is an option's text, normalised as in [`normalize_answer`].
    5. It holds the text of one option, as words, and of no other that is not part of that one.
    6. It holds one letter in brackets, `(B)`.

    Args:
        prediction (`str`): What was said.
        options (`dict[str, str]`): Letter -> text; texts may be empty where options are in a picture or recording.

    Returns:
        `str` or `None`: `None` where no rule applies.
    """
    text = prediction.strip().strip("\"'")
    labels = {label.upper(): label for label in options}
    known = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True)) or "(?!)"
    if match := re.fullmatch(rf"[*(\[]*({known})[*)\]]*[.:,)]?[*]*", text, flags=re.IGNORECASE):
        return labels[match[1].upper()]
    marked = rf"(?:\(({known})\)|\b({known})[.:)])(?!\w)"
    glued = rf"({known})[.:)](?=[A-Za-z])(?![A-Za-z]\.)"  # "B.a bird", and not "B.C."
    if match := re.match(rf"[*]*(?:{marked}|{glued})", text):
        begun = {label for found in re.findall(rf"(?:^|[\s*]){marked}", text) for label in found if label}
        first = next(label for label in match.groups() if label)
        return labels[first] if begun <= {first} else None
    label = rf"[\s*(\[]*((?i:{known}))[*)\]]*(?![\w'])"
    said = rf"\b(?i:answer(?:\s+is)?|option|choice)[\s:*]*(?i:option|choice)?{label}"
    ends = r"\s*(?:$|[.,;:!?)\]*\n]|because|since|as\b|is\b|was\b)"
    named = set()
    for found in re.finditer(said, text):
        rest = text[found.end() :]
        if re.match(rf"\s*(?:/|&|,|and\b|or\b){label}", rest):
            return None  # several
        if found[1].upper() not in ("A", "I") or re.match(ends, rest):
            named.add(found[1].upper())
    if named:
        return labels[named.pop()] if len(named) == 1 else None
    answer = normalize_answer(text)
    texts = {label: normalize_answer(option) for label, option in options.items()}
    equal = [label for label, option in texts.items() if option and option == answer]
    if equal:
        return equal[0] if len(equal) == 1 else None
    held = [label for label, option in texts.items() if option and f" {option} " in f" {answer} "]
    widest = [one for one in held if all(f" {texts[other]} " in f" {texts[one]} " for other in held)]
    if len(widest) == 1:
        return widest[0]
    bracketed = set(re.findall(rf"\(({known})\)", text))
    return labels[bracketed.pop()] if len(bracketed) == 1 and not held else None


def parse_yes_no(prediction: str) -> str | None:
    """
    `"yes"` or `"no"` by the words of the first sentence: `no` or `not` among them is no, else `yes` is yes; `None`
    where there is neither.

    Source: `evaluate.py` of https://github.com/RUCAIBox/POPE, which takes everything without `no` for yes.
    """
    first = re.split(r"[.\n]", prediction.strip().replace("’", "'"), maxsplit=1)[0]
    words = re.findall(r"[a-z']+", first.lower())
    if {"no", "not"} & {*words} or any(word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


# --- Sentences


def word_errors(prediction: str, references: Sequence[str]) -> tuple[int, int]:
    """
    Edits that turn the prediction into the nearest reference, and that reference's words: `(errors, words)`, after
    Whisper's basic normaliser (small letters, no punctuation).

    Raises:
        ImportError: without `jiwer`.

    Source: `jiwer.process_words`.
    """
    jiwer = _library("jiwer")
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    normalize = BasicTextNormalizer()
    heard = normalize(prediction).strip()
    found = []
    for reference in references:
        expected = normalize(reference).strip()
        if not expected:
            found.append((len(heard.split()), 0))
            continue
        done = jiwer.process_words(expected, heard)
        found.append((done.substitutions + done.deletions + done.insertions, len(expected.split())))
    return min(found, key=lambda pair: pair[0] / max(pair[1], 1))


# What pycocoevalcap takes out. Brackets stay, under the Treebank's names: its list has them in capitals.
CAPTION_MARKS = {"'", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CAPTION_WORD = re.compile(
    r"n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w)"  # clitics
    r"|(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|jr|sr|st|vs)\.(?!$)"  # abbreviations keep their points
    r"|\d*\.?\d+(?:[.,:/]\d+)*(?:\w|-\w)*|\w+(?:[-'/]\w+)*"  # numbers, words
    r"|[?!]{2,}|\.\.\.|--|[^\w\s]"
)


def caption_words(text: str) -> list[str]:
    """
    Words of a caption as CIDEr counts them: in small letters, clitics (`'s`, `n't`, `'re`) on their own, punctuation
    removed; words with hyphens and numbers with points stay whole.

    Source: what `PTBTokenizer` of pycocoevalcap does, without its Java: of 10,540 questions of A-OKVQA, OK-VQA and
    TextVQA all but a handful are split alike (`benchmarks/results/evaluation.md`). Rare abbreviations differ.
    """
    text = text.lower().replace("’", "'").replace("“", '"').replace("”", '"')
    text = re.sub(r"\b(can)(not)\b", r"\1 \2", text)
    text = re.sub(r"(\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)", r"\1 \2", text)
    return [BRACKETS.get(word, word) for word in CAPTION_WORD.findall(text) if word not in CAPTION_MARKS]


def cider(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    r"""
    CIDEr-D of each caption: how near its n-grams, n = 1 to 4, are to those of the references, weighted by how rare
    they are among all references given here, with a penalty for another length. 0 to 10; 1.0 is printed as 100.

    Args:
        predictions (`list[list[str]]`): A caption's words, row by row.
        references (`list[list[list[str]]]`): Words of each of a row's references.

    Raises:
        ValueError: a row without references.

    Source: Vedantam et al. 2015 (https://arxiv.org/abs/1411.5726); `cider_scorer.py` of pycocoevalcap, to which it is
    equal on the same words. Its mean is the corpus' figure.
    """
    if not all(references):
        raise ValueError("CIDEr needs a reference for every row")
    counted = [[_ngrams(words) for words in row] for row in references]
    rows_with = Counter(gram for row in counted for gram in {gram for each in row for gram in each})
    log_rows = math.log(max(len(references), 1))

    def vectors(grams: Counter) -> tuple[list[dict], list[float], int]:
        parts: list[dict] = [{} for _ in range(4)]
        for gram, count in grams.items():
            parts[len(gram) - 1][gram] = count * (log_rows - math.log(max(1, rows_with[gram])))
        norms = [math.sqrt(sum(value**2 for value in part.values())) for part in parts]
        return parts, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    scores = []
    for words, row in zip(predictions, counted, strict=True):
        mine, my_norms, my_length = vectors(_ngrams(words))
        total = 0.0
        for grams in row:
            theirs, their_norms, their_length = vectors(grams)
            penalty = math.exp(-((my_length - their_length) ** 2) / (2 * 6.0**2))
            for part, other, norm, other_norm in zip(mine, theirs, my_norms, their_norms, strict=True):
                shared = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in part.items())
                total += penalty * (shared / (norm * other_norm) if norm and other_norm else shared)
        scores.append(10 * total / 4 / len(row))
    return scores


def _ngrams(words: Sequence[str]) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def chance(answers: Sequence[str], questions: Sequence[str]) -> list[float | None]:
    """
    How often the answer of another row with the same question, drawn at random, is the right one: what can be known
    without looking or listening.

    Args:
        answers, questions (`list[str]`): Row by row.

    Returns:
        `list[float]`: per row the share of the others with its answer; `None` where there is no other.
    """
    given: dict[str, Counter] = {}
    for answer, question in zip(answers, questions, strict=True):
        given.setdefault(question, Counter())[answer] += 1
    pairs = ((given[question], answer) for answer, question in zip(answers, questions, strict=True))
    return [(counts[answer] - 1) / (counts.total() - 1) if counts.total() > 1 else None for counts, answer in pairs]


# --- What tasks ask for


def _library(name: str) -> Any:
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        package = {"rouge_score": "rouge-score"}.get(name, name)
        raise ImportError(f"This metric needs `{package}`: `pip install uni-moe-hf[evaluate]`.") from error


Rows = Sequence[Answered]


def _exact_match(rows: Rows) -> dict[str, Contributions]:
    return {"exact_match": mean_of([exact_match(row.prediction, row.references) for row in rows])}


def _vqa_soft_accuracy(rows: Rows) -> dict[str, Contributions]:
    return {"vqa_soft_accuracy": mean_of([vqa_soft_accuracy(row.prediction, row.references) for row in rows])}


def _choice(rows: Rows) -> dict[str, Contributions]:
    """Strict: what names no option is wrong."""
    chosen = [parse_choice(row.prediction, row.options) for row in rows]
    right = [letter is not None and letter in row.references for letter, row in zip(chosen, rows, strict=True)]
    return {
        "choice_accuracy": mean_of(right),
        "choice_unparsed": mean_of([letter is None for letter in chosen]),
    }


def _yes_no(rows: Rows) -> dict[str, Contributions]:
    """ "Yes" is what precision and recall are about. Neither counts as wrong, and as not yes."""
    said = [parse_yes_no(row.prediction) for row in rows]
    truth = [parse_yes_no(row.references[0]) for row in rows]
    if None in truth:
        raise ValueError(
            f"yes_no compares with yes or no, and a row's answer is {rows[truth.index(None)].references[0]!r}"
        )
    yes, is_yes = ([each == "yes" for each in side] for side in (said, truth))
    both = [mine and theirs for mine, theirs in zip(yes, is_yes, strict=True)]
    # F1 is twice the hits over what was said and what is true.
    either = [float(mine) + float(theirs) for mine, theirs in zip(yes, is_yes, strict=True)]
    return {
        "yes_no_accuracy": mean_of([mine == theirs for mine, theirs in zip(said, truth, strict=True)]),
        "precision": ratio_of(both, yes),
        "recall": ratio_of(both, is_yes),
        "f1": ratio_of([2.0 * each for each in both], either, is_share=False),
        "yes_rate": mean_of(yes),
        "neither_rate": mean_of([each is None for each in said]),
    }


def _word_error_rate(rows: Rows) -> dict[str, Contributions]:
    errors, words = zip(*(word_errors(row.prediction, row.references) for row in rows), strict=True)
    return {"word_error_rate": ratio_of(errors, words, is_share=False)}


def _cider(rows: Rows) -> dict[str, Contributions]:
    predictions = [caption_words(row.prediction) for row in rows]
    scores = cider(predictions, [[caption_words(each) for each in row.references] for row in rows])
    return {"cider": mean_of(scores, unit="points")}


def _bleu(rows: Rows) -> dict[str, Contributions]:
    """Corpus BLEU-4 of sacrebleu, 0 to 1."""
    metric = _library("sacrebleu.metrics").BLEU()
    done = [metric.corpus_score([row.prediction], [[each] for each in row.references]) for row in rows]
    counts = np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in done], dtype=float)

    def value(sums: np.ndarray) -> float:
        sums = [round(each) for each in sums]
        return metric.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score / 100

    return {"bleu": Contributions(counts, value, unit="points")}


def _rouge(rows: Rows) -> dict[str, Contributions]:
    """F-measure of the longest common subsequence with the nearest reference."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return {
        "rouge_l": mean_of([scorer.score_multi(row.references, row.prediction)["rougeL"].fmeasure for row in rows])
    }


def _judged(rows: Rows) -> dict[str, Contributions]:
    return {
        "judged_accuracy": mean_of([row.judgement["correct"] for row in rows]),
        "judged_score": mean_of([row.judgement["score"] for row in rows], unit=""),
    }


def _chance(rows: Rows) -> dict[str, Contributions]:
    questions = [f"{row.group}\n{row.question}" for row in rows]
    shares = chance([normalize_answer(row.references[0]) for row in rows], questions)
    return {"chance": ratio_of([share or 0.0 for share in shares], [share is not None for share in shares])}


@dataclass(frozen=True)
class Metric:
    """
    What a task can be scored by.

    Args:
        figures (`dict[str, bool]`): Names of its figures, and whether more is better (`None`: neither); the first is
            the main one.
        score (`Callable`): Rows -> figure -> what rows bring to it.
        needs (`str`, *optional*): `"options"` or `"judge"`, without which it cannot be had.
    """

    figures: Mapping[str, bool | None]
    score: Callable[[Rows], dict[str, Contributions]]
    needs: str | None = None


METRICS = {
    "exact_match": Metric({"exact_match": True}, _exact_match),
    "vqa_soft_accuracy": Metric({"vqa_soft_accuracy": True}, _vqa_soft_accuracy),
    "choice": Metric({"choice_accuracy": True, "choice_unparsed": False}, _choice, needs="options"),
    "yes_no": Metric(
        dict.fromkeys(("yes_no_accuracy", "precision", "recall", "f1"), True)
        | {"yes_rate": None, "neither_rate": False},
        _yes_no,
    ),
    "word_error_rate": Metric({"word_error_rate": False}, _word_error_rate),
    "cider": Metric({"cider": True}, _cider),
    "bleu": Metric({"bleu": True}, _bleu),
    "rouge": Metric({"rouge_l": True}, _rouge),
    "judged": Metric({"judged_accuracy": True, "judged_score": True}, _judged, needs="judge"),
    "chance": Metric({"chance": None}, _chance),
}
# What figures say, where their name does not.
EXPLAINED = {
    "choice_unparsed": "answers that name no option; they count as wrong",
    "chance": "how often the answer of another row with the same question, drawn at random, is right",
    "yes_rate": "answers that say yes",
    "neither_rate": "answers that say neither yes nor no; they count as wrong",
    "judged_score": "the judge's mean grade, 0 to 5",
    "own_preferred": "rows whose right answer is likelier beside their own media than beside another row's",
    "gain": "by how much, in nats a token",
    "own_loss": "mean loss of the right answers beside their own media, in nats a token",
    "other_loss": "the same beside another row's media",
}
# Figures of tasks that compare likelihoods, as in [`Metric`].
PREFERENCE = {"own_preferred": True, "gain": True, "own_loss": False, "other_loss": None}


__all__ = [
    "EXPLAINED",
    "METRICS",
    "PREFERENCE",
    "Answered",
    "Metric",
    "caption_words",
    "chance",
    "cider",
    "exact_match",
    "normalize_answer",
    "parse_choice",
    "parse_yes_no",
    "vqa_soft_accuracy",
    "word_errors",
]
