"""Metrics against hand-worked values and the packages that define them."""

import math
import random

import numpy as np
import pytest

from uni_moe_hf.evaluation.metrics import (
    METRICS,
    Answered,
    caption_words,
    chance,
    cider,
    exact_match,
    normalize_answer,
    parse_choice,
    parse_yes_no,
    vqa_soft_accuracy,
    word_errors,
)
from uni_moe_hf.evaluation.statistics import Contributions, mean_of, ratio_of


OPTIONS = {"A": "a cat", "B": "a dog", "C": "a cat and a dog", "D": "none of them"}


def scored(metric: str, *rows: Answered) -> dict[str, float]:
    return {name: each.figure().value for name, each in METRICS[metric].score(rows).items()}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("a red, white flag", "red white flag"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes/no", "yes no"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("its", "its"),
        ("none", "0"),
        ("  line\nbreak\t", "line break"),
        ("t-shirt", "t shirt"),
        ("the - dash", "dash"),
        ("", ""),
    ],
)
def test_short_answers_are_normalised_as_the_vqa_script_does(text, normal):
    """Worked by hand from `vqaEval.py`."""
    assert normalize_answer(text) == normal


def test_any_annotator_counts_for_exact_match_and_three_others_for_soft_accuracy():
    ten = ["cat"] * 2 + ["dog"] * 8
    assert exact_match("A cat!", ten) == 1.0 and exact_match("bird", ten) == 0.0
    # Two said cat: left out they see 1 of 3, the eight others 2 of 3.
    assert vqa_soft_accuracy("cat", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_soft_accuracy("dog", ten) == 1.0 and vqa_soft_accuracy("bird", ten) == 0.0
    assert exact_match("", ["the"]) == 0.0 and vqa_soft_accuracy("", ["the"] * 10) == 0.0
    with pytest.raises(ValueError, match="at least 4 annotators, usually 10, and a row has 1; use exact_match"):
        vqa_soft_accuracy("cat", ["cat"])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B. a dog", "B"),
        ("B) it is a dog", "B"),
        ("(B) a dog", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B) because it barks", "B"),
        ("Answer: B", "B"),
        ("I would choose option D", "D"),
        ("a dog", "B"),
        ("It is a dog.", "B"),
        ("a cat and a dog", "C"),  # the longest that holds the others
        ("I see a cat and a dog there", "C"),
        ("A cat", "A"),
        ("A bird sits there", None),  # an article is no letter
        ("It may be (A) or (B)", None),
        ("E", None),
        ("", None),
        ("something else", None),
        ("The answer is a cat", "A"),
        ("It is clearly (D)", "D"),
        ("Answer: A woman", None),
        ("The answer is A dog.", "B"),
        ("The answer is A because it purrs", "A"),
        ("The answer is A.", "A"),
        ("(A) red or (B) blue", None),
        ("A. red\nB. blue", None),
        ("B.a bird", "B"),
        ("Option A is correct.", "A"),
        ("answer B is wrong, answer A is right", None),
        ("The answer is B/C", None),
        ("The answer is B and C", None),
        ("**Answer:** B", "B"),
        ("the answer is b", "B"),
    ],
)
def test_a_free_answer_is_read_as_a_letter_by_documented_rules(answer, letter):
    assert parse_choice(answer, OPTIONS) == letter


def test_options_without_texts_are_told_by_letters_alone():
    assert parse_choice("B", {"A": "", "B": ""}) == "B"
    assert parse_choice("", {"A": "", "B": ""}) is None


def test_labels_need_not_be_letters_from_a_on():
    assert parse_choice("T", {"A": "T", "B": "F"}) == "A"
    assert (
        parse_choice("(2)", {"1": "cat", "2": "dog"}) == "2" and parse_choice("dog", {"1": "cat", "2": "dog"}) == "2"
    )
    assert parse_choice("The answer is b", {"a": "cat", "b": "dog"}) == "b"
    assert parse_choice("The answer is ii", {"i": "cat", "ii": "dog"}) == "ii"


