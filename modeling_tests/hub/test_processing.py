"""From conversations to ids and features: exact tokens, every source of media, every kind of broken input."""

import base64
import copy
import dataclasses
import json
import logging
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import groupby, permutations
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from PIL import Image
from tiny import ROUNDING, film, picture, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, tone, user
from transformers import AutoProcessor, LlamaTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uni_moe_hf import UniMoEDataCollator, UniMoEProcessor
from uni_moe_hf.hub.media_uni_moe import load_waveform
from uni_moe_hf.mixtures.processors import build_processor


MODALITIES = ("image", "video", "audio", "speech")
# Tokens of one clip of the tiny model: 2 x 2 patches, the same after pooling frames, queries of one window.
NUM_TOKENS = {"image": 4, "video": 4, "audio": 5, "speech": 3}
FILES = {"image": "picture.png", "video": "film.mp4", "audio": "sound.wav", "speech": "sound.wav"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
# Levels of grey of a test video's frames, far enough apart to be told through lossy compression.
GREYS = [30, 70, 110, 150, 190, 230]


@pytest.fixture(scope="module")
def processor() -> UniMoEProcessor:
    return tiny_processor(video_frames=4)


@pytest.fixture(scope="module")
def plain_tokenizer():
    """One that never had the special tokens."""
    return tiny_tokenizer()


def write_video(path: Path, greys: list[int], sound: np.ndarray | None = None) -> None:
    """One flat frame for each level of grey, 5 per second, H.264, with an AAC track of `sound` at 16 kHz."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        track = None if sound is None else container.add_stream("aac", rate=16000, layout="mono")
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(track.encode(frame))
            container.mux(track.encode())


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with one good file of each kind."""
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(picture()).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", tone(), 16000, subtype="FLOAT")
    write_video(folder / "film.mp4", GREYS, sound=tone(0.8))
    write_video(folder / "silent.mp4", GREYS)
    write_video(folder / "film.mkv", GREYS)
    return folder


@pytest.fixture(scope="module")
def server(media):
    """The address at which `media` is served from this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        timeout = 10

        def log_message(self, *_):
            pass

    with (
        pytest.MonkeyPatch.context() as patch,
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(media))) as http,
    ):
        patch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join(timeout=10)


def clip(modality: str, seed: int = 0, seconds: float = 0.3):
    if modality in ("image", "video"):
        return {"image": picture, "video": film}[modality](seed)
    return tone(seconds, pitch=300 + 50 * seed)


def part(modality: str, seed: int = 0, seconds: float = 0.3) -> dict:
    return {"type": modality, modality: clip(modality, seed, seconds)}


def turn(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode(processor: UniMoEProcessor, conversation: list, **kwargs) -> dict:
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(conversation, **kwargs)


def tokens(processor: UniMoEProcessor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


def runs(processor: UniMoEProcessor, ids) -> list[tuple[str, int]]:
    """Placeholders in order, equal neighbours counted together."""
    placeholders = {f"<{modality}>" for modality in MODALITIES}
    return [(t[1:-1], len(list(same))) for t, same in groupby(tokens(processor, ids)) if t in placeholders]


def assert_same(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- placeholders ----


def test_text_without_media_has_the_plain_tokenizers_ids(processor, plain_tokenizer):
    inputs = processor(text="what is it")
    assert inputs["input_ids"] == [plain_tokenizer("what is it")["input_ids"]]
    assert set(inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("modality", MODALITIES)
def test_one_clip_repeats_its_placeholder_in_place(processor, modality):
    names = {"image": "images", "video": "videos"}
    inputs = processor(text=f"what <{modality}> is", **{names.get(modality, modality): clip(modality)})
    repeated = [f"<{modality}>"] * NUM_TOKENS[modality]
    assert tokens(processor, inputs["input_ids"][0]) == ["<s>", "▁what", "▁", *repeated, "▁is"]


def test_a_video_without_pooling_has_the_tokens_of_all_its_frames():
    processor = tiny_processor(tiny_config(video_pooling="none"), video_frames=3)
    inputs = encode(processor, user(part("video")))
    assert runs(processor, inputs["input_ids"][0]) == [("video", 3 * 4)]
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 16, 16)


@pytest.mark.parametrize(
    ("num_samples", "num_windows"), [(1, 1), (1600, 1), (16000, 1), (16001, 2), (32000, 2), (40000, 3)]
)
@pytest.mark.parametrize("modality", ["audio", "speech"])
def test_a_clip_has_tokens_for_every_started_window(processor, modality, num_samples, num_windows):
    inputs = encode(processor, user({"type": modality, modality: tone(3)[:num_samples]}))
    assert runs(processor, inputs["input_ids"][0]) == [(modality, num_windows * NUM_TOKENS[modality])]
    features = inputs["input_values" if modality == "audio" else "input_features"]
    assert len(features) == num_windows


@pytest.mark.parametrize("order", list(permutations(MODALITIES))[::5])
def test_clips_of_all_kinds_stand_in_reading_order(processor, order):
    order = [*order, *order[::-1], order[0]]
    parts = [part(modality, seed) for seed, modality in enumerate(order)]
    inputs = encode(processor, user("what", *parts[:4], "is it", *parts[4:]))

    lines = ["what", *(f"<{m}>" * NUM_TOKENS[m] for m in order)]
    lines.insert(5, "is it")
    expanded = f"{SYSTEM}USER: " + "\n".join(lines)
    assert inputs["input_ids"].tolist() == [processor.tokenizer(expanded)["input_ids"]]
    for modality, name in zip(
        MODALITIES, ("pixel_values", "pixel_values_videos", "input_values", "input_features"), strict=True
    ):
        alone = [encode(processor, user(p))[name] for p in parts if p["type"] == modality]
        assert torch.equal(inputs[name], torch.cat(alone)), name


def test_clips_of_raw_prompts_come_in_one_list_or_by_row(processor):
    prompts = ["<image> what", "<image> is <image>"]
    pictures = [clip("image", seed) for seed in range(3)]
    flat = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    nested = processor(text=prompts, images=[pictures[:1], pictures[1:]], padding=True, return_tensors="pt")
    assert_same(flat, nested)
    assert [runs(processor, ids) for ids in flat["input_ids"]] == [[("image", 4)], [("image", 4), ("image", 4)]]


def test_media_without_text_become_features_alone(processor):
    inputs = processor(images=clip("image"), videos=clip("video"), audio=clip("audio"), speech=clip("speech"))
    assert {name: np.shape(value) for name, value in inputs.items()} == {
        "pixel_values": (1, 3, 16, 16),
        "pixel_values_videos": (1, 4, 3, 16, 16),
        "input_values": (1, 98, 128),
        "input_values_mask": (1, 98),
        "input_features": (1, 80, 100),
    }


def test_token_type_ids_number_the_modalities(processor):
    conversation = user(*(part(modality) for modality in MODALITIES))
    inputs = encode(processor, conversation, processor_kwargs={"return_mm_token_type_ids": True})
    types = {token_id: number for number, token_id in enumerate(range(380, 384), start=1)}
    assert inputs["mm_token_type_ids"].tolist() == [[types.get(i, 0) for i in inputs["input_ids"][0].tolist()]]
    counts = torch.bincount(inputs["mm_token_type_ids"][0])
    assert counts[1:].tolist() == [NUM_TOKENS[modality] for modality in MODALITIES]


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_the_model_finds_as_many_features_as_the_processor_promised(pooling):
    model = tiny_model(video_pooling=pooling)
    processor = tiny_processor(model.config, video_frames=3)
    parts = [part(modality, seconds=1.5) for modality in (*MODALITIES, *MODALITIES)]
    inputs = encode(processor, [user("hello"), user(*parts)], processor_kwargs={"padding": True})
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 380)


# ---- conversations ----


RENDERED = [
    (user("what is it"), "USER: what is it"),
    (user("what", "is it"), "USER: whatis it"),
    ([{"role": "user", "content": "hello"}], "USER: hello"),
    (user({"type": "image"}, "what"), "USER: <image>\nwhat"),
    (user("what", {"type": "speech"}), "USER: what\n<speech>"),
    (user("what", {"type": "audio"}, "is it"), "USER: what\n<audio>\nis it"),
    (user({"type": "video"}, {"type": "audio"}), "USER: <video>\n<audio>"),
    (user("hello") + [turn("yes")], "USER: hello ASSISTANT: yes</s>"),
    (
        user("hello") + [turn("yes")] + user({"type": "image"}, "what") + [turn("a bird")],
        "USER: hello ASSISTANT: yes</s>USER: <image>\nwhat ASSISTANT: a bird</s>",
    ),
]


@pytest.mark.parametrize(("conversation", "rendered"), RENDERED)
def test_conversations_render_as_vicuna_v1_1_to_the_byte(processor, conversation, rendered):
    assert processor.apply_chat_template(conversation) == SYSTEM + rendered
    prompted = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompted == f"{SYSTEM}{rendered} ASSISTANT:"


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_a_system_message_takes_the_default_ones_place(processor, content):
    conversation = [{"role": "system", "content": content}, *user("hello"), turn("yes")]
    assert processor.apply_chat_template(conversation) == "Be brief. USER: hello ASSISTANT: yes</s>"


@pytest.mark.parametrize("text", ["yes it", "yes <image>"])
def test_the_final_message_can_be_left_open(processor, text):
    conversation = user("hello") + [turn(text)]
    ids = encode(processor, conversation, continue_final_message=True)["input_ids"][0]
    assert processor.tokenizer.decode(ids) == f"<s> {SYSTEM}USER: hello ASSISTANT: {text}"


@pytest.mark.parametrize(
    ("conversation", "number", "role"),
    [
        (user("hello") + [turn("yes"), turn("no")], 3, "assistant"),
        (user("hello") + [{"role": "system", "content": "Be brief."}], 2, "system"),
        ([{"role": "tool", "content": "hello"}], 1, "tool"),
    ],
)
def test_roles_that_do_not_alternate_are_refused(processor, conversation, number, role):
    with pytest.raises(Exception, match=f"must alternate.* message {number} is by '{role}'"):
        processor.apply_chat_template(conversation)


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_cover_answers_and_their_end_alone(processor, side):
    conversations = [
        user(part("video"), part("audio", seconds=1.5), "what is it") + [turn("a bell")],
        user("hello", part("image")) + [turn("yes")] + user("what", part("speech")) + [turn("it is a bird")],
        user("hello") + [turn("no")] + user(part("image")) + [turn("red")] + user("what") + [turn("blue")],
    ]
    inputs = encode(
        processor,
        conversations,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )
    learned = [
        tokens(processor, ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert learned == [
        ["▁a", "▁bell", "</s>"],
        ["▁yes", "</s>", "▁it", "▁is", "▁a", "▁bird", "</s>"],
        ["▁no", "</s>", "▁red", "</s>", "▁blue", "</s>"],
    ]


@pytest.mark.parametrize("answer", ["<image>", "<speech> yes", "it is <video>", "<audio><audio>"])
def test_assistant_masks_are_not_shifted_by_literal_placeholders(processor, plain_tokenizer, answer):
    conversation = user(part("image"), "say <image>") + [turn(answer)]
    inputs = encode(processor, conversation, return_assistant_tokens_mask=True)
    learned = inputs["input_ids"][inputs["assistant_masks"].bool()]
    assert tokens(processor, learned) == [*plain_tokenizer.tokenize(answer), "</s>"]


def test_the_callers_messages_stay_as_they_were(processor):
    conversation = user({"type": "audio", "audio": [0.0] * 800, "sampling_rate": 16000}, "say <image>")
    before = copy.deepcopy(conversation)
    encode(processor, conversation)
    assert conversation == before


# ---- literal placeholders ----


@pytest.mark.parametrize(
    "text",
    [
        "<image>",
        "a<image>b",
        "<image><image>",
        "<<speech>>",
        "x <audio>\n<video> y",
        "<ima<image>ge>",
        "\uf8ee<image>",
    ],
)
def test_a_placeholder_in_a_chats_text_is_ordinary_text(processor, plain_tokenizer, text):
    readable = text.replace("\uf8ee", "")
    for conversation, rendered in (
        (user(text), f"{SYSTEM}USER: {readable}"),
        ([{"role": "user", "content": text}], f"{SYSTEM}USER: {readable}"),
        ([{"role": "system", "content": text}, *user("hello")], f"{readable} USER: hello"),
        (user("hello") + [turn(text)], f"{SYSTEM}USER: hello ASSISTANT: {readable}</s>"),
    ):
        inputs = encode(processor, conversation)
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert inputs["input_ids"].tolist() == [plain_tokenizer(rendered)["input_ids"]]
        assert readable in processor.tokenizer.decode(inputs["input_ids"][0])
        assert processor(text=processor.apply_chat_template(conversation))["input_ids"] == inputs["input_ids"].tolist()


def test_a_placeholder_spelled_by_two_text_parts_is_ordinary_text(processor, plain_tokenizer):
    inputs = encode(processor, user("<ima", "ge>"))
    assert inputs["input_ids"].tolist() == [plain_tokenizer(f"{SYSTEM}USER: <image>")["input_ids"]]


def test_a_literal_placeholder_beside_a_picture_takes_no_picture(processor):
    ids = encode(processor, user("say <image>", part("image"), "and <image>"))["input_ids"][0]
    assert runs(processor, ids) == [("image", 4)]
    readable = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert "USER: say <image>\n" in readable and readable.endswith("and <image>")


# ---- batches ----


def test_rows_of_a_batch_may_hold_other_modalities_or_none(processor):
    conversations = [
        user(part("image", 1), part("image", 2), "what is it"),
        user("hello"),
        user(part("speech", 3), "what"),
        user("is it", part("video", 4), part("audio", 5, seconds=2.5)),
        user(part("image", 6)),
    ]
    batch = encode(processor, conversations, add_generation_prompt=True, processor_kwargs={"padding": True})
    singles = [encode(processor, conversation, add_generation_prompt=True) for conversation in conversations]
    width = max(single["input_ids"].shape[1] for single in singles)
    for row, single in enumerate(singles):
        ids = single["input_ids"][0].tolist()
        missing = width - len(ids)
        assert batch["input_ids"][row].tolist() == [processor.tokenizer.pad_token_id] * missing + ids
        assert batch["attention_mask"][row].tolist() == [0] * missing + [1] * len(ids)
    for name in ("pixel_values", "pixel_values_videos", "input_values", "input_values_mask", "input_features"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles if name in single])), name


def test_without_return_tensors_ids_and_masks_are_lists(processor):
    conversation = user(part("image"), "what") + [turn("yes")]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = encode(processor, conversation, return_assistant_tokens_mask=True)
    for name in ("input_ids", "attention_mask", "assistant_masks"):
        assert isinstance(inputs[name], list) and inputs[name] == expected[name].tolist()
    assert processor.apply_chat_template(conversation, tokenize=True) == expected["input_ids"].tolist()


# ---- sources of media ----


PICTURE_SOURCES = {
    "str": lambda file: {"path": str(file)},
    "Path": lambda file: {"path": file},
    "own key": lambda file: {"image": str(file)},
    "bytes": lambda file: {"bytes": file.read_bytes()},
    "base64": lambda file: {"base64": base64.b64encode(file.read_bytes()).decode()},
    "dict with path": lambda file: {"image": {"path": str(file), "bytes": None}},
    "dict with bytes": lambda file: {"image": {"path": None, "bytes": file.read_bytes()}},
    "PIL": lambda file: {"image": Image.open(file)},
    "PIL with alpha": lambda file: {"image": Image.open(file).convert("RGBA")},
    "channels first": lambda file: {"image": picture().transpose(2, 0, 1)},
    "float tensor": lambda file: {"image": torch.from_numpy(picture() / 255)},
}


@pytest.mark.parametrize("source", PICTURE_SOURCES.values(), ids=PICTURE_SOURCES)
def test_a_picture_may_come_in_any_form(processor, media, source):
    inputs = encode(processor, user({"type": "image", **source(media / "picture.png")}))
    assert_same(inputs, encode(processor, user(part("image"))))


SOUND_SOURCES = {
    "str": lambda file, kind: {"path": str(file)},
    "Path": lambda file, kind: {"path": file},
    "own key": lambda file, kind: {kind: str(file)},
    "bytes": lambda file, kind: {"bytes": file.read_bytes()},
    "base64": lambda file, kind: {"base64": base64.b64encode(file.read_bytes()).decode()},
    "data URL": lambda file, kind: {"url": "data:audio/wav;base64," + base64.b64encode(file.read_bytes()).decode()},
    "path beside rate": lambda file, kind: {"path": str(file), "sampling_rate": 16000},
    "dict with path": lambda file, kind: {kind: {"path": str(file), "bytes": None}},
    "dict with bytes": lambda file, kind: {kind: {"path": None, "bytes": file.read_bytes()}},
    "dict with array": lambda file, kind: {kind: {"path": None, "array": tone(), "sampling_rate": 16000}},
    "dict without rate": lambda file, kind: {kind: {"array": tone(), "sampling_rate": None}},
    "list": lambda file, kind: {kind: tone().tolist()},
    "array beside rate": lambda file, kind: {kind: tone(), "sampling_rate": 16000},
    "tensor": lambda file, kind: {kind: torch.from_numpy(tone())},
    "stereo, channels first": lambda file, kind: {kind: np.stack([tone(), tone()])},
    "stereo, channels last": lambda file, kind: {kind: np.stack([tone(), tone()], axis=1)},
}


@pytest.mark.parametrize("kind", ["audio", "speech"])
@pytest.mark.parametrize("source", SOUND_SOURCES.values(), ids=SOUND_SOURCES)
def test_sound_may_come_in_any_form(processor, media, kind, source):
    inputs = encode(processor, user({"type": kind, **source(media / "sound.wav", kind)}))
    assert_same(inputs, encode(processor, user({"type": kind, kind: tone()})))


FILM_SOURCES = {
    "Path": lambda file: {"path": file},
    "own key": lambda file: {"video": str(file)},
    "bytes": lambda file: {"bytes": file.read_bytes()},
    "dict with path": lambda file: {"video": {"path": str(file), "bytes": None}},
}


@pytest.mark.parametrize("source", FILM_SOURCES.values(), ids=FILM_SOURCES)
def test_a_video_file_may_be_named_in_any_form(processor, media, source):
    inputs = encode(processor, user({"type": "video", **source(media / "film.mp4")}))
    assert_same(inputs, encode(processor, user({"type": "video", "path": str(media / "film.mp4")})))


FRAMES = {
    "channels first": lambda frames, folder: frames.transpose(0, 3, 1, 2),
    "arrays": lambda frames, folder: list(frames),
    "PIL": lambda frames, folder: [Image.fromarray(frame) for frame in frames],
    "paths": lambda frames, folder: [str(folder / f"{number}.png") for number in range(len(frames))],
}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES)
def test_a_video_may_be_a_row_of_pictures(processor, tmp_path, frames):
    for number, frame in enumerate(film()):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    inputs = encode(processor, user({"type": "video", "video": frames(film(), tmp_path)}))
    assert_same(inputs, encode(processor, user(part("video"))))


@pytest.mark.parametrize("modality", MODALITIES)
def test_media_are_fetched_from_addresses(processor, media, server, modality):
    name = FILES[modality]
    inputs = encode(processor, user({"type": modality, "url": f"{server}/{name}"}))
    assert_same(inputs, encode(processor, user({"type": modality, "path": str(media / name)})))


def test_the_sound_track_of_a_video_is_fetched_from_an_address(processor, media, server):
    inputs = encode(processor, user({"type": "audio", "url": f"{server}/film.mp4"}))
    assert_same(inputs, encode(processor, user({"type": "audio", "path": str(media / "film.mp4")})))


@pytest.mark.parametrize("modality", MODALITIES)
def test_keys_that_are_none_do_not_count_as_sources(processor, media, modality):
    source = {"type": modality, "path": str(media / FILES[modality])}
    unused = dict.fromkeys([*MODALITIES, "text", "url", "bytes", "base64", "sampling_rate"])
    conversation = [
        {
            "role": "user",
            "name": None,
            "content": [{**unused, **source}, {**unused, "path": None, "type": "text", "text": "what"}],
        }
    ]
    assert_same(encode(processor, conversation), encode(processor, user(source, "what")))


# ---- sound ----


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_of_any_rate_is_averaged_and_resampled(tmp_path, rate, channels):
    recording = np.stack([tone(0.5, pitch, rate) for pitch in (300, 500)[:channels]], axis=1)
    soundfile.write(tmp_path / "sound.wav", recording, rate, subtype="FLOAT")
    expected = soxr.resample(recording.mean(axis=1), rate, 16000)
    for source in (str(tmp_path / "sound.wav"), {"array": recording, "sampling_rate": rate}):
        # 1e-6: the mean of two channels is rounded in either order.
        np.testing.assert_allclose(load_waveform(source), expected, rtol=0, atol=1e-6)


def test_a_parts_own_rate_resamples_its_array(processor):
    inputs = encode(processor, user({"type": "speech", "speech": tone(0.5, rate=8000), "sampling_rate": 8000}))
    resampled = soxr.resample(tone(0.5, rate=8000), 8000, 16000)
    assert_same(inputs, encode(processor, user({"type": "speech", "speech": resampled})))


@pytest.mark.parametrize("modality", ["audio", "speech"])
def test_windows_of_a_long_clip_are_those_of_its_pieces(processor, modality):
    long = np.random.default_rng(0).normal(size=40000).astype(np.float32) / 10
    whole = processor(**{modality: long}, return_tensors="pt")
    pieces = processor(**{modality: [long[:16000], long[16000:32000], long[32000:]]}, return_tensors="pt")
    assert_same(whole, pieces)


def test_the_mask_of_sound_ends_with_the_clip(processor):
    mask = processor(audio=[tone(1.0), tone(0.9)], return_tensors="pt")["input_values_mask"]
    assert mask[0].sum() == 98
    # BEATs' own arithmetic: 98 equal runs of 163 samples, and 89 of them begin inside the clip's 14,400.
    assert mask[1].tolist() == [1] * 89 + [0] * 9


def test_a_clip_of_too_many_windows_is_refused(processor):
    with pytest.raises(ValueError, match=r"20\.5 s, which is 21 windows of 1 s, but at most 20 are allowed"):
        encode(processor, user({"type": "audio", "audio": tone(20.5)}))


def test_a_rate_that_the_model_does_not_hear_is_refused(processor):
    with pytest.raises(ValueError, match="8000 Hz but the model hears 16000 Hz"):
        processor(text="<audio>", audio=tone(rate=8000), sampling_rate=8000)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(0, np.float32), "0 samples"),
        (np.array([0.1, np.nan, np.inf]), "2 NaN or infinite"),
        (np.array([1, 2], np.int16), "int16; divide by 32768"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
        ({"array": tone()[:1], "sampling_rate": 48000}, "0 samples"),
    ],
)
def test_waveforms_that_hold_no_sound_are_refused(processor, waveform, message):
    with pytest.raises(ValueError, match=message):
        encode(processor, user({"type": "speech", "speech": waveform}))


# ---- video ----


def greys(inputs: dict) -> list[int]:
    """Mean level of every frame of the only video, in the order of `GREYS`."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    levels = inputs["pixel_values_videos"][0].mean(dim=(-1, -2)) * std + mean
    return (255 * levels.mean(dim=-1)).tolist()


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize(
    ("num_frames", "wanted"),
    [(6, [0, 1, 3, 4]), (4, [0, 1, 2, 3]), (3, [0, 0, 1, 2]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])],
)
def test_frames_are_taken_evenly_and_short_videos_repeat_them(
    processor, tmp_path, monkeypatch, backend, num_frames, wanted
):
    if backend == "decord":
        monkeypatch.setitem(sys.modules, "av", None)
    write_video(tmp_path / "film.mp4", GREYS[:num_frames])
    inputs = encode(processor, user({"type": "video", "path": str(tmp_path / "film.mp4")}))
    # 8 levels: lossy compression and the rounding of YUV.
    assert greys(inputs) == pytest.approx([GREYS[index] for index in wanted], abs=8)


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv"])
def test_pyav_gives_decords_frames(processor, media, monkeypatch, name):
    conversation = user({"type": "video", "path": str(media / name)})
    expected = encode(processor, conversation)["pixel_values_videos"]
    monkeypatch.setitem(sys.modules, "av", None)
    # 0.03: two levels of 255 over the channels' deviation of 0.26.
    torch.testing.assert_close(encode(processor, conversation)["pixel_values_videos"], expected, rtol=0, atol=0.03)


