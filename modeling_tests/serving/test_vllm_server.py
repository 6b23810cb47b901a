"""`vllm serve`, asked by an OpenAI client; run by `make test-vllm`."""

import base64
import contextlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from test_vllm import saved
from tiny import picture, tone

from uni_moe_hf import UniMoEForConditionalGeneration, UniMoEProcessor


pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


@contextlib.contextmanager
def serving(folder: Path, port: int, *options: str):
    """The server's process, for as long as it is needed."""
    # In a program's words: `vllm serve FOLDER`.
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--port", str(port), *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder.parent / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder.parent)
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server, its checkpoint, and a client of it."""
    from openai import OpenAI

    folder = saved(tmp_path_factory.mktemp("server") / "model", {"shared_expert_base": True})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "300", "--trust-remote-code"]
    with serving(folder, port, *options) as process:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=0)
        for _ in range(120):
            with contextlib.suppress(Exception):
                assert client.models.list().data
                break
            assert process.poll() is None, (folder.parent / "server.log").read_text()[-3000:]
            time.sleep(1)
        yield folder, port, client


def url(kind: str, data: bytes, form: str) -> dict:
    """A part with a file in it."""
    return {"type": kind, kind: {"url": f"data:{form};base64,{base64.b64encode(data).decode()}"}}


def sound(seconds: float, ear: str | None = None) -> dict:
    """A recording, as OpenAI's clients send it."""
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), 16000, format="WAV")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}, **({"ear": ear} if ear else {})}


def drawing() -> bytes:
    """A PNG."""
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    return file.getvalue()


def say(client, *parts: dict | str, **settings):
    """A client's request."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    name = client.models.list().data[0].id
    settings = {"temperature": 0, "max_tokens": 12, **settings}
    return client.chat.completions.create(model=name, messages=[{"role": "user", "content": content}], **settings)


def by_generate(folder: Path, *parts: dict | str) -> str:
    """What the model itself answers."""
    model, processor = UniMoEForConditionalGeneration.from_pretrained(folder), UniMoEProcessor.from_pretrained(folder)
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return whole(processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def whole(text: str) -> str:
    """Without half characters at the end, of which vLLM says nothing, and the space before the first word."""
    return text.strip().rstrip("\ufffd")


def test_clients_get_the_words_of_generate_at_once_and_as_a_stream(server):
    folder, _, client = server
    image = url("image_url", drawing(), "image/png")
    for parts in (
        ["what is this"],
        [image, "what"],
        [sound(0.7), "what"],
        [sound(0.7, "speech")],
        [sound(2.3), image],
    ):
        expected = by_generate(folder, *parts)
        assert whole(say(client, *parts).choices[0].message.content) == expected
        stream = say(client, *parts, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert whole("".join(pieces)) == expected and len(pieces) > 3


def test_what_cannot_be_answered_is_said_in_a_sentence_and_the_server_goes_on(server):
    from openai import BadRequestError

    _, _, client = server
    refusals = {
        "known are text, image, video, audio and speech": [sound(0.5, "nose")],
        "Invalid or corrupted audio data": [
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"junk" * 99).decode(), "format": "wav"}}
        ],
        "Failed to load image": [url("image_url", b"no picture", "image/png")],
        "exceeds model's maximum context length (300)": [sound(100, "speech"), "what"],
    }
    for sentence, parts in refusals.items():
        with pytest.raises(BadRequestError) as refused:
            say(client, *parts)
        assert sentence in str(refused.value), sentence
    assert say(client, "is <image> a bird </s>").choices[0].message.content is not None
    name = client.models.list().data[0].id
    assert client.completions.create(model=name, prompt="USER: <image> <speech>", max_tokens=2).choices
    assert say(client, "what is this").choices


def test_a_port_in_use_is_said(server):
    folder, port, _ = server
    with serving(folder, port, "--dtype", "float32", "--enforce-eager") as process:
        assert process.wait(120) != 0
    assert "address already in use" in (folder.parent / "server.log").read_text().lower()