def test_choices_are_strict_and_tell_how_many_could_not_be_read():
    rows = [Answered(said, ["B"], OPTIONS) for said in ("B", "a cat", "what?", "the answer is B")]
    assert scored("choice", *rows) == {"choice_accuracy": 0.5, "choice_unparsed": 0.25}


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("Yes", "yes"),
        ("yes, there is a dog", "yes"),
        ("No.", "no"),
        ("There is not a dog. Yes", "no"),
        ("There isn't", "no"),
        ("Yes. No dog though", "yes"),
        ("A dog", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_yes_and_no_are_read_from_the_first_sentence(answer, meant):
    assert parse_yes_no(answer) == meant


def test_yes_no_figures_are_those_of_the_counts():
    truth = ["yes", "yes", "yes", "no", "no", "no"]
    said = ["yes", "no", "dog", "yes", "no", "no"]
    found = scored("yes_no", *(Answered(mine, [right]) for mine, right in zip(said, truth, strict=True)))
    precision, recall = 1 / 2, 1 / 3
    assert found == pytest.approx(
        {
            "yes_no_accuracy": 3 / 6,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_rate": 2 / 6,
            "neither_rate": 1 / 6,
        }
    )
    with pytest.raises(ValueError, match="compares with yes or no, and a row's answer is 'maybe'"):
        METRICS["yes_no"].score([Answered("yes", ["maybe"])])


def test_word_errors_are_jiwers_after_whispers_normaliser():
    jiwer = pytest.importorskip("jiwer")
    assert word_errors("Hello, word!", ["hello world"]) == (1, 2)
    assert word_errors("the cat sat", ["a dog", "The cat, sat."]) == (0, 3)  # the nearest reference
    assert word_errors("one two", ["   "]) == (2, 0)
    assert word_errors("", ["one two"]) == (2, 2)
    pairs = [("a b c d", "a x c"), ("hello there", "hello there"), ("one", "one two three")]
    rows = [Answered(heard, [reference]) for reference, heard in pairs]
    expected = jiwer.wer([reference for reference, _ in pairs], [heard for _, heard in pairs])
    assert scored("word_error_rate", *rows)["word_error_rate"] == pytest.approx(expected, abs=1e-12)


REFERENCES = [
    ["rain falls on the roof", "the rain is loud on a roof"],
    ["a bird sings while water runs"],
    ["people talk and a door slams", "a door slams while people talk", "loud people talk"],
    ["an engine hums"],
]
PREDICTIONS = ["rain falls on a roof", "a bird sings and a dog", "people talk while a door slams loud", "water runs"]


def test_cider_equals_pycocoevalcaps_on_the_same_words():
    """The values are those of pycocoevalcap 1.2 (`Cider().compute_score`)."""
    theirs = [3.719600570110141, 2.8318486894903394, 3.423135214014843, 0.0]
    words = [[each.split() for each in row] for row in REFERENCES]
    assert cider([each.split() for each in PREDICTIONS], words) == pytest.approx(theirs, abs=1e-12)
    rows = [Answered(said, row) for said, row in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert scored("cider", *rows)["cider"] == pytest.approx(2.4936461184038308, abs=1e-12)
    with pytest.raises(ValueError, match="a reference for every row"):
        cider([["a"]], [[]])


def test_cider_of_one_row_or_of_no_words_is_nothing():
    assert cider([["rain"]], [[["rain"]]]) == [0.0]  # of one row every n-gram is in all references
    assert cider([[], ["rain"]], [[["rain"]], [["wind"]]]) == [0.0, 0.0]


def test_captions_are_split_as_the_java_tokenizer_splits_them():
    """Checked by hand against `PTBTokenizer` of pycocoevalcap."""
    assert caption_words("A man's dog can't run, it's raining!") == "a man 's dog ca n't run it 's raining".split()
    assert caption_words("Slow - a well-known 3.5 kg bell") == "slow a well-known 3.5 kg bell".split()
    assert caption_words("What U.S. city (is it)??") == "what u.s. city -lrb- is it -rrb- ??".split()
    assert caption_words("  ... ") == []


def test_bleu_and_rouge_are_their_libraries():
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    references = [row[:1] for row in REFERENCES]
    rows = [Answered(said, row) for said, row in zip(PREDICTIONS, references, strict=True)]
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [[row[0] for row in references]]).score / 100
    assert scored("bleu", *rows)["bleu"] == pytest.approx(expected, abs=1e-12)
    scorer = rouge.RougeScorer(["rougeL"])
    each = [scorer.score(row[0], said)["rougeL"].fmeasure for said, row in zip(PREDICTIONS, references, strict=True)]
    assert scored("rouge", *rows)["rouge_l"] == pytest.approx(np.mean(each), abs=1e-12)


def test_chance_is_how_often_another_row_with_the_same_question_has_the_answer():
    answers, questions = ["red", "red", "blue", "bell"], ["colour"] * 3 + ["sound"]
    assert chance(answers, questions) == [0.5, 0.5, 0.0, None]
    rows = [Answered("", [answer], question=question) for answer, question in zip(answers, questions, strict=True)]
    figure = METRICS["chance"].score(rows)["chance"].figure()
    assert figure.value == pytest.approx(1 / 3) and figure.rows == 4
    alone = METRICS["chance"].score([Answered("", ["a"], question="b")])["chance"].figure()
    assert str(alone) == "undefined"
    apart = [Answered("", [each], question="which", group=each) for each in ("a", "a", "b", "b")]
    assert METRICS["chance"].score(apart)["chance"].figure().value == 1.0  # by group, in the total too


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 samples of 60 rows, some 95 % of the intervals hold the mean; 3 standard errors of that are 5 %."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        figure = mean_of(generator.random(60) < 0.3).figure()
        held += figure.low <= 0.3 <= figure.high
    assert 0.88 <= held / 200 <= 0.99


def test_where_all_rows_agree_the_interval_is_the_binomial_one():
    """Clopper and Pearson at 97.5 % on the side that is left: 1 - 0.025 ** (1 / n)."""
    all_right, none = mean_of([1] * 20).figure(), mean_of([0] * 20).figure()
    assert all_right.high == 1.0 and all_right.low == pytest.approx(0.025 ** (1 / 20))
    assert none.low == 0.0 and none.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert mean_of([1]).figure().low == pytest.approx(0.025)
    same = mean_of([1, 0, 1]).against(mean_of([1, 0, 1]))
    assert same.value == 0.0 and same.high == -same.low == pytest.approx(1 - 0.025 ** (1 / 3))
    for score in (mean_of([0, 0], unit=""), mean_of([1, 1], unit="points"), ratio_of([0, 0], [1, 1], is_share=False)):
        figure = score.figure()  # no share of yes or no
        assert figure.low == figure.value == figure.high
    apart = mean_of([1] * 5).against(mean_of([0] * 5))
    assert apart.value == apart.high == 1.0 and apart.low == pytest.approx(0.025 ** (1 / 5))
    assert ratio_of([1, 1, 0], [1, 1, 0]).figure().low == pytest.approx(0.025 ** (1 / 2))  # of two trials


def test_a_paired_difference_is_narrower_than_two_figures_apart():
    generator = random.Random(0)
    hard = [generator.random() for _ in range(200)]
    one = mean_of([value < 0.6 for value in hard])
    other = mean_of([value < 0.5 for value in hard])
    difference = one.against(other)
    assert difference.value == pytest.approx(one.figure().value - other.figure().value)
    assert difference.low > 0  # rows that one alone has right, never the other
    assert difference.high - difference.low < one.figure().high - one.figure().low
    with pytest.raises(ValueError, match="the same rows, got 200 and 3"):
        one.against(mean_of([1, 0, 1]))


def test_figures_of_nothing_are_no_numbers_and_raise_nothing():
    assert str(mean_of([]).figure()) == "of no row"
    assert mean_of([]).figure().to_dict() == {"value": None, "low": None, "high": None, "rows": 0, "unit": "%"}
    figure = ratio_of([0, 0], [0, 0]).figure()
    assert math.isnan(figure.value) and figure.rows == 2 and str(figure) == "undefined"
    assert str(mean_of([0.25, 0.25]).figure()) == "25.0 % (25.0 to 25.0)"
    assert str(mean_of([0.25, 0.25], unit="points").figure()) == "25.0 (25.0 to 25.0)"
    assert str(mean_of([0.25, 0.25], unit="").figure()) == "0.250 (0.250 to 0.250)"
    assert (
        Contributions(np.zeros((0, 2)), lambda sums: 1 / 0).against(Contributions(np.zeros((0, 2)), float)).rows == 0
    )


def test_every_metric_names_the_figures_that_it_gives():
    rows = [Answered("yes", ["yes"] * 4, {"yes": "yes", "no": "no"}, "?", "", {"correct": True, "score": 4.0})] * 2
    for name, metric in METRICS.items():
        assert tuple(metric.score(rows)) == tuple(metric.figures), name
