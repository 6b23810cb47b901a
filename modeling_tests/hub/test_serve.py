"""`transformers serve` and `transformers chat` with a checkpoint folder, in processes without this package."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from tiny import film, picture, tiny_model, tiny_processor, tone, user


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "uni_moe_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
"""
LENGTH = 12


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png() -> str:
    file = BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    return f"data:image/png;base64,{as_base64(file.getvalue())}"


def wav() -> bytes:
    """1.5 s: two windows of this model."""
    file = BytesIO()
    soundfile.write(file, tone(1.5), 16000, format="WAV")
    return file.getvalue()


PICTURE = {"type": "image_url", "image_url": {"url": png()}}
# `transformers serve` hands on of a sound part no more than its address.
SPEECH = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;ear=speech;base64,{as_base64(wav())}"}}
SOUND = {"type": "input_audio", "input_audio": {"data": as_base64(wav()), "format": "wav"}}
TEXT = {"type": "text", "text": "what is it?"}
# The same as arrays, for a model in this process.
OWN_PICTURE = {"type": "image", "image": picture()}
OWN_SOUND = {"type": "audio", "audio": soundfile.read(BytesIO(wav()), dtype="float32")[0]}


class Server:
    """A served checkpoint, and the same model in this process."""

    def __init__(self, root: Path):
        self.root, self.folder = root, root / "checkpoint"
        self.model = tiny_model()
        self.processor = tiny_processor(self.model.config)
        # So that the answers of a random model are letters and not broken UTF-8.
        names = map(self.processor.tokenizer.convert_ids_to_tokens, range(self.model.config.text_config.vocab_size))
        is_byte = [name.startswith("<") and name.endswith(">") for name in names]
        self.model.generation_config.suppress_tokens = [index for index, byte in enumerate(is_byte) if byte]
        self.model.save_pretrained(self.folder)
        self.processor.save_pretrained(self.folder)
        (root / "block").mkdir()
        (root / "block/sitecustomize.py").write_text(BLOCK)
        (root / "home/hub").mkdir(parents=True)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))} | {
            "PYTHONPATH": str(root / "block"),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HOME": str(root / "home"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *arguments]

    def start(self) -> None:
        host, port = self.address.split(":")
        command = self.command("serve", str(self.folder), "--trust-remote-code", "--host", host, "--port", port)
        environment = {**self.environment, "HF_HUB_OFFLINE": "1"}
        self.log = (self.root / "log.txt").open("w")
        self.process = subprocess.Popen(
            command, env=environment, cwd=self.root, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://{self.address}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.1)
        self.stop()
        pytest.fail("the server did not start:\n" + (self.root / "log.txt").read_text()[-3000:])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.log.close()

    def post(self, path: str, body: dict) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, *content: dict, **more) -> tuple[str, int]:
        """An answer and the length of its prompt."""
        body = {"messages": [{"role": "user", "content": list(content)}], "max_tokens": LENGTH, "temperature": 0}
        status, text = self.post("/v1/chat/completions", {**body, **more})
        assert status == 200, text + (self.root / "log.txt").read_text()[-2000:]
        answer = json.loads(text)
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]

    def expected(self, *content: dict | str) -> tuple[str, int]:
        inputs = self.processor.apply_chat_template(
            user(*content), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        words = self.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0, length:]
        return self.processor.decode(words, skip_special_tokens=True), length


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve"))
    server.start()
    yield server
    server.stop()


def events(text: str) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def test_the_server_cannot_import_the_package(server):
    run = subprocess.run([sys.executable, "-c", "import uni_moe_hf"], env=server.environment, capture_output=True)
    assert b"ModuleNotFoundError: uni_moe_hf" in run.stderr


def test_a_request_with_a_picture_and_a_sound_is_answered_as_by_generate(server):
    answer = server.ask(PICTURE, SOUND, TEXT)
    assert answer == server.expected(OWN_PICTURE, OWN_SOUND, "what is it?") and answer[0]
    # The comparison can see what is heard and seen.
    both = server.ask(SPEECH, SOUND, TEXT)
    assert both == server.expected({"type": "speech", "speech": OWN_SOUND["audio"]}, OWN_SOUND, "what is it?")
    assert server.ask(PICTURE, TEXT)[0] != answer[0] != server.ask(SOUND, TEXT)[0]


def test_answers_are_streamed(server):
    content = [SOUND, TEXT, PICTURE]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": LENGTH, "temperature": 0}
    status, text = server.post("/v1/chat/completions", {**body, "stream": True})
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events(text)]
    assert status == 200 and sum(map(bool, pieces)) > 1
    assert "".join(pieces) == server.expected(OWN_SOUND, "what is it?", OWN_PICTURE)[0]


def test_the_responses_interface_takes_media_too(server):
    content = [
        {"type": "input_image", "image_url": PICTURE["image_url"]["url"]},
        {"type": "input_audio", "input_audio": SOUND["input_audio"]},
        {"type": "input_text", "text": "what is it?"},
    ]
    body = {"input": [{"role": "user", "content": content}], "max_output_tokens": LENGTH, "temperature": 0}
    status, text = server.post("/v1/responses", {**body, "stream": False})
    assert status == 200, text
    answer = json.loads(text)["output"][0]["content"][0]["text"]
    assert answer == server.expected(OWN_PICTURE, OWN_SOUND, "what is it?")[0]


def test_sound_without_a_format_and_a_video_in_the_request_are_read(server, tmp_path):
    av = pytest.importorskip("av")
    bare = {"type": "input_audio", "input_audio": {"data": SOUND["input_audio"]["data"]}}
    assert server.ask(bare, TEXT) == server.expected(OWN_SOUND, "what is it?")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 24, 20, "yuv420p"
        for frame in film():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    data = as_base64((tmp_path / "film.mp4").read_bytes())
    answer = server.ask({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}, TEXT)
    assert answer[1] == server.expected({"type": "video", "path": str(tmp_path / "film.mp4")}, "what is it?")[1]


def test_a_stop_string_ends_an_answer(server):
    whole, _ = server.ask(PICTURE, TEXT)
    stop = whole.strip()[1:3]
    stopped, _ = server.ask(PICTURE, TEXT, stop=stop)
    assert stop in stopped and len(stopped) < len(whole) and whole.startswith(stopped)


def test_bad_media_is_an_error_and_the_server_lives_on(server):
    def refusal(messages: list[dict], **more) -> str:
        status, body = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4, **more})
        assert status == 400
        return json.loads(body)["detail"]

    for stream in (False, True):
        broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        told = refusal([{"role": "user", "content": [broken, TEXT]}], stream=stream)
        assert told.startswith("Picture in the given bytes could not be read")
        missing = {"type": "image_url", "image_url": {"url": "/nowhere/ä.png"}}
        assert "'/nowhere/ä.png' does not exist" in refusal([{"role": "user", "content": [missing]}], stream=stream)
        roles = [{"role": "tool", "content": "x"}]
        assert "Roles must alternate" in refusal(roles, stream=stream)
    assert server.ask(TEXT) == server.expected("what is it?")


def test_transformers_chat_talks_to_it(server):
    """Words from stdin; 'n' declines to go on where an answer was cut."""
    environment = {k: v for k, v in server.environment.items() if k != "HF_HUB_OFFLINE"}
    settings = ("do_sample=False", f"max_new_tokens={LENGTH}")
    run = subprocess.run(
        server.command("chat", str(server.folder), f"http://{server.address}", *settings),
        env=environment,
        cwd=server.root,
        input="what is it?\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert server.expected("what is it?")[0].split()[0] in run.stdout
