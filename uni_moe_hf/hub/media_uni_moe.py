"""
From whatever a user has to pictures, frames and waveforms: paths, URLs, bytes, base64, arrays, `datasets` entries.

Files may lie about what they hold: what is read is bounded in memory, and fails with one sentence.
"""

import base64
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_utils import load_image as load_pil_image
from transformers.video_utils import load_video


# Of one fetched file, in bytes and in seconds, and for how long a server may say nothing.
MAX_FETCHED_BYTES, MAX_FETCH_SECONDS, MAX_SILENT_SECONDS = 1 << 30, 600, 30
# Of one clip, in seconds. An hour of windows is more tokens than any decoder reads.
MAX_AUDIO_SECONDS = 3600
# What sound files may claim, in hertz: resampling a wrong number could fill any memory.
MIN_RATE, MAX_RATE = 1_000, 768_000
# Text is base64, which is how servers hand media over, where it is longer than any path, or names no file and has
# neither a dot, which most paths have and base64 has not, nor the shortness of a name.
MAX_PATH_CHARACTERS, MIN_BASE64_CHARACTERS = 4096, 128


def load_image(source: Any):
    """
    Args:
        source (path, URL, base64 text, `bytes`, `dict` with "bytes" or "path", array or PIL image):
            Arrays are `(height, width)`, `(height, width, channels)` or `(channels, height, width)`; floats in [0, 1].

    Returns:
        `PIL.Image.Image`: RGB, upright.

    Raises:
        ValueError: the file is missing, is no image, is cut, or claims more pixels than PIL opens (179 million).
    """
    from PIL import Image

    source = _resolved(source, "Picture")
    try:
        if isinstance(source, str | bytes):
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        elif hasattr(source, "__array__") and not isinstance(source, Image.Image):
            image = array_to_image(np.asarray(source))
        else:
            image = source
        image = load_pil_image(image)
        if 0 in image.size:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return image
    except Exception as error:
        raise ValueError(
            f"Picture {_name(source)} could not be read ({error}); is it a complete image file?"
        ) from error


def array_to_image(array: np.ndarray):
    """A PIL image from `(height, width)`, `(height, width, channels)` or `(channels, height, width)`."""
    from PIL import Image

    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "b":
        array = array * 255
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1 and array.max(initial=0) > 255:
        raise ValueError(f"it holds values up to {array.max()}, where 255 is white")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("it holds NaN or infinite values")
        array = (array * 255).round() if array.max(initial=0.0) <= 1.0 else array
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def load_frames(source: Any, num_frames: int) -> list:
    """
    Args:
        source (path, URL, base64 text, `bytes`, `dict`, array `(frames, height, width, 3)` or a list of pictures):
            A video.
        num_frames (`int`): How many frames to take, evenly from the start; short videos repeat frames.

    Returns:
        `list[PIL.Image.Image]` of length `num_frames`.

    Raises:
        ValueError: the file is missing, is no video or holds no frame.
        ImportError: neither decord nor PyAV is installed.
    """
    source = _resolved(source, "Video")
    if isinstance(source, bytes):
        # The decoders' own reading from memory is not the same for all of them.
        with tempfile.NamedTemporaryFile(suffix=".video") as file:
            file.write(source)
            file.flush()
            return load_frames(file.name, num_frames)
    if not isinstance(source, str):
        try:
            frames = list(source)
        except TypeError as error:
            raise ValueError(f"A video is a {type(source).__name__}; give a file or a list of pictures.") from error
        if not frames:
            raise ValueError("A video has 0 frames; remove it or check how it was cut.")
        return [load_image(frames[index]) for index in _even_indices(len(frames), num_frames)]
    try:
        return [array_to_image(frame) for frame in _decode_video(source, num_frames)]
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"Video '{source}' could not be read ({error}); is it a complete video file?") from error


def _even_indices(total: int, wanted: int) -> np.ndarray:
    """`(wanted,)` frame numbers in `[0, total)`, evenly from the start as in the original's demo."""
    if total < 1:
        raise ValueError("it has 0 frames")
    return np.arange(wanted) * total // wanted


