"""Rows spoken: by espeak-ng, by a command, and what cannot be said."""

import json
import sys

import pytest
import soundfile

from uni_moe_hf.evaluation.questions import load_questions
from uni_moe_hf.evaluation.speaking import command_voice, espeak_voice, speak, speak_rows
from uni_moe_hf.evaluation.tasks import load_task


pytest.importorskip("espeakng_loader")


def written(tmp_path, rows):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def spoken(source, output, voice=None, **settings) -> list[dict]:
    list(speak_rows(source, output, voice or espeak_voice(), **settings))
    return [json.loads(line) for line in (output / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_longer_text_is_a_longer_recording_and_voices_differ():
    short, rate = speak("hello")
    long, _ = speak("hello there, how are you today")
    other, _ = speak("hello", voice="en-us+f3")
    assert rate > 8000 and 0.2 < len(short) / rate < 2 and len(long) > 2 * len(short)
    assert short.tobytes() != other.tobytes() and abs(short).max() > 1000
    with pytest.raises(ValueError, match="espeak-ng has no voice 'klingonese'"):
        espeak_voice("klingonese")


def test_a_passage_is_spoken_and_its_question_stays_written(tmp_path):
    """RACE's rows become RACE-Audio's."""
    row = {"article": "A fox eats.", "question": "Who eats?", "options": ["dog", "fox"], "answer": "B"}
    (made,) = spoken(written(tmp_path, [row]), tmp_path / "out", field="article")
    assert "article" not in made and made["question"] == "Who eats?" and made["spoken"] == "A fox eats."
    assert soundfile.info(tmp_path / "out" / made["speech"]).duration > 0.3
    (question,) = load_questions(load_task("race-audio-middle"), tmp_path / "out/rows.jsonl")
    parts = question.messages[0]["content"]
    assert [part["type"] for part in parts] == ["speech", "text"] and question.references == ["B"]
    assert parts[1]["text"] == "Listen to the article and answer the question: Who eats?\nA. dog\nB. fox"


def test_the_originals_question_is_spoken_and_how_to_answer_stays_written(tmp_path):
    value = "<image>\nWhat is it?\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": ""}]
    (tmp_path / "1.png").write_bytes(b"")
    source = written(tmp_path, [{"conversations": turns, "image": "1.png", "gt": ["cat"] * 10, "question_id": "x"}])
    (made,) = spoken(source, tmp_path / "out")
    assert made["spoken"] == "What is it?" and made["image"] == str(tmp_path / "1.png")
    (question,) = load_questions(load_task("a-okvqa-spoken"), tmp_path / "out/rows.jsonl")
    assert [part["type"] for part in question.messages[0]["content"]] == ["image", "speech", "text"]
    assert question.messages[0]["content"][2]["text"].startswith("Answer the question using")
    (made,) = spoken(source, tmp_path / "whole", whole=True)
    assert made["spoken"].endswith("a single word or phrase.")
    with pytest.raises(ValueError, match="its question is spoken already"):
        spoken(tmp_path / "out/rows.jsonl", tmp_path / "twice")


def test_the_last_question_of_a_conversation_is_spoken_and_one_without_words_stays(tmp_path):
    def chat(*content, before=()):
        return {"messages": [*before, {"role": "user", "content": [*content]}, {"role": "assistant", "content": "x"}]}

    (tmp_path / "1.png").write_bytes(b"")
    image, text = {"type": "image", "path": "1.png"}, {"type": "text", "text": "What is it?"}
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    made = spoken(written(tmp_path, [chat(image, text, before=before), chat(image)]), tmp_path / "out")
    first = made[0]["messages"][2]["content"]
    assert [part["type"] for part in first] == ["image", "speech"] and first[0]["path"] == str(tmp_path / "1.png")
    assert made[0]["spoken"] == "What is it?" and made[0]["messages"][0]["content"] == "Hello"
    assert [part["type"] for part in made[1]["messages"][0]["content"]] == ["image"] and "spoken" not in made[1]
    found = load_questions(load_task("short-answers"), tmp_path / "out/rows.jsonl")
    assert found[0].media[1]["path"] == str(tmp_path / "out" / first[1]["path"])


def test_mmbench_audio_is_made_of_the_originals_rows_and_of_mmbenchs_table(tmp_path):
    asked = "Hint: look.\nWhich?\nOptions:\nA.a cat\nB.a dog\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": ""}]
    ours = written(tmp_path, [{"conversations": turns, "image": ["1.png"], "answer": ["B"]}])
    (tmp_path / "t").mkdir()
    row = {"question": "Which?", "hint": "look.", "A": "a cat", "B": "a dog", "image": "1.png", "answer": "B"}
    table = written(tmp_path / "t", [row])
    for source, settings in ((ours, {}), (table, {"task": load_task("mmbench")})):
        (made,) = spoken(source, tmp_path / "out", **settings)
        assert "Which?" in made["spoken"] and "a dog" in made["spoken"] and "look." in made["spoken"]
        assert "single word" not in made["spoken"]
        (question,) = load_questions(load_task("mmbench-audio"), tmp_path / "out/rows.jsonl")
        parts = question.messages[0]["content"]
        assert [part["type"] for part in parts] == ["image", "speech", "text"]
        assert parts[2]["text"] == "Answer the question using a single word or phrase."
        assert question.options == {"A": "a cat", "B": "a dog"} and question.references == ["B"]


