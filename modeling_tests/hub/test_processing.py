"""From conversations to ids and features: exact tokens, every source of media, every kind of broken input."""

import copy
import dataclasses
import json
import logging
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import film, picture, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, tone, user
from tiny_media import MODALITIES, NUM_TOKENS, SYSTEM, assert_same, clip, encode, part, runs, tokens, turn
from transformers import AutoProcessor, LlamaTokenizer

from uni_moe_hf import UniMoEDataCollator, UniMoEProcessor
from uni_moe_hf.mixtures.processors import build_processor


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
