"""`uni-moe evaluate`: the table, the files it leaves, and one sentence for whatever goes wrong."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from tiny import picture, tiny_model, tiny_processor, tone

from uni_moe_hf.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two checkpoints and rows of pictures, sounds and words."""
    root = tmp_path_factory.mktemp("place")
    for seed in (2, 3):
        model = tiny_model(seed=seed)
        model.save_pretrained(root / f"model{seed}")
        tiny_processor(model.config).save_pretrained(root / f"model{seed}")
    rows = []
    for index in range(6):
        Image.fromarray(picture(index)).save(root / f"{index}.png")
        soundfile.write(root / f"{index}.wav", tone(pitch=200 + 50 * index), 16000)
        rows.append({"image": f"{index}.png", "question": "what is it", "answer": "a bird", "kind": "seen"})
        rows.append({"speech": f"{index}.wav", "question": "what is this", "answer": "bell", "kind": "heard"})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def options(place: Path, *more: object, task: str = "short-answers") -> list[object]:
    short = ["--max-new-tokens", 3] if task != "preference" else []
    return [place / "model2", "--task", task, "--data", place / "rows.jsonl", "--workers", 0, *short, *more]


def test_the_tasks_are_listed_without_a_checkpoint(capsys):
    code, out, _ = run(capsys, "--list")
    assert code == 0 and "MMBench (image; choice)" in out and "clotho-v2" in out and len(out.splitlines()) > 20
    code, out, _ = run(capsys, "--list", "--task", "clotho-aqa")
    assert code == 0 and "num_beams: 4" in out and "SME-Task8: 32.3" in out and "what the original intends" in out


def test_a_table_figures_and_answers_in_both_formats_are_left(place, tmp_path, capsys):
    left = {name: tmp_path / f"deep/{name}" for name in ("p.jsonl", "o.json", "f.json")}
    more = ["--predictions", left["p.jsonl"], "--original-format", left["o.json"], "--json", left["f.json"]]
    code, out, err = run(capsys, *options(place, *more, "--by", "kind"))
    assert code == 0, err
    assert "12 rows, 95 % bootstrap intervals" in out
    assert out.startswith(f"{place / 'model2'} on {place / 'rows.jsonl'}, greedy, max_new_tokens 3\n")
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["seen", "heard", "all", "chance:"]
    facts = json.loads(left["f.json"].read_text())
    assert facts["figures"]["seen"]["exact_match"]["rows"] == 6 and facts["decoding"]["max_new_tokens"] == 3
    answers = [json.loads(line) for line in left["p.jsonl"].read_text().splitlines()[1:]]
    assert sorted(answer["row"] for answer in answers) == list(range(1, 13))
    original = json.loads(left["o.json"].read_text())
    assert [row["question"] for row in original[:2]] == ["what is it", "what is this"]
    assert all(row["answer"] and isinstance(row["text"], str) for row in original)  # `answer` holds the right one
    again = run(capsys, *options(place, *more, "--by", "kind"))
    assert again[0] == 0 and again[1] == out
    code, out, _ = run(capsys, *options(place, "--json", "-"))
    assert code == 0 and json.loads(out)["figures"] == json.loads(json.dumps(json.loads(out)["figures"]))


