"""Folders as people have them become rows; what cannot be read is named; no file is trained on and tested on."""

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny import picture, tone

from uni_moe_hf import check_rows
from uni_moe_hf.cli import main
from uni_moe_hf.recipes.gathering import gather_rows, hold_out, write_rows


def images(folder: Path, count: int, suffix: str = "png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"a picture {index}.{suffix}" for index in range(count)]
    for index, name in enumerate(names):
        Image.fromarray(picture(index)).save(folder / name)
    return names


def sounds(folder: Path, count: int, suffix: str = "wav") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index}.{suffix}" for index in range(count)]
    for index, name in enumerate(names):
        soundfile.write(folder / name, tone(0.2, pitch=300 + 10 * index), 16000)
    return names


def table(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def told(gathered) -> list[tuple]:
    """Task, kind of media, question and answer of each row."""
    found = []
    for row in gathered.rows:
        *media, text = row["messages"][0]["content"]
        found.append((row["task"], *(part["type"] for part in media), text["text"], row["answer"]))
    return found


def test_a_table_names_files_and_its_one_other_column_is_the_answer(tmp_path):
    names = images(tmp_path / "things/pets", 3, "JPG")
    table(tmp_path / "things/pets/list.csv", [{"photo": name, "kind": f"cat {i}"} for i, name in enumerate(names)])
    found = told(gather_rows(tmp_path / "things"))
    assert found == [("pets", "image", "What is in the picture?", f"cat {index}") for index in range(3)]


def test_a_question_of_a_table_is_asked_and_others_are_named(tmp_path):
    names = images(tmp_path / "pets", 2)
    rows = [{"file": name, "question": "Who?", "answer": "Tom", "date": "1.1."} for name in names]
    table(tmp_path / "pets/list.csv", rows)
    assert told(gather_rows(tmp_path / "pets")) == [("pets", "image", "Who?", "Tom")] * 2


def test_columns_say_what_is_what_where_names_do_not(tmp_path):
    names = images(tmp_path / "pets", 2)
    table(tmp_path / "pets/list.csv", [{"photo": name, "who": "Tom", "where": "here"} for name in names])
    with pytest.raises(ValueError, match="no known form"):
        gather_rows(tmp_path / "pets")
    found = told(gather_rows(tmp_path / "pets", columns=["photo=image", "where=answer"], question="Where?"))
    assert found == [("pets", "image", "Where?", "here")] * 2


def test_folders_are_labels_and_texts_beside_files_come_before_them(tmp_path):
    sounds(tmp_path / "all/big_bell", 2, "flac")
    images(tmp_path / "all/art", 1)
    (tmp_path / "all/art/a picture 0.txt").write_text("a blue horse\n")
    found = told(gather_rows(tmp_path / "all"))
    assert ("art", "image", "What is in the picture?", "a blue horse") in found
    assert found.count(("big_bell", "audio", "What do you hear?", "big bell")) == 2 and len(found) == 3


@pytest.mark.parametrize("how", ["column", "option"])
def test_speech_is_told_from_sound(tmp_path, how):
    names = sounds(tmp_path / "memos", 2)
    column = "transcript" if how == "column" else "text"
    table(tmp_path / "memos/list.csv", [{"memo": name, column: "good morning"} for name in names])
    found = told(gather_rows(tmp_path / "memos", speech=["memos"] if how == "option" else []))
    assert found == [("memos", "speech", "What is said?", "good morning")] * 2


def test_what_nothing_can_be_made_of_is_named_and_the_rest_is_kept(tmp_path):
    root = tmp_path / "things"
    names = images(root / "pets", 4)
    table(root / "pets/list.csv", [{"file": n, "what": "cat"} for n in (*names[:2], "lost.png")] + [
        {"file": names[2], "what": " "}
    ])  # fmt: skip
    (root / "pets" / names[0]).write_bytes((root / "pets" / names[0]).read_bytes()[:60])
    (root / "bells").mkdir()
    (root / "bells/empty.mp3").write_bytes(b"")
    images(root, 1)
    gathered = gather_rows(root)
    assert told(gathered) == [("pets", "image", "What is in the picture?", "cat")]
    lines = "\n".join(gathered.left_out)
    for words in (names[0], "lost.png", "answer is empty", "list.csv' names it", "empty.mp3",
                  "nothing says what it is"):  # fmt: skip
        assert words in lines, words
    assert len(gathered.left_out) == 6


def test_without_decoding_broken_files_stay(tmp_path):
    names = images(tmp_path / "cats", 2)
    (tmp_path / "cats" / names[0]).write_bytes(b"no picture")
    assert len(gather_rows(tmp_path, decode=False).rows) == 2 and len(gather_rows(tmp_path).rows) == 1
    with pytest.raises(ValueError, match="nothing says what it is"):  # of the folder itself, the name is no label
        gather_rows(tmp_path / "cats", decode=False)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda root: None, {}, "There is no folder"),
        (lambda root: root.mkdir(), {}, "Nothing can be made"),
        (lambda root: images(root / "cats", 1), {"speech": ["memos"]}, "in which no recording was found"),
    ],
)
def test_what_is_refused(tmp_path, make, options, words):
    make(tmp_path / "things")
    with pytest.raises(ValueError, match=words):
        gather_rows(tmp_path / "things", **options)


