"""`pipeline("any-to-text")`: every form of input and output against plain `generate`."""

import logging
import threading
from types import SimpleNamespace

import pytest
import soundfile
import torch
from tiny import film, picture, since, tiny_model, tiny_processor, tone, user
from transformers import AnyToAnyPipeline, AutoModel, AutoProcessor, GenerationConfig, TextIteratorStreamer, pipeline

from uni_moe_hf import AnyToTextPipeline, UniMoEForConditionalGeneration, UniMoEProcessor


NEW = {"max_new_tokens": 4, "return_full_text": False}


@pytest.fixture(scope="module")
def pipe() -> AnyToTextPipeline:
    model = tiny_model()
    # A random model may end at once; without an end every answer has all its tokens.
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=None, pad_token_id=0)
    return pipeline("any-to-text", model=model, processor=tiny_processor(model.config, video_frames=4))


@pytest.fixture(scope="module")
def chats() -> list[list[dict]]:
    """One of each modality, one of several, one of none."""
    return [
        user({"type": "image", "image": picture()}, "what is it"),
        user({"type": "video", "video": film()}, "what is it"),
        user({"type": "audio", "audio": tone()}, "what is it"),
        user({"type": "speech", "speech": tone(1.5)}),
        user({"type": "speech", "speech": tone()}, {"type": "image", "image": picture(1)}, "is it a bird"),
        user("hello"),
    ]


def expected_ids(pipe: AnyToTextPipeline, inputs: dict, max_new_tokens: int = 4) -> torch.Tensor:
    """New tokens by plain `generate`, `(rows, max_new_tokens)`."""
    ids = pipe.model.generate(**inputs, max_new_tokens=max_new_tokens)
    return ids[:, inputs["input_ids"].shape[1] :]


def answer(pipe: AnyToTextPipeline, chat: list[dict]) -> str:
    """The answer to a chat by plain `generate`."""
    inputs = pipe.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt, answer = inputs["input_ids"][0], expected_ids(pipe, inputs)[0]
    # As the library cuts it: what the whole is longer by, a space between the two included.
    before, whole = (
        pipe.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, torch.cat([prompt, answer]))
    )
    return whole[len(before) :]


def test_the_task_makes_our_pipeline(pipe):
    assert type(pipe) is AnyToTextPipeline
    assert pipe.task == "any-to-text"


@pytest.mark.parametrize("index", range(6))
def test_a_chat_is_answered_as_by_generate(pipe, chats, index):
    records = pipe(chats[index], **NEW)
    assert records == [{"input_text": chats[index], "generated_text": answer(pipe, chats[index])}]


def test_media_change_the_answer(pipe, chats):
    other = user({"type": "image", "image": picture(7)}, "what is it")
    (seen,), (other_seen,) = (pipe(chat, max_new_tokens=20, return_full_text=False) for chat in (chats[0], other))
    assert seen["generated_text"] != other_seen["generated_text"]


def test_by_default_a_result_repeats_the_conversation(pipe, chats):
    (record,) = pipe(chats[0], max_new_tokens=4)
    assert record["input_text"] == chats[0]
    assert record["generated_text"] == [*chats[0], {"role": "assistant", "content": answer(pipe, chats[0])}]


def test_a_result_can_be_the_next_conversation(pipe, chats):
    (record,) = pipe(chats[0], max_new_tokens=4)
    follow_up = [*record["generated_text"], *user({"type": "audio", "audio": tone()}, "what")]
    (second,) = pipe(follow_up, **NEW)
    assert second["generated_text"] == answer(pipe, follow_up)


