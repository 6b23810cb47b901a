"""Answers of a model: batches, what cannot be read, predictions that go on, judges, comparisons, likelihoods."""

import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import soundfile
import torch
from PIL import Image
from tiny import WORDS, picture, tiny_config, tiny_model, tiny_processor, tone
from tiny_training import rows_apart as rows
from tiny_training import write_media

from uni_moe_hf import UniMoEDataCollator, evaluate
from uni_moe_hf.evaluation import answering, evaluation
from uni_moe_hf.evaluation.judging import judged, open_judge, parse_grade
from uni_moe_hf.evaluation.predictions import Predictions, model_digest, write_original
from uni_moe_hf.evaluation.questions import load_questions
from uni_moe_hf.evaluation.tasks import Task, load_task


SHORT = Task("short", metrics=("exact_match", "chance"), decoding={"max_new_tokens": 4})


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = write_media(tmp_path_factory.mktemp("media"), 12)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(12))))
    return folder


@pytest.fixture(scope="module")
def model():
    """One whose answers depend on what it is asked."""
    model = tiny_model(seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "norm" not in name and parameter.dim() > 1:
                parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model.config)


def said(found) -> dict[int, str]:
    return {number: record["prediction"] for number, record in found.records.items()}


def test_answers_do_not_depend_on_batches_order_or_who_reads(model, processor, media):
    source = media / "rows.jsonl"
    alone = evaluate(model, processor, SHORT, source, batch_size=1, workers=0)
    assert len(set(said(alone).values())) > 3  # random words, of different rows different ones
    for settings in ({"batch_size": 5, "workers": 0}, {"batch_size": 12, "workers": 1}):
        assert said(evaluate(model, processor, SHORT, source, **settings)) == said(alone)
    assert not model.training