def test_race_own_files_are_spoken_question_by_question(tmp_path):
    row = {"article": "A fox.", "questions": ["q1", "q2"], "options": [["x", "y"], ["z", "w"]], "answers": ["A", "B"]}
    made = spoken(written(tmp_path, [row]), tmp_path / "out", field="article")
    assert [each["question"] for each in made] == ["q1", "q2"] and made[0]["speech"] == made[1]["speech"]
    found = load_questions(load_task("race-audio-high"), tmp_path / "out")
    assert [each.references for each in found] == [["A"], ["B"]]


def test_a_plain_question_that_is_spoken_is_asked_as_the_originals(tmp_path):
    row = {"question": "What is it?", "image": "1.png", "direct_answers": ["cat"] * 10}
    for whole, kinds in ((False, ["image", "speech", "text"]), (True, ["image", "speech"])):
        task = load_task("a-okvqa")
        spoken(written(tmp_path, [row]), tmp_path / "out", whole=whole, task=task)
        (question,) = load_questions(load_task("a-okvqa-spoken"), tmp_path / "out/rows.jsonl")
        assert [part["type"] for part in question.messages[0]["content"]] == kinds
    spoken(written(tmp_path, [row]), tmp_path / "out")
    (question,) = load_questions(load_task("a-okvqa-spoken"), tmp_path / "out/rows.jsonl")
    assert question.messages[0]["content"][2]["text"] == "Answer the question using a single word or phrase."


def test_a_recording_is_made_once_for_each_voice(tmp_path):
    made = []

    def voice(text, path):
        made.append(text)
        soundfile.write(path, [0.0] * 800, 16000)

    source = written(tmp_path, [{"question": text, "answer": "x"} for text in ("one", "two", "one")])
    rows = spoken(source, tmp_path / "out", voice)
    assert made == ["one", "two"] and rows[0]["speech"] == rows[2]["speech"]
    spoken(source, tmp_path / "out", voice)
    assert made == ["one", "two"]
    voice.name = "another"
    spoken(source, tmp_path / "out", voice)
    assert made == ["one", "two"] * 2


def test_any_command_is_a_voice(tmp_path):
    script = tmp_path / "say.py"
    lines = ["import sys, soundfile", "text = sys.argv[2] if len(sys.argv) > 2 else sys.stdin.read()"]
    lines += ["soundfile.write(sys.argv[1], [0.1] * 100 * len(text), 16000)"]
    script.write_text("\n".join(lines))
    source = written(tmp_path, [{"question": "four", "answer": "x"}])
    for number, end in enumerate(("", " {text}")):
        voice = command_voice(f"{sys.executable} {script} {{output}}{end}")
        (made,) = spoken(source, tmp_path / f"out{number}", voice)
        assert soundfile.info(tmp_path / f"out{number}" / made["speech"]).frames == 400
    with pytest.raises(ValueError, match="does not say where to write"):
        command_voice("say hello")
    with pytest.raises(ValueError, match="Row 1 of .* cannot be spoken: The command 'no-such-voice' cannot be run"):
        spoken(source, tmp_path / "out2", command_voice("no-such-voice {output}"))
    with pytest.raises(ValueError, match="wrote no recording .exit code 0"):
        spoken(source, tmp_path / "out2", command_voice(f"{sys.executable} -c pass {{output}}"))
    assert not (tmp_path / "out2/rows.jsonl").exists()


def test_rows_are_not_written_over_and_a_voice_without_sound_is_none(tmp_path):
    row = {"question": "one", "answer": "1.png", "image": "1.png", "note": "1.png"}
    (tmp_path / "1.png").write_bytes(b"")
    (made,) = spoken(written(tmp_path, [row]), tmp_path / "out")
    assert made["answer"] == made["note"] == "1.png" and made["image"] == str(tmp_path / "1.png")
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="would be written over itself; name another folder"):
        spoken(tmp_path / "out/rows.jsonl", tmp_path / "out")
    for command in ("touch {output}", f"cp {tmp_path / 'rows.json'} {{output}}"):
        with pytest.raises(ValueError, match="cannot be spoken: the voice wrote no sound"):
            spoken(written(tmp_path, [row]), tmp_path / "out", command_voice(command))
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before
    recording = tmp_path / "out" / made["speech"]
    recording.write_bytes(b"")  # as a crash leaves one
    spoken(written(tmp_path, [row]), tmp_path / "out")
    assert soundfile.info(recording).frames > 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["rows.jsonl", "speech"]
    for source in (tmp_path / "out", f"{tmp_path}/out/ro*.jsonl"):  # the same file by other names
        with pytest.raises(ValueError, match="would be written over itself"):
            spoken(source, tmp_path / "out")
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before
    assert [file.name for file in (tmp_path / "out/speech").iterdir()] == [recording.name]
    with pytest.raises(ValueError, match="cannot be read as a shell would"):
        command_voice("say 'x {output}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "x"}, "no text in 'question'; name its column with --field"),
        ({"question": " ", "answer": "x"}, "no text to say"),
        ({"question": ["x"]}, "no text in 'question'"),
        ({"messages": ["x"]}, "'messages' is not a list of objects"),
        ({"question": "what", "speech": "x.wav", "answer": "x"}, "it has a recording already"),
        ({"messages": [{"role": "user", "content": 5}]}, "neither text nor a list of parts"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no turn is by 'user'"),
    ],
)
def test_a_row_with_nothing_to_say_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"Row 1 of '.*' cannot be spoken: .*{message}"):
        spoken(written(tmp_path, [row]), tmp_path / "out")