def test_an_answer_that_was_begun_is_continued(pipe):
    begun = [*user("hello"), {"role": "assistant", "content": [{"type": "text", "text": "yes it"}]}]
    inputs = pipe.processor.apply_chat_template(
        begun, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = pipe.processor.tokenizer.decode(expected_ids(pipe, inputs)[0], skip_special_tokens=True)
    (new,), (full,) = pipe(begun, **NEW), pipe(begun, max_new_tokens=4)
    assert new["generated_text"].lstrip() == text.lstrip()
    assert full["generated_text"][-1]["content"][0]["text"] == "yes it" + new["generated_text"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_chats_give_a_list_for_each(pipe, chats, batch_size):
    same_kind = [chats[0], user({"type": "image", "image": picture(3)}, "a red bird")]
    for several in (same_kind, [chats[5], user("what is this")]):
        results = pipe(several, **NEW, batch_size=batch_size)
        assert results == [[{"input_text": chat, "generated_text": answer(pipe, chat)}] for chat in several]


def test_several_chats_of_different_modalities_are_answered_one_by_one(pipe, chats):
    several = [chats[5], chats[4], chats[2]]
    results = pipe(several, **NEW)
    assert [record["generated_text"] for (record,) in results] == [answer(pipe, chat) for chat in several]


@pytest.mark.parametrize("text", ["hello", ["hello", "what is it"]])
def test_text_alone_is_continued(pipe, text):
    prompts = [text] if isinstance(text, str) else text
    texts = []
    for prompt in prompts:
        ids = expected_ids(pipe, pipe.processor(text=prompt, return_tensors="pt"))
        texts.append(pipe.processor.tokenizer.decode(ids[0], skip_special_tokens=True))
    results = pipe(text, **NEW)
    records = results if isinstance(text, str) else [record for (record,) in results]
    assert [record["input_text"] for record in records] == prompts
    # A decoded prompt has a space less than prompt and answer decoded together.
    assert [record["generated_text"].lstrip() for record in records] == [text.lstrip() for text in texts]


RAW = {
    "image": ("<image> what is it", {"images": picture()}),
    "two images": ("<image> is <image>", {"images": [picture(), picture(1)]}),
    "video": ("<video> what", {"videos": film()}),
    "audio": ("<audio>", {"audio": tone()}),
    "speech": ("<speech> what", {"speech": tone(1.5)}),
    "all": (
        "<speech> <image> <audio> <video>",
        {"images": picture(), "videos": film(), "audio": tone(), "speech": tone()},
    ),
}


@pytest.mark.parametrize(("text", "media"), RAW.values(), ids=RAW)
def test_raw_prompts_take_their_media_beside_them(pipe, text, media):
    ids = expected_ids(pipe, pipe.processor(text=text, **media, return_tensors="pt"))
    (record,) = pipe(text, **media, max_new_tokens=4, return_tensors=True)
    assert record["generated_token_ids"][-4:].tolist() == ids[0].tolist()
    (new,), (full,) = pipe(text, **media, **NEW), pipe(text, **media, max_new_tokens=4)
    assert new["input_text"] == full["input_text"] == text
    assert full["generated_text"] == text + new["generated_text"]


def test_raw_prompts_of_a_list_are_padded_into_one_batch(pipe):
    prompts, pictures = ["<image> what is it", "hello", "<image> is <image>"], [picture(seed) for seed in range(3)]
    records = pipe(prompts, images=pictures, max_new_tokens=4, return_tensors=True)
    rows = [("<image> what is it", pictures[:1]), ("hello", None), ("<image> is <image>", pictures[1:])]
    for record, (prompt, images) in zip(records, rows, strict=True):
        ids = expected_ids(pipe, pipe.processor(text=prompt, images=images, return_tensors="pt"))
        assert record["generated_token_ids"][-4:].tolist() == ids[0].tolist()


@pytest.mark.parametrize(
    ("text", "media"),
    [(user("hello"), {}), ("hello", {}), ("<image> what", {"images": picture()})],
    ids=["chat", "text", "media"],
)
def test_processor_kwargs_reach_the_processor(pipe, text, media, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logging.Logger.warning_once.cache_clear()
    padded = {"padding": "max_length", "max_length": 200}
    (record,) = pipe(text, **media, max_new_tokens=2, return_tensors=True, processor_kwargs=padded)
    assert len(record["generated_token_ids"]) == 202
    assert "will be ignored" not in caplog.text


def test_a_literal_placeholder_in_a_chat_is_text_and_in_a_raw_prompt_a_clip(pipe):
    chat = user("say <image>")
    assert pipe(chat, **NEW)[0]["generated_text"] == answer(pipe, chat)
    with pytest.raises(ValueError, match="1 `<image>` placeholder in the text but 0 image clips"):
        pipe("say <image>", **NEW)


def test_an_answer_is_256_tokens_long_at_most_by_default(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(pipe.model, "generate", lambda **kwargs: asked.append(kwargs) or kwargs["input_ids"])
    pipe(user("hello"))
    pipe("<image>", images=picture())
    # Until 5.22 the library hands its defaults over in one config.
    settings = [kwargs.get("generation_config") or SimpleNamespace(**kwargs) for kwargs in asked]
    assert [found.max_new_tokens for found in settings] == [256, 256]


@since(5, 23)
def test_several_answers_are_returned(pipe, chats):
    sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4}
    assert len(pipe(chats[4], generate_kwargs=sampled, return_full_text=False)) == 3


@since(5, 23)
def test_several_answers_to_several_conversations_stay_with_their_own(pipe, chats):
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    alone = [pipe(chat, generate_kwargs=beams, return_full_text=False) for chat in chats[:3]]
    together = pipe(chats[:3], generate_kwargs=beams, return_full_text=False, batch_size=3)
    assert [[each["generated_text"] for each in records] for records in together] == [
        [each["generated_text"] for each in records] for records in alone
    ]


def test_a_setting_that_is_given_twice_is_refused(pipe, chats):
    with pytest.raises(ValueError, match="max_new_tokens"):
        pipe(chats[4], generate_kwargs={"max_new_tokens": 3}, max_new_tokens=3)


def test_answers_are_streamed_while_they_are_made(pipe, chats):
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    results = []
    arguments = {"generate_kwargs": {"streamer": streamer, "max_new_tokens": 20}, "return_full_text": False}
    thread = threading.Thread(target=lambda: results.extend(pipe(chats[4], **arguments)), daemon=True)
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=30)
    assert len([piece for piece in pieces if piece]) > 1
    # A streamer sees the answer alone, which begins without the space between it and the prompt.
    assert "".join(pieces).strip() == results[0]["generated_text"].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Pass a conversation or a prompt"),
        ({"text": []}, "Pass a conversation or a prompt"),
        ({"text": [], "images": [picture()]}, "images"),
        ({"images": picture()}, "Got images beside no text"),
        ({"text": user("hello"), "speech": tone()}, "Got speech beside a conversation"),
        ({"text": [user("hello")], "images": picture(), "audio": tone()}, "Got images, audio beside a conversation"),
    ],
)
def test_input_that_fits_no_form_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_missing_file_is_named(pipe):
    with pytest.raises(ValueError, match="nothing.wav"):
        pipe(user({"type": "audio", "path": "nothing.wav"}), **NEW)