def _decode_video(source: str, num_frames: int) -> np.ndarray:
    """`(num_frames, height, width, 3)` through decord; what it is missing for or cannot read, through PyAV."""
    backends, errors = [], []
    for backend, module in (("decord", "decord"), ("pyav", "av")):
        try:
            import_module(module)
            backends.append(backend)
        except ImportError:
            continue
    if not backends:
        raise ImportError("Reading video files needs decord or PyAV: `pip install decord` or `pip install av`.")
    for backend in backends:
        repeats = []

        def sample_indices(metadata: Any, repeats: list = repeats, **_) -> np.ndarray:
            # Some containers (Matroska) do not say how many frames they hold.
            wanted = _even_indices(metadata.total_num_frames or _count_frames(source), num_frames)
            indices, inverse = np.unique(wanted, return_inverse=True)  # decord stumbles over frames asked for twice
            repeats.append(inverse)
            return indices

        try:
            return load_video(source, backend=backend, sample_indices_fn=sample_indices)[0][repeats[0]]
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _count_frames(source: str) -> int:
    """Frames of a video, by decoding it."""
    try:
        import av
    except ImportError:
        return 0
    with av.open(source) as container:
        return sum(1 for _ in container.decode(video=0))


def load_waveform(source: Any, sampling_rate: int = 16000) -> np.ndarray:
    """
    Args:
        source (path, URL, base64 text, `bytes`, `np.ndarray`, `list[float]` or `dict`):
            An audio or video file, a waveform at `sampling_rate`, or `{"array": ..., "sampling_rate": ...}` /
            `{"path": ..., "bytes": ...}` as `datasets` gives them.
        sampling_rate (`int`, *optional*, defaults to 16000): Wanted rate, in hertz.

    Returns:
        `np.ndarray` of shape `(num_samples,)`, float32, mono, at `sampling_rate`.

    Raises:
        ValueError: the file is missing, unreadable or longer than an hour, or the waveform fails [`check_waveform`].
    """
    if isinstance(source, dict) and source.get("array") is not None:
        rate = sampling_rate if source.get("sampling_rate") is None else source["sampling_rate"]
        return _resampled(check_waveform(source["array"]), rate, sampling_rate)
    source = _resolved(source, "Audio")
    if not isinstance(source, str | bytes):
        return check_waveform(source)
    try:
        waveform = _decode_audio(source, sampling_rate)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"Audio {_name(source)} could not be read ({error}); is it a complete audio file?") from error
    if len(waveform) == 0:
        raise ValueError(f"Audio {_name(source)} has 0 samples.")
    return check_waveform(waveform)


def check_waveform(waveform: Any) -> np.ndarray:
    """
    Args:
        waveform (`np.ndarray`, `torch.Tensor` or a list of `float`): One clip, `(num_samples,)`, or with channels in
            either order.

    Returns:
        `np.ndarray` of shape `(num_samples,)`, float32, channels averaged.

    Raises:
        ValueError: no samples, integers, more than two axes, or values that are not finite.
    """
    if hasattr(waveform, "detach"):  # a tensor of any device; NumPy has no bfloat16
        waveform = waveform.detach().cpu()
        waveform = waveform.float() if waveform.is_floating_point() else waveform
    waveform = np.asarray(waveform)
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
        waveform = waveform.astype(np.float32)
    if not np.isfinite(waveform).all():
        bad = int((~np.isfinite(waveform)).sum())
        raise ValueError(
            f"A waveform of {waveform.size} samples holds {bad} NaN or infinite values; repair or remove the clip."
        )
    return waveform


def _decode_audio(source: str | bytes, sampling_rate: int) -> np.ndarray:
    """Through soundfile; what it cannot open (mp4, m4a, aac, webm) through PyAV when that is installed."""
    try:
        import soundfile

        with soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else source) as file:
            waveform, rate = _joined_mono(_soundfile_blocks(file), file.samplerate), file.samplerate
    except _TooLongError:
        raise
    except Exception as soundfile_error:
        try:
            import av
        except ImportError:
            if isinstance(soundfile_error, ImportError):
                packages = "`pip install soundfile soxr` or `pip install av soxr`"
                raise ImportError(f"Reading audio files needs soundfile or PyAV: {packages}.") from None
            raise soundfile_error from None
        with av.open(BytesIO(source) if isinstance(source, bytes) else source) as container:
            if not container.streams.audio:
                raise ValueError("it has no sound track") from soundfile_error
            # To float only: the library's own mixing to mono is 3 dB louder than the mean of the channels.
            resampler = av.AudioResampler(format="fltp")
            frames = (f for frame in container.decode(audio=0) for f in resampler.resample(frame))
            rate = container.streams.audio[0].rate
            waveform = _joined_mono((frame.to_ndarray().T for frame in frames), rate)
    return _resampled(waveform, rate, sampling_rate)


