"""Conversations of any shape against their rows one by one; files that lie: one sentence, little memory, no hang."""

import json
import os
import struct
import subprocess
import sys
import wave
import zlib
from io import BytesIO

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import TESTS, film, picture, tiny_model, tiny_processor, tone


# Conversations


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def pair(request):
    """Model and processor; not to be changed."""
    torch.manual_seed(0)
    model = tiny_model({"shared_expert_base": request.param})
    model.generation_config.eos_token_id = None
    return model, tiny_processor(model.config, video_frames=3)


seeds = st.integers(0, 5)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seconds = st.floats(0.01, 2.2)
parts = st.one_of(
    st.text("ab <>imageuspch/\n\ue000é漢🙂", max_size=12).map(lambda text: {"type": "text", "text": text}),
    st.tuples(seeds, sizes).map(lambda drawn: {"type": "image", "image": picture(*drawn)}),
    st.tuples(seeds, st.integers(1, 5)).map(lambda drawn: {"type": "video", "video": film(*drawn)}),
    *(
        st.tuples(seconds, st.floats(50, 4000)).map(lambda drawn, kind=kind: {"type": kind, kind: tone(*drawn)})
        for kind in ("audio", "speech")
    ),
)
contents = st.lists(parts, min_size=1, max_size=5)
turns = st.lists(contents, min_size=1, max_size=3).filter(lambda made: len(made) % 2 == 1)
chats = st.lists(
    turns.map(
        lambda made: [
            {"role": "user" if index % 2 == 0 else "assistant", "content": content}
            for index, content in enumerate(made)
        ]
    ),
    min_size=1,
    max_size=4,
)
sides = st.sampled_from(["left", "right"])
quick = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
thorough = settings(quick, max_examples=300)


def encode(processor, conversations: list, side: str = "left") -> dict:
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": side, "return_mm_token_type_ids": True},
    )


def check_rows(pair, conversations, side):
    """Ids, the last word's logits (1e-4) and three greedy words of a batch are those of its rows alone."""
    model, processor = pair
    together = encode(processor, conversations, side)
    alone = [encode(processor, [chat]) for chat in conversations]
    with torch.no_grad():
        logits = model(**together).logits
        for row, single in enumerate(alone):
            kept = together["attention_mask"][row].bool()
            for name in ("input_ids", "mm_token_type_ids"):
                assert torch.equal(together[name][row][kept], single[name][0])
            expected = model(**single).logits[0]
            torch.testing.assert_close(logits[row][kept], expected, atol=1e-4, rtol=1e-4)
    if side == "left":
        greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        words = model.generate(**together, **greedy)[:, -3:]
        assert torch.equal(words, torch.cat([model.generate(**single, **greedy)[:, -3:] for single in alone]))


@quick
@given(chats, sides)
def test_conversations_of_any_shape_equal_their_rows(pair, conversations, side):
    check_rows(pair, conversations, side)


@pytest.mark.slow
@thorough
@given(chats, sides)
def test_many_conversations_of_any_shape_equal_their_rows(pair, conversations, side):
    check_rows(pair, conversations, side)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversations_of_any_shape_are_answered_in_half_precision(dtype):
    """Rounding may turn a router, so only what must hold is asked: shape, dtype, numbers."""
    model = tiny_model().to(dtype)
    processor = tiny_processor(model.config, video_frames=3)

    @quick
    @given(chats)
    def check(conversations):
        inputs = encode(processor, conversations)
        with torch.no_grad():
            logits = model(**inputs).logits
        assert logits.dtype == dtype and torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
        words = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
        assert words.shape == (len(conversations), inputs["input_ids"].shape[1] + 2)

    check()


