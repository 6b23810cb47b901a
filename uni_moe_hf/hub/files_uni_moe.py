"""
Files that users name or send: fetched, decoded, opened. Video and sound in container files (MP4, Matroska, AVI, ...):
frames of certain moments, samples block by block.

PyAV reads; where it is missing, decord in a process of its own, whose death is survived. Files may lie about what they
hold, so only containers that hold their own data are opened, and size, number and time are bounded.
"""

import base64
import binascii
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from itertools import groupby
from tempfile import NamedTemporaryFile
from threading import Timer
from typing import Any, BinaryIO

import numpy as np


# Of one fetched or uploaded file, in bytes; of a fetched one in seconds, and for how long a server may say nothing.
MAX_FILE_BYTES, MAX_FETCH_SECONDS, MAX_SILENT_SECONDS = 256 << 20, 600, 30
# Text is base64, which is how servers hand media over, where it is longer than any path, or names no file and has
# neither a dot, which most paths have and base64 has not, nor the shortness of a name.
MAX_PATH_CHARACTERS, MIN_BASE64_CHARACTERS = 4096, 128

# FFmpeg's names of what may be opened. Others (playlists, `concat`, `image2`) open further files by name.
DEMUXERS = (
    "3g2,3gp,aac,ac3,aiff,amr,apng,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,ivf,j2k,m4a,m4v,matroska,mj2,mjpeg,"
    "mov,mp3,mp4,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,opus,rm,tta,voc,w64,wav,webm,wv,yuv4mpegpipe"
)
# How files of the commonest of these begin, for decord, which cannot be told what to open.
SIGNATURES = (b"\x1aE\xdf\xa3", b"OggS", b"FLV\x01", b"\x00\x00\x01\xba", b"0&\xb2u\x8ef\xcf\x11", b"GIF8", b"\x47")
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
# Boxes that hold boxes; tables, with the bytes of an entry (`stsz` and `trun` say it themselves); bounds of both.
MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf")
MP4_TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stsz": 4, b"stps": 4}
MP4_TABLES |= {b"sdtp": 0, b"elst": 12, b"trun": 4}
MAX_MP4_BOXES, MAX_MP4_TRACKS, MAX_MP4_DEPTH = 200_000, 64, 12

# Of one decoded frame, in bytes: 16 million pixels of ordinary video. A decoder may hold 17 of them.
MAX_FRAME_BYTES = 24 << 20
MAX_FRAME_PIXELS = str(MAX_FRAME_BYTES * 2 // 3)
# Of one file: frames, and seconds of computing that reading a clip may take.
MAX_FILE_FRAMES, MAX_DECODE_SECONDS = 2_000_000, 10
# Codecs of still pictures, which make room for whatever size each of them says that it has.
STILLS = ("png", "apng", "tiff", "webp", "jpeg2000", "libopenjpeg", "jpegls", "bmp", "exr", "dpx", "psd", "targa")
STILL_ENTRIES = (b"png ", b"MPNG", b"tiff", b"mjp2", b"gif ")  # the same as an MP4 names them
# Of a process that decord runs in, in bytes.
MAX_DECORD_BYTES = 4 << 30

DECORD = """
import io, json, sys
import numpy
import decord
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
except (ImportError, ValueError):
    pass
def send(array):
    data = io.BytesIO()
    numpy.save(data, array)
    sys.stdout.buffer.write(data.tell().to_bytes(8, "big") + data.getvalue())
    sys.stdout.buffer.flush()
video = decord.VideoReader(sys.argv[1], num_threads=1)
send(numpy.asarray(video.get_frame_timestamp(range(len(video))))[:, 0])
for index in json.loads(sys.stdin.readline()):
    send(video[index].asnumpy())
"""


class LimitError(ValueError):
    """The file is beyond a limit; another reader would not find it any smaller."""


class Deadline:
    """Seconds of computing of this thread that one clip may take."""

    def __init__(self, seconds: float = MAX_DECODE_SECONDS):
        self.seconds, self.start = seconds, time.thread_time()

    def check(self) -> None:
        """
        Raises:
            LimitError: they are spent.
        """
        if time.thread_time() - self.start > self.seconds:
            raise LimitError(f"decoding it takes longer than {self.seconds} s: cut it, or save it smaller")


def resolved(source: Any, kind: str, uploads_only: bool = False) -> Any:
    """
    Args:
        source: What a user gave for a clip.
        kind (`str`): "Picture", "Video" or "Audio", for messages.
        uploads_only (`bool`, *optional*, defaults to `False`): Whether the source is a stranger's, who may send data
            but name neither files nor addresses. The environment variable `UNI_MOE_UPLOADS_ONLY=1` says so everywhere.

    Returns:
        The path of a file that is there, the bytes of a file, or an object that is neither.

    Raises:
        ValueError: there is no such file, it is empty or too large, or naming it is not allowed.
    """
    if isinstance(source, dict):  # `datasets` with decode=False
        if unknown := sorted(set(source) - {"bytes", "path"}):
            raise ValueError(f"{kind} is an object with {unknown}, which are not read; known are 'bytes' and 'path'.")
        source = next((source[key] for key in ("bytes", "path") if source.get(key) is not None), None)
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        source = _named(source, kind, uploads_only or os.environ.get("UNI_MOE_UPLOADS_ONLY", "0") not in ("", "0"))
    elif isinstance(source, bytearray | memoryview):
        source = bytes(source)
    elif hasattr(source, "read") and not hasattr(source, "__array__"):
        source = _content(source, kind)
    if source is None:
        raise ValueError(f"{kind} has no source: neither a path, nor bytes, nor an array.")
    if (isinstance(source, bytes) and not source) or (isinstance(source, str) and os.stat(source).st_size == 0):
        raise ValueError(f"{kind} {name_of(source)} could not be read: it is empty (0 bytes).")
    return source


def _named(text: str, kind: str, uploads_only: bool) -> str | bytes:
    """What a text stands for: an address, base64, or a path."""
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    if text.startswith("data:") or len(text) > MAX_PATH_CHARACTERS:
        return from_base64(text)
    is_address = text.startswith(("http://", "https://"))
    is_name = text.startswith("file:") or "." in text or len(text) <= MIN_BASE64_CHARACTERS or _is_file(text)
    if uploads_only and (is_address or is_name):
        raise ValueError(f"{kind} '{shown}' is named and not sent; only data may be sent here, as a data: URL.")
    if is_address:
        return _fetch(text, kind)
    if text.startswith("file://"):
        text = urllib.request.url2pathname(urllib.parse.urlparse(text).path)
    if _is_file(text):
        return text
    if len(text) > MIN_BASE64_CHARACTERS and "." not in text:
        return from_base64(text)
    raise ValueError(f"{kind} file '{shown}' does not exist; check the path.")


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):  # longer than the file system allows; a null character
        return False


