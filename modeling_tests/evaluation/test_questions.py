"""Tasks as data, and rows of every form as questions: the original's records as they lie, plain rows, annotations."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import PACKAGE, picture

from uni_moe_hf.evaluation.questions import load_questions, with_other_media
from uni_moe_hf.evaluation.tasks import Task, load_task, task_names


SHORT = Task("short", metrics=("exact_match",))
CHOICE = Task("choice", metrics=("choice",), prompt="{hint}{question}\n{options}")
PAPERS = {
    "a-okvqa": ("image", "exact_match", 66.20),
    "ok-vqa": ("image", "exact_match", 63.02),
    "vqav2": ("image", "exact_match", 74.41),
    "mmbench": ("image", "choice_accuracy", 71.17),
    "mmbench-audio": ("speech", "choice_accuracy", 49.38),
    "pope": ("image", "yes_no_accuracy", 85.43),
    "mm-vet": ("image", "judged_score", 28.2),
    "seed-bench": ("image", "choice_accuracy", 60.54),
    "race-audio-middle": ("speech", "choice_accuracy", 49.65),
    "race-audio-high": ("speech", "choice_accuracy", 49.37),
    "ehsl-long": ("speech", "choice_accuracy", 42.00),
    "ehsl-short": ("speech", "choice_accuracy", 48.00),
    "clotho-aqa": ("audio", "exact_match", 32.6),
    "clotho-v1": ("audio", "cider", 25.0),
    "clotho-v2": ("audio", "cider", 24.7),
    "activitynet-qa": ("video", "judged_accuracy", 42.7),
    "msvd-qa": ("video", "judged_accuracy", 55.0),
    "a-okvqa-spoken": ("speech", "exact_match", 7.76),
}


def original(question: str, **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]
    return {"conversations": turns, **fields}


def written(tmp_path, rows, name="rows.json"):
    file = tmp_path / name
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_every_benchmark_of_the_paper_is_a_task_with_its_figures():
    assert {*PAPERS, "textvqa"} <= {*task_names()}
    for name, (modality, metric, value) in PAPERS.items():
        task = load_task(name)
        assert modality in task.takes and task.paper["metric"] == metric and task.notes, name
        assert value in task.paper["values"].values(), name
        assert metric in [f for each in task.metrics for f in _figures(each)], name
    assert load_task("clotho-v1").decoding["num_beams"] == 5 and load_task("clotho-aqa").decoding["num_beams"] == 4
    assert load_task("activitynet-qa").decoding["temperature"] == 0.2
    assert load_task("vqav2-spoken").metrics[0] == "vqa_soft_accuracy"


def _figures(metric):
    from uni_moe_hf.evaluation.metrics import METRICS

    return METRICS[metric].figures


def test_a_task_that_is_like_another_does_not_inherit_what_the_paper_measured(tmp_path):
    (tmp_path / "mine.yaml").write_text("like: mmbench\ntitle: Mine\n")
    task = load_task(tmp_path / "mine.yaml")
    assert task.name == "mine" and task.metrics == ("choice",) and not task.paper


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metrics: [exact]", "`metrics` is 'exact'; there are exact_match, "),
        ("metric: [choice]", "says 'metric', which is none of name, metrics"),
        ("metrics: [exact_match]\ntakes: [smell]", "`takes` is 'smell'; there are image, video, audio, speech"),
        ("title: x", "give `metrics`, such as"),
        ("method: prefer\nmetrics: [exact_match]", "leave out `metrics`"),
        ("method: choose\nmetrics: [exact_match]", r"scored by `metrics: \[choice\]`"),
        (
            "metrics: [exact_match]\nprompt: '{answer}'",
            "may hold {hint}, {options}, {question} in braces, not {answer}",
        ),
        ("metrics: [exact_match]\ndecoding: greedy", "must be names with values, got 'greedy'"),
        ("metrics: {a: 1}", "must be a list of names"),
        ("metrics: [exact_match]\ndecoding: {foo: 1}", "`decoding` cannot hold 'foo'; it takes do_sample"),
        ("metrics: [exact_match]\ndecoding: {num_return_sequences: 2}", "cannot hold 'num_return_sequences'"),
        ("metrics: [exact_match]\ndecoding: {max_new_tokens: abc}", "whole number from 1, got 'abc'"),
        ("metrics: [exact_match]\ndecoding: {do_sample: maybe}", "`do_sample` must be true or false"),
        ("metrics: [exact_match]\nprompt: 5", "`prompt` must be a text, got 5"),
        ("metrics: [exact_match]\ndistractors: -1", "`distractors` must be a number, 0 to 25"),
        ("metrics: [exact_match]\npaper: {values: [1]}", "`paper` needs `values`"),
        ("metrics: [exact_match]\ndecoding: {top_p: 5}", "`top_p` must be a number from 0 to 1, got 5"),
        ("metrics: [exact_match]\ndecoding: {eos_token_id: x}", "cannot hold 'eos_token_id'"),
        ("metrics: [exact_match]\nprompt: '{question.__class__}'", "in braces, not {question.__class__}"),
        ("metrics: [exact_match]\nprompt: '{question:>99}'", "in braces, not {question}"),
        ("metrics: [exact_match]\nprompt: '{'", "`prompt` cannot be filled in"),
        ("metrics: [exact_match]\npaper: {values: {a: high}}", "`paper` needs `values`"),
        ("- a", "must hold names with values"),
        ("a: [", "cannot be read as YAML"),
        ("like: nothing", "like 'nothing', which is no task"),
    ],
)
def test_a_task_file_that_is_none_says_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(file)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="no task 'clotho_v3'; did you mean 'clotho-v"):
        load_task("clotho_v3")
    with pytest.raises(ValueError, match="no task file 'there/is/none.yaml'"):
        load_task("there/is/none.yaml")


def test_the_originals_records_are_read_as_they_lie(tmp_path):
    """One of each of its files for evaluation: the fields are theirs, the texts are not."""
    phrase = "\nAnswer the question using a single word or phrase."
    vqa = original(f"<image>\nWhat is it?{phrase}", question_id="x1", image="/coco/1.jpg", category="default")
    (found,) = load_questions(load_task("a-okvqa"), written(tmp_path, [{**vqa, "text": "?", "gt": ["cat"] * 10}]))
    parts = found.messages[0]["content"]
    assert parts[0] == {"type": "image", "image": "/coco/1.jpg"}
    assert parts[1]["text"] == f"What is it?{phrase}" and found.text == "What is it?" and found.key == "x1"
    assert found.references == ["cat"] * 10 and len(found.messages) == 1

    # MMBench: the picture in a list, no `<image>`, options in the text, the letter in a list.
    asked = f"Hint: a hint.\nLook.\nWhich?\nOptions:\nA.a cat\nB.a dog, two{phrase}"
    row = original(asked, id="m1", image=["MM/1.jpg"], answer=["B"], category=["fine", "coarse"])
    (found,) = load_questions(load_task("mmbench"), written(tmp_path, [row]))
    assert [part["type"] for part in found.messages[0]["content"]] == ["image", "text"]
    assert found.options == {"A": "a cat", "B": "a dog, two"} and found.references == ["B"]
    assert found.answer == "a dog, two" and found.groups == ("fine", "coarse")
    assert found.messages[0]["content"][0]["image"] == str(tmp_path / "MM/1.jpg")

    row = original("<image>\nWhat is x?", id="v1", image="/v/1.png", gt="1<OR>one", capability=["ocr", "math"])
    (found,) = load_questions(load_task("mm-vet"), written(tmp_path, [row]))
    assert found.groups == ("ocr", "math") and found.references == ["1<OR>one"]

    frames = [f"{index}.jpg" for index in range(8)]
    row = original("<audio>\n<video>\nWhat happens?", video=frames, voice=["a.mp3"], answer="a game")
    (found,) = load_questions(load_task("msvd-qa"), written(tmp_path, [row]))
    assert [part["type"] for part in found.messages[0]["content"]] == ["audio", "video", "text"]
    row = {"video": frames, "audio": "a.mp3", "question": "what", "answer": "a game"}
    for given in (row, original("What happens?", **{name: row[name] for name in ("video", "audio", "answer")})):
        (found,) = load_questions(load_task("msvd-qa"), [given])
        assert [part["type"] for part in found.messages[0]["content"]] == ["audio", "video", "text"]


def test_turns_before_the_last_question_stay_context_and_the_last_answer_is_the_reference(tmp_path):
    turns = [("human", "<image>\nwhat"), ("gpt", "a cat"), ("human", "where"), ("gpt", "on a mat")]
    row = {"image": "1.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (found,) = load_questions(SHORT, written(tmp_path, [row]))
    assert [message["role"] for message in found.messages] == ["user", "assistant", "user"]
    assert found.references == ["on a mat"] and found.text == "where"


def test_answers_may_lie_in_a_file_of_their_own_as_vqa_and_textvqa_have_them(tmp_path):
    rows = written(tmp_path, [original("<image>\nWhat is it?", question_id=7, image="1.jpg")])
    answers = [{"answer": "cat", "answer_id": index} for index in range(10)]
    vqa = written(tmp_path, {"annotations": [{"question_id": 7, "answers": answers}]}, "vqa.json")
    assert load_questions(SHORT, rows, answers=vqa)[0].references == ["cat"] * 10
    data = [{"question_id": 1, "image_id": "7", "question": "what is it?", "answers": ["cat"] * 10}]
    text = written(tmp_path, {"data": data}, "text.json")
    assert load_questions(SHORT, rows, answers=text)[0].references == ["cat"] * 10
    with pytest.raises(ValueError, match=r"Row 1 of '.*' cannot be evaluated: it has no right answer"):
        load_questions(SHORT, rows)
    other = written(tmp_path, [{"question_id": 8, "answers": ["cat"]}], "other.json")
    with pytest.raises(ValueError, match="the file of answers has none for '7'"):
        load_questions(SHORT, rows, answers=other)
    for text, message in (("[]", "holds no answers"), ("{", "no valid JSON"), ("3", "holds no answers")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_questions(SHORT, rows, answers=tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no file of answers"):
        load_questions(SHORT, rows, answers=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("fields", "letter"),
    [
        ({"options": ["cat", "dog"], "answer": "B"}, "B"),
        ({"options": ["A. cat", "B. dog"], "answer": "dog"}, "B"),
        ({"choices": ["cat", "dog"], "answer": 1}, "B"),
        ({"options": {"a": "cat", "b": "dog"}, "answer": "b"}, "b"),
        ({"options": json.dumps(["cat", "dog"]), "answer": "(B)"}, "B"),
        ({"options": "cat\ndog", "answer": "b"}, "B"),
        ({"choices": {"label": ["A", "B"], "text": ["cat", "dog"]}, "answer": "B"}, "B"),
        ({"A": "cat", "B": "dog", "C": None, "answer": "B", "hint": "nan"}, "B"),
        ({"choice_a": "cat", "choice_b": "dog", "answer": "B"}, "B"),
        ({"options": "['cat', 'dog']", "answer": "B"}, "B"),
        ({"options": "cat|dog", "answer": "dog"}, "B"),
        ({"options": "['cat' 'dog']", "answer": "B"}, "B"),
        ({"options": [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}], "answer": "B"}, "B"),
        ({"options": [{"text": "cat"}, {"text": "dog"}], "answer": "B"}, "B"),
        ({"options": ["cat", "dog", None], "answer": "B"}, "B"),
    ],
)
def test_options_are_read_in_the_forms_in_which_benchmarks_have_them(fields, letter):
    (found,) = load_questions(CHOICE, [{"question": "Which?", "image": "1.png", **fields}])
    assert found.references == [letter] and [*found.options.values()] == ["cat", "dog"] and found.answer == "dog"
    assert "cat" in found.messages[0]["content"][1]["text"]


def test_an_option_may_have_several_lines_and_answers_may_be_a_list_as_pandas_writes_it(tmp_path):
    asked = "Which?\nOptions:\nA.one\nline\nB.two\nlines\nAnswer the question using a single word or phrase."
    (found,) = load_questions(CHOICE, written(tmp_path, [original(asked, answer=["B"])]))
    assert found.options == {"A": "one\nline", "B": "two\nlines"}
    for written_so in ("['dog', \"it's\"]", "['dog' \"it's\"]"):  # a list, and an array of NumPy's
        (found,) = load_questions(SHORT, [{"question": "what", "answers": written_so}])
        assert found.references == ["dog", "it's"]


def test_an_answer_that_is_no_option_or_a_question_without_options_is_refused():
    with pytest.raises(ValueError, match="its right answer 'bird' is none of its options"):
        load_questions(CHOICE, [{"question": "Which?", "options": ["cat", "dog"], "answer": "bird"}])
    for odd in ({"A": {"x": "cat"}, "B": {"x": "dog"}}, {"label": 3, "text": ["x"]}):
        with pytest.raises(ValueError, match="and not letters with texts"):
            load_questions(CHOICE, [{"question": "Which?", "options": odd, "answer": "A"}])
    with pytest.raises(ValueError, match="none of its options"):
        load_questions(CHOICE, [{"question": "Which?", "options": ["cat", "dog"], "answer": "²"}])
    with pytest.raises(ValueError, match="it offers no options"):
        load_questions(CHOICE, [{"question": "Which?", "options": ["cat"], "answer": "A"}])
    with pytest.raises(ValueError, match="it offers no options"):
        load_questions(CHOICE, [{"question": "Which?", "answer": "bird"}])


def test_plain_rows_fill_the_tasks_prompt_and_captions_may_be_five_columns():
    row = {"question": "Which?", "hint": "look", "options": ["x", "y"], "answer": "A"}
    assert load_questions(CHOICE, [row])[0].messages[0]["content"] == "Hint: look\nWhich?\nA. x\nB. y"
    row = {"audio": "1.wav", **{f"caption_{index}": f"rain {index}" for index in range(1, 6)}}
    (found,) = load_questions(load_task("clotho-v1"), [row])
    assert found.references == [f"rain {index}" for index in range(1, 6)]
    assert found.messages[0]["content"][1]["text"] == "Generate audio caption."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "neither a question nor media"),
        ({"question": 3, "answer": "x"}, "the question is a int"),
        ({"question": "what", "answer": ""}, "no right answer"),
        ({"question": "what", "answer": float("nan")}, "no right answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "asks nothing"),
        ({"messages": "what"}, "'messages' is not a list"),
        ({"conversations": [], "gt": "x"}, "'conversations' is empty"),
        ({"question": "what", "answer": "\ud800"}, "half a character"),
        ({"question": "what", "answer": "x", "task": "\ud800"}, "half a character"),
    ],
)
def test_a_row_that_is_no_question_is_one_sentence(row, message):
    with pytest.raises(ValueError, match=message):
        load_questions(SHORT, [row])


def test_a_question_under_another_name_is_not_left_out_in_silence(tmp_path):
    """A table under a model that was asked nothing would look like any other."""
    row = {"image": "1.png", "frage": "Was ist das?", "answer": "cat"}
    with pytest.raises(ValueError, match=r"nothing is made of its column 'frage'; say .* columns \(frage=question\)"):
        load_questions(SHORT, [row])
    (found,) = load_questions(SHORT, written(tmp_path, [row]), columns=["frage=question"])
    assert found.text == "Was ist das?"
    (found,) = load_questions(SHORT, [{"image": "1.png", "answer": "cat"}])  # pictures alone, as training takes them
    assert [part["type"] for part in found.messages[0]["content"]] == ["image"]
    (tmp_path / "rows.csv").write_text("image;frage;answer;wahl\n1.png;Was?;A;x|y\n")
    columns = ["frage=question", "wahl=options"]
    (found,) = load_questions(CHOICE, str(tmp_path / "rows.csv"), columns=columns)
    assert found.options == {"A": "x", "B": "y"} and found.text == "Was?"


def test_race_own_files_have_several_questions_in_a_row():
    row = {"article": "a", "questions": ["q1", "q2"], "options": [["x", "y"], ["z", "w"]], "answers": ["A", "B"]}
    found = load_questions(CHOICE, [row])
    assert [(each.text, each.references, each.number) for each in found] == [("q1", ["A"], 1), ("q2", ["B"], 2)]


def test_a_folder_that_holds_rows_is_a_source(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "what", "answer": "x"}))
    assert len(load_questions(SHORT, tmp_path)) == 1


def test_sources_without_rows_and_rows_that_are_none():
    with pytest.raises(ValueError, match="no rows to evaluate"):
        load_questions(SHORT, [])
    with pytest.raises(ValueError, match="Row 1 is a int, not an object"):
        load_questions(SHORT, [3])
    rows = [{"question": "what", "answer": "x", "kind": "a"}, {"question": "what", "answer": "x"}]
    assert [each.group for each in load_questions(SHORT, rows, by="kind")] == ["a", "text"]
    with pytest.raises(ValueError, match="No row has the column 'colour'"):
        load_questions(SHORT, rows, by="colour")
    assert len(load_questions(SHORT, rows, limit=1)) == 1


def test_rows_of_several_files_keep_numbers_of_their_own(tmp_path):
    files = [written(tmp_path, [{"question": "what", "answer": str(index)}], f"{index}.json") for index in range(2)]
    found = load_questions(SHORT, [str(file) for file in files])
    assert [each.number for each in found] == [1, 2] and "1.json" in found[1].name


def test_messages_of_prompt_and_completion_are_read(tmp_path):
    row = {"prompt": [{"role": "user", "content": "what"}], "completion": [{"role": "assistant", "content": "cat"}]}
    (found,) = load_questions(SHORT, written(tmp_path, [row]))
    assert found.references == ["cat"] and found.text == "what"


def test_rows_in_memory_may_name_their_columns():
    (found,) = load_questions(SHORT, [{"frage": "what", "label": "cat"}], columns=["frage=question", "label=answer"])
    assert found.text == "what" and found.references == ["cat"]
    (found,) = load_questions(SHORT, [{"image": "1.png", "answer": "cat"}], question="Which animal?")
    assert found.text == "Which animal?"


def test_distractors_differ_from_the_answer_and_each_other_in_more_than_capitals():
    task = load_task("likeliest-choice")
    answers = ["White", "white", "WHITE.", "red", "blue", "green"]
    rows = [{"question": "what", "image": f"{i}.png", "answer": each} for i, each in enumerate(answers)]
    for each in load_questions(task, rows):
        bare = [text.lower().strip(".") for text in each.options.values()]
        assert len(set(bare)) == 4


def test_a_rooted_path_is_sought_in_the_folder_of_the_data(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/1.png").write_bytes(b"")
    row = original("<image>\nwhat", image="/coco/1.png", gt="x")
    (found,) = load_questions(SHORT, written(tmp_path, [row]))
    assert found.messages[0]["content"][0]["image"] == str(tmp_path / "coco/1.png")


def test_another_rows_media_come_from_its_group_with_the_same_kinds():
    rows = [{"question": f"q{i}", "image": f"{i}.png", "answer": "x", "task": "ab"[i % 2]} for i in range(8)]
    rows += [{"question": "text", "answer": "x", "task": "a"}]
    questions = load_questions(SHORT, rows)
    for mine, other in zip(questions, with_other_media(questions), strict=True):
        assert mine.text == other.text and mine.number == other.number
        if mine.media:
            source = other.media[0]["image"]
            assert source != mine.media[0]["image"] and int(source[0]) % 2 == int(mine.media[0]["image"][0]) % 2
    assert questions[0].media[0]["image"] == "0.png"  # the originals stay as they are
    two = with_other_media(questions[:2])  # each alone in its group
    assert [each.media[0]["image"] for each in two] == ["1.png", "0.png"]
    with pytest.raises(ValueError, match="shows the only image that there is, so no other row's"):
        with_other_media(questions[:1])
    with pytest.raises(ValueError, match="No row has media"):
        with_other_media(questions[-1:])


def test_questions_about_one_picture_get_another_one():
    rows = [{"question": f"q{i}", "image": f"{i // 6}.png", "answer": "x"} for i in range(24)]
    questions = load_questions(SHORT, rows)
    for mine, other in zip(questions, with_other_media(questions), strict=True):
        assert mine.media[0]["image"] != other.media[0]["image"]


def test_the_same_picture_under_another_name_is_not_another_one(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "c.png").symlink_to(tmp_path / "a.png")
    sources = [str(tmp_path / f"{name}.png") for name in "abc"]
    pictures = [Image.fromarray(picture()), Image.fromarray(picture())]
    for same in (sources, pictures, [np.zeros((4, 4, 3), np.uint8)] * 2):
        questions = load_questions(SHORT, [{"question": "what", "image": each, "answer": "x"} for each in same])
        with pytest.raises(ValueError, match="shows the only image that there is"):
            with_other_media(questions)
    grid = [{"question": "what", "image": i, "speech": s, "answer": "x"} for i in "abc" for s in "def"]
    questions = load_questions(SHORT, grid)
    for mine, other in zip(questions, with_other_media(questions), strict=True):  # both are another row's
        assert all(a != b for a, b in zip(mine.media, other.media, strict=True))


def test_distractors_are_other_answers_of_the_group_by_a_draw_that_stays():
    task = load_task("likeliest-choice")
    rows = [{"question": "what", "image": f"{i}.png", "answer": f"answer {i}"} for i in range(6)]
    first, again = load_questions(task, rows), load_questions(task, rows)
    assert [each.options for each in first] == [each.options for each in again]
    for each in first:
        assert len(set(each.options.values())) == 4 and each.options[each.references[0]] == each.answer
    assert all(len(each.options) == 2 for each in load_questions(task, rows[:2]))
    lonely = [*rows[:3], {**rows[3], "task": "lonely"}]
    assert len(load_questions(task, lonely)[3].options) == 4  # from the other groups
    own = load_questions(task, [{**rows[0], "options": ["answer 0", "x"]}])
    assert own[0].options == {"A": "answer 0", "B": "x"} and own[0].references == ["A"]
    with pytest.raises(ValueError, match="no other row has another answer"):
        load_questions(task, rows[:1])


def test_task_files_are_part_of_the_package():
    assert len([*(PACKAGE / "evaluation/task_files").glob("*.yaml")]) == len(task_names())
