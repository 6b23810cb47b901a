"""From sound to tensors: parity with the original front ends, windows, masks, files, and bad input."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from bench_frontends import library_fbank
from safetensors.numpy import load_file
from tiny import ROUNDING, TESTS, assert_pixels_equal, tone
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uni_moe_hf import UniMoEFeatureExtractor
from uni_moe_hf.hub.media_uni_moe import check_waveform, load_waveform


RATE = 16000
FRAMES = 98  # 25 ms every 10 ms of one second


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(TESTS / "fixtures" / "audio" / "frontends.safetensors")


@pytest.fixture(scope="module")
def extractor() -> UniMoEFeatureExtractor:
    """Its windows last one second: 16000 samples."""
    return UniMoEFeatureExtractor(chunk_length=1)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


# Parity


@pytest.mark.parametrize("clip", ["short", "second", "odd"])
def test_filterbank_equals_the_original(extractor, golden, clip):
    waveform = golden[f"{clip}/waveform_int16"].astype(np.float32) / 32768
    fbank = extractor.kaldi_fbank(waveform)
    assert fbank.dtype == np.float32
    np.testing.assert_allclose(fbank, golden[f"{clip}/fbank_normalized"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seconds", [0.001, 0.013, 0.5, 0.9875, 0.99, 1.0])
def test_log_mel_equals_that_of_the_library_in_float64(extractor, seconds):
    """1e-5, on windows that zeros extend by any amount; the library's own float32 path is as far off."""
    clip = noise(int(seconds * RATE))
    padded = np.pad(clip, (0, RATE - len(clip)))
    expected = extractor._np_extract_fbank_features(padded[None], "cpu")[0]
    np.testing.assert_allclose(extractor(speech=clip)["input_features"][0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 401, 9000, RATE - 1, RATE])