def _content(file: Any, kind: str) -> bytes:
    """All of an open file, which stays open, where it stood."""
    try:
        place = file.tell()
        file.seek(0)
    except (OSError, AttributeError):  # a pipe
        place = None
    data = file.read(MAX_FILE_BYTES + 1)
    if place is not None:
        file.seek(place)
    if not isinstance(data, bytes):
        raise ValueError(f"{kind} is a file that was opened as text; open it with mode 'rb'.")
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{kind} is an open file of more than {MAX_FILE_BYTES >> 20} MiB; give its path.")
    return data


def _fetch(url: str, kind: str) -> bytes:
    """What an address holds."""
    data, deadline = BytesIO(), time.monotonic() + MAX_FETCH_SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "uni_moe"})  # many servers refuse Python's own
        with urllib.request.urlopen(request, timeout=MAX_SILENT_SECONDS) as response:
            while chunk := response.read1(1 << 20):
                if data.tell() + len(chunk) > MAX_FILE_BYTES:
                    raise ValueError(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise ValueError(f"it takes longer than {MAX_FETCH_SECONDS} s")
                data.write(chunk)
    except Exception as error:
        raise ValueError(f"{kind} from '{url}' could not be fetched ({reason(error)}); check the address.") from error
    return data.getvalue()


def from_base64(text: Any) -> bytes:
    """
    Args:
        text (`str`): Base64, with or without a `data:` prefix.

    Returns:
        `bytes` behind it.

    Raises:
        ValueError: it is no text, no base64, or more than `MAX_FILE_BYTES`.
    """
    if not isinstance(text, str):
        raise ValueError(f"A base64 source is a {type(text).__name__}; it must be text.")
    if len(text) > MAX_FILE_BYTES * 4 // 3 + 1000:
        raise ValueError(f"A source of {len(text)} characters is more than {MAX_FILE_BYTES >> 20} MiB; give a path.")
    start = text.find(",", 0, 1000) + 1
    try:
        coded = text[start:] if start else text
        if not coded.isascii() or re.search(r"\s", coded):
            coded = "".join(coded.split())
        return base64.b64decode(coded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"A source of {len(text)} characters is no valid base64 ({error}).") from error


def name_of(source: Any) -> str:
    """What a message calls a source: its path, or that it was given as data."""
    if isinstance(source, str):
        return f"'{source}'"
    return "in the given bytes" if isinstance(source, bytes) else "in the given data"


def reason(error: BaseException) -> str:
    """
    Args:
        error (`BaseException`): Of a library.

    Returns:
        `str`: what it says, on one line, without addresses of objects.
    """
    if getattr(error, "errno", None) and type(error).__module__.startswith("av."):
        if error.errno == 22:  # how FFmpeg says that a demuxer is not among those allowed
            return "it is no container of sound or pictures that holds its own data"
        return str(error.strerror) if error.errno > 1000 else "it is damaged"  # small numbers are the system's
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, AssertionError) and not str(error):
        return "it is damaged"
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is of no known kind"
    if error.args and isinstance(error.args[0], bytes):
        error = ValueError(error.args[0].decode("utf-8", "replace"))
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-fA-F]+>", "it", str(error)) or type(error).__name__
    return " ".join(text.split())[:300].rstrip(".")


