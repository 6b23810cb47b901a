"""From files of rows to training batches: labels, both row formats, what is cut and what is skipped."""

import base64
import copy
import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from tiny import film, picture, tiny_model, tiny_processor, tone, user

from uni_moe_hf import UniMoEDataCollator, check_rows, load_rows, row_to_messages
from uni_moe_hf.cli import main


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
SYSTEM_LENGTH = 139  # tokens of f"<s> {SYSTEM}USER:" with the tiny tokenizer


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(video_frames=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of a picture, a sound and three frames."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(picture()).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", tone(), 16000, subtype="FLOAT")
    for number, frame in enumerate(film(frames=3)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return {
        "image": str(folder / "picture.png"),
        "sound": str(folder / "sound.wav"),
        "frames": [str(folder / f"{number}.png") for number in range(3)],
    }


def row(*parts, answer: str = "yes") -> dict:
    return {"messages": [*user(*parts), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def original(question: str, answer: str = "yes", **files) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **files}


def learned(processor, batch: dict) -> list[list[str]]:
    """Tokens with a label, by row; each must be the label itself."""
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])
    return [processor.tokenizer.convert_ids_to_tokens(labels[labels != -100]) for labels in batch["labels"]]


def assert_same(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- batches ----


def test_only_answers_and_their_ends_are_learned(processor):
    image, speech = {"type": "image", "image": picture()}, {"type": "speech", "speech": tone(1.5)}
    long = row(image, "what is it", answer="a bird")
    long["messages"] += row("is it", speech, answer="no")["messages"]
    batch = UniMoEDataCollator(processor)([long, row("hello"), row(speech, answer="a bell")])
    assert learned(processor, batch) == [
        ["▁a", "▁bird", "</s>", "▁no", "</s>"],
        ["▁yes", "</s>"],
        ["▁a", "▁bell", "</s>"],
    ]


def test_a_batch_is_padded_on_the_right_and_holds_plain_model_inputs(processor):
    batch = UniMoEDataCollator(processor)([row("hello"), row("what is it", {"type": "image", "image": picture()})])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    short, long = batch["attention_mask"].sum(dim=1).tolist()
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (long - short)
    assert batch["labels"][0, short:].eq(-100).all()
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_rows_of_any_modalities_share_a_batch_that_the_model_learns_from():
    model = tiny_model()
    processor = tiny_processor(model.config, video_frames=4)
    rows = [
        row({"type": "image", "image": picture()}, "what"),
        row("hello"),
        row({"type": "video", "video": film()}, {"type": "audio", "audio": tone(1.5)}),
        row({"type": "speech", "speech": tone()}),
    ]
    batch = UniMoEDataCollator(processor)(rows)
    singles = [UniMoEDataCollator(processor)([one]) for one in rows]
    with torch.no_grad():
        loss = model(**batch).loss
        expected = [(model(**single).loss, (single["labels"] != -100).sum()) for single in singles]
    # 1e-5: the same rows, summed in another order and beside padding, in float32.
    mean = sum(one * count for one, count in expected) / sum(count for _, count in expected)
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=1e-5)


def test_media_in_an_answer_are_not_learned(processor):
    answer = {"role": "assistant", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "yes"}]}
    batch = UniMoEDataCollator(processor)([{"messages": [*user("hello"), answer]}])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4
    assert not (batch["labels"] == processor.image_token_id).any()


def test_the_rows_stay_as_they_were(processor, files):
    rows = [row({"type": "image", "path": files["image"]}), original("<image>\nwhat", image=files["image"])]
    before = copy.deepcopy(rows)
    UniMoEDataCollator(processor)(rows)
    assert rows == before


@pytest.mark.parametrize("on_mixed_types", [None, "use_json"])
def test_messages_may_come_from_a_stored_data_set(processor, files, on_mixed_types):
    rows = [
        row({"type": "image", "path": files["image"]}, "what"),
        row({"type": "speech", "speech": files["sound"]}, "what"),
        row({"type": "audio", "audio": tone(0.2, rate=8000).tolist(), "sampling_rate": 8000}),
        row({"type": "audio", "path": files["sound"]}, answer="a bell"),
        row("hello"),
    ]
    options = {} if on_mixed_types is None else {"on_mixed_types": on_mixed_types}
    stored = datasets.Dataset.from_list(rows, **options)
    if on_mixed_types is None:
        assert "sampling_rate" in stored[0]["messages"][0]["content"][0]  # keys of other parts, filled with None
    collate = UniMoEDataCollator(processor)
    assert_same(collate([stored[index] for index in range(len(rows))]), collate(rows))