def test_arrays_repeat_frames_like_files(processor):
    inputs = processor(videos=film(frames=3), return_tensors="pt")["pixel_values_videos"][0]
    pictures = processor(images=list(film(frames=3)), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs, pictures[[0, 0, 1, 2]])


def test_without_any_decoder_the_error_names_both(processor, media, monkeypatch):
    for name in ("decord", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs PyAV or decord: `pip install av`"):
        encode(processor, user({"type": "video", "path": str(media / "film.mp4")}))


def test_a_video_file_serves_as_sound(media):
    track = load_waveform(str(media / "film.mp4"))
    # AAC adds up to two frames of 1024 samples of silence at either end.
    assert len(tone(0.8)) <= len(track) <= len(tone(0.8)) + 4096
    spectrum = np.abs(np.fft.rfft(track))
    assert np.argmax(spectrum) * 16000 / len(track) == pytest.approx(440, abs=5)


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_an_empty_sound_part_behind_a_video_is_its_sound_track(processor, media, kind):
    video = {"type": "video", "path": str(media / "film.mp4")}
    inputs = encode(processor, user(video, {"type": kind}), load_audio_from_video=True)
    assert_same(inputs, encode(processor, user(video, {"type": kind, "path": str(media / "film.mp4")})))


def test_an_empty_sound_part_belongs_to_the_last_video_before_it(processor, media, tmp_path):
    write_video(tmp_path / "other.mp4", GREYS, sound=tone(0.8, pitch=700))
    first, second = ({"type": "video", "path": str(file)} for file in (media / "film.mp4", tmp_path / "other.mp4"))
    inputs = encode(processor, user(first, {"type": "audio"}, second, {"type": "audio"}), load_audio_from_video=True)
    tracks = [load_waveform(video["path"]) for video in (first, second)]
    assert torch.equal(inputs["input_values"], processor(audio=tracks, return_tensors="pt")["input_values"])


def test_an_empty_sound_part_means_nothing_without_the_option_or_before_the_video(processor, media):
    video = {"type": "video", "path": str(media / "film.mp4")}
    with pytest.raises(ValueError, match="'audio' has no source"):
        encode(processor, user(video, {"type": "audio"}))
    with pytest.raises(ValueError, match="'audio' has no source"):
        encode(processor, user({"type": "audio"}, video), load_audio_from_video=True)


# ---- pictures ----


@pytest.mark.parametrize("draw", range(25))
def test_pixels_are_those_of_the_image_processor(processor, draw):
    """Bit for bit before the affine map; whatever is not the usual way goes through the processor."""
    random = np.random.default_rng(draw)
    height, width = random.integers(1, 400, 2)
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    crop = {"height": int(random.integers(8, 33)), "width": int(random.integers(8, 33))}
    settings = {"size": {"shortest_edge": 32}, "crop_size": crop, "resample": int(random.integers(0, 6))}
    other = random.choice(["", "do_center_crop", "do_rescale", "do_normalize", "do_resize"])
    settings |= {str(other): False} if other else {}
    owner = copy.copy(processor)
    owner.image_processor = CLIPImageProcessorPil(**settings)
    expected = owner.image_processor([image], return_tensors="np")["pixel_values"]
    actual = owner._pixels([image], {"return_tensors": "np"})
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, **ROUNDING)