def cause_of(error: Exception) -> Exception:
    """The error that says most: the library wraps what a config's own checks say."""
    wrapped = type(error).__name__.startswith("StrictDataclass")
    return error.__cause__ if wrapped and isinstance(error.__cause__, Exception) else error


def sentence_of(error: Exception) -> str:
    """What an error says to a person, whole and on one line."""
    return " ".join(str(cause_of(error)).split()) or type(error).__name__


# --- Containers

# From the times at which frames begin, sorted, with the end of the last behind them, and their unit in seconds, to the
# numbers of the frames that are wanted, in order; a frame may be wanted repeatedly.
Choice = Callable[[np.ndarray, Fraction], list[int]]


def frames_at(source: str | bytes, choose: Choice) -> Iterator[np.ndarray]:
    """
    Args:
        source (`str` or `bytes`): Path or content of a video file.
        choose (`Choice`): Which frames are wanted.

    Yields:
        `np.ndarray` of shape `(height, width, 3)`, uint8, upright: each wanted frame.

    Raises:
        ImportError: neither PyAV nor decord is installed.
        Exception: (of any kind) the file cannot be read.
    """
    try:
        _pyav()
    except ImportError:
        if find_spec("decord") is None:
            raise ImportError("Reading video files needs PyAV or decord: `pip install av`.") from None
        return _decord_frames(source, choose)
    return _pyav_frames(source, choose)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("This file needs PyAV: `pip install av`.") from error
    return av


@contextmanager
def opened(source: str | bytes) -> Iterator[Any]:
    """
    A container that PyAV opened.

    Args:
        source (`str` or `bytes`): Path or content of a file.

    Raises:
        LimitError: its tables or frames are beyond a limit.
        Exception: (of PyAV) it is none of `DEMUXERS`, or damaged.
    """
    av = _pyav()
    with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        check_mp4_tables(file)
        file.seek(0)
        # From an open file, so that no name inside it can open another.
        bounds = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none"}
        with av.open(Reader(file), container_options=bounds) as container:
            yield container


