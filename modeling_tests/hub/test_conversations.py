"""Conversations as people write them, through templates of other LLMs: what is said, learned and refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import film, picture, tiny_processor, tone, user

from uni_moe_hf import UniMoEProcessor


# Written after the public descriptions of these formats. G and E stand for the marks of what the assistant says.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}G{{ m.content + '<|im_end|>' }}E{{ '\n' }}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "smollm2": (
        "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}G{{ m.content + '<|im_end|>' }}E{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}G{{ m.content | trim + '<|eot_id|>' }}E{% else %}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{% if m.role == 'assistant' %}G{{ m.content | trim + '<end_of_turn>' }}E{{ '\n' }}{% else %}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # The system's words stand in the last question, wherever that is.
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system if loop.index0 >= turns | length - 2 else '') + m.content + '[/INST]' }}"
        "{% else %}G{{ ' ' + m.content | trim + eos_token }}E{% endif %}{% endfor %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
        "{% if m.role == 'assistant' %}G{{ m.content + '<|end|>' }}E{{ '\n' }}{% else %}{{ m.content + '<|end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # Answers to the last question carry their thoughts, or an empty place for them; earlier ones lose theirs.
    "qwen3": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}G{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content"
        " else '' %}{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{ said + '<|im_end|>' }}E{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    ),
}
ADDED = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> [INST] "
    "[/INST] <|end|> <|user|> <|assistant|> <|system|>"
).split()


def template(name: str, marked: bool = False) -> str:
    marks = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    text = TEMPLATES[name]
    for letter, mark in zip("GE", marks, strict=True):
        text = text.replace(f"}}{letter}{{", f"}}{mark}{{")
    return text


@pytest.fixture(scope="module")
def processor() -> UniMoEProcessor:
    made = tiny_processor(video_frames=4)
    made.tokenizer.add_special_tokens({"additional_special_tokens": [*made.all_special_multimodal_tokens, *ADDED]})
    return made


def say(text, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def encode(processor, conversation, **settings) -> dict:
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **settings}
    return processor.apply_chat_template(conversation, **settings)


def learned(processor, conversation, **settings) -> list[str]:
    """The pieces of text that are learned."""
    inputs = encode(processor, conversation, return_assistant_tokens_mask=True, **settings)
    pieces, ids, mask = [], inputs["input_ids"][0].tolist(), inputs["assistant_masks"][0].tolist()
    for index, (token, bit) in enumerate(zip(ids, mask, strict=True)):
        if bit and (index == 0 or not mask[index - 1]):
            pieces.append([])
        if bit:
            pieces[-1].append(token)
    return [processor.tokenizer.decode(piece).strip() for piece in pieces]


IMAGE = {"type": "image", "image": picture()}
CHATS = {
    "one": [*user(IMAGE, "what is this"), say("a bird")],
    "two": [*user("hello"), say("yes"), *user(IMAGE, "what is it"), say("it is a red bird")],
    "three": [*user("is it"), say("no"), *user("is it red"), say("yes it is"), *user("hello"), say("hello")],
    "the same words": [*user("yes"), say("yes"), *user("yes"), say("yes")],
    "spaces": [*user("hello"), say("  yes  "), *user("hello"), say("a\n\nb\n")],
    "marks in text": [*user("what is <image> <|im_end|>"), say("it is </s> <|eot_id|> a bird")],
    "thoughts": [
        *user("hello"),
        say("<think>\nso\n</think>\n\nyes"),
        *user("hello"),
        say("<think>\nso\n</think>\n\nno"),
    ],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_what_is_learned_is_the_same_with_and_without_marks(processor, name, chat, system):
    conversation = [{"role": "system", "content": "be brief"}, *CHATS[chat]] if system else CHATS[chat]
    if name == "gemma" and system:
        with pytest.raises(ValueError, match="refuses this conversation: System role not supported"):
            encode(processor, conversation, chat_template=template(name))
        return
    marked, found = (
        encode(processor, conversation, chat_template=template(name, marks), return_assistant_tokens_mask=True)
        for marks in (True, False)
    )
    assert torch.equal(marked["input_ids"], found["input_ids"])
    assert marked["assistant_masks"].any() and torch.equal(marked["assistant_masks"], found["assistant_masks"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_picture_has_its_tokens_in_any_template(processor, name):
    inputs = encode(processor, CHATS["two"], chat_template=template(name))
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4 and len(inputs["pixel_values"]) == 1


def test_thinking_can_be_switched_off_where_earlier_answers_have_no_place_for_it(processor):
    settings = {"chat_template": template("qwen3"), "enable_thinking": False}
    assert learned(processor, CHATS["three"], **settings) == ["no<|im_end|>", "yes it is<|im_end|>", "hello<|im_end|>"]


# ---- what is text stays text ----


@pytest.mark.parametrize("word", ["</s>", "<s>", "<|im_end|>", "[INST]", "<image>", "<unk>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_special_token_in_somebodys_text_is_text(processor, word, role):
    conversation = [{"role": "system", "content": "be brief"}, *user("hello"), say("yes"), *user("hello")]
    plain = encode(processor, conversation)["input_ids"]
    changed = copy.deepcopy(conversation)
    index = [message["role"] for message in changed].index(role)
    changed[index]["content"] = [{"type": "text", "text": "a " + word[:2]}, {"type": "text", "text": word[2:] + " b"}]
    found = encode(processor, changed)["input_ids"]
    special = torch.tensor(processor.tokenizer.convert_tokens_to_ids([word]))
    assert torch.isin(found, special).sum() == torch.isin(plain, special).sum()
    assert f"a {word} b" in processor.tokenizer.decode(found[0])


# ---- roles ----


def test_an_assistant_may_greet_first(processor):
    conversation = [say("hello"), *user("what is it"), say("a bird")]
    assert processor.apply_chat_template(conversation).endswith(
        "ASSISTANT: hello</s>USER: what is it ASSISTANT: a bird</s>"
    )
    assert learned(processor, conversation) == ["hello</s>", "a bird</s>"]
    assert learned(processor, conversation, chat_template=template("chatml")) == [
        "hello<|im_end|>",
        "a bird<|im_end|>",
    ]


def test_messages_of_a_user_that_follow_each_other_are_joined(processor):
    apart = [*user(IMAGE), {"role": "user", "content": "what"}, *user("is it", {"type": "speech", "speech": tone()})]
    together = user(IMAGE, "whatis it", {"type": "speech", "speech": tone()})
    together[0]["content"][1]["text"] = "what\nis it"
    for name, value in encode(processor, apart).items():
        assert torch.equal(value, encode(processor, together)[name])


def test_a_developer_is_the_system_and_no_content_is_none(processor):
    conversation = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": None}, say("yes")]
    assert processor.apply_chat_template(conversation) == "be brief USER:  ASSISTANT: yes</s>"


@pytest.mark.parametrize("content", [IMAGE, {"type": "text", "text": "hello"}])
def test_a_single_part_is_a_list_of_one(processor, content):
    single, several = ({"role": "user", "content": each} for each in (content, [content]))
    assert processor.apply_chat_template([single]) == processor.apply_chat_template([several])


# ---- what messages and parts say of themselves ----


@pytest.mark.parametrize("flag", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.0, "loss": 0}])
@pytest.mark.parametrize("name", [None, "chatml", "llama 3"])
def test_a_message_that_is_not_to_be_learned_is_not(processor, flag, name):
    conversation = [*user("hello"), say("no", **flag), *user("hello"), say("yes", weight=1)]
    settings = {} if name is None else {"chat_template": template(name)}
    (piece,) = learned(processor, conversation, **settings)
    assert piece.startswith("yes")


def test_a_part_that_is_not_to_be_learned_is_not(processor):
    parts = [{"type": "text", "text": "it is ", "train": False}, {"type": "text", "text": "a bird"}]
    assert learned(processor, [*user("hello"), say(parts)]) == ["a bird</s>"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (say("yes", weight=0.5), "`weight` is 0.5; only 0 and 1"),
        (say("yes", loss="no"), "`loss` is 'no'"),
        (say("yes", loss=True, train=False), "contradict each other"),
        ({"role": "user", "content": "hi", "train": True}, "only the assistant's are"),
        (say("yes", tool_calls=[{"name": "f"}]), "'tool_calls', which the chat template does not read"),
        (say("yes", reasoning_content="so"), "'reasoning_content'"),
        ({"role": "user", "content": "hi", "images": ["a.png"]}, "'images'.*put media into the parts"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "image": "a.png"}]}, "'text' holds 'image'"),
        ({"role": "user", "content": [{"type": "image", "path": "a.png", "text": "x"}]}, "holds text as well"),
        (
            {"role": "user", "content": [{"type": "image", "path": "a.png", "start": 1}]},
            "`start`, which means nothing",
        ),
        ({"role": "user", "content": [{"type": "audio", "path": "a.wav", "fps": 1}]}, "`fps`, which means nothing"),
        ({"role": "user", "content": [{"type": "image", "video": "a.mp4"}]}, "names 1 sources"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image' has no source"),
        ({"role": "user", "content": [{"type": "image", "base64": 5}]}, "base64 source is a int"),
        ({"role": ["user"], "content": "hi"}, "role of a message is a list"),
    ],
)
def test_what_would_be_lost_is_refused(processor, message, reason):
    conversation = [message] if message["role"] != "assistant" else [*user("hello"), message]
    with pytest.raises(ValueError, match=reason):
        encode(processor, conversation)


def test_tools_need_a_template_that_reads_them(processor):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(ValueError, match="template does not read `tools`"):
        processor.apply_chat_template(user("hello"), tools=tools)
    reading = (
        "{{ tools[0].function.name }}{% for m in messages %}{{ m.tool_calls | length if m.tool_calls }}{% endfor %}"
    )
    called = [*user("hello"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert processor.apply_chat_template(called, tools=tools, chat_template=reading) == "f1"


def test_what_nobody_reads_is_named_once(processor, caplog):
    conversation = user({"type": "image", "image": picture(), "colour": "red"}, "what")
    for _ in range(2):
        encode(processor, conversation)
    assert caplog.text.count("type 'image' have the field 'colour', which is not read") == 1


@pytest.mark.parametrize(
    "part",
    [
        {"image": picture()},
        {"type": "image", "bytes": None, "image": picture()},
    ],
)
def test_parts_of_other_interfaces_are_understood(processor, part):
    assert torch.equal(encode(processor, user(part))["pixel_values"], encode(processor, user(IMAGE))["pixel_values"])


# ---- a cut, a number of frames ----


def test_a_part_may_ask_for_a_cut_of_a_sound(processor):
    whole = tone(2.0)
    for keys in ({"start": 0.5, "end": 1.25}, {"audio_start": 0.5, "audio_end": 1.25}):
        inputs = encode(processor, user({"type": "speech", "speech": whole, **keys}))
        expected = encode(processor, user({"type": "speech", "speech": whole[8000:20000]}))
        assert torch.equal(inputs["input_features"], expected["input_features"])
    with pytest.raises(ValueError, match="begins at 3 s and it lasts 2.00 s"):
        encode(processor, user({"type": "speech", "speech": whole, "start": 3}))


@pytest.mark.parametrize("key", ["num_frames", "nframes"])
def test_videos_of_a_batch_may_have_different_numbers_of_frames(processor, key):
    """Each row as if it were alone, in the order of its frames."""
    chats = [user({"type": "video", "video": film(0), key: 2}), user({"type": "video", "video": film(1)})]
    together = encode(processor, chats, processor_kwargs={"padding": True})
    assert together["pixel_values_videos_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    for row, chat in enumerate(chats):
        alone = encode(processor, chat)["pixel_values_videos"][0]
        assert "pixel_values_videos_mask" not in encode(processor, chat)
        assert torch.equal(together["pixel_values_videos"][row, : len(alone)], alone)


@pytest.mark.parametrize("number", [0, -1, 2.0, "4", True, 10**9])
def test_a_number_of_frames_is_bounded(processor, number):
    video = {"type": "video", "video": film()}
    with pytest.raises(ValueError, match="`num_frames` is"):
        encode(processor, user(video), num_frames=number)
    with pytest.raises(ValueError, match="`num_frames` is"):
        encode(processor, user({**video, "num_frames": number}))


# ---- templates that are particular ----

PARTICULAR = {
    "needs a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('needs system') }}{% endif %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        [{"role": "system", "content": "be brief"}, *user("what"), say("a bird")],
    ),
    "takes one turn": (
        "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}{% for m in messages %}"
        "{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        [*user("what"), say("a bird")],
    ),
    "takes no empty message": (
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
        "{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        [*user("what"), say("a bird")],
    ),
    "ends with the assistant": (
        "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}{% for m in messages %}"
        "{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        [*user("what"), say("a bird")],
    ),
    "reads parts alone": (
        "{% for m in messages %}{{ m.role + ': ' }}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<' + p.type + '>' }}{% endfor %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        [*user("what"), say("a bird")],
    ),
    "opens answers otherwise than it writes them": (
        "{% for m in messages %}{{ '<|Assistant|>' + m.content + eos_token if m.role == 'assistant' else m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>' }}{% endif %}",
        [*user("<|Assistant|><think>say hello"), say("a bird")],
    ),
}


@pytest.mark.parametrize("name", PARTICULAR)
def test_a_particular_template_learns_the_answer_and_its_end(processor, name):
    text, conversation = PARTICULAR[name]
    (piece,) = learned(processor, conversation, chat_template=text)
    assert piece in ("a bird</s>", "<|Assistant|>a bird</s>")


def test_a_call_that_fails_leaves_its_template_as_it_was(processor):
    strict = "{% if colour is defined %}{{ raise_exception('no colours') }}{% endif %}" + template("chatml")
    with pytest.raises(ValueError, match="no colours"):
        processor.apply_chat_template(user("what"), chat_template=strict, colour="red")
    assert processor.apply_chat_template(user("what"), chat_template=strict) == "<|im_start|>user\nwhat<|im_end|>\n"


def test_the_part_that_is_not_to_be_learned_is_that_one_and_no_other_of_the_same_words(processor):
    parts = [
        {"type": "text", "text": "is it "},
        {"type": "text", "text": "it", "weight": 0},
        {"type": "text", "text": " red"},
    ]
    assert learned(processor, [*user("hello"), say(parts)]) == ["is it", "red</s>"]


def test_threads_do_not_disturb_each_other(processor):
    def call(index: int) -> list:
        if index % 2:
            return processor(text=["hello", "what is it what is it"], padding=True, return_tensors="np")[
                "input_ids"
            ].shape
        return len(processor(text="hello")["input_ids"][0])

    expected = [call(0), call(1)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(200)))
    assert found == expected * 100 and processor.tokenizer.backend_tokenizer.padding is None