def test_pad_shows_the_whole_picture_on_the_mean_colour():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :8, 0] = wide[:, -8:, 2] = 255
    padded, cropped = (
        encode(tiny_processor(image_mode=mode), user({"type": "image", "image": wide}))["pixel_values"][0]
        for mode in ("pad", "crop")
    )
    # 0.016: the mean colour is rounded down to one of 255 levels, and a deviation is about 0.26.
    assert padded[:, 0].abs().max() < 0.016 and padded[:, -1].abs().max() < 0.016
    middle = padded[:, 8]
    assert middle[0, 0] > 1 and middle[2, -1] > 1
    assert cropped[0].max() < 0 and cropped[2].max() < 0


def test_pad_leaves_squares_alone_and_pads_frames_of_videos():
    pad, crop = tiny_processor(image_mode="pad"), tiny_processor(image_mode="crop")
    square = user({"type": "image", "image": picture(size=(30, 30))})
    assert_same(encode(pad, square), encode(crop, square))
    frames = pad(videos=film(), return_tensors="pt")["pixel_values_videos"][0]
    pictures = pad(images=list(film()), return_tensors="pt")["pixel_values"]
    assert torch.equal(frames[:2], pictures[[0, 0]])


# ---- ears and towers ----


def test_plain_audio_goes_to_the_only_ear_with_one_warning(caplog):
    logging.Logger.warning_once.cache_clear()
    processor = tiny_processor(tiny_config(without=("vision", "audio")))
    parts = [part("audio", 1, seconds=1.5), part("speech", 2), part("audio", 3)]
    inputs = encode(processor, user(*parts))
    encode(processor, user(*parts))
    assert [record.getMessage() for record in caplog.records if "speech tower" in record.getMessage()] == [
        "This model has no tower for sound, so plain `audio` parts are heard by its speech tower; use `speech` parts "
        "to say so."
    ]
    said = [{"type": "speech", "speech": p[p["type"]]} for p in parts]
    assert_same(inputs, encode(processor, user(*said)))
    raw = processor(
        text="<audio> <speech> <audio>",
        audio=[parts[0]["audio"], parts[2]["audio"]],
        speech=parts[1]["speech"],
        return_tensors="pt",
    )
    assert runs(processor, raw["input_ids"][0]) == [("speech", 6), ("speech", 3), ("speech", 3)]
    assert torch.equal(raw["input_features"], inputs["input_features"])