def test_a_baseline_is_compared_and_a_control_asks_with_other_media(place, capsys):
    more = ["--baseline", place / "model3", "--json", "-"]
    code, out, err = run(capsys, *options(place, *more, task="preference"))
    facts = json.loads(out)
    assert code == 0, err
    mine, theirs = facts["figures"]["all"]["own_loss"], facts["baseline"]["figures"]["all"]["own_loss"]
    difference = facts["difference"]["all"]["own_loss"]
    assert difference["value"] == pytest.approx(mine["value"] - theirs["value"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    code, out, _ = run(capsys, *options(place, "--other-media"))
    assert code == 0 and "\nShort answers, with another row's media: 12 rows" in out


def test_media_that_cannot_be_read_are_told_by_the_exit_code_too(place, tmp_path, capsys):
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()[:4]]
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    rows[2]["image"] = "broken.png"
    (place / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run(capsys, *options(place)[:4], place / "broken.jsonl", "--workers", 0, "--max-new-tokens", 2)
    assert code == 1 and "1 of 4 rows could not be read and are in no figure; the first is row 3:" in out


def test_the_task_is_written_for_lmms_eval_without_a_checkpoint(place, tmp_path, capsys):
    arguments = ["--task", "short-answers", "--data", place / "rows.jsonl", "--to-lmms-eval", tmp_path / "tasks"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert out.startswith("lmms-eval --model uni_moe --tasks uni_moe_short_answers --include_path")
    assert sorted(file.name for file in (tmp_path / "tasks").iterdir()) == [
        "uni_moe_short_answers.jsonl",
        "uni_moe_short_answers.yaml",
    ]


def test_no_file_of_the_command_is_written_over_another(place, tmp_path, capsys):
    """Whatever two options name alike: rows and predictions are lost for good."""
    data = tmp_path / "data.json"
    rows = json.dumps([{"question": "what", "answer": "x"}])  # one line without an end
    arguments = [place / "model2", "--task", "short-answers", "--data", data, "--workers", 0]
    for more in (
        ["--predictions", data],
        ["--json", data],
        ["--original-format", data],
        ["--predictions", tmp_path / "p", "--json", tmp_path / "p"],
        ["--predictions", tmp_path / "p.jsonl", "--baseline", "M", "--json", tmp_path / "p.baseline.jsonl"],
        ["--json", tmp_path],
    ):
        data.write_text(rows)
        code, _, err = run(capsys, *arguments, *more)
        assert code == 1 and err.count("\n") == 1 and ("would write over" in err or "names the folder" in err), more
        assert data.read_text() == rows and [file.name for file in tmp_path.iterdir()] == ["data.json"]


def test_nothing_of_the_data_or_a_checkpoint_is_written_over(place, tmp_path, capsys):
    """However it is named: by its folder, a pattern, as a task, as a row's picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "a.png")
    (folder / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "what", "answer": "x"}))
    (folder / "t.yaml").write_text("like: short-answers")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for data, task, target in (
        (folder, "short-answers", folder / "rows.jsonl"),
        (f"{folder}/ro*.jsonl", "short-answers", folder / "rows.jsonl"),
        (folder, folder / "t.yaml", folder / "t.yaml"),
        (folder, "short-answers", folder / "a.png"),
        (folder, "short-answers", place / "model2/config.json"),
    ):
        arguments = [place / "model2", "--task", task, "--data", data, "--workers", 0, "--json", target]
        code, _, err = run(capsys, *arguments)
        assert code == 1 and "would" in err and "written over" in err or "write over" in err, (target, err)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="`ulimit`")
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(place, tmp_path):
    """A limit on the size of files stands for it."""
    old = tmp_path / "f.json"
    old.write_text("old")
    command = [sys.executable, "-m", "uni_moe_hf.cli", "evaluate", *map(str, options(place)), "--batch-size", "1"]
    for more in (["--predictions", str(tmp_path / "p.jsonl")], ["--json", str(old)]):
        limited = f"trap '' XFSZ; ulimit -f 1; exec {shlex.join([*command, *more])}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and "uni-moe: " in done.stderr, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert (
            ("Make room; the same command goes on" in last) if "p.jsonl" in more[1] else ("cannot be written" in last)
        )
    assert old.read_text() == "old" and sorted(file.name for file in tmp_path.iterdir()) == ["f.json", "p.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CHECKPOINT is missing: uni-moe evaluate CHECKPOINT --task NAME --data FILE"),
        (["M"], "--task is missing"),
        (["M", "--task", "short-answers"], "--data is missing"),
        (
            ["M", "--task", "shortanswers", "--data", "D"],
            "no task 'shortanswers'; did you mean 'short-answers', or a file",
        ),
        (["M", "--task", "mm-vet", "--data", "D"], "scored by a judge: name an OpenAI-compatible server with --judge"),
        (["M", "--task", "mm-vet", "--data", "D", "--judge", "x"], "such as http://localhost:8000/v1, not 'x'"),
        (["M", "--task", "short-answers", "--data", "none.jsonl"], "'none.jsonl'"),
        (["M", "--task", "short-answers", "--data", "D", "--metrics", "bleurt"], "`metrics` is 'bleurt'; there are"),
        (["M", "--task", "choices", "--data", "D"], "it offers no options"),
        (["M", "--task", "clotho-v1", "--data", "D"], "is about audio, and it holds no audio; say which column"),
        (["M", "--task", "short-answers", "--data", "D", "--by", "colour"], "No row has the column 'colour'"),
        (["M", "--task", "short-answers", "--data", "D", "--columns", "kind=answer", "a=image"], "no column 'a'"),
        (["M", "--task", "short-answers", "--data", "D", "--baseline", "nowhere"], "'nowhere'"),
        (["nowhere", "--task", "short-answers", "--data", "D"], "'nowhere'"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_one_sentence(place, capsys, arguments, message):
    names = {"M": place / "model2", "D": place / "rows.jsonl"}
    code, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert code == 1 and message in err and err.count("\n") == 1 and not out, err


def test_a_run_that_is_killed_goes_on_where_it_was(place, tmp_path):
    """SIGKILL while it answers; what it had written is kept, and the end is that of a run that was left alone."""
    arguments = [sys.executable, "-m", "uni_moe_hf.cli", "evaluate"]
    arguments += [str(each) for each in options(place, "--batch-size", 1, "--predictions")]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*arguments, str(whole)], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*arguments, str(killed)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if killed.is_file() and killed.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = killed.read_bytes()
    assert written.count(b"\n") >= 3
    done = subprocess.run([*arguments, str(killed)], check=True, env=environment, capture_output=True, text=True)
    assert "12 rows" in done.stdout
    assert killed.read_bytes().startswith(written[: written.rfind(b"\n") + 1])
    assert killed.read_bytes() == whole.read_bytes()