# ---- the original format ----


def test_original_records_become_messages_in_reading_order():
    record = {
        "conversations": [
            {"from": "human", "value": "<image>\n<audio>\n<video>\nWhat is it?"},
            {"from": "gpt", "value": "A bird."},
            {"from": "human", "value": "And this?\n<audio>"},
            {"from": "gpt", "value": "A bell."},
        ],
        "image": "a.png",
        "voice": ["b.wav", "c.wav"],
        "video": ["0.png", "1.png"],
        "id": 7,
    }
    assert row_to_messages(record) == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "speech", "speech": "b.wav"},
                {"type": "video", "video": ["0.png", "1.png"]},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A bird."}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "speech", "speech": "c.wav"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A bell."}]},
    ]


@pytest.mark.parametrize(
    ("question", "rendered"),
    [
        ("<image>\n<audio>\n<video>\nwhat", "<image>\n<speech>\n<video>\nwhat"),
        ("what\n<image>", "what\n<image>"),
        ("<image>\n\nwhat", "<image>\n\nwhat"),
        ("hello", "hello"),
        ("a\nb", "a\nb"),
    ],
)
def test_original_records_render_as_the_original_prompts(processor, question, rendered):
    names = {"<image>": ("image", "a.png"), "<audio>": ("voice", ["b.wav"]), "<video>": ("video", ["0.png"])}
    files = dict(value for placeholder, value in names.items() if placeholder in question)
    prompt = processor.apply_chat_template(row_to_messages(original(question, **files)))
    assert prompt == f"{SYSTEM}USER: {rendered} ASSISTANT: yes</s>"


def test_both_formats_give_the_same_batch(processor, files):
    record = original(
        "<image>\n<audio>\n<video>\nwhat", image=files["image"], voice=[files["sound"]], video=files["frames"]
    )
    parts = [
        {"type": "image", "path": files["image"]},
        {"type": "speech", "path": files["sound"]},
        {"type": "video", "video": film(frames=3)},
    ]
    collate = UniMoEDataCollator(processor)
    assert_same(collate([record]), collate([row(*parts, "what")]))


def test_the_caller_says_what_voice_files_are(processor, files):
    record = original("<audio>\nwhat", voice=files["sound"])
    as_speech, as_sound = (UniMoEDataCollator(processor, voice=kind)([record]) for kind in ("speech", "audio"))
    assert "input_features" in as_speech and "input_values" not in as_speech
    assert "input_values" in as_sound and "input_features" not in as_sound


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (original("<image>\nwhat"), "1 <image> in its conversation but 0 such files"),
        (original("what", image="a.png"), "0 <image> in its conversation but 1 such files"),
        (original("<audio>\n<audio>", voice=["a.wav"]), "2 <audio> in its conversation but 1 such files"),
        (original("<video> <video>", video=["0.png", "1.png"]), "2 <video> in its conversation but 1 such files"),
        ({"text": "hello"}, r"fields \['text'\], which is no known form: it needs 'messages'"),
        ({"messages": None, "conversations": None}, "which is no known form"),
    ],
)
def test_records_that_do_not_add_up_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        row_to_messages(record)


# ---- files of rows, folders of media ----


def write_rows(file: Path, rows: list[dict]) -> None:
    lines = [json.dumps(one, ensure_ascii=False) for one in rows]
    file.write_text(f"[{','.join(lines)}]" if file.suffix == ".json" else "\n".join(lines) + "\n", encoding="utf-8")