def test_a_phones_video_is_a_video(tmp_path):
    (tmp_path / "clips/dogs").mkdir(parents=True)
    with av.open(str(tmp_path / "clips/dogs/VID 1.MP4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert told(gather_rows(tmp_path / "clips")) == [("dogs", "video", "What is in the video?", "dogs")]


def test_no_file_is_on_both_sides_even_where_rows_share_several(tmp_path):
    names = images(tmp_path / "pairs", 30)
    rows = [{"question": "Which?", "images": json.dumps([names[i], names[(i + 15) % 30]]), "answer": "a"}
            for i in range(0, 30, 2)]  # fmt: skip
    table(tmp_path / "pairs/list.csv", rows)
    train, test = hold_out(gather_rows(tmp_path / "pairs").rows, 0.4)
    files = [{part["path"] for row in each for part in row["messages"][0]["content"] if "path" in part}
             for each in (train, test)]  # fmt: skip
    assert len(train) + len(test) == 15 and test and not files[0] & files[1]


def test_the_share_is_held_out_of_every_task_and_always_the_same(tmp_path):
    sounds(tmp_path / "all/bell", 20)
    images(tmp_path / "all/cats", 10)
    rows = gather_rows(tmp_path / "all", decode=False).rows
    train, test = hold_out(rows, 0.3)
    assert [sum(row["task"] == task for row in test) for task in ("bell", "cats")] == [6, 3]
    assert hold_out(rows, 0.3) == (train, test) and hold_out(rows, 0.3, seed=1)[1] != test
    assert [len(each) for each in hold_out(rows, 0.0)] == [30, 0]
    with pytest.raises(ValueError, match="must be 0 or more, and below 1"):
        hold_out(rows, 1.0)


def test_the_command_writes_rows_that_can_be_moved_with_their_files(tmp_path, capsys):
    sounds(tmp_path / "mine/things/bell", 5)
    images(tmp_path / "mine/things/cats", 5)
    (tmp_path / "mine/things/bell/9.wav").write_bytes(b"RIFF")
    out = tmp_path / "mine/rows"
    assert main(["data", "rows", str(tmp_path / "mine/things"), "--output", str(out)]) == 1
    said = capsys.readouterr().out
    assert "left out: " in said and "9.wav" in said and "10 rows are in" in said
    (tmp_path / "mine").rename(tmp_path / "moved")
    for name, count in (("train", 8), ("test", 2)):
        file = tmp_path / f"moved/rows/{name}.jsonl"
        assert list(check_rows(file)) == [] and len(file.read_text().splitlines()) == count


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("before")

    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(json, "dumps", broken)
    with pytest.raises(OSError, match="no space"):
        write_rows([{"messages": []}], file)
    assert file.read_text() == "before"


def files_of_rows(file: Path) -> set[str]:
    found = set()
    for line in file.read_text().splitlines():
        for part in json.loads(line)["messages"][0]["content"]:
            sources = part.get("path", part.get("video", []))
            sources = [sources] if isinstance(sources, str) else sources
            found |= {str((file.parent / each).resolve()) for each in sources}
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_file_under_several_names_is_one_file(tmp_path, seed):
    names = images(tmp_path / "all/pets", 12)
    (tmp_path / "all/links").mkdir()
    for name in names[:4]:
        (tmp_path / "all/links" / name).symlink_to(tmp_path / "all/pets" / name)
    rows = [{"file": f"../pets/{name}", "question": "Again?", "answer": "yes"} for name in names[3:9]]
    (tmp_path / "all/again").mkdir()
    table(tmp_path / "all/again/list.csv", rows)
    frames = [{"video": json.dumps([f"../pets/{names[8]}", f"../pets/{names[9]}"]), "answer": "moving"}]
    table(tmp_path / "all/again/films.csv", frames)
    out = tmp_path / "rows"
    command = ["data", "rows", str(tmp_path / "all"), "--output", str(out), "--hold-out", "0.4", "--seed", str(seed)]
    assert main(command) == 1  # files of a folder of which tables speak
    train, test = (files_of_rows(out / f"{name}.jsonl") for name in ("train", "test"))
    assert train and not train & test
    assert all(file.startswith(str(tmp_path / "all/pets")) for file in train | test)
    for file in out.iterdir():
        assert list(check_rows(file)) == [] and str(tmp_path) not in file.read_text()


def test_rows_that_were_written_before_are_not_gathered_and_an_old_split_does_not_stay(tmp_path, capsys):
    images(tmp_path / "all/cats", 8)
    command = ["data", "rows", str(tmp_path / "all"), "--output", str(tmp_path / "all/rows"), "--hold-out"]
    assert main([*command, "0.25"]) == 0 and main([*command, "0.25"]) == 0
    lines = [(tmp_path / f"all/rows/{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert [len(each) for each in lines] == [6, 2]
    assert main([*command, "0"]) == 0
    assert len((tmp_path / "all/rows/train.jsonl").read_text().splitlines()) == 8
    assert not (tmp_path / "all/rows/test.jsonl").exists()
    (tmp_path / "file").write_text("")
    assert main(["data", "rows", str(tmp_path / "all"), "--output", str(tmp_path / "file")]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err


def test_a_table_speaks_for_folders_below_it_and_rows_without_a_file_are_left_out(tmp_path):
    names = images(tmp_path / "set/imgs", 3)
    table(tmp_path / "set/list.csv", [{"file": f"imgs/{names[0]}", "label": "blue"}, {"file": "", "label": "dog"}])
    gathered = gather_rows(tmp_path / "set")
    assert [row["answer"] for row in gathered.rows] == ["blue"]
    lines = "\n".join(gathered.left_out)
    assert names[1] in lines and names[2] in lines and "it names no file in 'file'" in lines


@pytest.mark.parametrize(
    "content", ["file,label\na picture 0.png,caf\u00e9\n".encode("latin-1"), b"file\tlabel\na picture 0.png\tcat\n"]
)
def test_beside_a_table_that_says_nothing_the_folder_is_no_label(tmp_path, content):
    images(tmp_path / "all/holiday", 2)
    images(tmp_path / "all/cats", 1)
    (tmp_path / "all/holiday/list.csv").write_bytes(content)
    gathered = gather_rows(tmp_path / "all")
    assert [row["answer"] for row in gathered.rows] == ["cats"]
    assert sum("names it" in line for line in gathered.left_out) == 2


def test_texts_beside_files_are_utf_8_in_any_case_of_their_ending(tmp_path):
    images(tmp_path / "all/pets", 3)
    (tmp_path / "all/pets/a picture 0.TXT").write_bytes("\ufeffa cat".encode())
    (tmp_path / "all/pets/a picture 1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    gathered = gather_rows(tmp_path / "all")
    assert sorted(row["answer"] for row in gathered.rows) == ["a cat", "pets"]
    assert "is not UTF-8" in gathered.left_out[0]


def test_addresses_and_data_stay_as_they_are(tmp_path):
    (tmp_path / "web").mkdir()
    addresses = ["https://example.com/y.jpg", "data:image/png;base64,AAAA"]
    table(tmp_path / "web/list.csv", [{"image": address, "label": "a"} for address in addresses])
    write_rows(gather_rows(tmp_path / "web", columns="label=answer", decode=False).rows, tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"][0]["content"][0]["path"] for line in lines] == addresses


def test_what_is_unknown_is_named_what_is_hidden_is_passed_over_and_links_are_followed(tmp_path):
    images(tmp_path / "elsewhere/cats", 2)
    images(tmp_path / "all/dogs", 1)
    images(tmp_path / "all/.trash", 1)
    (tmp_path / "all/cats").symlink_to(tmp_path / "elsewhere/cats")
    (tmp_path / "all/again").symlink_to(tmp_path / "all")
    for name in ("raw.cr2", "noending", ".hidden.png"):
        (tmp_path / "all/dogs" / name).write_bytes(b"x")
    with open(bytes(tmp_path / "all/dogs") + b"/a\xff.jpg", "wb") as file:
        file.write(b"x")
    gathered = gather_rows(tmp_path / "all")
    assert sorted(row["answer"] for row in gathered.rows) == ["cats", "cats", "dogs"]
    lines = "\n".join(gathered.left_out)
    assert "raw.cr2" in lines and "noending" in lines and "is no valid text" in lines and len(gathered.left_out) == 3