def test_media_of_a_chat_may_be_files(pipe, tmp_path):
    soundfile.write(tmp_path / "sound.wav", tone(), 16000, subtype="FLOAT")
    from_file = user({"type": "audio", "path": str(tmp_path / "sound.wav")}, "what is it")
    from_array = user({"type": "audio", "audio": tone()}, "what is it")
    assert pipe(from_file, **NEW)[0]["generated_text"] == pipe(from_array, **NEW)[0]["generated_text"]


def test_a_saved_pipeline_is_a_whole_folder(pipe, chats, tmp_path):
    pipe.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert {"templates_uni_moe.py", "modeling_uni_moe.py", "processing_uni_moe.py"} <= names
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (type(model), type(processor)) == (UniMoEForConditionalGeneration, UniMoEProcessor)
    loaded = pipeline("any-to-text", model=model, processor=processor)
    assert loaded(chats[4], **NEW) == pipe(chats[4], **NEW)


# The library's own task


@pytest.fixture
def stock(pipe, monkeypatch):
    """`any-to-any`, which asks for torchvision though nothing here uses it; no build of it fits a CPU torch."""
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    return pipeline("any-to-any", model=pipe.model, processor=pipe.processor)


@pytest.mark.parametrize("index", range(6))
def test_the_stock_pipeline_answers_as_ours_does(stock, pipe, chats, index, caplog):
    assert type(stock) is AnyToAnyPipeline
    assert stock(chats[index], **NEW)[0]["generated_text"] == pipe(chats[index], **NEW)[0]["generated_text"]
    assert "is not supported for any-to-any" not in caplog.text


def test_the_stock_pipeline_takes_several_chats_and_plain_text(stock, pipe, chats):
    answers = [record[0]["generated_text"] for record in stock(chats[:3], **NEW)]
    assert answers == [pipe(chat, **NEW)[0]["generated_text"] for chat in chats[:3]]
    assert stock("hello", max_new_tokens=4)[0]["generated_text"].startswith("hello")