class Reader:
    """
    An open file whose seeks may fail: PyAV would print what they raise.

    Args:
        file (`BinaryIO`): It.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.read, self.tell = file, file.read, file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        """The new position, or -1."""
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError):
            return -1


def audio_blocks(source: str | bytes) -> tuple[int, Iterator[np.ndarray]]:
    """
    Args:
        source (`str` or `bytes`): Path or content of a file with a sound track.

    Returns:
        `tuple(int, Iterator)`: sampling rate, and blocks of samples `(num_samples, channels)`, float32.

    Raises:
        ValueError: it has no sound track.
        Exception: (of PyAV) it cannot be read.
    """
    av = _pyav()

    def blocks() -> Iterator[np.ndarray]:
        with opened(source) as container:
            # To float only: the library's own mixing to mono is 3 dB louder than the mean of the channels.
            resampler = av.AudioResampler(format="fltp")
            for frame in container.decode(audio=0):
                yield from (each.to_ndarray().T for each in resampler.resample(frame))

    with opened(source) as container:
        if not container.streams.audio:
            raise ValueError("it has no sound track")
        if container.streams.audio[0].codec_context is None:
            raise ValueError("its sound is coded in an unknown way")
        return container.streams.audio[0].rate, blocks()


def _pyav_frames(source: str | bytes, choose: Choice) -> Iterator[np.ndarray]:
    deadline = Deadline()
    with opened(source) as container:
        times, keys, base, is_numbered = _packet_times(container, deadline)
    wanted = [(moment, len(list(group))) for moment, group in groupby(int(times[i]) for i in choose(times, base))]
    done = 0
    for places in (keys, []):  # where jumping does not lead where it should, all is decoded from the beginning
        with opened(source) as container, suppress(_LostError):
            left = [moment for moment, _ in wanted[done:]]
            for frame in _frames_shown_at(container, left, int(times[0]), places, is_numbered, deadline):
                yield from (frame for _ in range(wanted[done][1]))
                done += 1
            return


class _LostError(Exception):
    """Behind a jump the stream goes on too late."""


def _video_stream(container: Any) -> Any:
    """The first video stream, set to one thread: each thread keeps a frame more in memory."""
    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise ValueError("it has no pictures")
    if stream.codec_context is None or stream.codec_context.name in STILLS:
        raise ValueError("its pictures are coded in a way that is not read")
    _check_frame(stream.codec_context)
    stream.codec_context.options = {"max_pixels": MAX_FRAME_PIXELS}  # what the header said may be another number
    stream.thread_count = 1
    return stream


def _check_frame(frame: Any) -> None:
    """A frame, or what a header says of frames."""
    bits = frame.format.padded_bits_per_pixel if frame.format is not None else 12
    if frame.width * frame.height * bits > 8 * MAX_FRAME_BYTES:
        raise LimitError(
            f"its frames have {frame.width} x {frame.height} pixels of {bits} bits, more than the "
            f"{MAX_FRAME_BYTES >> 20} MiB that are read: scale it down"
        )


def _packet_times(container: Any, deadline: Deadline) -> tuple[np.ndarray, list[int], Fraction, bool]:
    """
    When frames begin, sorted, and behind them the end of the last; when key frames do; the unit of both; and whether
    the container does not say it, so that these are numbers of frames, without key frames.
    """
    stream = _video_stream(container)
    found, keys, duration = array("q"), array("q"), 0
    is_numbered = container.format.name == "avi"  # which has the times of storing alone
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        is_numbered = is_numbered or packet.pts is None
        found.append(len(found) if is_numbered else packet.pts)
        if packet.is_keyframe:
            keys.append(found[-1])
        duration = packet.duration or duration
        if len(found) > MAX_FILE_FRAMES:
            raise LimitError(f"it holds more than {MAX_FILE_FRAMES} frames: cut it")
        if len(found) % 1000 == 0:
            deadline.check()
    if not found:
        raise ValueError("it has 0 frames")
    if is_numbered:  # the container says nothing of when frames are shown: they follow each other
        rate = stream.average_rate or stream.guessed_rate or 25
        return np.arange(len(found) + 1), [], 1 / Fraction(rate), True
    times = np.unique(np.frombuffer(found, np.int64))
    last = (times[-1] - times[0]) // max(1, len(times) - 1) or duration
    return np.append(times, times[-1] + max(1, last)), sorted(keys), stream.time_base or Fraction(1, 25), False


def _frames_shown_at(
    container: Any, wanted: list[int], first: int, keys: list[int], is_numbered: bool, deadline: Deadline
) -> Iterator[np.ndarray]:
    """The frame that is shown at each of the wanted times, which rise; decoding goes on, or jumps to a key frame."""
    stream = _video_stream(container)
    decoding, shown, ahead = container.decode(stream), None, None  # `ahead`: decoded, and too late so far
    jumped, count = False, 0
    for moment in wanted:
        key = keys[bisect_right(keys, moment) - 1] if keys and keys[0] <= moment else first
        reached = ahead if ahead is not None else shown
        if key > first and (reached is None or key > reached.pts):
            try:
                container.seek(key, stream=stream)
            except Exception as error:  # raw streams cannot
                raise _LostError from error
            decoding, shown, ahead, jumped = container.decode(stream), None, None, True
        while shown is None or shown.pts < moment:
            deadline.check()
            is_new, frame, ahead = ahead is None, ahead or next(decoding, None), None
            if frame is None:
                break
            _check_frame(frame)
            if jumped and shown is None and (frame.pts is None or frame.pts > key):
                raise _LostError
            if is_numbered and is_new:
                frame.pts, count = count, count + 1
            elif frame.pts is None:
                frame.pts = first if shown is None else shown.pts + 1
            if frame.pts > moment and shown is not None:
                ahead = frame
                break
            shown = frame
        if shown is None:
            raise ValueError("it has 0 frames")
        picture, turns = shown.to_ndarray(format="rgb24"), round(shown.rotation / 90)
        yield np.ascontiguousarray(np.rot90(picture, turns)) if turns % 4 else picture


def _decord_frames(source: str | bytes, choose: Choice) -> Iterator[np.ndarray]:
    """Through decord, in a process of its own: damaged files kill it."""
    with NamedTemporaryFile(suffix=".video") if isinstance(source, bytes) else open(source, "rb") as file:
        if isinstance(source, bytes):
            file.write(source)
            file.flush()
        file.seek(0)
        begin = file.read(12)
        if not (begin.startswith(SIGNATURES) or begin[4:8] in MP4_BOXES or begin[8:12] == b"AVI "):
            raise ValueError("it is no kind of video that decord may open; `pip install av` reads more")
        check_mp4_tables(file)
        child = subprocess.Popen(
            [sys.executable, "-c", DECORD, file.name, str(MAX_DECORD_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

        def received(pipe: BinaryIO) -> np.ndarray:
            return np.load(BytesIO(pipe.read(int.from_bytes(pipe.read(8), "big"))))

        timer = Timer(2 * MAX_DECODE_SECONDS, child.kill)
        timer.start()
        try:
            seconds = received(child.stdout)
            times = np.unique((seconds * 1_000_000).round().astype(np.int64))
            last = (times[-1] - times[0]) // max(1, len(times) - 1)
            wanted = choose(np.append(times, times[-1] + max(1, last)), Fraction(1, 1_000_000))
            child.stdin.write(json.dumps([index for index, _ in groupby(wanted)]).encode() + b"\n")
            child.stdin.flush()
            for _, group in groupby(wanted):
                frame = received(child.stdout)
                if frame.ndim != 3 or frame.shape[2] != 3:  # what decord makes of widths that FFmpeg pads
                    raise ValueError("decord cannot read frames of this width; `pip install av` reads more")
                yield from (frame for _ in group)
        except (EOFError, OSError, IndexError) as error:
            raise ValueError("decord cannot read it") from error
        finally:
            timer.cancel()
            child.kill()
            child.communicate()


def check_mp4_tables(file: BinaryIO) -> None:
    """
    An MP4 says how long its tables are, and readers make room for as much.

    Args:
        file (`BinaryIO`): Any file; what is no MP4 passes.

    Raises:
        LimitError: a table promises more entries than it holds, or boxes are nested or many beyond reason.
    """
    size, left, tracks = file.seek(0, 2), MAX_MP4_BOXES, MAX_MP4_TRACKS
    file.seek(0)
    if file.read(8)[4:] not in MP4_BOXES:
        return
    open_boxes = [(0, size, 0)]  # where each begins and ends, and how deep it lies
    while open_boxes:
        start, end, depth = open_boxes.pop()
        while start + 8 <= end:
            file.seek(start)
            header = file.read(16)
            length, kind, begin = int.from_bytes(header[:4], "big"), header[4:8], start + 8
            if length == 1 and len(header) == 16:
                length, begin = int.from_bytes(header[8:], "big"), start + 16
            stop = min(end, start + length) if length else end
            if stop < begin or start == stop:
                break
            left, tracks = left - 1, tracks - (kind == b"trak")
            if left < 0 or tracks < 0 or depth > MAX_MP4_DEPTH:
                raise LimitError("its boxes are nested too deep, or too many")
            if kind == b"stsd":
                file.seek(begin + 12)
                if file.read(4) in STILL_ENTRIES:  # which are decoded to be described
                    raise LimitError("its pictures are coded in a way that is not read")
            if kind == b"cmov":
                raise LimitError("its tables are compressed, so what they hold is unknown")
            if kind in MP4_PARENTS:
                open_boxes.append((begin, stop, depth + 1))
            elif kind in MP4_TABLES:
                file.seek(begin)
                _check_table(kind, file.read(20), stop - begin, size)
            start = stop


def _check_table(kind: bytes, head: bytes, room: int, file_size: int) -> None:
    """Whether as many entries as are promised fit into a box of `room` bytes."""
    if len(head) < 8:
        return
    words = [int.from_bytes(head[at : at + 4], "big") for at in range(0, len(head) - 3, 4)]
    count, entry = words[1], MP4_TABLES[kind]
    if kind == b"stsz" and len(words) > 2:
        count = words[2]
        promised, held = (count * words[1], file_size) if words[1] else (count * 4, room)
    elif kind == b"trun":
        entry = 4 * sum(bool(words[0] & flag) for flag in (0x100, 0x200, 0x400, 0x800))
        promised, held = (count * entry, room) if entry else (count, MAX_FILE_FRAMES)
    else:
        promised, held = count * entry, room
    if promised > held:
        raise LimitError(f"its table '{kind.decode()}' promises {count} entries, more than there are")


__all__ = [
    "Choice",
    "Deadline",
    "LimitError",
    "audio_blocks",
    "cause_of",
    "check_mp4_tables",
    "frames_at",
    "from_base64",
    "name_of",
    "reason",
    "resolved",
]