def test_text_and_speech_alone_cause_no_warning_about_audio(caplog):
    logging.Logger.warning_once.cache_clear()
    processor = tiny_processor(tiny_config(without=("vision", "audio")))
    processor(text="hello")
    encode(processor, user(part("speech"), "what"))
    assert not caplog.records


def test_speech_never_falls_back_to_the_ear_for_sound():
    processor = tiny_processor(tiny_config(without=("vision", "speech")))
    encode(processor, user(part("audio")))
    with pytest.raises(ValueError, match="1 speech clip but this model has no tower for speech .*text, audio"):
        encode(processor, user(part("speech")))


def test_the_default_ear_hears_plain_audio_when_there_are_two():
    processor = tiny_processor(default_ear="speech")
    assert_same(encode(processor, user(part("audio"))), encode(processor, user(part("speech"))))
    raw = processor(text="<speech> <audio>", audio=tone(1.5), speech=tone(0.2), return_tensors="pt")
    assert runs(processor, raw["input_ids"][0]) == [("speech", 3), ("speech", 6)]
    assert torch.equal(
        raw["input_features"], processor(speech=[tone(0.2), tone(1.5)], return_tensors="pt")["input_features"]
    )


def test_the_ear_is_the_same_with_and_without_text():
    processor = tiny_processor(tiny_config(without=("vision", "audio")))
    assert_same(processor(audio=tone(), return_tensors="pt"), processor(speech=tone(), return_tensors="pt"))


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_modality_without_a_tower_is_refused(modality):
    processor = tiny_processor(tiny_config(without=("vision", "speech", "audio")))
    with pytest.raises(ValueError, match=f"2 {modality} clips but this model has no tower for {modality} "):
        encode(processor, user(part(modality), part(modality)))


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