ROW_FILES = {
    "messages": [row({"type": "image", "path": "a.png"}, "what", answer="ein Vöglein"), row("hello")],
    "original": [
        original("hello"),
        original("<image>\nwhat", image="a.png"),
        original("<image>\n<audio>", image="a.png", voice=["b.wav"]),
        original("<video>", video=["0.png", "1.png"]),
    ],
    "both formats": [row("hello"), original("<image>\nwhat", image="a.png")],
    "odd separators inside": [row("a\u2028b\x85c\nd")],
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("rows", ROW_FILES.values(), ids=ROW_FILES)
def test_rows_are_read_from_files_as_they_were_written(tmp_path, suffix, rows):
    write_rows(tmp_path / f"rows{suffix}", rows)
    loaded = load_rows(tmp_path / f"rows{suffix}")
    assert [row_to_messages(one) for one in loaded] == [row_to_messages(one) for one in rows]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", None, "does not exist"),
        ("rows.json", "[{]", "no valid json"),
        ("rows.jsonl", '{"text": 1}\n{"text"', "no valid jsonl"),
        ("rows.json", '{"messages": []}', "non-empty list of objects"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.jsonl", "1\n2", "is a int, not an object"),
    ],
)
def test_files_that_hold_no_rows_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
        load_rows(tmp_path / name)


def test_relative_paths_start_at_the_media_root(processor, files, monkeypatch, tmp_path):
    root = Path(files["image"]).parent
    monkeypatch.chdir(tmp_path)
    sound = "data:audio/wav;base64," + base64.b64encode(Path(files["sound"]).read_bytes()).decode()
    rows = [
        row({"type": "image", "path": "picture.png"}, {"type": "speech", "speech": "sound.wav"}),
        row({"type": "video", "video": [f"{number}.png" for number in range(3)]}),
        row(
            {"type": "image", "path": files["image"]},
            {"type": "audio", "url": sound},
            {"type": "audio", "audio": tone()},
        ),
        row({"type": "image", "image": {"path": "picture.png", "bytes": None}}),
        original(
            "<image>\n<audio>\n<video>", image="picture.png", voice="sound.wav", video=["0.png", "1.png", "2.png"]
        ),
    ]
    found = UniMoEDataCollator(processor, media_root=str(root))(rows)
    monkeypatch.chdir(root)
    assert_same(found, UniMoEDataCollator(processor)(rows))


def test_a_media_root_leaves_everything_else_as_it_is(processor, tmp_path):
    rows = [{"messages": [{"role": "user", "content": ["hello"]}, {"role": "assistant", "content": "yes"}]}]
    collate = UniMoEDataCollator(processor, media_root=tmp_path)
    assert_same(collate(rows), UniMoEDataCollator(processor)(rows))
    with pytest.raises(ValueError, match="part"):
        collate([row(None)])


# ---- too long, unreadable ----


@pytest.mark.parametrize("max_length", [SYSTEM_LENGTH + 4, SYSTEM_LENGTH + 7, 10_000])
def test_a_row_that_is_too_long_loses_the_end_of_its_text(processor, max_length):
    rows = [row("hello"), row("hello", answer="it is a red bird"), row("is it")]
    whole = UniMoEDataCollator(processor)(rows)
    collate = UniMoEDataCollator(processor, max_length=max_length)
    assert_same(collate(rows), {name: value[:, :max_length] for name, value in whole.items()})
    assert not collate.skipped


def test_a_row_is_skipped_where_its_media_would_be_cut(processor):
    image = {"type": "image", "image": picture()}
    late = row("what is this red bird what is it", image)
    early = row(image, answer="a " * 20)
    collate = UniMoEDataCollator(processor, max_length=SYSTEM_LENGTH + 10)
    batch = collate([late, row("hello"), early])
    assert collate.skipped == {"media beyond max_length": 1}
    whole = UniMoEDataCollator(processor)([row("hello"), early])
    cut = {name: whole[name][:, : SYSTEM_LENGTH + 10] for name in ("input_ids", "attention_mask", "labels")}
    assert_same(batch, {**whole, **cut})
    assert batch["pixel_values"].shape[0] == 1