def test_filterbank_equals_that_of_the_library_in_float64(extractor, samples):
    """1e-4, on windows that their last sample extends by any amount."""
    clip = noise(samples)
    padded = np.pad(clip, (0, RATE - samples), mode="edge")
    expected = library_fbank(padded, extractor, extractor._fbank_filters.double().numpy())
    np.testing.assert_allclose(extractor(audio=clip)["input_values"][0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [0.0, 0.3, -0.7])
def test_a_constant_has_no_energy_in_the_filterbank(extractor, level):
    values = extractor(audio=np.full(RATE // 2, level, dtype=np.float32))["input_values"][0]
    silence = (np.log(1.192092955078125e-07) - extractor.fbank_mean) / (2 * extractor.fbank_std)
    np.testing.assert_allclose(values, silence, **ROUNDING)


@pytest.mark.parametrize("picture", ["square", "tall", "wide"])
def test_pixels_equal_the_original(golden, picture):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor(golden[f"{picture}/rgb"], return_tensors="np")["pixel_values"][0]
    assert_pixels_equal(pixels, golden[f"{picture}/pixel_values"])


# Windows


@pytest.mark.parametrize(
    ("samples", "windows"), [(1, 1), (RATE - 1, 1), (RATE, 1), (RATE + 1, 2), (2 * RATE, 2), (2 * RATE + 1, 3)]
)
def test_every_started_second_is_a_window(extractor, samples, windows):
    clip = noise(samples)
    features = extractor(audio=clip, speech=clip, return_tensors="np")
    assert extractor.num_windows(len(clip), "audio") == windows
    assert features["input_values"].shape == (windows, FRAMES, 128)
    assert features["input_values_mask"].shape == (windows, FRAMES)
    assert features["input_features"].shape == (windows, 80, 100)
    assert all(np.isfinite(array).all() for array in features.values())


def test_default_window_lasts_thirty_seconds():
    extractor = UniMoEFeatureExtractor()
    assert extractor.n_samples == 480_000
    windows = [extractor.num_windows(samples, "speech") for samples in (480_000, 480_001)]
    assert windows == [1, 2]
    assert extractor(audio=tone(0.1))["input_values"].shape == (1, 2998, 128)


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_windows_of_a_clip_are_its_consecutive_slices(extractor, kind):
    clip = noise(2 * RATE + 700)
    together = extractor(**{kind: clip})
    slices = [extractor(**{kind: clip[start : start + RATE]}) for start in range(0, len(clip), RATE)]
    for name in together:
        np.testing.assert_array_equal(together[name], np.concatenate([part[name] for part in slices]))


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_windows_of_all_clips_follow_each_other(extractor, kind):
    clips = [noise(RATE + 5, 1), noise(3, 2), noise(RATE, 3)]
    together = extractor(**{kind: clips})
    for name in together:
        alone = [extractor(**{kind: clip})[name] for clip in clips]
        assert [len(part) for part in alone] == [2, 1, 1]
        np.testing.assert_array_equal(together[name], np.concatenate(alone))


def test_short_sound_is_extended_by_its_last_sample(extractor):
    clip = noise(5000)
    clip[-1] = 0.4
    values = extractor(audio=clip)["input_values"][0]
    edge, zeros = (extractor.kaldi_fbank(np.pad(clip, (0, RATE - 5000), mode=mode)) for mode in ("edge", "constant"))
    np.testing.assert_array_equal(values, edge)
    assert np.abs(values - zeros).max() > 0.1


def test_short_speech_is_extended_by_zeros(extractor):
    clip = noise(5000)
    clip[-1] = 0.4
    features = extractor(speech=clip)["input_features"]
    zeros, edge = (
        extractor(speech=np.pad(clip, (0, RATE - 5000), mode=mode))["input_features"] for mode in ("constant", "edge")
    )
    np.testing.assert_array_equal(features, zeros)
    assert np.abs(features - edge).max() > 0.1


@pytest.mark.parametrize("samples", [1, 163, 164, 165, 8000, 15974, 15975, RATE - 1, RATE])
def test_mask_follows_the_arithmetic_of_beats(extractor, samples):
    """BEATs cuts the padding mask of samples into as many equal runs as there are frames."""
    padding = np.arange(RATE) >= samples
    run = RATE // FRAMES
    expected = ~padding[: run * FRAMES].reshape(FRAMES, run).all(axis=1)
    mask = extractor(audio=noise(samples))["input_values_mask"]
    np.testing.assert_array_equal(mask, expected[None].astype(np.int64))
    assert mask.sum() >= 1


def test_mask_marks_the_last_window_of_a_long_clip_only(extractor):
    mask = extractor(audio=noise(2 * RATE + 8000))["input_values_mask"]
    assert mask.sum(axis=1).tolist() == [FRAMES, FRAMES, 50]


def test_tensors_come_in_the_asked_type(extractor):
    features = extractor(audio=tone(), speech=tone(), return_tensors="pt")
    assert [str(tensor.dtype) for tensor in features.values()] == ["torch.float32", "torch.int64", "torch.float32"]


@pytest.mark.parametrize(
    ("kind", "names"), [("audio", {"input_values", "input_values_mask"}), ("speech", {"input_features"})]
)
def test_only_the_asked_ear_hears(extractor, kind, names):
    assert set(extractor(**{kind: tone()})) == names


@pytest.mark.parametrize("shape", [(2, 5000), (5000, 2)], ids=str)
def test_channels_are_averaged(extractor, shape):
    stereo = noise(10000).reshape(shape)
    mono = stereo.mean(axis=shape.index(2))
    np.testing.assert_allclose(check_waveform(stereo), mono, atol=1e-7, rtol=0)
    np.testing.assert_array_equal(extractor(audio=[stereo])["input_values"], extractor(audio=mono)["input_values"])


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_bare_array_of_two_axes_is_refused(extractor, kind):
    """Two channels of one clip to [`check_waveform`], two clips to numpy: nobody can know."""
    with pytest.raises(ValueError, match=r"\(2, 5000\)"):
        extractor(**{kind: noise(10000).reshape(2, 5000)})


# Saving


def test_saved_extractor_loads_equal_and_without_the_filters(tmp_path):
    extractor = UniMoEFeatureExtractor(chunk_length=1, feature_size=128, max_speech_windows=3, max_audio_windows=None)
    expected = extractor(audio=tone(), speech=tone())
    extractor.save_pretrained(tmp_path)
    loaded = UniMoEFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    for name, array in loaded(audio=tone(), speech=tone()).items():
        np.testing.assert_array_equal(array, expected[name])
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not [name for name, value in saved.items() if isinstance(value, list)]


# Refusals


@pytest.mark.parametrize(
    ("kind", "limit"), [("audio", {"max_audio_windows": 2}), ("speech", {"max_speech_windows": 2})]
)
def test_clip_of_too_many_windows_is_refused_with_both_numbers(kind, limit):
    extractor = UniMoEFeatureExtractor(chunk_length=1, **limit)
    assert len(extractor(**{kind: noise(2 * RATE)}).popitem()[1]) == 2
    with pytest.raises(ValueError, match=rf"2\.0 s.*3 windows.*at most 2.*max_{kind}_windows"):
        extractor(**{kind: noise(2 * RATE + 1)})


def test_sound_is_limited_to_twenty_windows_and_speech_is_not(extractor):
    clip = np.zeros(20 * RATE + 1, dtype=np.float32)
    with pytest.raises(ValueError, match="21 windows.*at most 20"):
        extractor(audio=clip)
    assert len(extractor(speech=clip)["input_features"]) == 21


@pytest.mark.parametrize("kind", ["audio", "speech"])
@pytest.mark.parametrize(
    ("clip", "words"),
    [
        (np.zeros(0, dtype=np.float32), ["0 samples"]),
        (np.zeros((2, 0), dtype=np.float32), ["0 samples"]),
        (np.array([0.1, np.nan, 0.2]), ["3 samples", "1 NaN"]),
        (np.array([np.inf, -np.inf, 0.2, 0.1]), ["4 samples", "2 NaN or infinite"]),
        (np.array([1e300, 0.0]), ["2 samples", "1 NaN or infinite"]),
        (np.ones(100, dtype=np.int16), ["int16", "32768"]),
        (np.ones(100, dtype=bool), ["bool"]),
        (np.ones((2, 3, 4)), ["(2, 3, 4)"]),
        (np.array("text"), ["<U4"]),
    ],
    ids=["empty", "empty-stereo", "nan", "inf", "beyond-float32", "int16", "bool", "three-axes", "text"],
)
@pytest.mark.filterwarnings("error")
def test_bad_waveform_is_refused_in_one_sentence(extractor, kind, clip, words):
    with pytest.raises(ValueError) as caught:
        extractor(**{kind: [tone(), clip]})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_empty_list_of_clips_is_refused_by_name(extractor, kind):
    with pytest.raises(ValueError, match=kind):
        extractor(**{kind: []})


def test_other_sampling_rate_is_refused_with_both_rates(extractor):
    with pytest.raises(ValueError, match="44100 Hz.*16000 Hz"):
        extractor(audio=tone(), sampling_rate=44100)
    assert len(extractor(audio=tone(), sampling_rate=RATE)["input_values"]) == 1


# Files


def pitch_of(waveform: np.ndarray) -> float:
    """Hertz of the strongest frequency."""
    spectrum = np.abs(np.fft.rfft(waveform))
    return np.fft.rfftfreq(len(waveform), 1 / RATE)[spectrum.argmax()]


def stereo_tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    """`(num_samples, 2)`: a tone on the left, silence on the right."""
    left = tone(seconds, 440.0, rate)
    return np.stack([left, np.zeros_like(left)], axis=1)


def assert_is_the_left_tone(waveform: np.ndarray) -> None:
    """Half a second of 440 Hz at half of 0.3, as the mean of both channels is; ogg may lose 5 % of its strength."""
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - RATE // 2) <= 2
    assert abs(pitch_of(waveform) - 440) <= 3
    middle = waveform[1000:-1000]
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.15 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_stereo_files_of_any_rate_become_mono_at_sixteen_kilohertz(tmp_path, extension, rate):
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, stereo_tone(rate), rate)
    assert_is_the_left_tone(load_waveform(str(path)))


def test_mono_wav_at_the_models_rate_comes_back_sample_by_sample(tmp_path):
    soundfile.write(tmp_path / "clip.wav", noise(1234), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_waveform(tmp_path / "clip.wav"), noise(1234))


def test_wanted_rate_is_obeyed(tmp_path):
    soundfile.write(tmp_path / "clip.wav", tone(0.5), RATE)
    assert len(load_waveform(tmp_path / "clip.wav", sampling_rate=8000)) == 4000


@pytest.mark.parametrize("form", ["path", "bytes", "dict-of-bytes", "dict-of-path", "dict-of-both"])
def test_file_may_come_in_any_form(tmp_path, form):
    path = tmp_path / "clip.flac"
    soundfile.write(path, stereo_tone(44100), 44100)
    data = path.read_bytes()
    source = {
        "path": path,
        "bytes": data,
        "dict-of-bytes": {"bytes": data, "path": None},
        "dict-of-path": {"bytes": None, "path": str(path)},
        "dict-of-both": {"bytes": data, "path": "not-there.flac"},
    }[form]
    assert_is_the_left_tone(load_waveform(source))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_array_with_its_rate_is_resampled(rate):
    assert_is_the_left_tone(load_waveform({"array": stereo_tone(rate), "sampling_rate": rate}))
    assert_is_the_left_tone(load_waveform({"array": stereo_tone(rate).T.tolist(), "sampling_rate": rate}))


@pytest.mark.parametrize(
    "source", [[0.5, -0.5], np.array([0.5, -0.5]), {"array": [0.5, -0.5]}], ids=["list", "array", "dict"]
)
def test_bare_waveform_is_taken_at_the_models_rate(source):
    np.testing.assert_array_equal(load_waveform(source), np.array([0.5, -0.5], dtype=np.float32))


def test_array_of_unknown_rate_is_taken_at_the_models_rate():
    np.testing.assert_array_equal(load_waveform({"array": tone(), "sampling_rate": None}), tone())


@pytest.mark.parametrize("rate", [0, -16000])
def test_impossible_rate_of_an_array_is_refused_with_the_number(rate):
    with pytest.raises(ValueError, match=rf"sampling.rate.*{rate}|{rate} Hz"):
        load_waveform({"array": tone(), "sampling_rate": rate})


def wav_bytes(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty", "0 bytes"]),
        (b"not a sound " * 50, ["could not be read"]),
        (wav_bytes(tone())[:30], ["could not be read"]),
        (wav_bytes(np.zeros(0)), ["0 samples"]),
    ],
    ids=["zero-bytes", "garbage", "half-a-header", "zero-samples"],
)
def test_broken_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_waveform(str(path))
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


@pytest.mark.parametrize("extension", ["flac", "ogg"])
def test_half_a_file_is_refused_by_name(tmp_path, extension):
    path = tmp_path / f"half.{extension}"
    soundfile.write(path, noise(RATE), RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"half.{extension}"):
        load_waveform(str(path))


@pytest.mark.parametrize("content", [b"", b"not a sound " * 50], ids=["empty", "garbage"])
def test_broken_bytes_are_refused(content):
    with pytest.raises(ValueError, match="bytes"):
        load_waveform(content)


@pytest.mark.parametrize("name", ["missing.wav", "."])
def test_missing_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(ValueError, match="does not exist") as caught:
        load_waveform(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("source", [{}, {"bytes": None, "path": None}, {"bytes": b"", "path": None}, None], ids=str)
def test_nothing_at_all_is_refused_in_a_sentence_about_the_source(source):
    """Not in one about shape () and dtype object, which the user never gave."""
    with pytest.raises(ValueError) as caught:
        load_waveform(source)
    assert "dtype object" not in str(caught.value)


def write_mp4(path: Path, sound: np.ndarray | None) -> None:
    """Five frames of film, with a sound track in AAC when there is one."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        track = None if sound is None else container.add_stream("aac", rate=44100, layout="stereo")
        for shade in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * shade, dtype=np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout="stereo")
            frame.sample_rate = 44100
            container.mux(track.encode(frame))
            container.mux(track.encode(None))


@pytest.mark.parametrize("as_bytes", [False, True], ids=["path", "bytes"])
def test_sound_track_of_a_film_is_read(tmp_path, as_bytes):
    """AAC adds up to two of its frames, 2048 samples at 44.1 kHz, at either end."""
    path = tmp_path / "film.mp4"
    write_mp4(path, stereo_tone(44100))
    waveform = load_waveform(path.read_bytes() if as_bytes else path)
    assert abs(len(waveform) - RATE // 2) <= 2 * 2048 * RATE / 44100
    assert abs(pitch_of(waveform) - 440) <= 3
    middle = waveform[2000:6000]
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.15 / np.sqrt(2), rel=0.1)


def test_film_without_sound_track_is_refused_by_name(tmp_path):
    path = tmp_path / "silent.mp4"
    write_mp4(path, None)
    with pytest.raises(ValueError, match=r"silent\.mp4.*no sound track"):
        load_waveform(path)