# ---- saving ----


def test_a_saved_processor_gives_the_same_inputs_and_the_same_files(tmp_path):
    settings = {"video_frames": 3, "image_mode": "crop", "default_ear": "speech", "num_audio_query_tokens": 2}
    processor = tiny_processor(tiny_config(video_pooling="none"), **settings)
    processor.save_pretrained(tmp_path / "first")
    loaded = UniMoEProcessor.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")

    conversation = user(*(part(modality, seconds=1.5) for modality in MODALITIES), "say <image>") + [turn("<audio>")]
    kwargs = {"return_assistant_tokens_mask": True, "processor_kwargs": {"return_mm_token_type_ids": True}}
    assert_same(encode(loaded, conversation, **kwargs), encode(processor, conversation, **kwargs))
    for name in settings:
        assert getattr(loaded, name) == getattr(processor, name)

    first, second = ({file.name: file.read_bytes() for file in (tmp_path / d).iterdir()} for d in ("first", "second"))
    # The library notes in the second tokenizer file that the first was a local one.
    configs = [json.loads(files.pop("tokenizer_config.json")) for files in (first, second)]
    configs[1] = {key: value for key, value in configs[1].items() if key not in ("is_local", "local_files_only")}
    assert first == second
    assert configs[0] == configs[1]