def test_answers_are_those_of_generate(model, processor, media):
    found = evaluate(model, processor, SHORT, media / "rows.jsonl", workers=0)
    for question in found.questions[:6]:
        inputs = processor.apply_chat_template(
            question.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said(found)[question.number] == text.strip()


def test_figures_are_by_group_and_over_all_rows(model, processor, media):
    found = evaluate(model, processor, SHORT, media / "rows.jsonl", workers=0)
    assert {*found.figures} == {"image", "speech", "audio", "video", "text", "image+audio+speech", "all"}
    assert found.figures["all"]["exact_match"].rows == 12 and found.main[0] == "exact_match"
    table = found.table()
    assert "12 rows, 95 % bootstrap intervals" in table and "image+audio+speech" in table
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["figures"]["all"]["exact_match"]["rows"] == 12 and facts["answered_now"] == 12


def test_media_that_cannot_be_read_are_told_and_in_no_figure(model, processor, media, tmp_path):
    bad = rows(4)
    (media / "broken.png").write_bytes(b"no picture")
    bad[0]["messages"][0]["content"][0]["path"] = "broken.png"
    bad[1]["messages"][0]["content"][0]["path"] = "missing.wav"
    for workers in (0, 1):
        found = evaluate(model, processor, SHORT, bad, media_root=media, batch_size=4, workers=workers)
        assert sorted(found.unreadable) == [1, 2] and found.figures["all"]["exact_match"].rows == 2
        assert "2 of 4 rows could not be read and are in no figure; the first is row 1" in found.table()
        assert "missing.wav" in found.unreadable[2]
    file = tmp_path / "p.jsonl"
    settings = {"media_root": media, "workers": 0, "predictions": file}
    assert len(evaluate(model, processor, SHORT, bad, **settings).unreadable) == 2
    lines = file.read_bytes()
    assert len(evaluate(model, processor, SHORT, bad, **settings).unreadable) == 2 and file.read_bytes() == lines
    Image.fromarray(picture()).save(media / "broken.png")  # mended: asked again
    assert [*evaluate(model, processor, SHORT, bad, **settings).unreadable] == [2]
    (media / "broken.png").write_bytes(b"no picture")
    found = evaluate(model, processor, SHORT, bad[:2], media_root=media, workers=0)
    assert found.figures == {"all": {}} and "no row could be read" in found.table()


def test_a_killed_run_goes_on_and_ends_with_the_same_predictions(model, processor, media, tmp_path, monkeypatch):
    source, whole, half = media / "rows.jsonl", tmp_path / "whole.jsonl", tmp_path / "deep/half.jsonl"
    sampled = replace(SHORT, decoding={"do_sample": True, "temperature": 1.5, "max_new_tokens": 4})
    settings = {"batch_size": 3, "workers": 0, "seed": 7}
    expected = evaluate(model, processor, sampled, source, predictions=whole, **settings)
    run, calls = answering._run, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(answering, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, sampled, source, predictions=half, **settings)
    monkeypatch.setattr(answering, "_run", run)
    lines = half.read_bytes()
    assert lines.count(b"\n") == 1 + 6
    half.write_bytes(lines + b'{"row": 9, "predic')  # as a crash in the middle of a line leaves it
    found = evaluate(model, processor, sampled, source, predictions=half, **settings)
    assert found.answered_now == 6 and said(found) == said(expected)
    assert sorted(map(json.loads, half.read_text().splitlines()[1:]), key=lambda line: line["row"]) == sorted(
        map(json.loads, whole.read_text().splitlines()[1:]), key=lambda line: line["row"]
    )
    again = evaluate(model, processor, sampled, source, predictions=half, **settings)
    assert again.answered_now == 0 and again.figures == found.figures


def test_predictions_of_something_else_are_refused(model, processor, media, tmp_path):
    file, source = tmp_path / "p.jsonl", media / "rows.jsonl"
    evaluate(model, processor, SHORT, source, predictions=file, workers=0, limit=3)
    kept = file.read_bytes()
    more = evaluate(model, processor, SHORT, source, predictions=file, workers=0)  # --limit is gone: the rest is added
    assert more.answered_now == 9
    file.write_bytes(kept)
    other = rows(12)
    other[1]["messages"][0]["content"][1]["text"] = "who is it"
    with pytest.raises(ValueError, match="holds predictions of other data: row 2 asks something else"):
        evaluate(model, processor, SHORT, other, media_root=media, predictions=file, workers=0)
    with pytest.raises(ValueError, match="holds predictions of another decoding"):
        evaluate(model, processor, replace(SHORT, decoding={}), source, predictions=file, workers=0)
    with pytest.raises(ValueError, match="holds predictions of another model"):
        evaluate(tiny_model(seed=1), processor, SHORT, source, predictions=file, workers=0)
    with pytest.raises(ValueError, match="holds predictions of another media"):
        evaluate(model, processor, SHORT, source, media="other", predictions=file, workers=0)
    assert file.read_bytes() == kept
    (tmp_path / "notes.jsonl").write_text("my notes\n")
    with pytest.raises(ValueError, match="holds no predictions of this command"):
        evaluate(model, processor, SHORT, source, predictions=tmp_path / "notes.jsonl", workers=0)
    assert (tmp_path / "notes.jsonl").read_text() == "my notes\n"
    (tmp_path / "notes.jsonl").write_text('{"one": "line"}')  # without a line's end
    with pytest.raises(ValueError, match="holds no predictions of this command"):
        evaluate(model, processor, SHORT, source, predictions=tmp_path / "notes.jsonl", workers=0)
    assert (tmp_path / "notes.jsonl").read_text() == '{"one": "line"}'
    (tmp_path / "notes.jsonl").write_text('{"predictions_')  # a run that was killed at once
    assert evaluate(model, processor, SHORT, source, predictions=tmp_path / "notes.jsonl", workers=0).main
    with pytest.raises(OSError, match="cannot be written to"):
        evaluate(model, processor, SHORT, source, predictions=tmp_path, workers=0)


def test_a_picture_that_changed_is_another_question(model, processor, media, tmp_path):
    file, folder = tmp_path / "p.jsonl", tmp_path / "data"
    folder.mkdir()

    def ask(given, **settings):
        return evaluate(model, processor, SHORT, given, predictions=file, workers=0, **settings)

    in_memory = [[{"question": "what", "image": Image.fromarray(picture(seed)), "answer": "x"}] for seed in range(2)]
    ask(in_memory[0])
    assert ask(in_memory[0]).answered_now == 0
    with pytest.raises(ValueError, match="holds predictions of other data"):
        ask(in_memory[1])
    file.unlink()
    Image.fromarray(picture()).save(folder / "a.png")
    given = [{"question": "what", "image": "a.png", "answer": "x"}]
    ask(given, media_root=folder)
    (tmp_path / "moved").mkdir()
    (folder / "a.png").rename(tmp_path / "moved/a.png")
    assert ask(given, media_root=tmp_path / "moved").answered_now == 0  # wherever the data lie
    sounds = [tmp_path / f"{number}/a.wav" for number in range(2)]
    for number, sound in enumerate(sounds):  # of one name and length
        sound.parent.mkdir()
        soundfile.write(sound, tone(pitch=300 + 100 * number), 16000)
    heard = [[{"question": "what", "audio": str(sound), "answer": "x"}] for sound in sounds]
    file.rename(tmp_path / "kept")
    ask(heard[0])
    with pytest.raises(ValueError, match="holds predictions of other data"):
        ask(heard[1])
    (tmp_path / "kept").replace(file)
    Image.fromarray(picture(1, (40, 40))).save(tmp_path / "moved/a.png")
    with pytest.raises(ValueError, match="holds predictions of other data"):
        ask(given, media_root=tmp_path / "moved")


@pytest.mark.parametrize("line", ["null", "[1]", "5", '{"row": 1}', '{"row": [1], "digest": "x"}', "", "[" * 5000])
def test_a_line_that_is_no_prediction_is_named(model, processor, media, tmp_path, line):
    file = tmp_path / "p.jsonl"
    evaluate(model, processor, SHORT, media / "rows.jsonl", predictions=file, workers=0, limit=2)
    lines = file.read_text().splitlines()
    bad = [lines[0], line, *lines[1:]]
    file.write_text("\n".join(bad) + "\n")
    with pytest.raises(ValueError, match="Line 2 of '.*' is no prediction; delete"):
        evaluate(model, processor, SHORT, media / "rows.jsonl", predictions=file, workers=0)
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match="holds no predictions of this command"):
        evaluate(model, processor, SHORT, media / "rows.jsonl", predictions=file, workers=0)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
