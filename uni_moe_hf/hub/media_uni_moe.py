"""
From whatever a user has to pictures, frames and waveforms: paths, URLs, bytes, open files, arrays, decoders' objects.

Files may lie about what they hold: what is read is bounded in memory, and fails with one sentence.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import chain
from typing import Any

import numpy as np

from .files_uni_moe import Choice, Deadline, LimitError, audio_blocks, frames_at, name_of, reason, resolved


# Columns of media beside conversations: what each is called, as TRL, LLaMA-Factory, ms-swift and the original name
# them. The caller says whether the original's `voice` is speech or sound.
MEDIA_COLUMNS = {
    "image": ("image", "images"),
    "video": ("video", "videos"),
    "audio": ("audio", "audios"),
    "speech": ("speech",),
    "voice": ("voice",),
}
MEDIA_NAMES = tuple(chain.from_iterable(MEDIA_COLUMNS.values()))

# Of a picture; of one whose format is decoded in several copies; from where on a JPEG is decoded at half its size.
MAX_PIXELS, MAX_COPIED_PIXELS, MAX_WHOLE_JPEG_PIXELS = 64_000_000, 24_000_000, 32_000_000
# Of a progressive JPEG: the passes in which it is painted; cameras and editors make a dozen.
MAX_SCANS = 100
# Of a video: the frames that are taken.
MAX_VIDEO_FRAMES = 128
# Of one clip, in seconds. An hour of windows is more tokens than any decoder reads.
MAX_AUDIO_SECONDS = 3600
# What sound may claim, in hertz: resampling a wrong number could fill any memory.
MIN_RATE, MAX_RATE = 1_000, 768_000
# Samples lie within [-1, 1], or somewhat beyond where they were amplified; integers in the guise of floats do not.
MAX_SAMPLE = 64.0

# Pictures that hold their own data; what others need (EPS runs Ghostscript) is not theirs to ask for.
PICTURE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "HEIF")
COPIED_FORMATS = ("WEBP", "TIFF", "JPEG2000", "AVIF", "HEIF")
# `Image.Transpose` by EXIF's number of an orientation.
ORIENTATIONS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


@dataclass
class Clip:
    """
    A source with what is asked of it.

    Args:
        source: As in [`load_image`], [`load_frames`] or [`load_waveform`].
        start, end (`float`, *optional*): Of a sound or video, in seconds; all of it by default.
        num_frames (`int`, *optional*): Of a video, evenly.
        fps (`float`, *optional*): Of a video, frames per second in place of a number.

    Raises:
        ValueError: these contradict each other, or are no such numbers.
    """

    source: Any
    start: float | None = None
    end: float | None = None
    num_frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end", "fps"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` is {value!r}; it must be a number that is not negative.")
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"A clip begins at {self.start or 0} s and ends at {self.end} s; it must end later.")
        if self.fps is not None and (self.fps == 0 or self.num_frames is not None):
            raise ValueError("A video needs either `num_frames` or an `fps` above 0, not both.")
        if self.num_frames is not None:
            check_num_frames(self.num_frames)


def check_num_frames(num_frames: Any) -> int:
    """
    Raises:
        ValueError: it is no whole number from 1 to `MAX_VIDEO_FRAMES`.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int | np.integer):
        raise ValueError(f"`num_frames` is {num_frames!r}; it must be a whole number from 1 to {MAX_VIDEO_FRAMES}.")
    if not 1 <= num_frames <= MAX_VIDEO_FRAMES:
        raise ValueError(f"`num_frames` is {num_frames}; it must lie between 1 and {MAX_VIDEO_FRAMES}.")
    return int(num_frames)


# --- Pictures


