"""The web page: answers with their experts and alternatives, as they are made; errors as sentences."""

import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny import DENSE, picture, tiny_model, tiny_processor, tone, user

from uni_moe_hf import record_routing
from uni_moe_hf.cli.main import main
from uni_moe_hf.mixtures.routing import TOKEN_TYPES
from uni_moe_hf.serving import web, web_page
from uni_moe_hf.serving.live_answers import LiveAnswer, Word, _word, answer_live


@pytest.fixture(scope="module")
def served():
    model = tiny_model({"shared_expert_base": True})
    return web.Served("demo/model", model, tiny_processor(model.config))


@pytest.fixture
def clips(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", tone(), 16000)
    return [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "speech", "path": str(tmp_path / "b.wav")}]


CHAT = user({"type": "image", "image": picture()}, {"type": "audio", "audio": tone()}, "what is this")


def test_an_answer_grows_word_by_word_into_that_of_generate(served):
    inputs = served.processor.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = served.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = served.processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    seen = [
        (len(live.words), live.is_done)
        for live in answer_live(served.model, served.processor, CHAT, 6, do_sample=False)
    ]
    assert seen == [*((count, False) for count in range(1, 7)), (6, True)]
    live = [*answer_live(served.model, served.processor, CHAT, 6, do_sample=False)][-1]
    assert live.text == expected
    for word in live.words:
        assert len(word.alternatives) == 5 and word.probability == max(value for _, value in word.alternatives)


def test_experts_of_every_token_are_those_that_record_routing_counts(served):
    with record_routing(served.model) as recorder:
        live = [*answer_live(served.model, served.processor, CHAT, 5, do_sample=False)][-1]
    report = recorder.report()
    assert live.layers == report.layers and live.experts == report.expert_names
    assert live.weights.shape[1] == len(live.types) == len(live.pieces) == int(report.num_tokens[0].sum())
    for number, name in enumerate(TOKEN_TYPES):
        chosen = live.weights[:, np.array(live.types) == number]
        assert ((chosen > 0).sum(axis=1) == report.counts[:, number].numpy()).all(), name
    assert live.from_answer == 4  # the last word is said, and not read
    np.testing.assert_allclose(live.weights.sum(axis=-1), 1, atol=1e-5)
    assert set(live.shares()) == {"text", "image", "audio", "answer"}


def test_a_slow_reader_sees_no_more_experts_than_words(served):
    for live in answer_live(served.model, served.processor, CHAT, 30, do_sample=False, min_new_tokens=30):
        time.sleep(0.01)  # the model runs ahead
        assert live.weights.shape[1] == len(live.types) == len(live.pieces)
        assert live.shares().keys() >= {"text", "image", "audio"} and web_page.panel(live) and web_page.answer(live)


def test_characters_of_several_tokens_are_shown_once_they_are_whole(served):
    tokenizer = served.processor.tokenizer
    wanted = "Zoë 日本 🙂 café"
    said, words = [], []
    for token in tokenizer(wanted, add_special_tokens=False)["input_ids"]:
        words.append(_word(tokenizer, said, "".join(words), token, torch.zeros(len(tokenizer))).text)
        said.append(token)
    assert "".join(words).strip() == wanted and not any("\ufffd" in word for word in words)


def test_an_answer_that_nobody_waits_for_ends(served):
    stream = answer_live(served.model, served.processor, CHAT, 10_000, do_sample=False)
    next(stream)
    stream.close()
    assert not any(router._forward_hooks for name, router in served.model.named_modules() if name.endswith("mlp.gate"))


def test_a_dense_model_answers_without_experts():
    model = tiny_model(DENSE)
    *_, live = answer_live(model, tiny_processor(model.config), user("what is this"), 3, do_sample=False)
    assert live.experts == () and len(live.words) == 3
    assert "dense model" in web_page.panel(live) and "(0)" not in web_page.answer(live)


def test_the_page_shows_words_with_alternatives_and_experts(served, clips):
    steps = [*web.answers([served], clips, "what is this", 4, 0.0)]
    assert "Reading" in steps[0][0]
    answer, panel = steps[-1]
    assert answer.count('class="word"') == 4 and answer.count("<em>") == 20
    assert [name for name in ("picture", "speech", "answer") if f"<span>{name}</span>" in panel] == [
        "picture", "speech", "answer",
    ]  # fmt: skip
    columns = len(served.processor.apply_chat_template(
        web.conversation(clips, "what is this"), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]) + 3  # fmt: skip
    assert panel.count("<rect") == 2 * columns


def test_two_models_answer_beside_each_other_and_one_that_fails_says_so(served, clips):
    other = tiny_model(without=("speech",))
    two = [served, web.Served("other", other, tiny_processor(other.config))]
    last = [*web.answers(two, clips, "what", 3, 0.0)][-1]
    assert last[0].count('class="word"') == 3
    assert "no tower for speech" in last[2] and 'role="alert"' in last[2]


