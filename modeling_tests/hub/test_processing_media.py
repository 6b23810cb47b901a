"""Media in every form that people hold them, and what becomes of sound, video and pictures."""

import base64
import copy
import sys
from io import BytesIO

import numpy as np
import pytest
import soundfile
import soxr
import torch
from PIL import Image
from tiny import ROUNDING, film, picture, tiny_processor, tone, user
from tiny_media import FILES, GREYS, MODALITIES, assert_same, encode, part, write_video
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uni_moe_hf.hub.media_uni_moe import load_waveform


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
            for place in ({"url": text}, {"image": text}, {"base64": text}, {"url": f"data:image/png;base64,{text}"}):
                inputs = encode(processor, user({"type": "image", **place}))
                np.testing.assert_array_equal(inputs["pixel_values"].numpy(), expected)


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


def test_very_long_pictures_show_their_middle(processor):
    """As an unbounded resize and crop would, which the library does: within rounding of the crop."""
    strip = np.zeros((4, 4000, 3), np.uint8)
    strip[:, 1990:2010] = 255
    middle = processor(images=strip, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(middle, processor(images=strip[:, 1900:2100], return_tensors="np")["pixel_values"])