# Files


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A grey PNG whose header says what it is told to."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def image(size: tuple[int, int], mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def sound(kind: str, samples: np.ndarray | None = None, rate: int = 16000, subtype: str | None = None) -> bytes:
    file = BytesIO()
    soundfile.write(file, tone() if samples is None else samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def wav(
    channels: int = 1, rate: int = 16000, bits: int = 16, size: int | None = None, data: bytes = b"\0" * 3200
) -> bytes:
    """A WAV whose header says what it is told to."""
    size = len(data) if size is None else size
    frame = max(1, channels * bits // 8)
    format_chunk = struct.pack("<HHIIHH", 1, channels, rate, (rate * frame) % 2**32, frame % 2**16, bits)
    return (
        b"RIFF" + struct.pack("<I", (36 + size) % 2**32) + b"WAVEfmt " + struct.pack("<I", 16) + format_chunk
        + b"data" + struct.pack("<I", size) + data
    )  # fmt: skip


def flac_of_many_samples() -> bytes:
    """A FLAC whose header promises 2^36 - 1 samples."""
    data = bytearray(sound("FLAC"))
    start = 8 + 10  # "fLaC", block header, block and frame sizes; then rate, channels, bits, samples in 8 bytes
    fields = int.from_bytes(data[start : start + 8], "big") | (2**36 - 1)
    data[start : start + 8] = fields.to_bytes(8, "big")
    return bytes(data)


def mp4(frames: int = 5, with_sound: bool = False) -> bytes:
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        if frames:
            stream = container.add_stream("libx264", rate=5)
            stream.width, stream.height, stream.pix_fmt = 24, 20, "yuv420p"
        if with_sound:
            track = container.add_stream("aac", rate=16000)
            samples = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
            samples.rate = 16000
            container.mux(track.encode(samples))
            container.mux(track.encode(None))
        for frame in film(frames=frames) if frames else ():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if frames:
            container.mux(stream.encode(None))
    return file.getvalue()


def cuts(data: bytes, name: str, count: int = 6) -> dict[str, bytes]:
    """The beginnings of a file, and the file with a hole in it."""
    made = {f"{name}-cut-{part}": data[: len(data) * part // count] for part in range(1, count)}
    middle = len(data) // 2
    return made | {f"{name}-hole": data[:middle] + b"\0" * 64 + data[middle + 64 :]}


def hostile_files() -> dict[str, dict[str, bytes]]:
    noise = np.random.default_rng(0).bytes(5000)
    jpeg = BytesIO()
    Image.fromarray(picture(0, (200, 300))).save(jpeg, "JPEG")
    real_png = BytesIO()
    Image.fromarray(picture(0, (200, 300))).save(real_png, "PNG")
    bad = np.where(np.arange(1000) == 500, np.nan, 0.1).astype(np.float32)
    everywhere = {"empty": b"", "noise": noise, "text": b"not a file of media\n" * 50, "zeros": b"\0" * 10_000}
    images = {
        **everywhere,
        **cuts(jpeg.getvalue(), "jpeg"),
        **cuts(real_png.getvalue(), "png"),
        "one-pixel": image((1, 1)),
        "wide": image((20_000, 1)),
        "tall": image((1, 20_000)),
        "panorama": image((20_000, 300)),
        "square-20000": png(20_000, 20_000, b"\0"),
        "declared-huge": png(2**31 - 1, 2**31 - 1, b"\0" * 100),
        "declared-large": png(9_000, 9_000, b"\0" * 100),
        "declared-zero": png(0, 0, b""),
        "palette": image((30, 20), "P", "GIF"),
        "cmyk": image((30, 20), "CMYK", "JPEG"),
        "sixteen-bit": image((30, 20), "I;16"),
        "transparent": image((30, 20), "RGBA"),
        "a-sound": sound("WAV"),
    }
    sounds = {
        **everywhere,
        **cuts(sound("WAV"), "wav"),
        **cuts(sound("FLAC"), "flac"),
        **cuts(sound("OGG"), "ogg"),
        "one-sample": sound("WAV", np.array([0.5], np.float32)),
        "no-samples": sound("WAV", np.zeros(0, np.float32)),
        "nan": sound("WAV", bad, subtype="FLOAT"),
        "infinite": sound("WAV", np.nan_to_num(bad, nan=np.inf), subtype="FLOAT"),
        "clipped": sound("WAV", 30 * tone(), subtype="FLOAT"),
        "declared-4-gb": wav(size=2**32 - 1),
        "declared-nothing": wav(size=0),
        "rate-0": wav(rate=0),
        "rate-1": wav(rate=1),
        "rate-huge": wav(rate=2**32 - 1),
        "channels-0": wav(channels=0),
        "channels-65535": wav(channels=65_535),
        "bits-0": wav(bits=0),
        "flac-2-to-the-36": flac_of_many_samples(),
        "eight-kilohertz": sound("WAV", rate=8000),
        "over-an-hour": wav(rate=1000, bits=8, data=b"\x80" * 3_700_000),
        "a-picture": image((30, 20)),
    }
    films = {
        **everywhere,
        **cuts(mp4(), "mp4"),
        **cuts(mp4(with_sound=True), "mp4-with-sound"),
        "one-frame": mp4(1),
        "sound-only": mp4(0, with_sound=True),
        "a-picture": image((30, 20)),
        "a-sound": sound("WAV"),
    }
    return {"image": images, "audio": sounds, "speech": sounds, "video": films}


# What must be read in spite of its oddity; everything else may be read or refused, but by one sentence.
READABLE = {
    "image": {"one-pixel", "wide", "tall", "panorama", "palette", "cmyk", "sixteen-bit", "transparent"},
    "audio": {"one-sample", "clipped", "declared-4-gb", "eight-kilohertz"},
    "speech": {"one-sample", "clipped", "declared-4-gb", "eight-kilohertz"},
    "video": {"one-frame"},
}
REFUSED = {
    "image": {
        "empty",
        "noise",
        "text",
        "zeros",
        "square-20000",
        "declared-huge",
        "declared-zero",
        "a-sound",
        "png-cut-3",
    },
    "audio": {
        "empty",
        "noise",
        "text",
        "zeros",
        "no-samples",
        "nan",
        "infinite",
        "rate-1",
        "over-an-hour",
        "a-picture",
    },
    "speech": {"empty", "noise", "text", "no-samples", "nan", "infinite", "rate-1", "over-an-hour", "a-picture"},
    "video": {"empty", "noise", "text", "zeros", "sound-only", "a-sound", "mp4-cut-1", "mp4-cut-3"},
}

CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny import tiny_processor, user
from transformers import CLIPImageProcessorPil

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

root = Path(sys.argv[1])
results = {}
for mode in ("crop", "pad"):
    # Of CLIP's own size: a picture of one pixel's height would be enlarged to 3 GB.
    processor = tiny_processor(image_mode=mode)
    processor.image_processor = CLIPImageProcessorPil()
    for path in sorted(root.glob("*/*")):
        kind = path.parent.name
        if mode == "pad" and kind != "image":
            continue
        before, start = peak(), time.monotonic()
        try:
            processor.apply_chat_template(
                user({"type": kind, "path": str(path)}, "what"), tokenize=True, return_dict=True, return_tensors="pt"
            )
            outcome = "read"
        except ValueError as error:
            outcome = str(error)
        except BaseException as error:
            outcome = f"!! {type(error).__name__}: {error}"
        results[f"{mode} {kind} {path.stem}"] = [outcome, time.monotonic() - start, peak() - before]
        Path(sys.argv[3]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list]:
    """What became of every file: "read" or the error, seconds, and by how many MiB the process grew."""
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("files")
    extensions = {"image": "png", "audio": "wav", "speech": "mp3", "video": "mp4"}  # mp3: extensions may lie as well
    for kind, files in hostile_files().items():
        (root / kind).mkdir()
        for name, data in files.items():
            (root / kind / f"{name}.{extensions[kind]}").write_bytes(data)
    script, results = root / "child.py", root / "results.json"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(root), str(TESTS), str(results)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, f"the reader crashed after {list(json.loads(results.read_text()))[-1:]}\n{run.stderr}"
    return json.loads(results.read_text())


def test_every_file_is_read_or_refused_by_one_sentence_that_names_it(outcomes):
    assert len(outcomes) > 120
    for name, (outcome, *_) in outcomes.items():
        kind, stem = name.split()[1:]
        assert not outcome.startswith("!!"), (name, outcome)
        if outcome != "read":
            assert len(outcome.strip().splitlines()) == 1 and len(outcome) < 600, (name, outcome)
            assert f"{stem}." in outcome or "waveform" in outcome, (name, outcome)


@pytest.mark.parametrize("kind", ["image", "video", "audio", "speech"])
def test_odd_files_are_read_and_lying_ones_refused(outcomes, kind):
    told = {name.split()[2]: outcome for name, (outcome, *_) in outcomes.items() if name.split()[1] == kind}
    assert {name for name in READABLE[kind] if told[name] != "read"} == set()
    assert {name for name in REFUSED[kind] if told[name] == "read"} == set()


def test_no_file_takes_long_or_fills_the_memory(outcomes):
    """A 20,000-pixel picture in memory is 1.1 GiB; nothing may come near. Reading any file takes a moment."""
    assert max(seconds for _, seconds, _ in outcomes.values()) < 20
    assert max(growth for *_, growth in outcomes.values()) < 600


def test_python_s_own_waves_are_read(tmp_path):
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(b"\0\1" * 22050)
    processor = tiny_processor()
    inputs = processor(text="<speech>", speech=str(tmp_path / "x.wav"), return_tensors="pt")
    assert inputs["input_features"].shape[0] == 1