def test_a_template_of_the_users_own_is_saved_and_used(tmp_path):
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<' + p['type'] + '>' }}{% endfor %}{% endfor %}"  # noqa: E501
    processor = tiny_processor(chat_template=template)
    processor.save_pretrained(tmp_path)
    loaded = UniMoEProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(user("what ", {"type": "image"})) == "what <image>"
    assert runs(loaded, encode(loaded, user("what ", part("image")))["input_ids"][0]) == [("image", 4)]


def test_a_jpeg_in_memory_is_a_picture(processor):
    buffer = BytesIO()
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(buffer, format="JPEG")
    inputs = encode(processor, user({"type": "image", "bytes": buffer.getvalue()}))
    expected = processor(images=np.full((16, 16, 3), 128, np.uint8), return_tensors="pt")["pixel_values"]
    # 0.03: JPEG may miss a flat grey by two of 255 levels, over a deviation of 0.26.
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=0.03)


def test_base64_is_read_short_or_long_in_lines_or_not(processor):
    """As a bare source, as servers pass it, and under its own key."""
    pixels = np.full((64, 64, 3), (200, 30, 30), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    short, file = file.getvalue(), BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    for data in (short, file.getvalue()):
        expected = processor(images=data, return_tensors="np")["pixel_values"]
        for text in (base64.b64encode(data).decode(), base64.encodebytes(data).decode()):
            for part in ({"url": text}, {"image": text}, {"base64": text}, {"url": f"data:image/png;base64,{text}"}):
                inputs = encode(processor, user({"type": "image", **part}))
                np.testing.assert_array_equal(inputs["pixel_values"].numpy(), expected)


def test_a_long_name_that_is_no_file_is_told_shortened(processor):
    with pytest.raises(ValueError, match="does not exist") as caught:
        encode(processor, user({"type": "image", "path": "x" * 3000 + ".png"}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["audio", "speech"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sound_may_be_a_tensor_of_any_float_with_or_without_gradient(processor, kind, dtype):
    wave = torch.from_numpy(tone()).to(dtype).requires_grad_()
    inputs = encode(processor, user({"type": kind, kind: wave}))
    expected = encode(processor, user({"type": kind, kind: wave.detach().float().numpy()}))
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_masks_are_white(processor):
    white = processor(images=np.ones((20, 24), bool), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(
        white, processor(images=np.full((20, 24), 255, np.uint8), return_tensors="np")["pixel_values"]
    )


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


def test_a_videos_settings_and_number_of_frames_may_be_given_with_a_call(processor):
    video = film()
    plain = processor(text="<video>", videos=[video], return_tensors="pt")["pixel_values_videos"]
    fewer = processor(text="<video>", videos=[video], num_frames=3, return_tensors="pt")["pixel_values_videos"]
    assert fewer.shape[1] == 3 and torch.equal(fewer[0, 0], plain[0, 0])
    settings = {"do_normalize": False, "do_rescale": False}
    raw = processor(text="<video>", videos=[video], videos_kwargs=settings, return_tensors="pt")
    assert raw["pixel_values_videos"].max() > 100


def test_the_processor_tells_servers_how_many_tokens_clips_become(processor):
    told = processor._get_num_multimodal_tokens([(20, 24), (9, 9)], [(5, 20, 24)], [1, 16000, 16001])
    assert (told.num_image_tokens, told.num_video_tokens, told.num_audio_tokens) == ([4, 4], [4], [5, 5, 10])


def test_names_of_inputs_are_those_of_the_towers_that_are_there():
    names = tiny_processor(tiny_config(without=("vision", "audio"))).model_input_names
    assert names[-2:] == ["input_features", "input_features_mask"]
    assert set(tiny_processor().model_input_names) >= {"pixel_values", "pixel_values_videos", "input_values_mask"}


def test_very_long_pictures_show_their_middle(processor):
    """As an unbounded resize and crop would, which the library does: within rounding of the crop."""
    strip = np.zeros((4, 4000, 3), np.uint8)
    strip[:, 1990:2010] = 255
    middle = processor(images=strip, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(middle, processor(images=strip[:, 1900:2100], return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_tokenizer_stays_as_it_was_when_saved(legacy, tmp_path):
    """Legacy ones put a space before the text after a special token; the library's saving drops that setting."""
    made = tiny_tokenizer()
    tokenizer = LlamaTokenizer(vocab=made._vocab, merges=made._merges, add_bos_token=True, legacy=legacy)
    processor = build_processor(tiny_config(), tokenizer, chunk_length=1)
    processor.save_pretrained(tmp_path)
    prompt = "hello <image>what</s>is"
    expected = processor.tokenizer.tokenize(prompt)
    assert ("▁what" in expected) == legacy
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.tokenize(prompt) == expected


# Keyword arguments


def test_settings_may_come_flat_in_groups_and_for_all(processor):
    texts = ["a bird", "what is this it a bird"]
    flat = processor(text=texts, padding=True, return_tensors="pt")
    for kwargs in (
        {"text_kwargs": {"padding": True, "return_tensors": "pt"}},
        {"common_kwargs": {"padding": True, "return_tensors": "pt"}},
        {"text_kwargs": {"padding": True}, "return_tensors": "pt"},
    ):
        assert torch.equal(processor(text=texts, **kwargs)["input_ids"], flat["input_ids"])
    with pytest.raises(ValueError, match="`padding` was passed both as it is and in `text_kwargs`"):
        processor(text=texts, padding=True, text_kwargs={"padding": False})
    plain = processor(text="<image>", images=picture(), images_kwargs={"return_tensors": "pt"})
    assert isinstance(plain["input_ids"], list)


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


def test_messages_may_be_objects_and_none_of_their_fields_count(processor):
    @dataclasses.dataclass
    class Message:
        role: str
        content: str
        name: str | None = None

    class Model:
        def model_dump(self) -> dict:
            return {"role": "user", "content": "hello", "name": None}

    expected = processor.apply_chat_template(user("hello"))
    assert processor.apply_chat_template([Message("user", "hello")]) == expected
    assert processor.apply_chat_template([Model()]) == expected
    assert processor.apply_chat_template([SimpleNamespace(messages=user("hello"))]) == [expected]
    url = {"type": "image_url", "image_url": {"url": "cat.png"}}
    assert processor.apply_chat_template(user(url)) == processor.apply_chat_template(
        user({"type": "image", "path": "cat.png"})
    )


def test_an_assistant_may_speak_first_in_a_template_without_marks(processor):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    chat = [{"role": "assistant", "content": "a bird"}, {"role": "user", "content": "what"}]
    inputs = processor.apply_chat_template(
        chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(inputs["input_ids"]).reshape(-1), np.array(inputs["assistant_masks"]).reshape(-1)
    assert processor.tokenizer.decode(ids[mask == 1]).strip() == "a bird"


# ---- a call leaves no trace ----


def test_what_calls_and_collators_set_is_neither_kept_nor_saved(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "made")
    for _ in range(2):
        UniMoEDataCollator(processor)([{"messages": [*user("hello"), turn("yes")]}] * 2)
        processor(text=["hello", "what is it"], padding="max_length", max_length=9, truncation=True)
        assert processor(text="what is it what is it")["input_ids"][0][-1] == processor(text="it")["input_ids"][0][-1]
    tokenizer = processor.tokenizer  # as other libraries call it, past the processor
    tokenizer(["hello", "what is it"], padding=True, padding_side="right", truncation=True, max_length=4)
    tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path / "used")
    assert tokenizer.padding_side == "right"  # of the caller's object
    for file in (tmp_path / "made").iterdir():
        assert file.read_bytes() == (tmp_path / "used" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("side", ["left", "right"])
def test_raw_prompts_are_padded_on_the_left_whatever_the_tokenizer_says(side):
    processor = tiny_processor()
    processor.tokenizer.padding_side = side
    mask = processor(text=["hello", "what is it what"], padding=True, return_tensors="pt")["attention_mask"]
    assert mask[0, 0] == 0 and mask[:, -1].all()
    mask = processor(text=["hello", "what is it"], padding=True, padding_side="right", return_tensors="pt")
    assert mask["attention_mask"][0, -1] == 0


def test_labels_put_into_a_batch_name_no_placeholder(processor):
    batch = processor(text="<image> what", images=picture(), return_tensors="pt")
    batch["labels"] = batch["input_ids"].clone()
    assert (batch["labels"] == -100).sum() == 4
    assert torch.equal(batch["labels"] == -100, batch["input_ids"] == processor.image_token_id)
