"""Rows as people have them: media in columns beside conversations, plain columns, and every source they lie in."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import soundfile
import torch
from PIL import Image
from tiny import film, picture, tiny_processor, tone, user

from uni_moe_hf import UniMoEDataCollator, check_rows, load_rows, row_to_messages
from uni_moe_hf.cli import main
from uni_moe_hf.training.row_files import iter_rows


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(video_frames=4)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for index in range(3):
        Image.fromarray(picture(index)).save(folder / f"{index}.png")
        soundfile.write(folder / f"{index}.wav", tone(pitch=200 + 100 * index), 16000)
    np.save(folder / "film.npy", film())
    return folder


def part(kind: str, file: str) -> dict:
    return {"type": kind, kind: file}


def plain(content: list | str) -> list | str:
    """A text alone is the same as a list of it."""
    is_text = isinstance(content, list) and [part["type"] for part in content] == ["text"]
    return content[0]["text"] if is_text else content


def said(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


# ---- media beside conversations ----

BESIDE = {
    "TRL: typed parts": (
        {
            "messages": [*user({"type": "image"}, {"type": "image"}, "what"), *said("", "yes")[1:]],
            "images": ["a", "b"],
        },
        [[part("image", "a"), part("image", "b"), {"type": "text", "text": "what"}], "yes"],
    ),
    "TRL: empty keys": (
        {"messages": [*user({"type": "image", "image": None}, "what"), *said("", "yes")[1:]], "image": "a"},
        [[part("image", "a"), {"type": "text", "text": "what"}], "yes"],
    ),
    "TRL: plain texts": (
        {"messages": said("what", "yes", "and", "no"), "images": ["a", "b"]},
        [[part("image", "a"), part("image", "b"), {"type": "text", "text": "what"}], "yes", "and", "no"],
    ),
    "TRL: prompt and completion": (
        {"prompt": said("what"), "completion": said("", "yes")[1:], "images": ["a"]},
        [[part("image", "a"), {"type": "text", "text": "what"}], "yes"],
    ),
    "LLaMA-Factory": (
        {
            "messages": said("<image>what<audio>", "yes", "<video>and<image>", "no"),
            "images": ["a", "b"],
            "audios": ["c"],
            "videos": ["d"],
        },
        [
            [part("image", "a"), {"type": "text", "text": "what"}, part("audio", "c")],
            "yes",
            [part("video", "d"), {"type": "text", "text": "and"}, part("image", "b")],
            "no",
        ],
    ),
    "ms-swift: marks in typed texts": (
        {"messages": [*user("<image>\nwhat"), *said("", "yes")[1:]], "images": [{"path": "a", "bytes": None}]},
        [[{"type": "image", "image": {"path": "a", "bytes": None}}, {"type": "text", "text": "what"}], "yes"],
    ),
    "ShareGPT with the columns of others": (
        {
            "conversations": [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "yes"}],
            "images": ["a"],
        },
        [[part("image", "a"), {"type": "text", "text": "what"}], "yes"],
    ),
    "the original's columns beside messages": (
        {"messages": said("<image><audio><video>what", "yes"), "image": "a", "voice": ["b"], "video": ["0", "1"]},
        [
            [part("image", "a"), part("speech", "b"), part("video", ["0", "1"]), {"type": "text", "text": "what"}],
            "yes",
        ],
    ),
    "speech": (
        {"messages": said("<speech>what", "yes"), "speech": "a"},
        [[part("speech", "a"), {"type": "text", "text": "what"}], "yes"],
    ),
    "typed parts that take all, and a mark that is text": (
        {"messages": [*user({"type": "image"}, "is <image> a word"), *said("", "yes")[1:]], "images": ["a"]},
        [[part("image", "a"), {"type": "text", "text": "is <image> a word"}], "yes"],
    ),
    "a mark without a column is text": ({"messages": said("is <image> a word", "yes")}, ["is <image> a word", "yes"]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_media_in_columns_take_their_places(name):
    row, contents = BESIDE[name]
    messages = row_to_messages(row)
    assert [plain(message["content"]) for message in messages] == contents
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(contents) // 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": said("<image><image>", "x"), "images": ["a"]}, "2 <image> in its conversation but 1 such files"),
        ({"messages": said("<image>", "x"), "images": []}, "1 <image> in its conversation but 0 such files"),
        (
            {"messages": [*user({"type": "audio"}, "q"), *said("", "x")[1:]], "audios": ["a", "b"]},
            "1 <audio> .* but 2",
        ),
        ({"messages": [*user("q"), *said("", "x")[1:]], "videos": ["a", "b"], "images": ["<"]}, "0 <image> .* but 1"),
        ({"messages": said("q", "x"), "image": "a", "images": ["b"]}, "both 'image' and 'images'"),
        ({"messages": said("<audio>", "x"), "audio": "a", "voice": "b"}, "both 'audio' and 'voice'"),
        ({"messages": said("q", "x"), "pictures": ["a.png"]}, "'pictures' holds media .*pictures=image"),
        ({"messages": said("q", "x"), "clip": {"bytes": b"x", "path": None}}, "'clip' holds media"),
        ({"id": 1, "photo": "a.jpg", "label": "cat"}, r"fields \['id', 'label', 'photo'\].*photo=image"),
        ({"image": "a.jpg", "label": "cat"}, "if 'label' is the answer, say so with columns .label=answer"),
        ({"image": "a.jpg", "text": "x", "caption": "y"}, "'caption' and 'text', each of which could be the answer"),
        ({"question": "a", "prompt": "b", "answer": "c"}, "'question' and 'prompt'"),
        ({"audio": "a.wav", "text": ["x", "y"]}, "the answer in 'text' is a list"),
        ({"image": "a.jpg", "caption": 3}, "the answer in 'caption' is a int"),
        ({"text": "only words"}, "no known form"),
        ({}, "no known form"),
    ],
)
def test_what_does_not_add_up_names_the_rows_own_fields(row, reason):
    with pytest.raises(ValueError, match=reason):
        row_to_messages({**row, "_row": 1, "_source": "x", "_root": "y"})


# ---- plain columns ----


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"image": "a.png", "caption": "a bird"}, [part("image", "a.png")], "a bird"),
        ({"audio": "a.wav", "sentence": "hello"}, [part("audio", "a.wav")], "hello"),
        ({"speech": "a.wav", "transcription": "hello"}, [part("speech", "a.wav")], "hello"),
        ({"video": "a.mp4", "text": "a film"}, [part("video", "a.mp4")], "a film"),
        ({"question": "what", "answer": "yes"}, "what", "yes"),
        ({"prompt": "what", "completion": "yes"}, "what", "yes"),
        ({"instruction": "add", "input": "1 1", "output": "2"}, "add\n1 1", "2"),
        (
            {"image": "a.png", "question": "what", "answer": "yes"},
            [part("image", "a.png"), {"type": "text", "text": "what"}],
            "yes",
        ),
        (
            {"images": ["a.png", "b.png"], "question": "<image>or<image>", "answer": "b"},
            [part("image", "a.png"), {"type": "text", "text": "or"}, part("image", "b.png")],
            "b",
        ),
    ],
)
def test_plain_columns_become_conversations(row, question, answer):
    messages = row_to_messages(row)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [plain(message["content"]) for message in messages] == [question, answer]


@pytest.mark.parametrize(
    "columns", [{"photo": "image", "label": "answer"}, '{"image": "photo", "answer": "label"}',
                ["photo=image", "label=answer"], "image=photo,label=answer"]
)  # fmt: skip
def test_the_caller_says_which_column_is_what_and_what_is_asked(tmp_path, media, columns, processor):
    rows = [{"photo": f"{index % 3}.png", "label": f"a bird {index}", "text": "not this"} for index in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for file in media.iterdir():
        shutil.copy(file, tmp_path)
    asked = ["what is it", "is it red", "hello"]
    loaded = load_rows(tmp_path / "rows.jsonl", columns=columns, question=asked)
    messages = [row_to_messages(row) for row in loaded]
    assert {m[0]["content"][1]["text"] for m in messages} == set(asked)
    assert [m[1]["content"] for m in messages] == [f"a bird {index}" for index in range(12)]
    assert messages == [
        row_to_messages(row) for row in load_rows(tmp_path / "rows.jsonl", columns=columns, question=asked)
    ]
    streamed = load_rows(tmp_path / "rows.jsonl", columns=columns, question=asked, streaming=True)
    by_answer = {m[1]["content"]: m for m in messages}
    assert all(row_to_messages(row) == by_answer[row["answer"]] for row in streamed)
    assert len(UniMoEDataCollator(processor)(list(loaded))["pixel_values"]) == 12


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"photo": "picture"}, "'photo' is 'picture'; a column can be image"),
        ("photo", "is None; a column can be"),
        ('{"photo"', "which is no JSON"),
        (["a=image", "b=image"], "two columns as image"),
    ],
)
def test_columns_that_mean_nothing_are_refused(columns, reason, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=reason):
        load_rows(tmp_path / "rows.jsonl", columns=columns)


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"photo": "a.png", "label": "x"}))
    reasons = dict(check_rows(tmp_path / "rows.jsonl", columns={"picture": "image"}))
    assert reasons == {1: "there is no column 'picture'; a row has the fields ['label', 'photo']"}


# ---- sources ----

PLAIN = [{"image": f"{index}.png", "caption": f'bird {index}, or "not"\nlast'} for index in range(3)]


def written(folder: Path, name: str, media: Path) -> Path:
    """The rows of `PLAIN` as a file or folder of a kind."""
    shutil.copytree(media, folder, dirs_exist_ok=True)
    text = "\n".join(map(json.dumps, PLAIN))
    file = folder / name
    if name.lower().endswith((".csv", ".tsv")):
        with open(file, "w", newline="", encoding="utf-8") as opened:
            table = csv.DictWriter(opened, PLAIN[0], delimiter="\t" if "tsv" in name.lower() else ",")
            table.writeheader()
            table.writerows(PLAIN)
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    elif name.lower().endswith(".json"):
        file.write_text(json.dumps(PLAIN))
    elif name == "embedded.parquet":
        rows = {
            "image": [{"bytes": (media / f"{i}.png").read_bytes(), "path": f"{i}.png"} for i in range(3)],
            "caption": [row["caption"] for row in PLAIN],
        }
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    elif name == "saved":
        rows = {"image": [str(media / f"{i}.png") for i in range(3)], "caption": [row["caption"] for row in PLAIN]}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        data = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(file)
    elif name.startswith("metadata"):
        file.write_text("\n".join(json.dumps({"file_name": r["image"], "caption": r["caption"]}) for r in PLAIN))
        return folder
    elif name == "split":
        for split, rows in (("train", PLAIN), ("test", PLAIN[:1])):
            shutil.copytree(media, file / split)
            lines = [json.dumps({"file_name": row["image"], "caption": row["caption"]}) for row in rows]
            (file / split / "metadata.jsonl").write_text("\n".join(lines))
    else:
        file.write_text(text)
    return file


SOURCES = [
    "rows.jsonl", "ROWS.JSONL", "rows.json", "lines.JSON", "rows.csv", "rows.TSV", "rows.jsonl.gz", "rows.ndjson",
    "embedded.parquet", "saved", "metadata.jsonl", "split",
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_read_as_they_lie(tmp_path, media, processor, name, streaming):
    if name == "lines.JSON":
        source = written(tmp_path, "lines.jsonl", media).rename(tmp_path / name)
    else:
        source = written(tmp_path, name, media)
    found = list(load_rows(source, streaming=streaming))
    found.sort(key=lambda row: row["caption"])
    assert [row["caption"] for row in found] == [row["caption"] for row in PLAIN]
    batch = UniMoEDataCollator(processor)(found)
    expected = processor(images=[str(media / f"{index}.png") for index in range(3)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert dict(check_rows(source)) == {}


def test_lists_patterns_splits_and_their_faults(tmp_path, media):
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path, name, media)
    for source in ([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")], str(tmp_path / "*.jsonl")):
        assert len(load_rows(source)) == 6 and len(list(load_rows(source, streaming=True))) == 6
    assert len(load_rows({str(tmp_path / "*.jsonl"): 2.0})) == 12
    for kind in ("saved", "split"):
        assert len(load_rows(written(tmp_path / kind, kind, media), split="test")) == 1
    with pytest.raises(ValueError, match="No file matches"):
        load_rows(str(tmp_path / "*.csv"))
    with pytest.raises(ValueError, match="no split 'dev'; it has .'test', 'train'."):
        load_rows(tmp_path / "saved/saved", split="dev")
    with pytest.raises(ValueError, match="a file without splits, so without 'test'"):
        load_rows(tmp_path / "a.jsonl", split="test")
    with pytest.raises(ValueError, match="has no configurations; leave out 'en'"):
        load_rows(tmp_path / "a.jsonl", config="en")
    (tmp_path / "README.md").write_text("words")
    for name in ("README.md", "nothing.md", "nothing.jsonl", "./nothing"):
        with pytest.raises(ValueError, match="check the path"):
            load_rows(str(tmp_path / name) if name == "README.md" else name)


def test_features_of_media_are_never_decoded(tmp_path, media, monkeypatch):
    """`datasets` would ask for torchcodec."""
    monkeypatch.setattr(datasets.Audio, "decode_example", None)
    sound = {"bytes": None, "path": str(media / "0.wav")}
    table = pyarrow.table({"audio": [sound, sound], "text": ["a", "b"], "label": [1, 0]})
    features = datasets.Features(
        {
            "audio": datasets.Audio(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    table = table.cast(features.arrow_schema)
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features)).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        found = list(load_rows(tmp_path / "saved", streaming=streaming, columns={"label": "answer"}))
        assert [row["answer"] for row in found] == ["yes", "no"]
        assert set(found[0]["audio"]) == {"bytes", "path"}


# ---- a bad row is that row's affair ----


def test_whatever_a_row_holds_is_said_of_that_row(tmp_path, processor):
    deep = "[" * 100_000 + "]" * 100_000
    lines = [
        json.dumps({"messages": said("hello", "yes")}),
        f'{{"messages": {deep}}}',
        json.dumps({"messages": [*user({"type": "image", "base64": 5}), *said("", "x")[1:]]}),
        json.dumps({"messages": [{"role": ["user"], "content": "x"}, *said("", "x")[1:]]}),
        json.dumps({"messages": [*user({"type": "video", "video": {"a": 1}}), *said("", "x")[1:]]}),
        json.dumps({"messages": [*user({"type": "audio", "audio": [[1, 2], [3]]}), *said("", "x")[1:]]}),
        "5",
        "null",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    reasons = dict(check_rows(tmp_path / "rows.jsonl"))
    assert list(reasons) == list(range(2, 9)) and "nested too deep" in reasons[2] and "not an object" in reasons[7]
    collate = UniMoEDataCollator(processor, skip_bad_rows=True)
    batch = collate(list(load_rows(tmp_path / "rows.jsonl")))
    assert len(batch["input_ids"]) == 1 and collate.skipped.total() == 7
    for row in list(load_rows(tmp_path / "rows.jsonl"))[1:]:
        with pytest.raises(ValueError, match=rf"^Row {row['_row']} of '.*rows\.jsonl' cannot be used: "):
            UniMoEDataCollator(processor)([row])


def test_a_row_is_named_by_its_fields_where_it_has_no_number(processor):
    with pytest.raises(ValueError, match=r"^The row that begins with \{\"photo\": \"a PngImageFile\"\} cannot"):
        file = Image.new("RGB", (4, 4))
        file.__class__ = type("PngImageFile", (Image.Image,), {})
        UniMoEDataCollator(processor)([{"photo": file}])


def test_fields_of_which_nothing_is_made_are_named(tmp_path, processor, caplog, capsys):
    rows = [{"messages": said("hello", "yes"), "score": 3, "id": "7"}, {"messages": said("hello", "yes"), "score": 4}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    UniMoEDataCollator(processor)(list(load_rows(tmp_path / "rows.jsonl")))
    assert "Rows have the field 'score', of which nothing is made" in caplog.text and "_root" not in caplog.text
    assert main(["data", "check", str(tmp_path / "rows.jsonl")]) == 0
    assert "nothing is made of the field 'score' (2 rows)" in capsys.readouterr().out


def test_the_checker_takes_what_loading_takes(tmp_path, media, capsys):
    source = written(tmp_path, "metadata.jsonl", media)
    assert main(["data", "check", str(source), "--question", "what", "--columns", "caption=answer"]) == 0
    (media / "0.png").rename(media / "gone.png")
    try:
        (source / "0.png").unlink()
        assert main(["data", "check", str(source)]) == 1
    finally:
        (media / "gone.png").rename(media / "0.png")
    assert "row 1: Picture file" in capsys.readouterr().out
    assert [row["_row"] for row in iter_rows(source)] == [1, 2, 3]


# ---- what only looks like a row with media ----


def test_a_folder_whose_metadata_are_parquet_keeps_its_media(tmp_path, media, processor):
    shutil.copytree(media, tmp_path / "folder")
    table = {"file_name": ["0.png", "1.png"], "question": ["what", "is it"], "answer": ["a bird", "yes"]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "folder/metadata.parquet")
    loaded = list(load_rows(tmp_path / "folder"))
    assert [row["image"] for row in loaded] == ["0.png", "1.png"]
    assert len(UniMoEDataCollator(processor)(loaded)["pixel_values"]) == 2


def test_a_split_that_a_folder_lacks_is_not_another_one(tmp_path, media):
    source = written(tmp_path, "metadata.jsonl", media)
    with pytest.raises(ValueError, match="could not be loaded with the split 'test'"):
        load_rows(source, split="test")
    (source / "metadata.csv").write_text("file_name,caption\n0.png,x\n")
    with pytest.raises(ValueError, match="has both .*metadata.csv' and .*metadata.jsonl'; name the one"):
        load_rows(source)


def test_rows_without_their_media_are_not_asked_about_them(tmp_path):
    (tmp_path / "rows.csv").write_text("image,caption\n0.png,a bird\n,bell\n")
    reasons = dict(check_rows(tmp_path / "rows.csv", question="what is it", decode=False))
    assert list(reasons) == [1, 2] and "does not exist" in reasons[1] and "no known form" in reasons[2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": said("<image>what", "x"), "images": None}, "1 <image> in its conversation but 0"),
        ({"question": "<image>what", "answer": "x", "image": None}, "1 <image> in its conversation but 0"),
        ({"messages": [{"role": "system", "content": "a"}, *said("q", "x")], "system": "b"}, "put both into one"),
        ({"question": "a", "Question": "b", "answer": "x"}, "differ in capitals alone"),
        ({"conversations": [{"from": "human", "value": 0}, {"from": "gpt", "value": "x"}]}, "a text is a int"),
    ],
)
def test_what_a_row_would_lose_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        row_to_messages(row)


def test_media_of_several_columns_stand_before_the_question():
    expected = [part("image", "a"), part("audio", "b"), {"type": "text", "text": "what"}]
    for row in (
        {"question": "what", "answer": "x", "image": "a", "audio": "b"},
        {"messages": said("what", "x"), "images": ["a"], "audios": ["b"]},
    ):
        assert row_to_messages(row)[0]["content"] == expected


def test_sound_marks_take_speech_where_there_is_no_other_sound():
    row = {"conversations": [{"from": "human", "value": "<audio>what"}, {"from": "gpt", "value": "x"}], "speech": "a"}
    assert row_to_messages(row)[0]["content"][0] == part("speech", "a")


def test_a_system_column_opens_the_conversation():
    for row in (
        {"system": "be brief", "messages": said("q", "x")},
        {"system": "be brief", "question": "q", "answer": "x"},
        {"system": "be brief", "prompt": said("q"), "completion": said("", "x")[1:]},
    ):
        assert row_to_messages(row)[0] == {"role": "system", "content": "be brief"}


def test_a_column_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("image,image,caption\na,b,c\n")
    with pytest.raises(ValueError, match="has the column 'image' twice"):
        load_rows(tmp_path / "rows.csv")


def test_a_data_set_may_be_given_as_it_is():
    data = datasets.Dataset.from_list([{"photo": "a.png", "label": "x"}] * 3)
    assert load_rows(data, columns={"photo": "image", "label": "answer"})[2] == {"image": "a.png", "answer": "x"}
    with pytest.raises(ValueError, match="rows themselves go into a `datasets.Dataset`"):
        load_rows([{"photo": "a.png"}])


def test_a_row_of_which_nothing_is_learned_is_bad_for_the_checker_too(tmp_path, processor):
    row = {"messages": [*user("hello"), {"role": "assistant", "content": "x", "weight": 0}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert "no assistant text to learn" in dict(check_rows(tmp_path / "rows.jsonl"))[1]
    with pytest.raises(ValueError, match="no assistant text to learn"):
        UniMoEDataCollator(processor)([row])
