"""Pictures, sound and video: what is in a file is what is seen, whatever it is given as."""

import base64
import io
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny import film, picture, tiny_processor, tone, user

from uni_moe_hf.hub import files_uni_moe, media_uni_moe
from uni_moe_hf.hub.files_uni_moe import check_mp4_tables, resolved
from uni_moe_hf.hub.media_uni_moe import Clip, load_frames, load_image, load_waveform


def pixels(source) -> np.ndarray:
    return np.asarray(load_image(source))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---- pictures ----


@pytest.mark.parametrize("hidden", [(255, 0, 0), (0, 0, 0), (0, 255, 0)])
def test_what_is_transparent_shows_white_whatever_colour_it_hides(hidden):
    """Red, half of it transparent and a quarter of it gone: as it looks on a white page."""
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[...] = (255, 0, 0, 255)
    rgba[2:] = (255, 0, 0, 128)
    rgba[3:] = (*hidden, 0)
    expected = np.zeros((4, 4, 3), np.uint8)
    expected[...], expected[2], expected[3] = (255, 0, 0), (255, 127, 127), 255
    for source in (
        saved(Image.fromarray(rgba)),
        saved(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
        rgba,
    ):
        assert np.abs(pixels(source).astype(int) - expected).max() <= 1  # rounding
    assert np.abs(pixels(Image.fromarray(rgba)).astype(int) - expected).max() <= 1


def test_a_palette_with_a_transparent_colour_shows_white_there():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(saved(image, kind, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
DEEP = {
    "16-bit PNG": saved(Image.fromarray((RAMP * 65535).round().astype(np.uint16))),
    "16-bit TIFF": saved(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "TIFF"),
    "16-bit PGM": b"P5\n16 16\n65535\n" + (RAMP * 65535).round().astype(">u2").tobytes(),
    "32-bit TIFF": saved(Image.fromarray((RAMP * (2**31 - 1)).astype(np.int32)), "TIFF"),
    "float TIFF": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float TIFF of bytes": saved(Image.fromarray((255 * RAMP).astype(np.float32)), "TIFF"),
    "uint16": (RAMP * 65535).round().astype(np.uint16),
    "uint32": (RAMP * (2**32 - 1)).astype(np.uint32),
    "int64 of bytes": (RAMP * 255).round().astype(np.int64),
    "float64": RAMP,
    "float16": RAMP.astype(np.float16),
    "bfloat16 with a gradient": torch.from_numpy(RAMP).to(torch.bfloat16).requires_grad_(),
    "a tensor of bytes in floats": torch.from_numpy(255 * RAMP).float(),
    "a picture of floats": Image.fromarray(RAMP.astype(np.float32)),
    "a picture of 16 bits": Image.fromarray((RAMP * 65535).round().astype(np.uint16)),
}


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP)
def test_deep_pictures_are_scaled_by_their_types_range(source):
    found = pixels(source)
    # One level for rounding, another for bfloat16's eight bits.
    assert np.abs(found[..., 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= 2
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize(
    "values",
    [
        RAMP * 2 - 1,
        RAMP * 4 - 2,
        RAMP * 1.5,
        RAMP * 1000,
        (RAMP * 1000).astype(np.int32) - 500,
        np.full((4, 4), np.nan),
        np.full((4, 4), 1e30),
        (RAMP * 3000).astype(np.int16),
    ],
)
def test_ranges_that_mean_nothing_are_refused_at_every_door(values):
    doors = [values, torch.from_numpy(values), np.stack([values] * 3, axis=-1)]
    for source in doors:
        with pytest.raises(ValueError, match="holds"):
            load_image(source)
    with pytest.raises(ValueError, match="holds"):
        load_frames(np.stack([np.stack([values] * 3, axis=-1)] * 2), 2)


def test_a_dark_frame_among_bytes_in_floats_stays_dark():
    frames = np.stack([np.full((4, 4, 3), level, np.float32) for level in (1, 200)])
    for source in (frames, list(frames), torch.from_numpy(frames)):
        assert [np.asarray(frame).max() for frame in load_frames(source, 2)] == [1, 200]


def test_a_camera_held_upright_takes_upright_pictures():
    image, exif = Image.fromarray(picture(0, (6, 4))), Image.Exif()
    for number in range(1, 9):
        exif[0x0112] = number
        data = saved(image, "PNG", exif=exif)
        from PIL import ImageOps

        assert (pixels(data) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).all()


def test_pictures_of_many_pixels_are_refused_by_their_numbers(monkeypatch):
    monkeypatch.setattr(media_uni_moe, "MAX_PIXELS", 99)
    with pytest.raises(ValueError, match=r"10 x 10 pixels and at most .* of a PNG are read: scale it down"):
        load_image(saved(Image.new("RGB", (10, 10))))
    monkeypatch.setattr(media_uni_moe, "MAX_COPIED_PIXELS", 99)
    with pytest.raises(ValueError, match="of a WEBP are read"):
        load_image(saved(Image.new("RGB", (10, 10)), "WEBP"))


def test_a_format_that_runs_other_programs_is_no_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="x.png' could not be read"):
        load_image(tmp_path / "x.png")


# ---- videos ----


def write_video(
    path, moments, size=(64, 48), rotation: int = 0, codec: str = "libx264", base=Fraction(1, 90_000), **options
) -> None:
    """A grey level per frame, with a red corner at the top left, shown at these moments (seconds)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = stream.time_base = base
        stream.options = {"g": "10", "bf": "2", "qp": "4", **options}
        for index, moment in enumerate(moments):
            image = np.full((size[1], size[0], 3), 2 * index, np.uint8)
            image[: size[1] // 3, : size[0] // 3] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(Fraction(moment) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotation:
        turned(path, rotation)


def turned(path, rotation: int) -> None:
    """Writes into an MP4 how it is to be turned, clockwise."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    one = 0x10000
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[rotation]
    for offset, value in ((0, a), (4, b), (12, c), (16, d)):
        data[matrix + offset : matrix + offset + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(data)


def levels(frames: list) -> list[float]:
    return [float(np.asarray(frame)[-8:, -8:].mean()) / 2 for frame in frames]


@pytest.fixture(params=["pyav", "decord"])
def reader(request, monkeypatch):
    """Videos are read by one of the two."""
    if request.param == "decord":
        pytest.importorskip("decord")
        monkeypatch.setitem(sys.modules, "av", None)
    return request.param


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("films")
    write_video(folder / "steady.mp4", [Fraction(i, 30) for i in range(60)])
    # A second at 30 frames, then five seconds at 6.
    uneven = [Fraction(i, 30) for i in range(30)] + [1 + Fraction(i, 6) for i in range(30)]
    write_video(folder / "uneven.mp4", uneven)
    for rotation in (90, 180, 270):
        moments = [Fraction(i, 30) for i in range(4)]
        write_video(folder / f"turned{rotation}.mp4", moments, size=(128, 64), rotation=rotation)
    return folder


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_video_lies_as_its_camera_was_held(films, reader, rotation):
    """The red corner goes round clockwise."""
    frame = np.asarray(load_frames(films / f"turned{rotation}.mp4", 1)[0]).astype(int)
    assert frame.shape[:2] == ((64, 128) if rotation == 180 else (128, 64))
    corner = {90: frame[:8, -8:], 180: frame[-8:, -8:], 270: frame[-8:, :8]}[rotation]
    assert corner[..., 0].min() > 200 and corner[..., 1:].max() < 60


def test_frames_are_taken_evenly_in_time_where_the_rate_varies(films, reader):
    found = levels(load_frames(films / "uneven.mp4", 6))
    # At 0, 1, ... 5 s of 6: the frames of number 0, 30, 36, ...
    assert found == pytest.approx([0, 30, 36, 42, 48, 54], abs=1.5)


def test_frames_are_taken_by_number_where_the_rate_is_steady(films, reader):
    assert levels(load_frames(films / "steady.mp4", 8)) == pytest.approx([0, 7, 15, 22, 30, 37, 45, 52], abs=1.2)
    assert levels(load_frames(films / "steady.mp4", 61)) == pytest.approx([i * 60 // 61 for i in range(61)], abs=1.2)


def test_a_video_is_cut_and_thinned(films, reader):
    cut = Clip(str(films / "steady.mp4"), start=0.5, end=1.5, num_frames=3)
    assert levels(load_frames(cut)) == pytest.approx([15, 25, 35], abs=1.2)
    assert levels(load_frames(Clip(str(films / "steady.mp4"), fps=2))) == pytest.approx([0, 15, 30, 45], abs=1.2)
    with pytest.raises(ValueError, match="`fps=1000` of 2.0 s are 2000 frames, and at most 128"):
        load_frames(Clip(str(films / "steady.mp4"), fps=1000))
    with pytest.raises(ValueError, match="the cut begins at 9 s and it lasts 2.00 s"):
        load_frames(Clip(str(films / "steady.mp4"), start=9))


def test_objects_of_decoders_give_the_frames_that_are_needed_and_no_others(films):
    decord = pytest.importorskip("decord")
    expected = levels(load_frames(films / "steady.mp4", 4))
    assert levels(load_frames(decord.VideoReader(str(films / "steady.mp4")), 4)) == pytest.approx(expected, abs=1)
    asked = []

    class VideoDecoder:  # torchcodec's
        metadata = SimpleNamespace(num_frames=60, average_fps=30.0)

        def get_frame_at(self, index):
            asked.append(index)
            return SimpleNamespace(data=torch.full((3, 4, 4), 2 * index, dtype=torch.uint8))

    assert levels(load_frames(VideoDecoder(), 4)) == [0, 15, 30, 45] and asked == [0, 15, 30, 45]


@pytest.mark.parametrize("given", [iter, list, tuple, np.stack, lambda frames: torch.from_numpy(np.stack(frames))])
def test_frames_may_come_in_any_collection(given):
    expected = [np.asarray(frame) for frame in load_frames(film(), 3)]
    assert all((np.asarray(a) == b).all() for a, b in zip(load_frames(given(list(film())), 3), expected, strict=True))


# ---- sound ----


def test_a_pair_of_waveform_and_rate_is_one_clip():
    wave = tone(0.5, rate=8000)
    expected = load_waveform({"array": wave, "sampling_rate": 8000})
    for pair in ((wave, 8000), (8000, wave), (torch.from_numpy(wave)[None], 8000), (wave, np.int64(8000))):
        np.testing.assert_array_equal(load_waveform(pair), expected)
    processor = tiny_processor()
    single = processor(audio=(wave, 8000), text="<audio>", return_tensors="pt")
    listed = processor(audios=[(wave, 8000)], text="<audio>", return_tensors="pt")
    assert torch.equal(single["input_values"], listed["input_values"])


def test_a_clip_resampled_in_blocks_is_the_whole_one(tmp_path, monkeypatch):
    import soxr

    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 100_003).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", wave, 44_100, subtype="FLOAT")
    whole = soxr.resample(wave, 44_100, 16_000)
    monkeypatch.setattr(media_uni_moe, "_soundfile_blocks", lambda file: iter(np.array_split(wave[:, None], 7)))
    np.testing.assert_allclose(load_waveform(tmp_path / "x.wav"), whole, atol=1e-6)
    cut = load_waveform(Clip(tmp_path / "x.wav", start=0.25, end=1.0))
    np.testing.assert_allclose(cut, soxr.resample(wave[11_025:44_100], 44_100, 16_000), atol=1e-6)


@pytest.mark.parametrize("value", [65.0, 1e15, 1e30, -3e38])
def test_samples_beyond_reason_are_refused_at_every_door(tmp_path, value):
    wave = np.full(100, value, np.float32)
    soundfile.write(tmp_path / "x.wav", wave, 16000, subtype="FLOAT")
    for source in (wave, torch.from_numpy(wave), {"array": wave}, (wave, 16000), str(tmp_path / "x.wav"), list(wave)):
        with pytest.raises(ValueError, match="floats in .-1, 1., got values from"):
            load_waveform(source)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integers_in_the_guise_of_floats_are_refused(dtype):
    wave = (tone(0.1) * 20).round().astype(dtype)
    with pytest.raises(ValueError, match="divide 16-bit samples by 32768"):
        load_waveform(wave)
    assert load_waveform(tone(0.1) * 20).max() > 1  # amplified, but sound


def test_an_audio_decoder_gives_the_samples_that_are_needed():
    asked = []

    class AudioDecoder:  # torchcodec's
        metadata = SimpleNamespace(sample_rate=8000)

        def get_samples_played_in_range(self, start, stop):
            asked.append((start, stop))
            return SimpleNamespace(data=torch.from_numpy(np.stack([tone(0.5, rate=8000)] * 2)), sample_rate=8000)

    found = load_waveform(Clip(AudioDecoder(), start=1.0, end=1.5))
    np.testing.assert_allclose(found, load_waveform((tone(0.5, rate=8000), 8000)), atol=1e-6)
    assert asked == [(1.0, 1.5)]


# ---- sources ----


def test_bytes_in_any_form_and_open_files_are_read_and_left_as_they_were(tmp_path):
    data = saved(Image.fromarray(picture()))
    (tmp_path / "x y.png").write_bytes(data)
    expected = pixels(data)
    for source in (bytearray(data), memoryview(data), tmp_path / "x y.png", (tmp_path / "x y.png").as_uri()):
        assert (pixels(source) == expected).all()
    with open(tmp_path / "x y.png", "rb") as file:
        file.seek(7)
        for source in (file, held := io.BytesIO(data)):
            assert (pixels(source) == expected).all() and not source.closed
        assert file.tell() == 7 and held.tell() == 0
    with open(tmp_path / "x y.png", encoding="latin-1") as file, pytest.raises(ValueError, match="mode 'rb'"):
        load_image(file)
    sound = io.BytesIO()
    soundfile.write(sound, tone(), 16000, format="WAV")
    assert len(load_waveform(sound)) == len(tone()) and not sound.closed


def test_only_what_is_sent_is_read_where_strangers_ask(tmp_path, monkeypatch):
    data = saved(Image.fromarray(picture()))
    (tmp_path / "x.png").write_bytes(data)
    (tmp_path / "plain").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    named = ["x.png", "plain", str(tmp_path / "x.png"), (tmp_path / "x.png").as_uri(), "http://127.0.0.1:1/x.png"]
    named += [f"file://{'/' * 130}{tmp_path}/x%2Epng", f"file://localhost{tmp_path}/x%2Epng?{'a' * 140}"]
    processor = tiny_processor(uploads_only=True)

    def encode(source, kind="image"):
        return processor.apply_chat_template(user({"type": kind, "url": source}), tokenize=True, return_dict=True)

    assert len(encode(url)["pixel_values"]) == 1
    for source in named:
        for kind in ("image", "video", "audio", "speech"):
            with pytest.raises(ValueError, match="is named and not sent"):
                encode(source, kind)
    with pytest.raises(ValueError, match="is named and not sent"):
        processor.apply_chat_template(user({"type": "video", "video": ["x.png"]}), tokenize=True, return_dict=True)
    processor.save_pretrained(tmp_path / "saved")
    assert type(processor).from_pretrained(tmp_path / "saved").uploads_only
    assert load_image("x.png").size
    monkeypatch.setenv("UNI_MOE_UPLOADS_ONLY", "1")
    with pytest.raises(ValueError, match="is named and not sent"):
        load_image("x.png")


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {0}\n",
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1.0,\n{0}\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><Representation>'
    "<BaseURL>{0}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    "pls": "[playlist]\nFile1={0}\nNumberOfEntries=1\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ts", "wav"])
def test_no_file_opens_another(tmp_path, films, reader, name, ending):
    soundfile.write(tmp_path / "secret.wav", tone(), 16000)
    for secret in (tmp_path / "secret.wav", films / "steady.mp4"):
        data = PLAYLISTS[name].format(secret).encode()
        (tmp_path / f"list.{ending}").write_bytes(data)
        for source in (data, str(tmp_path / f"list.{ending}"), f"data:;base64,{base64.b64encode(data).decode()}"):
            for load in (load_waveform, load_frames):
                with pytest.raises(ValueError, match="could not be read"):
                    load(source)


def box(kind: bytes, data: bytes) -> bytes:
    return (8 + len(data)).to_bytes(4, "big") + kind + data


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (b"stts", (0, 2**31)),
        (b"ctts", (0, 2**32 - 1)),
        (b"stsc", (0, 10**8)),
        (b"stco", (0, 10**8)),
        (b"co64", (0, 10**8)),
        (b"stss", (0, 10**8)),
        (b"stsz", (0, 0, 10**8)),
        (b"stsz", (0, 100, 2**31)),
        (b"trun", (0, 2**31)),
    ],
)
def test_a_table_that_promises_more_than_it_holds_is_refused(kind, head):
    table = box(kind, b"".join(number.to_bytes(4, "big") for number in head) + b"\0" * 64)
    for parents in ((b"stbl", b"minf", b"mdia", b"trak", b"moov"), (b"traf", b"moof")):
        data = table
        for parent in parents:
            data = box(parent, data)
        with pytest.raises(ValueError, match=f"table '{kind.decode()}' promises {head[-1]} entries"):
            check_mp4_tables(io.BytesIO(box(b"ftyp", b"isom") + data))


def test_boxes_nested_without_end_are_refused():
    data = b""
    for _ in range(50):
        data = box(b"trak", data)
    with pytest.raises(ValueError, match="nested too deep"):
        check_mp4_tables(io.BytesIO(box(b"moov", data)))


def test_a_reader_that_dies_takes_nobody_with_it(films, monkeypatch):
    pytest.importorskip("decord")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(files_uni_moe, "DECORD", "import os; os.abort()")
    with pytest.raises(ValueError, match=r"steady\.mp4' could not be read \(decord cannot read it\)"):
        load_frames(films / "steady.mp4")


def test_decoding_that_takes_too_long_ends(films, monkeypatch):
    monkeypatch.setattr(files_uni_moe.Deadline, "check", lambda self: (_ for _ in ()).throw(
        files_uni_moe.LimitError("decoding it takes longer than 15 s: cut it, or save it smaller")
    ))  # fmt: skip
    with pytest.raises(ValueError, match="takes longer than 15 s"):
        load_frames(films / "steady.mp4")


def test_frames_of_many_pixels_are_refused_before_they_are_decoded(films, monkeypatch):
    monkeypatch.setattr(files_uni_moe, "MAX_FRAME_BYTES", 1000)
    with pytest.raises(ValueError, match="64 x 48 pixels of 12 bits, more than"):
        load_frames(films / "steady.mp4")


@pytest.mark.parametrize("kind", ["Picture", "Video", "Audio"])
def test_messages_name_no_objects_and_no_files_that_nobody_made(kind):
    load = {"Picture": load_image, "Video": load_frames, "Audio": load_waveform}[kind]
    for source in (b"nothing of the kind" * 20, io.BytesIO(b"nothing of the kind" * 20)):
        with pytest.raises(ValueError, match=f"{kind} in the given bytes could not be read") as caught:
            load(source)
        assert "0x" not in str(caught.value) and "/tmp" not in str(caught.value) and "<" not in str(caught.value)


@pytest.mark.parametrize("source", [{}, {"path": None, "bytes": None}, None])
def test_a_source_that_is_nothing_is_named(source):
    with pytest.raises(ValueError, match="has no source"):
        resolved(source, "Picture")


@pytest.mark.parametrize("name", ["film.ts", "film.h264", "film.avi", "film.mkv", "film.flv", "film.mov"])
def test_frames_are_right_in_containers_whose_jumps_are_not(tmp_path, name):
    """With key frames now and then, and frames that are shown in another order than they are stored."""
    write_video(tmp_path / name, [Fraction(i, 30) for i in range(60)])
    wanted = [0, 7, 15, 22, 30, 37, 45, 52]
    # 1.6: lossy compression, and half a frame where streams are only numbered.
    assert levels(load_frames(tmp_path / name, 8)) == pytest.approx(wanted, abs=1.6)


def test_frames_are_right_where_the_unit_of_time_is_a_frame(tmp_path):
    """Times that are 0, 1, 2, ... are still times: behind a jump they do not begin anew."""
    moments, quality = [Fraction(i, 30) for i in range(60)], {"bf": "0", "qp": "-1", "crf": "4", "b": "2M"}
    write_video(tmp_path / "film.ivf", moments, codec="libvpx", base=Fraction(1, 30), **quality)
    found = levels(load_frames(tmp_path / "film.ivf", 8))
    assert found == pytest.approx([0, 7, 15, 22, 30, 37, 45, 52], abs=1.6)  # lossy compression


def test_an_object_of_decord_gives_the_frames_of_its_file(films):
    decord = pytest.importorskip("decord")
    for clip in ({}, {"start": 1.0}, {"start": 0.5, "end": 3.0}):
        path, reader = str(films / "uneven.mp4"), decord.VideoReader(str(films / "uneven.mp4"))
        found, expected = (levels(load_frames(Clip(source, num_frames=4, **clip))) for source in (reader, path))
        assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"array": tone(), "sample_rate": 8000}, "has .'sample_rate'. beside it"),
        ({"path": "x.wav", "start": 5}, "is an object with .'start'., which are not read"),
    ],
)
def test_what_an_object_says_and_nobody_reads_is_refused(source, reason):
    with pytest.raises(ValueError, match=reason):
        load_waveform(source)
    assert len(load_waveform({"raw": tone(0.5, rate=8000), "sampling_rate": 8000})) == 8000


def test_a_jpeg_of_endless_passes_is_refused():
    data = saved(Image.fromarray(picture(0, (64, 64))), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ValueError, match=r"painted in \d+ passes and at most 100"):
        load_image(data[:-2] + data[last:-2] * 200 + data[-2:])


def test_sixteen_bits_in_the_other_order_are_the_same():
    deep = (RAMP * 65535).round().astype(np.uint16)
    swapped = Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes())
    assert (pixels(swapped) == pixels(deep)).all()