@pytest.mark.parametrize("content", [b"RIFF nothing", b""])
def test_a_broken_clip_is_a_sentence_that_names_the_file_and_not_its_place(served, tmp_path, content):
    (tmp_path / "mine.wav").write_bytes(content)
    last = [*web.answers([served], [{"type": "audio", "path": str(tmp_path / "mine.wav")}], "what", 3, 0.0)][-1]
    assert 'role="alert"' in last[0] and "mine.wav" in last[0] and str(tmp_path) not in last[0]


def test_nothing_to_answer_is_said(served):
    assert "add a clip, or write a question" in [*web.answers([served], [], "  ", 3, 0.0)][-1][0]


def test_what_a_model_says_and_files_are_called_is_text_and_no_html():
    evil = "<script>alert(1)</script>"
    live = LiveAnswer(experts=(evil,), layers=(0,), pieces=[evil], types=[0], weights=np.ones((1, 1, 1)))
    live.words = [Word(evil, 0.5, [(evil, 0.5)])]
    shown = [web_page.answer(live), web_page.panel(live), web_page.problem(evil), web_page.title(evil, [evil], [evil])]
    assert all("<script" not in html and "&lt;script" in html for html in shown)


def test_long_inputs_are_drawn_in_few_columns():
    types = [0] * 300 + [1] * 576
    weights = np.random.default_rng(0).dirichlet(np.ones(12), (2, 876))
    live = LiveAnswer(tuple("abcdefghijkl"), (0, 1), ["x"] * 300 + [""] * 576, types, 0, weights)
    panel = web_page.panel(live)
    assert panel.count("<rect") == 2 * web_page.MAX_COLUMNS and "156 earlier columns are left out" in panel
    assert len({web_page.colour(expert) for expert in range(12)}) == 12


def test_examples_are_one_of_each_kind_whose_files_are_there(tmp_path, clips):
    rows = [
        user({"type": "image", "path": "a.png"}, "what is it"),
        user({"type": "image", "path": "a.png"}, "again"),
        user({"type": "speech", "path": "b.wav"}),
        user({"type": "audio", "path": "gone.wav"}, "what"),
        user("no media"),
    ]
    file = tmp_path / "rows.jsonl"
    answer = {"role": "assistant", "content": "a bird"}
    file.write_text("\n".join(json.dumps({"messages": [*row, answer]}) for row in rows))
    found = web.examples_of(file, ["image", "audio", "speech"])
    assert [([clip["type"] for clip in clips], question) for clips, question in found] == [
        (["image"], "what is it"), (["speech"], ""), ([], "no media"),
    ]  # fmt: skip
    assert web.examples_of(file, ["image"])[0][0][0]["path"] == str(tmp_path / "a.png")


def test_the_page_is_served_to_this_machine_alone_and_a_port_in_use_is_said(served, clips, monkeypatch):
    gradio = pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {}
    launch = gradio.Blocks.launch
    monkeypatch.setattr(
        gradio.Blocks, "launch", lambda self, **settings: told.update(settings) or launch(self, **settings)
    )
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    secret = Path(clips[0]["path"]).with_name("secret.txt")
    secret.write_text("mine")
    web.serve([served], [(clips, "what")], port=port, prevent_thread_lock=True, quiet=True)
    try:
        for file, status in ((Path(clips[0]["path"]), 200), (secret, 403)):
            try:
                code = urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/file={file}", timeout=30).status
            except urllib.error.HTTPError as error:
                code = error.code
            assert code == status, file
        assert told["server_name"] == "127.0.0.1" and told["share"] is False
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            html = answer.read().decode()
        assert "Uni-MoE: demo/model" in html
        assert not re.search(r"fonts\.(googleapis|gstatic)\.com/css", html)
        with pytest.raises(ValueError, match=f"Port {port} of 127.0.0.1 is in use"):
            web.serve([served], port=port)
    finally:
        gradio.close_all()


@pytest.mark.parametrize(
    "options, sentence",
    [([], "nothing"), (["--port", "99999"], "There is no port 99999"), (["--host", "nonsense.invalid"], "no host")],
)
def test_the_command_says_what_is_wrong_before_a_model_is_loaded(options, sentence, tmp_path, capsys):
    pytest.importorskip("gradio")
    assert main(["web", str(tmp_path / "nothing"), *options]) == 1
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_stop_and_start_over_end_every_answer_that_a_button_began(served, clips):
    pytest.importorskip("gradio")
    page = web.build([served], [(clips, "what"), ([], "hello")])
    events = page.fns.values()
    answering = {event._id for event in events if event.name == "run"}
    assert len(answering) == 4  # Ask, Enter, two examples
    cancelled = [set(event.cancels) for event in events if event.cancels]
    assert sum(cancels >= answering for cancels in cancelled) == 2


def test_random_answers_are_drawn_where_heat_is_asked_for(served):
    torch.manual_seed(0)
    texts = {[*web.answers([served], [], "what is this", 8, 2.0)][-1][0] for _ in range(4)}
    assert len(texts) > 1
