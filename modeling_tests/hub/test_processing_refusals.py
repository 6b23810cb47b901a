"""What a processor cannot use is refused by one sentence."""

import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny import film, picture, tiny_processor, tone, user
from tiny_media import FILES, MODALITIES, encode

from uni_moe_hf import UniMoEProcessor


# ---- wrong input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image> <image>", "images": picture()}, "2 `<image>` placeholders in the text but 1 image clip;"),
        ({"text": "what", "images": [picture()] * 2}, "0 `<image>` placeholders in the text but 2 image clips;"),
        ({"text": "<speech>"}, "1 `<speech>` placeholder in the text but 0 speech clips;"),
        (
            {"text": ["<audio>", "hello"], "audio": [tone()] * 3},
            "1 `<audio>` placeholder in the text but 3 audio clips;",
        ),
        (
            {"text": ["<image>", "<image> <image>"], "images": [[picture()] * 2, [picture()]]},
            "1 `<image>` placeholder in the text of row 0 but 2 image clips;",
        ),
        (
            {"text": ["<video>", "<video>"], "videos": [[film()], []]},
            "1 `<video>` placeholder in the text of row 1 but 0 video clips;",
        ),
    ],
)
def test_counts_that_differ_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments, padding=True)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (user({"type": "sound", "path": "x.wav"}), "type 'sound'; known are text, image, video, audio, speech"),
        (user({"path": "x.wav"}), "type None; known are"),
        (user({"type": "image"}), "type 'image' has no source; give one of .*'path'"),
        (user({"type": "audio", "path": "a.wav", "url": "http://b"}), "'audio' names 2 sources"),
        (user(None), "part"),
        ([{"role": "user"}], "needs 'role' and 'content'"),
        ([{"role": 7, "content": "hello"}], "The role of a message is a int"),
        ([], "empty"),
    ],
)
def test_malformed_conversations_are_refused(processor, conversation, message):
    with pytest.raises(ValueError, match=message):
        encode(processor, conversation)


@pytest.mark.parametrize("arguments", [{}, {"text": [1]}, {"text": []}])
def test_a_call_without_usable_input_is_refused(processor, arguments):
    with pytest.raises(ValueError, match="`text`"):
        processor(**arguments)


def test_truncation_never_cuts_placeholders(processor):
    with pytest.raises(ValueError, match="image"):
        processor(text="what <image> is it", images=picture(), truncation=True, max_length=4)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "folder"])
@pytest.mark.parametrize(
    ("modality", "name"), [*FILES.items(), pytest.param("audio", "film.mp4", id="track-film.mp4")]
)
def test_files_that_cannot_be_read_are_named(processor, media, tmp_path, modality, name, damage):
    file = tmp_path / f"broken_{name}"
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        good = (media / name).read_bytes()
        file.write_bytes({"empty": b"", "garbage": b"\x00\x01 no media " * 99, "cut": good[:40]}[damage])
    with pytest.raises(ValueError, match=f"{file}"):
        encode(processor, user({"type": modality, "path": str(file)}))


def test_a_picture_cut_in_the_middle_is_refused(processor, media, tmp_path):
    whole = (media / "picture.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.png"):
        encode(processor, user({"type": "image", "path": str(tmp_path / "half.png")}))


def test_files_without_the_wanted_stream_are_named(processor, media, tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0, np.float32), 16000)
    wrong = {"speech": tmp_path / "nothing.wav", "audio": media / "silent.mp4", "video": media / "sound.wav"}
    for kind, file in wrong.items():
        with pytest.raises(ValueError, match=f"{file}"):
            encode(processor, user({"type": kind, "path": str(file)}))


@pytest.mark.parametrize("modality", MODALITIES)
def test_addresses_that_hold_nothing_are_named(processor, server, modality, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries sound five times, 13 s in all
    with pytest.raises(ValueError, match="nothing.bin"):
        encode(processor, user({"type": modality, "url": f"{server}/nothing.bin"}))


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_bytes_that_hold_no_media_are_refused(processor, data):
    for modality in ("image", "audio", "speech"):
        with pytest.raises(ValueError, match="could not be read"):
            encode(processor, user({"type": modality, "bytes": data}))


def test_a_picture_of_no_pixels_is_refused(processor):
    with pytest.raises(ValueError, match="Picture"):
        encode(processor, user({"type": "image", "image": np.zeros((0, 4, 3), np.uint8)}))


@pytest.mark.parametrize("video", [[], film()[:0]])
def test_a_video_of_no_frames_is_refused(processor, video):
    with pytest.raises(ValueError, match="0 frames"):
        encode(processor, user({"type": "video", "video": video}))


@pytest.mark.parametrize("setting", ["video_pooling", "image_mode", "default_ear"])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"`{setting}` is 'max' but must be one of"):
        tiny_processor(**{setting: "max"})


def test_a_tokenizer_without_placeholders_is_refused(processor, plain_tokenizer):
    with pytest.raises(ValueError, match="no special token <image>.*build_processor"):
        UniMoEProcessor(processor.image_processor, processor.feature_extractor, plain_tokenizer)


def test_a_long_name_that_is_no_file_is_told_shortened(processor):
    with pytest.raises(ValueError, match="does not exist") as caught:
        encode(processor, user({"type": "image", "path": "x" * 3000 + ".png"}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": 3}, "A video is a int"),
        ({"type": "video", "video": Image.new("RGB", (4, 4))}, "A video is a Image"),
        ({"type": "audio", "audio": {"array": tone(), "sampling_rate": "16000"}}, "must be a number from 1000"),
    ],
    ids=["number", "picture", "rate"],
)
def test_objects_that_are_no_media_are_refused_in_one_sentence(processor, part, message):
    with pytest.raises(ValueError, match=message):
        encode(processor, user(part))


def test_settings_that_nobody_knows_are_named(processor, caplog):
    inputs = processor(text="<video>", videos=[film()], videos_kwargs={"num_frames": 3, "fps": 2}, paddding=True)
    assert np.asarray(inputs["pixel_values_videos"]).shape[1] == 3
    assert "no setting `fps` of videos" in caplog.text and "no argument `paddding`" in caplog.text
    processor.apply_chat_template(user("hello"), colour="red")
    assert "Neither the chat template nor the processor knows `colour`" in caplog.text
    template = "a {{ colour }} bird"
    assert processor.apply_chat_template(user("hello"), chat_template=template, colour="red") == "a red bird"


@pytest.mark.parametrize(
    ("conversation", "settings", "message"),
    [
        ("hello", {}, "The conversation is a str; pass a list of messages"),
        ({"role": "user", "content": "hello"}, {}, "The conversation is a dict; pass a list of messages"),
        (user("hello"), {"processor_kwargs": {"images": []}}, r"holds \['images'\]; media belong into"),
        (
            [{"role": "user", "content": 5}],
            {},
            "The content of a message is a int; it must be text or a list of parts",
        ),
    ],
)
def test_what_a_conversation_cannot_be_is_one_sentence(processor, conversation, settings, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, tokenize=True, **settings)
