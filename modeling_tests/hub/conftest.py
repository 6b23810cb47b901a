"""Processors and media files that the tests of this folder share."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from tiny import picture, tiny_processor, tiny_tokenizer, tone
from tiny_media import GREYS, write_video

from uni_moe_hf import UniMoEProcessor


@pytest.fixture(scope="module")
def processor() -> UniMoEProcessor:
    return tiny_processor(video_frames=4)


@pytest.fixture(scope="module")
def plain_tokenizer():
    """One that never had the special tokens."""
    return tiny_tokenizer()


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