class _TooLongError(ValueError):
    """Another decoder would not find the clip any shorter."""


def _soundfile_blocks(file) -> Iterator[np.ndarray]:
    """`(num_samples, channels)` pieces; a header's own count of samples is not believed."""
    while len(block := file.read(max(1, (1 << 20) // file.channels), dtype="float32", always_2d=True)):
        yield block


def _joined_mono(blocks: Iterator[np.ndarray], rate: int) -> np.ndarray:
    """`(num_samples,)` mean of the channels of `(num_samples, channels)` blocks, an hour of them at most."""
    pieces, total = [np.zeros(0, np.float32)], 0
    for block in blocks:
        pieces.append(block.mean(axis=1))
        total += len(block)
        if total > MAX_AUDIO_SECONDS * rate:
            raise _TooLongError(f"it lasts longer than the {MAX_AUDIO_SECONDS} s that are read at once: cut it")
    return np.concatenate(pieces)


def _resampled(waveform: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """`soxr_hq`, which is what the original's librosa uses."""
    if not isinstance(rate, int | float | np.number) or not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"A clip's sampling rate is {rate} Hz; it must be a number from {MIN_RATE} to {MAX_RATE}.")
    if rate == sampling_rate or len(waveform) == 0:
        return waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError(
            f"The audio has {rate} Hz and the model hears {sampling_rate} Hz; resampling needs `pip install soxr`."
        ) from error
    return soxr.resample(waveform, rate, sampling_rate)


def _resolved(source: Any, kind: str) -> Any:
    """A path of a file that is there, the bytes of a file, or an object that is neither."""
    if isinstance(source, dict):  # `datasets` with decode=False
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | Path):
        text = str(source)
        if text.startswith(("http://", "https://")):
            source = _fetch(text, kind)
        elif text.startswith("data:") or len(text) > MAX_PATH_CHARACTERS:
            source = from_base64(text)
        elif _is_file(text):
            source = text
        elif len(text) > MIN_BASE64_CHARACTERS and "." not in text:
            source = from_base64(text)
        else:
            raise ValueError(f"{kind} file '{text[:200]}' does not exist; check the path.")
    if source is None:
        raise ValueError(f"{kind} has no source: neither a path, nor bytes, nor an array.")
    if (isinstance(source, bytes) and not source) or (isinstance(source, str) and Path(source).stat().st_size == 0):
        raise ValueError(f"{kind} {_name(source)} could not be read: it is empty (0 bytes).")
    return source


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # longer than the file system allows
        return False


def _name(source: Any) -> str:
    if isinstance(source, str):
        return f"'{source}'"
    return "in the given bytes" if isinstance(source, bytes) else "in the given data"


def _fetch(url: str, kind: str) -> bytes:
    """What an address holds."""
    data, deadline = bytearray(), time.monotonic() + MAX_FETCH_SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "uni_moe"})  # many servers refuse Python's own
        with urllib.request.urlopen(request, timeout=MAX_SILENT_SECONDS) as response:
            while chunk := response.read1(1 << 20):
                data += chunk
                if len(data) > MAX_FETCHED_BYTES:
                    raise ValueError(f"it is larger than {MAX_FETCHED_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise ValueError(f"it takes longer than {MAX_FETCH_SECONDS} s")
    except Exception as error:
        raise ValueError(f"{kind} from '{url}' could not be fetched ({error}); check the address.") from error
    return bytes(data)


def from_base64(text: str) -> bytes:
    """
    Args:
        text (`str`): Base64, with or without a `data:` prefix.

    Returns:
        `bytes` behind it.

    Raises:
        ValueError: the text is no base64.
    """
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise ValueError(f"A source of {len(text)} characters is no valid base64 ({error}).") from error


__all__ = ["array_to_image", "check_waveform", "from_base64", "load_frames", "load_image", "load_waveform"]