def test_media_that_end_exactly_at_the_limit_are_kept(processor):
    both = [row({"type": "image", "image": picture()}, answer="yes it is"), row("hello")]
    whole = UniMoEDataCollator(processor)(both)
    answer = (whole["labels"][0] != -100).nonzero()[0].item()
    last = (whole["input_ids"][0] == processor.image_token_id).nonzero()[-1].item()

    collate = UniMoEDataCollator(processor, max_length=answer + 1)
    assert collate(both)["input_ids"].shape == (2, answer + 1)
    assert not collate.skipped
    for max_length, reason in ((last + 1, "answer beyond max_length"), (last, "media beyond max_length")):
        collate = UniMoEDataCollator(processor, max_length=max_length)
        assert collate(both[:1])["labels"].eq(-100).all()
        assert collate.skipped == {reason: 1}


def test_unreadable_rows_stop_the_training_by_default(processor, tmp_path):
    with pytest.raises(ValueError, match="nothing.png"):
        UniMoEDataCollator(processor)([row("hello"), row({"type": "image", "path": str(tmp_path / "nothing.png")})])


BROKEN = {
    "missing file": row({"type": "image", "path": "/nothing.png"}),
    "NaN": row({"type": "speech", "speech": np.array([np.nan])}),
    "no source": row({"type": "video"}),
    "no part": row(None),
    "unknown type": row({"type": "smell", "path": "a"}),
    "roles do not alternate": {"messages": user("hello") + user("hello")},
    "base64 is no audio": row({"type": "audio", "base64": "UklG" * 200}),
    "counts differ": original("<image>\nwhat"),
    "neither format": {"text": "hello"},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_unreadable_rows_are_skipped_and_counted_on_request(processor, broken):
    with pytest.raises(ValueError):
        UniMoEDataCollator(processor)([row("hello"), broken])
    collate = UniMoEDataCollator(processor, skip_bad_rows=True)
    assert_same(
        collate([row("hello"), broken, row("is it")]), UniMoEDataCollator(processor)([row("hello"), row("is it")])
    )
    collate([broken, row("hello")])
    assert collate.skipped == {"unreadable": 2}


def test_a_batch_without_a_usable_row_teaches_nothing_and_a_hundred_are_an_error(processor):
    collate = UniMoEDataCollator(processor, skip_bad_rows=True, describe_rows=True)
    broken = [BROKEN["missing file"], BROKEN["NaN"]]
    batch = collate(broken)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "rows", "num_skipped"}
    assert batch["num_skipped"] == 2
    assert batch["labels"].eq(-100).all() and len(batch["labels"]) == 1
    assert batch["rows"] == ["an empty row in place of 2 that were skipped"]
    assert collate.skipped.total() == 2
    for _ in range(99):
        collate(broken[:1])
    with pytest.raises(ValueError, match="No row of the last 100 batches could be used: {'unreadable': 102}"):
        collate(broken[:1])
    collate = UniMoEDataCollator(processor, skip_bad_rows=True)
    for _ in range(120):  # not in succession
        collate(broken[:1])
        collate([row("hello")])