def test_two_runs_do_not_write_one_file(model, processor, media, tmp_path):
    with Predictions(tmp_path / "p.jsonl", {"task": "x"}, [], []):
        with pytest.raises(ValueError, match="Another run is writing to"):
            evaluate(model, processor, SHORT, media / "rows.jsonl", predictions=tmp_path / "p.jsonl", workers=0)


def test_rows_without_media_are_not_compared_with_others(model, processor, media):
    given = [*media_rows(), {"question": "what", "answer": "x"}]
    found = evaluate(model, processor, "preference", given, media_root=media, workers=0)
    assert found.figures["all"]["gain"].rows == len(given) - 1 and found.without_media == 1
    assert "1 rows have no media and are not asked" in found.table()


def test_a_model_gets_back_the_modes_of_its_parts(model, processor):
    model.train()
    model.model.vision_tower.eval()
    evaluate(model, processor, SHORT, [{"question": "what", "answer": "x"}], workers=0)
    assert model.training and not model.model.vision_tower.training
    model.eval()


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"batch_size": 1.5}, {"limit": 0}, {"limit": -1}])
def test_numbers_that_are_none_are_refused(model, processor, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` is .*; it must be a number of"):
        evaluate(model, processor, SHORT, [{"question": "what", "answer": "x"}], **settings)


def test_a_model_is_known_by_its_weights_not_by_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert model_digest(type(model).from_pretrained(tmp_path)) == model_digest(model)
    changed = tiny_model(seed=2)
    changed.load_state_dict(model.state_dict())
    assert model_digest(changed) == model_digest(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.001)
    assert model_digest(changed) != model_digest(model)


def test_predictions_in_the_originals_format_keep_its_records(tmp_path):
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": ""}]
    given = [{"conversations": turns, "gt": ["x"], "id": 1}, {"conversations": turns, "answer": ["B"], "id": 2}]
    (tmp_path / "rows.json").write_text(json.dumps(given))
    questions = load_questions(SHORT, tmp_path / "rows.json")
    write_original(tmp_path / "out/o.json", questions, {1: {"prediction": "a"}, 2: {"prediction": "b"}})
    made = json.loads((tmp_path / "out/o.json").read_text())
    assert made == [{**given[0], "answer": "a"}, {**given[1], "text": "b"}]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["o.json"]


def test_likelihoods_are_the_losses_of_the_answers(model, processor, media):
    with_media = [row for row in rows(12) if len(row["messages"][0]["content"]) == 2]
    found = evaluate(model, processor, "preference", with_media, media_root=media, workers=0, batch_size=3)
    collate = UniMoEDataCollator(processor, media_root=media)
    for row, question in zip(with_media, found.questions, strict=True):
        batch = collate([row])
        loss = model(**batch).loss.item()
        assert found.records[question.number]["losses"][0] == pytest.approx(loss, abs=1e-5)
    figures = found.figures["all"]
    assert figures["gain"].value == pytest.approx(figures["other_loss"].value - figures["own_loss"].value)
    assert figures["gain"].unit == "" and 0 <= figures["own_preferred"].value <= 1


def test_the_likeliest_option_is_taken(model, processor, media):
    task = replace(load_task("likeliest-choice"), distractors=0)
    options = ["a bird", "bell", "red", "hello"]
    given = [{"question": "what is it", "image": "0.png", "options": options, "answer": "red"}]
    found = evaluate(model, processor, task, given, media_root=media, workers=0)
    losses = found.records[1]["losses"]
    assert len(losses) == 4
    likeliest = options[losses.index(min(losses))]
    assert found.figures["all"]["choice_accuracy"].value == float(likeliest == "red")
    right = evaluate(model, processor, task, [{**given[0], "answer": likeliest}], media_root=media, workers=0)
    assert right.figures["all"]["choice_accuracy"].value == 1.0


def test_likelihoods_of_other_options_or_answers_are_not_taken_from_a_file(model, processor, media, tmp_path):
    task, file = load_task("likeliest-choice"), tmp_path / "p.jsonl"
    given = [{"question": "what", "image": f"{index}.png", "answer": word} for index, word in enumerate(WORDS[:12])]
    few = evaluate(model, processor, task, given, media_root=media, workers=0, limit=4)
    all_rows = evaluate(model, processor, task, given, media_root=media, workers=0, predictions=file)
    assert [each.options for each in few.questions] == [each.options for each in all_rows.questions[:4]]
    changed = [{**row, "answer": "something"} for row in given[:1]] + given[1:]
    for name in ("likeliest-choice", "preference"):
        file = tmp_path / f"{name}.jsonl"
        evaluate(model, processor, name, given, media_root=media, workers=0, predictions=file)
        with pytest.raises(ValueError, match="holds predictions of other data: row 1"):
            evaluate(model, processor, name, changed, media_root=media, workers=0, predictions=file)


def test_what_is_sampled_belongs_to_its_batches_and_seeds_do_not_overlap(model, processor, media, tmp_path):
    sampled = replace(SHORT, decoding={"do_sample": True, "temperature": 2.0, "max_new_tokens": 4})
    settings = {"workers": 0, "predictions": tmp_path / "p.jsonl"}
    evaluate(model, processor, sampled, media / "rows.jsonl", batch_size=4, **settings)
    with pytest.raises(ValueError, match="holds predictions of another batch size .4, not 2"):
        evaluate(model, processor, sampled, media / "rows.jsonl", batch_size=2, **settings)
    same = [{"question": "what", "answer": "x"}] * 8
    answers = [
        [r["prediction"] for r in evaluate(model, processor, sampled, same, batch_size=4, seed=seed).records.values()]
        for seed in (0, 1)
    ]
    assert answers[0][4:] != answers[1][:4]


def test_a_row_of_several_categories_counts_in_each_and_all_stays_the_total(model, processor):
    given = [{"question": "what", "answer": "x", "category": each} for each in (["a", "b"], ["a"], "all")]
    figures = evaluate(model, processor, SHORT, given, workers=0).figures
    assert {name: found["exact_match"].rows for name, found in figures.items()} == {
        "a": 2,
        "b": 1,
        "all (group)": 1,
        "all": 3,
    }


def test_what_a_metric_lacks_is_said_before_anything_is_answered(processor, monkeypatch):
    monkeypatch.setattr(evaluation, "answer_questions", None)
    given = [{"question": "what", "answer": "maybe"}]
    with pytest.raises(ValueError, match="Task 'yes-no' cannot be scored: yes_no compares with yes or no"):
        evaluate(None, processor, "yes-no", given)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match="needs `jiwer`: `pip install uni-moe-hf.evaluate.`"):
        evaluate(None, processor, Task("heard", metrics=("word_error_rate",)), given)


def test_records_without_an_answer_are_told(model, processor):
    found = evaluate(model, processor, SHORT, [{"question": "what", "answer": "x"}] * 2, workers=0)
    with pytest.raises(ValueError, match="1 rows have no answer, the first of them Row 2 of"):
        evaluation.Evaluation(found.task, found.questions, {1: found.records[1]})


def test_two_models_are_compared_on_the_same_rows(model, processor, media):
    mine = evaluate(model, processor, "preference", media_rows(), media_root=media, workers=0)
    theirs = evaluate(tiny_model(seed=1), processor, "preference", media_rows(), media_root=media, workers=0)
    difference = mine.against(theirs)["all"]["own_loss"]
    assert difference.value == pytest.approx(
        mine.figures["all"]["own_loss"].value - theirs.figures["all"]["own_loss"].value
    )
    assert difference.low <= difference.value <= difference.high
    assert "difference to the baseline, paired:" in mine.table(theirs)
    assert mine.against(mine)["all"]["gain"].high == 0.0 and repr(mine) == mine.table()
    shorter = evaluate(model, processor, "preference", media_rows()[::4], media_root=media, workers=0)
    with pytest.raises(ValueError, match="the same task and rows"):
        mine.against(shorter)


def media_rows() -> list[dict]:
    return [row for row in rows(12) if len(row["messages"][0]["content"]) == 2]


def test_a_task_that_does_not_fit_the_model_or_the_rows_is_refused_before_an_answer(processor, media, monkeypatch):
    deaf = tiny_model(without=("audio", "speech"))
    monkeypatch.setattr(evaluation, "answer_questions", None)
    with pytest.raises(ValueError, match="holds speech, for which the model has no tower; it takes text, "):
        evaluate(deaf, tiny_processor(deaf.config), SHORT, media / "rows.jsonl")
    with pytest.raises(ValueError, match="is about image and speech, and it holds no speech; say which column"):
        evaluate(None, processor, "a-okvqa-spoken", [{"image": "0.png", "question": "what", "gt": ["x"] * 10}])
    with pytest.raises(ValueError, match="is scored by a judge: give one"):
        evaluate(None, processor, "mm-vet", [])
    with pytest.raises(ValueError, match="`media` is 'none'"):
        evaluate(None, processor, SHORT, [], media="none")
    with pytest.raises(ValueError, match="by itself; leave `media` alone"):
        evaluate(None, processor, "preference", [], media="other")


def test_a_metric_that_does_not_apply_is_left_out_and_the_main_one_is_refused(model, processor):
    given = [{"question": "what", "answer": "x"}]
    task = replace(SHORT, metrics=("exact_match", "vqa_soft_accuracy", "judged"))
    found = evaluate(model, processor, task, given, workers=0)
    assert {*found.figures["all"]} == {"exact_match"}
    assert "vqa_soft_accuracy is left out: soft accuracy compares with" in found.table()
    assert "judged is left out: no judge was given" in found.table()
    with pytest.raises(ValueError, match="Task 'short' cannot be scored: soft accuracy"):
        evaluate(model, processor, replace(SHORT, metrics=("vqa_soft_accuracy",)), given, workers=0)


# --- Judges


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ('{"correct": "yes", "score": 4}', {"correct": True, "score": 4.0}),
        ("Sure: {'pred': 'no', 'score': 1} as asked", {"correct": False, "score": 1.0}),
        ('{"correct": true, "score": "5"}', {"correct": True, "score": 5.0}),
        ('{"correct": "perhaps", "score": 4}', None),
        ('{"correct": "yes", "score": 9}', None),
        ('{"score": 3}', None),
        ('{"correct": "Yes", "score": 4, "why": "it\'s fine"}', {"correct": True, "score": 4.0}),
        ('<think>{x} is a cat</think> {"correct": "no", "score": 0}', {"correct": False, "score": 0.0}),
        ('{"correct": "yes", "score": null}', None),
        ("{['yes']}", None),
        ("{[1]: 2}", None),
        ('{"correct": "yes", "score": ' + "9" * 400 + "}", None),
        ("yes, 5", None),
        ("", None),
    ],
)
def test_a_judges_reply_is_a_grade_or_nothing(reply, grade):
    assert parse_grade(reply) == grade


def test_judged_answers_are_scored_and_asked_once(model, processor, tmp_path):
    asked = []

    def judge(messages):
        asked.append(messages[-1]["content"])
        return (
            '{"correct": "yes", "score": 4}' if "Right answer: x\n" in asked[-1] else '{"correct": "no", "score": 1}'
        )

    task = Task("judged", metrics=("judged",), decoding={"max_new_tokens": 2})
    given = [{"question": "what", "answer": answer} for answer in ("x", "y", "x", "z")]
    file = tmp_path / "p.jsonl"
    found = evaluate(model, processor, task, given, judge=judge, predictions=file, workers=0)
    assert found.figures["all"]["judged_accuracy"].value == 0.5
    assert found.figures["all"]["judged_score"].value == 2.5 and "2.500" in found.table()
    again = evaluate(model, processor, task, given, judge=judge, predictions=file, workers=0)
    assert len(asked) == 4 and again.figures == found.figures
    other = [{**row, "answer": "x"} for row in given]  # judged beside other answers
    assert evaluate(model, processor, task, other, judge=judge, predictions=file, workers=0).main[1].value == 1.0
    assert len(asked) == 6
    judge.name = "another judge"
    evaluate(model, processor, task, other, judge=judge, predictions=file, workers=0)
    assert len(asked) == 10


def test_a_grade_of_an_answer_that_is_gone_is_none(model, processor, tmp_path):
    task, file = Task("judged", metrics=("judged",), decoding={"max_new_tokens": 2}), tmp_path / "p.jsonl"
    given = [{"question": "what", "answer": "x"}] * 2
    judge = lambda messages: '{"correct": "yes", "score": 4}'  # noqa: E731
    evaluate(model, processor, task, given, judge=judge, predictions=file, workers=0)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *lines[2:]]) + "\n")  # without the first answer
    found = evaluate(model, processor, task, given, judge=judge, predictions=file, workers=0)
    assert found.answered_now == 1 and found.figures["all"]["judged_accuracy"].rows == 2


def test_an_answer_without_a_grade_is_told_and_in_no_figure(model, processor):
    def judge(messages):
        return "no idea" if "Right answer: y" in messages[-1]["content"] else '{"correct": "yes", "score": 4}'

    task = Task("judged", metrics=("judged",), decoding={"max_new_tokens": 2})
    given = [{"question": "what", "answer": answer} for answer in ("x", "y", "x")]
    found = evaluate(model, processor, task, given, judge=judge, workers=0)
    assert found.figures["all"]["judged_accuracy"].rows == 2 and found.ungraded == {2: "no idea"}
    assert "1 of 3 answers got no grade and are in no figure; for the first, row 2, the judge said" in found.table()
    assert dict(judged(judge, {2: (found.questions[1], "x")})) == {2: {"ungraded": "no idea"}}


def test_grades_that_came_before_a_judge_failed_are_kept(model, processor, tmp_path):
    def judge(messages):
        if "Right answer: 5\n" in messages[-1]["content"]:
            raise OSError("The judge went away.")
        return '{"correct": "yes", "score": 4}'

    task, file = Task("judged", metrics=("judged",), decoding={"max_new_tokens": 2}), tmp_path / "p.jsonl"
    given = [{"question": "what", "answer": str(index)} for index in range(6)]
    with pytest.raises(OSError, match="The judge went away"):
        evaluate(model, processor, task, given, judge=judge, predictions=file, workers=0)
    assert file.read_text().count('"judgement"') == 5


def test_a_judge_is_reached_over_the_interface_of_openai():
    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions" and sent["temperature"] == 0
            if sent["model"] != "grader":
                self.send_error(401, "Unauthorized")
                return
            if sent["messages"][0]["content"] == "html":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>")
                return
            reply = {"role": "assistant", "content": '{"correct": "yes", "score": 3}'}
            choice = {"index": 0, "message": reply, "finish_reason": "stop"}
            body = json.dumps({"id": "1", "created": 0, "model": "m", "object": "x", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        judge = open_judge(address, "grader")
        assert parse_grade(judge([{"role": "user", "content": "grade"}])) == {"correct": True, "score": 3.0}
        with pytest.raises(OSError, match=f"The judge at {address} refused: 401 Unauthorized"):
            open_judge(address, "nobody")([{"role": "user", "content": "grade"}])
        with pytest.raises(OSError, match="answers, but not as an OpenAI-compatible server does"):
            judge([{"role": "user", "content": "html"}])
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(OSError, match=f"The judge at {address} cannot be reached: .*refused"):
        judge([{"role": "user", "content": "grade"}])
    with pytest.raises(ValueError, match="is the address of an OpenAI-compatible server"):
        open_judge("localhost:8000")


def test_a_model_without_a_mixture_and_towers_is_evaluated_too(media):
    config = tiny_config({"mlp_layer_types": ["dense", "dense"]}, without=("vision", "audio", "speech"))
    model = tiny_model({"mlp_layer_types": ["dense", "dense"]}, without=("vision", "audio", "speech"))
    found = evaluate(model, tiny_processor(config), SHORT, [{"question": "what", "answer": "x"}], workers=0)
    assert found.figures["all"]["exact_match"].rows == 1