def load_image(source: Any, uploads_only: bool = False):
    """
    Args:
        source (path, URL, base64 text, `bytes`, open file, `dict` with "bytes" or "path", array or PIL image):
            Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`, with values as in
            [`array_to_image`].
        uploads_only (`bool`, *optional*, defaults to `False`): As in [`resolved`].

    Returns:
        `PIL.Image.Image`: RGB, upright; what is transparent shows white.

    Raises:
        ValueError: the file is missing, is no picture, is cut, or has more than `MAX_PIXELS` pixels.
    """
    from PIL import Image

    source = resolved(source, "Picture", uploads_only)
    Image.init()
    formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]
    try:
        if isinstance(source, str | bytes):
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as file:
                _check_pixels(file)
                return _upright(_rgb(file), file)
        image = source if isinstance(source, Image.Image) else array_to_image(_as_array(source))
        return _upright(_rgb(image), image)
    except Exception as error:
        raise ValueError(
            f"Picture {name_of(source)} could not be read ({reason(error)}); is it a complete picture?"
        ) from error


def _check_pixels(file: Any) -> None:
    """What a picture's header says, before its pixels are read."""
    pixels, limit = file.width * file.height, MAX_COPIED_PIXELS if file.format in COPIED_FORMATS else MAX_PIXELS
    if not pixels:
        raise ValueError(f"it has {file.width} x {file.height} pixels")
    if pixels > limit:
        raise ValueError(
            f"it has {file.width} x {file.height} pixels and at most {limit / 1e6:.0f} million of a {file.format} are "
            "read: scale it down"
        )
    if file.format in ("JPEG", "MPO") and file.info.get("progressive"):
        place = file.fp.tell()
        file.fp.seek(0)
        scans = file.fp.read().count(b"\xff\xda")
        file.fp.seek(place)
        if scans > MAX_SCANS:  # each of which goes over the whole picture
            raise ValueError(f"it is painted in {scans} passes and at most {MAX_SCANS} are read: save it again")
    if file.format in ("JPEG", "MPO") and pixels > MAX_WHOLE_JPEG_PIXELS:
        file.draft(None, (file.width // 2, file.height // 2))


def _upright(image: Any, original: Any):
    """The picture as its camera was held."""
    try:
        turn = ORIENTATIONS.get(original.getexif().get(0x0112))
    except Exception:  # of a damaged EXIF, which says nothing then
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Any):
    """A picture of any mode in RGB; strip by strip, so that no second copy is made of a large one."""
    from PIL import Image

    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    image.load()
    if image.mode.startswith("I;16") and image.mode != "I;16":  # of another order of bytes
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode == "La":  # which converts to its straight form alone
        image = image.convert("LA")
    is_deep = image.mode.startswith(("I", "F"))
    if not is_deep and not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if is_deep:
        low, high = image.getextrema()
        kind = {"F": np.dtype(np.float32), "I": _kind_of_i(image)}.get(image.mode, np.dtype(np.uint16))
        scale = _byte_scale(kind, low, high)
    canvas = Image.new("RGB", image.size, "white")
    rows = max(1, (1 << 22) // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        if is_deep:
            canvas.paste(Image.fromarray(scale(np.asarray(strip).astype(np.float64))), (0, top))
        else:
            strip = strip.convert("RGBA")
            canvas.paste(strip, (0, top), strip)
    return canvas


def _kind_of_i(image: Any) -> np.dtype:
    """What Pillow's mode "I" was read from: 16 bits of a PGM or PNG, 32 of a TIFF, or an array."""
    if getattr(image, "format", None) in ("PPM", "PNG"):
        return np.dtype(np.uint16)
    bits = getattr(image, "tag_v2", {}).get(258, (32,))
    return np.dtype(np.uint16) if bits and bits[0] == 16 else np.dtype(np.int32)


def _byte_scale(kind: np.dtype, low: float, high: float):
    """
    From values to bytes, by their type and the range that they fill.

    Raises:
        ValueError: no range is meant that one could know.
    """
    if kind.kind == "b":
        white = 1.0
    elif kind.kind == "u" or (kind == np.int32 and high > 255 and low >= 0):
        white = float(np.iinfo(kind).max)
    elif kind.kind == "i" and low >= 0 and high <= 255:
        white = 255.0
    elif kind.kind == "f" and -1e-3 <= low and high <= 1 + 1e-3:
        white = 1.0
    elif kind.kind == "f" and -0.5 <= low and 2 < high <= 255.5:
        white = 255.0
    else:
        raise ValueError(
            f"it holds {kind} values from {low:g} to {high:g}; give floats in [0, 1], or 8-bit values from 0 to 255"
        )
    return lambda values: (values * (255 / white)).round().clip(0, 255).astype(np.uint8)


def array_to_image(array: np.ndarray):
    """
    Args:
        array (`np.ndarray`): `(height, width)`, `(height, width, channels)` or `(channels, height, width)`. Black to
            white are 0 to 1 in floats, 0 to 255 in bytes, in floats that say so by a value above 2 and in signed
            integers, and the range of their type in other integers.

    Returns:
        `PIL.Image.Image`: grey, RGB, or RGBA for four channels.

    Raises:
        ValueError: another shape or range of values.
    """
    return _to_image(array, _scale_of([array]))


def _scale_of(arrays: list[np.ndarray]):
    """One scale for all frames: a dark frame of bytes in floats must not become a bright one."""
    array = arrays[0]
    if array.dtype == np.uint8:
        return None
    if array.dtype.kind not in "buif":
        raise ValueError(f"it is an array of {array.dtype}")
    if array.dtype.kind == "f" and not all(np.isfinite(each).all() for each in arrays):
        raise ValueError("it holds NaN or infinite values")
    if not array.size:
        raise ValueError(f"it has the shape {array.shape}, which is no picture")
    return _byte_scale(array.dtype, min(each.min() for each in arrays), max(each.max() for each in arrays))


def _to_image(array: np.ndarray, scale: Any):
    from PIL import Image

    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or not array.size:
        raise ValueError(f"it has the shape {array.shape}, which is no picture")
    return Image.fromarray(np.ascontiguousarray(array if scale is None else scale(array.astype(np.float64))))


# --- Videos


def load_frames(source: Any, num_frames: int = 8) -> list:
    """
    Args:
        source (path, URL, base64 text, `bytes`, open file, `dict`, array `(frames, height, width, 3)`, pictures, a
            `decord.VideoReader`, a torchcodec `VideoDecoder`, or a [`Clip`] of one of these): A video.
        num_frames (`int`, *optional*, defaults to 8): How many frames to take, evenly in time from the start; short
            videos repeat frames.

    Returns:
        `list[PIL.Image.Image]`: upright, of length `num_frames`, or of that which a [`Clip`] asks for.

    Raises:
        ValueError: the file is missing, is no video or holds no frame, or too many frames are wanted.
        ImportError: neither PyAV nor decord is installed.
    """
    return list(iter_frames(source, num_frames))


def iter_frames(source: Any, num_frames: int, uploads_only: bool = False) -> Iterator[Any]:
    """[`load_frames`], a frame at a time: those of a large video need not be in memory together."""
    clip = source if isinstance(source, Clip) else Clip(source)
    choose = _chooser(clip, check_num_frames(num_frames))
    source = resolved(clip.source, "Video", uploads_only)
    try:
        if isinstance(source, str | bytes):
            for frame in frames_at(source, choose):
                yield array_to_image(frame)
        elif hasattr(source, "get_frame_at") and hasattr(source, "metadata"):  # torchcodec's
            about = source.metadata
            for index in choose(np.arange(about.num_frames + 1), Fraction(1 / about.average_fps)):
                yield array_to_image(_as_array(getattr(frame := source.get_frame_at(index), "data", frame)))
        elif hasattr(source, "get_avg_fps"):  # decord's
            begins = np.asarray(source.get_frame_timestamp(range(len(source))))  # (frames, 2)
            times = np.append(begins[:, 0], begins[-1:, 1])
            for index in choose((times * 1_000_000).round().astype(np.int64), Fraction(1, 1_000_000)):
                frame = source[index]
                yield array_to_image(frame.asnumpy() if hasattr(frame, "asnumpy") else _as_array(frame))
        else:
            yield from _frames_of_pictures(source, clip, choose, uploads_only)
    except (ImportError, _SaidError):
        raise
    except Exception as error:
        raise ValueError(
            f"Video {name_of(source)} could not be read ({reason(error)}); is it a complete video?"
        ) from error


class _SaidError(ValueError):
    """A whole sentence already."""


def _frames_of_pictures(source: Any, clip: Clip, choose: Choice, uploads_only: bool) -> Iterator[Any]:
    """Of an array, or of pictures in any form."""
    if (clip.start, clip.end, clip.fps) != (None, None, None):
        raise _SaidError("A video is given as its frames, which have no times: leave out `start`, `end` and `fps`.")
    if hasattr(source, "ndim") and source.ndim != 4:
        raise _SaidError(f"A video is an array of shape {tuple(source.shape)}; it must be (frames, height, width, 3).")
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        if not isinstance(source, Iterable):
            raise _SaidError(f"A video is a {type(source).__name__}; give a file or a list of pictures.")
        source = list(source)
    if len(source) == 0:
        raise _SaidError("A video has 0 frames; remove it or check how it was cut.")
    wanted = [source[index] for index in choose(np.arange(len(source) + 1), Fraction(1))]
    if all(hasattr(frame, "__array__") and hasattr(frame, "ndim") for frame in wanted):
        arrays = [_as_array(frame) for frame in wanted]
        scale = _scale_of(arrays)
        yield from (_rgb(_to_image(frame, scale)) for frame in arrays)
    else:
        try:
            yield from (load_image(frame, uploads_only) for frame in wanted)
        except ValueError as error:
            raise _SaidError(str(error)) from error


def _chooser(clip: Clip, num_frames: int) -> Choice:
    """Which frames of a video are taken."""

    def choose(times: np.ndarray, base: Fraction) -> list[int]:
        total = len(times) - 1
        if total < 1:
            raise ValueError("it has 0 frames")
        begin, finish = (Fraction(int(time)) * base for time in (times[0], times[-1]))
        first = begin + Fraction(clip.start or 0)
        last = finish if clip.end is None else min(finish, begin + Fraction(clip.end))
        if first >= last:
            raise ValueError(f"the cut begins at {clip.start:g} s and it lasts {float(finish - begin):.2f} s")
        count = clip.num_frames or num_frames
        if clip.fps is not None:
            count = max(1, round((last - first) * Fraction(clip.fps)))
            if count > MAX_VIDEO_FRAMES:
                raise ValueError(
                    f"`fps={clip.fps:g}` of {float(last - first):.1f} s are {count} frames, and at most "
                    f"{MAX_VIDEO_FRAMES} are taken"
                )
        moments = [first + (last - first) * index / count for index in range(count)]
        # Where frames follow each other evenly, by number: containers round their times.
        span = int(times[-2] - times[0])
        even = np.arange(total) * (span / max(1, total - 1)) + float(times[0])
        if np.abs(times[:-1] - even).max() * 2 * max(1, total - 1) <= span or total == 1:
            if clip.start is clip.end is None:
                return [index * total // count for index in range(count)]
            step, early = Fraction(max(span, 1), max(1, total - 1)) * base, Fraction(1, 20)
            return [min(total - 1, int((moment - begin) / step + early)) for moment in moments]
        ticks = [moment / base for moment in moments]
        return [int(np.searchsorted(times[:-1], math.floor(tick), side="right")) - 1 for tick in ticks]

    return choose


# --- Sound


def load_waveform(source: Any, sampling_rate: int = 16000, uploads_only: bool = False) -> np.ndarray:
    """
    Args:
        source (path, URL, base64 text, `bytes`, open file, `np.ndarray`, `list[float]`, `tuple`, `dict`, a torchcodec
            `AudioDecoder`, or a [`Clip`] of one of these):
            An audio or video file, a waveform at `sampling_rate`, a waveform with its rate, or `{"array": ...,
            "sampling_rate": ...}` / `{"path": ..., "bytes": ...}` as `datasets` gives them.
        sampling_rate (`int`, *optional*, defaults to 16000): Wanted rate, in hertz.
        uploads_only (`bool`, *optional*, defaults to `False`): As in [`resolved`].

    Returns:
        `np.ndarray` of shape `(num_samples,)`, float32, mono, at `sampling_rate`.

    Raises:
        ValueError: the file is missing, unreadable or longer than an hour, or the waveform fails [`check_waveform`].
    """
    clip = source if isinstance(source, Clip) else Clip(source)
    source, rate = clip.source, sampling_rate
    if isinstance(source, dict) and source.get("raw") is not None and source.get("array") is None:
        source = {"array": source["raw"], **{k: v for k, v in source.items() if k != "raw"}}  # of the ASR pipeline
    if isinstance(source, dict) and source.get("array") is not None:
        if unknown := sorted(set(source) - {"array", "sampling_rate", "path", "bytes"}):
            raise ValueError(f"A waveform has {unknown} beside it, which are not read; its rate is 'sampling_rate'.")
        rate = sampling_rate if source.get("sampling_rate") is None else source["sampling_rate"]
        source = source["array"]
    elif is_waveform_with_rate(source):
        source, rate = source if _is_number(source[1]) else source[::-1]
    else:
        source = resolved(source, "Audio", uploads_only)
        if isinstance(source, str | bytes) or hasattr(source, "get_samples_played_in_range"):
            return _read_waveform(source, clip, sampling_rate)
    waveform = check_waveform(source)
    try:
        return _mono_at(iter([waveform[:, None]]), rate, sampling_rate, clip)
    except LimitError as error:
        raise ValueError(f"A waveform of {len(waveform)} samples: {error}.") from error


def is_waveform_with_rate(source: Any) -> bool:
    """Whether a tuple is `(waveform, rate)`, or the other way round as SciPy and Gradio have it."""
    return isinstance(source, tuple) and len(source) == 2 and sum(map(_is_number, source)) == 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _read_waveform(source: Any, clip: Clip, sampling_rate: int) -> np.ndarray:
    """Of a file, or of torchcodec's object."""
    try:
        if not isinstance(source, str | bytes):
            start, end = clip.start or 0.0, clip.end
            samples = source.get_samples_played_in_range(start, end)
            data = _as_array(samples.data).T
            waveform = _mono_at(iter([data]), int(samples.sample_rate), sampling_rate, Clip(source))
        else:
            waveform = _decode_audio(source, clip, sampling_rate)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"Audio {name_of(source)} could not be read ({reason(error)}); is it a complete audio file?"
        ) from error
    if len(waveform) == 0:
        raise ValueError(f"Audio {name_of(source)} has 0 samples.")
    return check_waveform(waveform)


def check_waveform(waveform: Any) -> np.ndarray:
    """
    Args:
        waveform (`np.ndarray`, `torch.Tensor` or a list of `float`): One clip, `(num_samples,)`, or with channels in
            either order.

    Returns:
        `np.ndarray` of shape `(num_samples,)`, float32, channels averaged.

    Raises:
        ValueError: no samples, integers (floats of their size included), more than two axes, or values that are not
            finite.
    """
    waveform = _as_array(waveform)
    if waveform.dtype.kind in "iu" and waveform.size:
        raise ValueError(
            f"A waveform must hold floats in [-1, 1], got {waveform.dtype}; "
            f"divide by {np.iinfo(waveform.dtype).max + 1}."
        )
    if waveform.ndim == 2 and waveform.size:
        waveform = waveform.mean(axis=int(np.argmin(waveform.shape)))
    if waveform.size == 0:
        raise ValueError("A waveform has 0 samples; remove the clip or check how it was cut.")
    if waveform.ndim != 1 or waveform.dtype.kind != "f":
        raise ValueError(
            f"A waveform must be one array of floats, got shape {waveform.shape} and dtype {waveform.dtype}; "
            "pass several clips as a list."
        )
    with np.errstate(over="ignore"):
        waveform = waveform.astype(np.float32, copy=False)
    if not np.isfinite(waveform).all():
        bad = int((~np.isfinite(waveform)).sum())
        raise ValueError(
            f"A waveform of {waveform.size} samples holds {bad} NaN or infinite values; repair or remove the clip."
        )
    low, high = float(waveform.min()), float(waveform.max())
    if max(-low, high) > MAX_SAMPLE or (max(-low, high) > 1 and (waveform == np.round(waveform)).all()):
        raise ValueError(
            f"A waveform must hold floats in [-1, 1], got values from {low:g} to {high:g}; divide 16-bit samples by "
            "32768, or repair the clip."
        )
    return waveform


def _decode_audio(source: str | bytes, clip: Clip, sampling_rate: int) -> np.ndarray:
    """Through soundfile; what it cannot open (mp4, m4a, aac, webm) through PyAV when that is installed."""
    try:
        import soundfile

        with soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else source) as file:
            return _mono_at(_soundfile_blocks(file), file.samplerate, sampling_rate, clip)
    except LimitError:
        raise
    except Exception as soundfile_error:
        try:
            rate, blocks = audio_blocks(source)
        except ImportError:
            if isinstance(soundfile_error, ImportError):
                packages = "`pip install soundfile soxr` or `pip install av soxr`"
                raise ImportError(f"Reading audio files needs soundfile or PyAV: {packages}.") from None
            raise soundfile_error from None
        return _mono_at(blocks, rate, sampling_rate, clip)


def _soundfile_blocks(file) -> Iterator[np.ndarray]:
    """`(num_samples, channels)` pieces; a header's own count of samples is not believed."""
    while len(block := file.read(max(1, (1 << 20) // file.channels), dtype="float32", always_2d=True)):
        yield block


def _mono_at(blocks: Iterator[np.ndarray], rate: Any, sampling_rate: int, clip: Clip) -> np.ndarray:
    """
    `(num_samples,)` at `sampling_rate`: the mean of the channels of `(num_samples, channels)` blocks, cut and
    resampled block by block, an hour at most. `soxr_hq` is what the original's librosa uses.
    """
    if not _is_number(rate) or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"A clip's sampling rate is {rate} Hz; it must be a number from {MIN_RATE} to {MAX_RATE}.")
    resampler, deadline = None, Deadline()
    if rate != sampling_rate:
        try:
            import soxr
        except ImportError as error:
            raise ImportError(
                f"The audio has {rate} Hz and the model hears {sampling_rate} Hz; resampling needs `pip install soxr`."
            ) from error
        resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
    first, last = round((clip.start or 0) * rate), math.inf if clip.end is None else round(clip.end * rate)
    kept, position, total = array("f"), 0, 0
    for block in blocks:
        deadline.check()
        begin, position = position, position + len(block)
        block = block[max(0, first - begin) : None if position <= last else max(0, int(last) - begin)]
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        total += len(mono)
        if total > MAX_AUDIO_SECONDS * rate:
            raise LimitError(f"it lasts longer than the {MAX_AUDIO_SECONDS} s that are read at once: cut it")
        mono = np.ascontiguousarray(mono, np.float32)
        kept.frombytes((mono if resampler is None else resampler.resample_chunk(mono)).data.cast("B"))
        if position >= last:
            break
    if position and not total:
        raise ValueError(f"the cut begins at {clip.start:g} s and it lasts {position / rate:.2f} s")
    if resampler is not None and total:
        kept.frombytes(resampler.resample_chunk(np.zeros(0, np.float32), last=True).data.cast("B"))
    return np.frombuffer(kept, np.float32)


def _as_array(value: Any) -> np.ndarray:
    """An array of anything that is one: tensors of any device, dtype and history among them."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # NumPy has no bfloat16
    return np.asarray(value)


__all__ = [
    "MAX_VIDEO_FRAMES",
    "MEDIA_COLUMNS",
    "MEDIA_NAMES",
    "Clip",
    "array_to_image",
    "check_num_frames",
    "check_waveform",
    "is_waveform_with_rate",
    "iter_frames",
    "load_frames",
    "load_image",
    "load_waveform",
]