def test_labels_of_a_padded_mixed_batch_are_those_written_by_hand(processor, files):
    """Four kinds of rows; every id and every label, token by token."""
    conversations = [
        row({"type": "image", "path": files["image"]}, "what is it", answer="a bird"),
        row("what is this", answer="yes"),
        {
            "messages": [
                *user({"type": "speech", "path": files["sound"]}),
                {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
                *user({"type": "audio", "path": files["sound"]}, "what is it"),
                {"role": "assistant", "content": [{"type": "text", "text": "bell"}]},
            ]
        },
    ]
    by_hand = [
        [(f"<s> {SYSTEM}USER: <image><image><image><image> \nwhat is it ASSISTANT:", False), (" a bird</s>", True)],
        [(f"<s> {SYSTEM}USER: what is this ASSISTANT:", False), (" yes</s>", True)],
        [
            (f"<s> {SYSTEM}USER: <speech><speech><speech> ASSISTANT:", False),
            (" no</s>", True),
            ("USER: <audio><audio><audio><audio><audio> \nwhat is it ASSISTANT:", False),
            (" bell</s>", True),
        ],
    ]
    batch = UniMoEDataCollator(processor)(conversations)
    for index, expected in enumerate(by_hand):
        length = int(batch["attention_mask"][index].sum())
        tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][index, :length])
        texts = [token.replace("▁", " ").replace("<0x0A>", "\n") for token in tokens]
        marks = (batch["labels"][index] != -100).tolist()
        assert not any(marks[length:])
        runs = [(list(run), mark) for mark, run in groupby(range(length), key=lambda i: marks[i])]
        found = [("".join(texts[i] for i in run), mark) for run, mark in runs]
        # Whether a space precedes the text after a special token is the tokenizer's affair.
        assert [(re.sub(r" *(\n|<)", r"\1", text), mark) for text, mark in found] == [
            (re.sub(r" *(\n|<)", r"\1", text), mark) for text, mark in expected
        ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_every_kind_of_file_give_the_same_batch(processor, files, suffix, streaming, tmp_path):
    (tmp_path / "media").mkdir()
    for kind in ("image", "sound"):
        shutil.copy(files[kind], tmp_path / "media")
    made = [
        row({"type": "image", "path": "media/picture.png"}, "what is it", answer="a bird"),
        row("what is this", answer="yes"),
        row({"type": "audio", "path": "media/sound.wav"}, answer="bell"),
    ]
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(made).to_parquet(file)
    elif suffix == ".json":
        file.write_text(json.dumps(made))
    else:
        file.write_text("\n".join(map(json.dumps, made)) + "\n\n")
    found = sorted(load_rows(file, streaming=streaming), key=lambda each: each["_row"])
    assert [each["_row"] for each in found] == [1, 2, 3]
    expected = UniMoEDataCollator(processor, media_root=tmp_path)(made)
    assert_same(UniMoEDataCollator(processor)(found), expected)


def test_a_stream_is_shared_by_workers_and_gives_every_row_once(processor, tmp_path):
    lines = [json.dumps(row("what is it", answer=f"yes {number}")) for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    stream = load_rows(tmp_path / "rows.jsonl", streaming=True)
    loader = torch.utils.data.DataLoader(stream, batch_size=4, num_workers=2, collate_fn=lambda batch: batch)
    seen = [each["_row"] for batch in loader for each in batch]
    assert sorted(seen) == list(range(1, 51))
    halves = [split_dataset_by_node(stream, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(each["_row"] for half in halves for each in half) == list(range(1, 51))


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_weight(tmp_path, streaming):
    for name, count in (("a", 40), ("b", 20)):
        lines = [json.dumps(row(f"{name} {number}")) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    weights = {str(tmp_path / "a.jsonl"): 0.5, str(tmp_path / "b.jsonl"): 2.25}
    mixed = load_rows(weights, streaming=streaming, seed=1)
    sources = [Path(each["_source"]).stem for each in mixed]
    if streaming:  # drawn row by row
        assert 10 < sources.count("a") < 30 and 40 < sources.count("b") < 52
        assert "a" in sources[:20] and "b" in sources[:20]
        return
    assert (sources.count("a"), sources.count("b")) == (20, 45)
    rows_of_a = [each["_row"] for each in mixed if each["_source"].endswith("a.jsonl")]
    assert len(set(rows_of_a)) == 20 and rows_of_a != list(range(1, 21))
    with pytest.raises(ValueError, match="positive weights"):
        load_rows({str(tmp_path / "a.jsonl"): 0})


ANSWERS = ["5", "null", '"quoted"', '["a", "b"]', "true", "3.14", '{"type": "image"}', "\u00e9\U0001f600"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_text_that_looks_like_json_stays_text(suffix, streaming, tmp_path):
    """Content as text in some messages and as parts in others, as many data sets have it; parts may be bare text."""
    made = []
    for answer in ANSWERS:
        asked = [answer, {"type": "image", "path": "a.png"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        made.append({"messages": turns, "id": 5 if answer == "5" else answer})
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":  # as `datasets` writes what it has read
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
        load_rows(tmp_path / "rows.jsonl").to_parquet(file)
    else:
        text = json.dumps(made) if suffix == ".json" else "\r\n".join(map(json.dumps, made))
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes files
    found = sorted(load_rows(file, streaming=streaming), key=lambda each: each["_row"])
    for original_row, each in zip(made, found, strict=True):
        assert row_to_messages(each) == row_to_messages(original_row)
        assert row_to_messages(each)[1]["content"] == original_row["messages"][1]["content"]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_other_shapes_are_mixed_and_lose_nothing(processor, files, streaming, tmp_path):
    """Media that begin late, both formats, a single name beside lists of them, names that look like numbers, bytes."""
    for kind in ("image", "sound"):
        shutil.copy(files[kind], tmp_path)
    shutil.copy(files["image"], tmp_path / "7")
    media = [{"type": "image", "path": "picture.png"}, {"type": "audio", "path": "sound.wav"}]
    late = [row(f"hello {number}") for number in range(12)] + [row(*media, "late")]
    records = [original("<image>", image="7"), original("<image><image>", image=["7", "picture.png"]), original("hi")]
    frames = [original("<video>", video=[files["frames"][0]] * 2)]
    stored = [row({"type": "image", "bytes": Path(files["image"]).read_bytes()}, "stored")]
    for name, rows in (("late", late), ("records", records), ("frames", frames)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(stored).to_parquet(tmp_path / "stored.parquet")
    names = ("late.jsonl", "records.jsonl", "frames.jsonl", "stored.parquet")
    found = list(load_rows({str(tmp_path / name): 1 for name in names}, streaming=streaming))
    expected = {"late": late, "records": records, "frames": frames, "stored": stored}
    assert len(found) == sum(map(len, expected.values()))
    plain = UniMoEDataCollator(processor, media_root=tmp_path)
    for each in found:
        wanted = expected[Path(each["_source"]).stem][each["_row"] - 1]
        assert_same(UniMoEDataCollator(processor)([each]), plain([wanted]))
    for name in names:
        assert list(check_rows(tmp_path / name)) == []


def test_a_stream_is_dealt_out_evenly_and_parses_no_line_twice(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row(str(number))) for number in range(30)))
    stream = load_rows(tmp_path / "rows.jsonl", streaming=True)
    parsed = []
    monkeypatch.setattr("json.loads", lambda text, loads=json.loads: (parsed.append(text), loads(text))[1])
    for split in (split_dataset_by_node, lambda stream, rank, world_size: stream.shard(world_size, rank)):
        parsed.clear()
        shares = [len(list(split(stream, rank=rank, world_size=4))) for rank in range(4)]
        assert sum(shares) == len(parsed) == len(set(parsed)) == 30 and max(shares) - min(shares) <= 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "positive weights"),
        ({"rows.jsonl": float("nan")}, "positive weights"),
        ({"rows.jsonl": float("inf")}, "positive weights"),
        ({"rows.jsonl": 0.1}, "leave no row"),
        ({"me/captions": 1}, "'me/captions' is no .json, .*only files can be mixed"),
        ({"other.jsonl": 1}, "'other.jsonl' does not exist"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(row("hello")))
    with pytest.raises(ValueError, match=message):
        load_rows(weights)


def test_half_a_character_is_named_by_collator_and_checker(processor, tmp_path):
    text = json.dumps(row("hello")) + "\n" + json.dumps(row("cut \ud83d"))
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"^Row 2 of '.*' cannot be used: a text holds half a character"):
        UniMoEDataCollator(processor)(list(load_rows(tmp_path / "rows.jsonl")))
    assert [number for number, _ in check_rows(tmp_path / "rows.jsonl")] == [2]


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(row("caf\u00e9"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl' is no valid jsonl \(line"):
        load_rows(tmp_path / "rows.jsonl")


BAD_ROWS = {
    "a file that is not there": (row({"type": "image", "path": "no.png"}), r"'.*no\.png' does not exist"),
    "a file that is no picture": (row({"type": "image", "path": "text.png"}), r"text\.png"),
    "a part without source": (row({"type": "audio"}), "has no source"),
    "an unknown part": (row({"type": "smell", "path": "x"}), "type 'smell'"),
    "no answer": (row("hello", answer=" "), "no assistant text"),
    "roles": ({"messages": [{"role": "tool", "content": "x"}, *row("x")["messages"]]}, "roles must alternate"),
    "no known form": ({"text": "x"}, r"the fields \['text'\], which is no known form"),
    "more tags than files": (original("<image><image>what", image="picture.png"), "has 2 <image> .* but 1 such files"),
    "a missing frame": (original("<video>what", video=["0.png", "9.png"]), r"'.*9\.png' does not exist"),
    "content": ({"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": "x"}]}, "neither text"),
    "no role": ({"messages": [{"content": "x"}, {"role": "assistant", "content": "x"}]}, "needs 'role'"),
    "a text that is a number": (row({"type": "text", "text": 5}), "a text is a int: 5"),
    "messages that are text": ({"messages": "hello"}, "'messages' is not a list of objects"),
    "messages that are one": ({"messages": {"role": "user", "content": "x"}}, "'messages' is not a list of objects"),
    "messages of text": ({"messages": ["hello", "yes"]}, "'messages' is not a list of objects"),
    "turns of text": ({"conversations": ["hello", "yes"]}, "'conversations' is not a list of objects"),
    "a turn that is a list": (original(["hello"]), "a text is a list"),
    "another speaker": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "and?"}]},
        "by 'bot'; known are",
    ),
    "two sources": (row({"type": "image", "path": "picture.png", "image": "picture.png"}), "2 sources"),
    "a name too long": (row({"type": "image", "path": "x" * 300}), "no valid base64"),
    "a late broken frame": (row({"type": "video", "video": ["0.png", "1.png", "2.png", "text.png"]}), r"text\.png"),
    "a system message in the middle": (
        {"messages": row("hello")["messages"] + [{"role": "system", "content": "x"}]},
        "roles must alternate|ystem|Roles",
    ),
}


def test_the_checker_lists_every_bad_row_and_why(files, tmp_path, capsys):
    for file in Path(files["image"]).parent.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    good = [row({"type": "image", "path": "picture.png"}), original("<audio>", voice=["sound.wav"]), row("hello")]
    lines = []
    for bad, _ in BAD_ROWS.values():
        lines += [json.dumps(good[len(lines) % 3]), json.dumps(bad)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = dict(check_rows(tmp_path / "rows.jsonl"))
    assert list(found) == list(range(2, 2 * len(BAD_ROWS) + 1, 2))
    for (name, (_, message)), reason in zip(BAD_ROWS.items(), found.values(), strict=True):
        assert re.search(message, reason), (name, reason)
    assert main(["data", "check", str(tmp_path / "rows.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "no.png' does not exist" in out and f"{len(BAD_ROWS)} rows cannot be used" in out
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, good)))
    assert main(["data", "check", str(tmp_path / "good.jsonl")]) == 0
    assert "every row can be used" in capsys.readouterr().out
    assert dict(check_rows(tmp_path / "good.jsonl", modalities=["image"])) == {
        2: "it has speech, for which the model has no tower"
    }
    assert main(["data", "check", str(tmp_path / "nothing.jsonl")]) == 1
    assert "check the path" in capsys.readouterr().err


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_names_itself_or_is_skipped_and_counted(processor, files, bad, tmp_path):
    for file in Path(files["image"]).parent.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("hello")) + "\n" + json.dumps(BAD_ROWS[bad][0]))
    loaded = list(load_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"^Row 2 of '.*rows\.jsonl' cannot be used: "):
        UniMoEDataCollator(processor)(loaded)
    collate = UniMoEDataCollator(processor, skip_bad_rows=True, describe_rows=True)
    batch = collate(loaded)
    assert len(batch["input_ids"]) == 1 and collate.skipped == {"unreadable": 1}
    assert batch["rows"] == [f"Row 1 of '{tmp_path / 'rows.jsonl'}'"]


def test_workers_decode_videos_without_hanging(processor, tmp_path):
    import av

    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 32, 32
        for index in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), index * 15, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row({"type": "video", "path": "film.mp4"}))] * 12))
    collate = UniMoEDataCollator(processor)
    collate(list(load_rows(tmp_path / "rows.jsonl").select([0])))  # the parent has decoded before the workers fork
    loader = torch.utils.data.DataLoader(
        load_rows(tmp_path / "rows.jsonl"), batch_size=2, num_workers=2, collate_fn=collate, timeout=60
    )
    assert sum(len(batch["pixel_values_videos"]) for batch in loader) == 12
