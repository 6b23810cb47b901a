"""Films that lie: MP4, Matroska, AVI and bare streams by hand and by FFmpeg's encoders, and playlists."""

import gzip
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import BytesIO

import av
import numpy as np
from av.codec.context import Flags

from .pictures import LARGE, animated_webp, flat_jpeg, flat_png, followed_by, gif, picture, saved
from .shared import (
    MEGABYTE,
    Items,
    Size,
    all_of,
    attempt,
    box,
    crc32,
    damaged,
    lists,
    lying,
    named,
    numbers,
    packed,
    patched,
    playlists,
    riff,
    riff_chunk,
    wave,
    with_box,
    zlib_of,
)
from .sounds import add_tone, flac, ogg, track


def film(
    codec: str = "libx264",
    kind: str = "mp4",
    frames: int = 8,
    size: Size = (64, 48),
    pix_fmt: str = "yuv420p",
    *,
    rate: int = 10,
    muxer: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    sound: str = "",
    plain: bool = False,
) -> bytes:
    """A film by FFmpeg: noise over a gradient that moves, or `plain` grey; `sound` is the encoder of another track."""
    file = BytesIO()
    with av.open(file, "w", format=kind, options={"fflags": "+bitexact", **(muxer or {})}) as container:
        # Otherwise x264, looking ahead in pictures so small, reads memory to which nothing was written.
        steady = {"x264-params": "scenecut=0:b-adapt=0:mbtree=0"} if codec.startswith("libx264") else {}
        stream = container.add_stream(codec, rate=rate, options=steady | (options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.flags |= Flags.bitexact
        stream.codec_context.thread_count = 1
        fill = add_tone(container, sound) if sound else None
        for index in range(frames):
            if plain:
                frame = av.VideoFrame(*size, pix_fmt)
                for plane in frame.planes:
                    plane.update(b"\x80" * plane.buffer_size)
            else:
                frame = av.VideoFrame.from_ndarray(picture(index % 50, *size), format="rgb24")
            frame.pts = index if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if fill:
            fill(0.8)
    return file.getvalue()


def movie(
    frames: list[bytes],
    code: bytes,
    size: Size,
    config: bytes = b"",
    order: Sequence[int] = (),
    name: bytes = b"isom",
) -> bytes:
    """An MP4 of frames, one after another or in an order in which the same may come often but is stored once."""
    order = order or range(len(frames))
    head = box(b"ftyp", name, numbers(512), name)
    offsets = np.cumsum([len(head) + 8, *map(len, frames)])
    described = bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HHIIIH", *size, 0x480000, 0x480000, 0, 1)
    described += bytes(32) + struct.pack(">Hh", 24, -1) + config
    matrix = numbers(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    table = box(
        b"stbl",
        box(b"stsd", numbers(0, 1), box(code, described)),
        box(b"stts", numbers(0, 1, len(order), 1)),
        box(b"stsc", numbers(0, 1, 1, 1, 1)),
        box(b"stsz", numbers(0, 0, len(order), *(len(frames[index]) for index in order))),
        box(b"stco", numbers(0, len(order), *(int(offsets[index]) for index in order))),
    )
    source = box(b"dinf", box(b"dref", numbers(0, 1), box(b"url ", numbers(1))))
    media = box(
        b"mdia",
        box(b"mdhd", numbers(0, 0, 0, 10, len(order), 0x55C40000)),
        box(b"hdlr", numbers(0, 0), b"vide", bytes(13)),
        box(b"minf", box(b"vmhd", numbers(1, 0, 0)), source, table),
    )
    shown = numbers(3, 0, 0, 1, 0, len(order), 0, 0, 0, 0) + matrix + numbers(size[0] << 16, size[1] << 16)
    whole = numbers(0, 0, 0, 10, len(order), 0x10000, 0x1000000, 0, 0) + matrix + bytes(24) + numbers(2)
    data = box(b"mdat", *frames)
    return head + data + box(b"moov", box(b"mvhd", whole), box(b"trak", box(b"tkhd", shown), media))


def golomb(*values: int) -> str:
    return "".join("0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}" for value in values)


def unit(kind: int, bits: str) -> bytes:
    """A unit of H.264."""
    return bytes([kind]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", packed(bits + "1"))


def h264_parameters(width: int, height: int, references: int = 1, shown: Size | None = None) -> list[bytes]:
    """The sets of parameters of a picture, in whole blocks of 16 pixels, of which a corner may be shown only."""
    sequence = f"{77:08b}{0:08b}{62:08b}" + golomb(0, 12, 2, references) + "0"
    sequence += golomb(width // 16 - 1, height // 16 - 1) + "11"
    sequence += f"1{golomb(0, (width - shown[0]) // 2, 0, (height - shown[1]) // 2)}0" if shown else "00"
    shot = golomb(0, 0) + "00" + golomb(0, references - 1, 0) + "000" + golomb(0, 0, 0) + "100"
    return [unit(0x67, sequence), unit(0x68, shot)]


def h264_config(sequence: bytes, shot: bytes) -> bytes:
    """Two sets of parameters as MP4 and Matroska have them."""
    heading = bytes([1, *sequence[1:4], 0xFF, 0xE1]) + struct.pack(">H", len(sequence))
    return heading + sequence + struct.pack(">BH", 1, len(shot)) + shot


def h264_frames(width: int, height: int, count: int) -> Iterator[bytes]:
    """A grey frame, eight bits a block of 16 pixels, and frames that say that nothing has changed."""
    blocks = width * height // 256
    yield unit(0x65, golomb(0, 7, 0) + f"{0:016b}" + golomb(0) + "00" + golomb(0, 1) + "00100111" * blocks)
    for number in range(1, count):
        yield unit(0x41, golomb(0, 5, 0) + f"{number % 65_536:016b}" + "000" + golomb(0, 1, blocks))


def sized(units: Iterable[bytes]) -> bytes:
    return b"".join(struct.pack(">I", len(data)) + data for data in units)


def h264_movie(
    width: int, height: int, count: int, references: int = 1, order: Sequence[int] = (), **sizes: Size
) -> bytes:
    """A film of which the codec may show a part, or of which MP4 may declare another size."""
    shown = sizes.get("shown")
    config = box(b"avcC", h264_config(*h264_parameters(width, height, references, shown)))
    samples = [sized([data]) for data in h264_frames(width, height, count)]
    return movie(samples, b"avc1", sizes.get("declared") or shown or (width, height), config, order)


def large_films() -> Items:
    yield from named("h264-{}.mp4", {
        "flat-4096": h264_movie(4096, 2304, 20), "flat-7680": h264_movie(7680, 4320, 20),
        "flat-7680-of-3000-frames": h264_movie(7680, 4320, 3000), "flat-16000": h264_movie(16_000, 8000, 5),
        "flat-16000-of-1000-frames": h264_movie(16_000, 8000, 1000),
        "flat-16000-square": h264_movie(16_000, 16_000, 2), "16-references-4096": h264_movie(4096, 2304, 40, 16),
        "16-references-7680": h264_movie(7680, 4320, 40, 16), "16-references-16000": h264_movie(16_000, 8000, 20, 16),
        "16000-of-which-64-are-shown": h264_movie(16_000, 8000, 5, shown=(64, 64)),
        "7680-said-to-be-64": h264_movie(7680, 4320, 20, declared=(64, 64)),
        "64-said-to-be-16000": h264_movie(64, 64, 20, declared=(16_000, 8000)),
        "64-said-to-be-65535": h264_movie(64, 64, 20, declared=(65_535, 65_535)), "column": h264_movie(16, 16_000, 5),
        "row": h264_movie(16_000, 16, 5), "of-20000-frames-of-16": h264_movie(16, 16, 20_000),
        "of-20000-frames-of-64": h264_movie(64, 64, 20_000),
        "of-100000-frames-stored-once": h264_movie(64, 64, 1, order=[0] * 100_000),
        "of-3000-large-frames-stored-once": h264_movie(7680, 4320, 1, order=[0] * 3000),
    })  # fmt: skip
    mark = b"\0\0\0\1"
    parameters, frames = h264_parameters(64, 64), list(h264_frames(64, 64, 5))
    config, small = box(b"avcC", h264_config(*parameters)), [sized([data]) for data in frames]
    for side, size in {7680: (7680, 4320), 16_000: (16_000, 8000)}.items():
        others, grown = h264_parameters(*size), list(h264_frames(*size, 3))
        samples = [*small, sized([*others, grown[0]])]
        yield f"h264-growing-to-{side}.mp4", movie(samples, b"avc1", (64, 64), config, [*range(5), 5, 0, 5])
        yield f"h264-bare-growing-to-{side}.h264", mark.join([b"", *parameters, *frames, *others, *grown])
    yield "h264-parameters-only.h264", mark.join([b"", *h264_parameters(16_000, 8000) * 2000])
    large, little = flat_jpeg(16_000, 8000, halved=True), flat_jpeg(64, 64, halved=True)
    yield "mjpeg-flat-16000.mp4", movie([large], b"jpeg", (16_000, 8000), order=[0] * 5)
    yield "mjpeg-bare-growing-to-16000.mjpeg", little * 5 + large + little
    scans = flat_jpeg(2000, 2000, 1, bands=[(1, 63, 0, 0)] * 10_000)
    rgb, rgba = flat_png("rgb", 16_000, 8000), flat_png("16-bit-rgba", 10_000, 8000)
    quicktime = partial(movie, name=b"qt  ")
    yield from named("{}.mov", {
        "mjpeg-flat-16000-of-10000-frames": quicktime([large], b"jpeg", (16_000, 8000), order=[0] * 10_000),
        "mjpeg-growing-to-16000": quicktime([little, large], b"jpeg", (64, 64), order=[0, 0, 0, 1, 0, 1]),
        "mjpeg-of-10000-scans": quicktime([scans], b"jpeg", (2000, 2000), order=[0] * 10),
        "png-flat-16000-in-mov": quicktime([rgb], b"png ", (16_000, 8000), order=[0] * 20),
        "png-rgba-16-bit-in-mov": quicktime([rgba], b"png ", (64, 64), order=[0] * 20),
        "raw-said-to-be-16000": quicktime([bytes(3000)] * 5, b"raw ", (16_000, 8000)),
        "gif-in-mov": quicktime([gif((20_000, 10_000), (0, 0, 4, 4))] * 5, b"gif ", (64, 64)),
    })  # fmt: skip
    yield from named("gif-film-{}.gif", {
        "canvas-of-65535": gif((65_535, 65_535), *[(0, 0, 4, 4)] * 5),
        "canvas-of-16000": gif((16_000, 16_000), *[(0, 0, 4, 4)] * 5),
        "of-16000": gif((16_000, 8000), *[(0, 0, 16_000, 8000)] * 8),
        "of-3000-frames": gif((64, 48), *[(index % 40, 3, 4, 4) for index in range(3000)]),
    })  # fmt: skip
    yield "webp-film-canvas-of-13000.webp", animated_webp((13_000, 13_000), *[(0, 0, 16, 16)] * 5)
    quick = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
    for name, codec, kind, size, pix_fmt, options in (
        ("h264-by-x264-4096.mp4", "libx264", "mp4", (4096, 2304), "yuv420p", {"preset": "ultrafast"}),
        ("mpeg4-7680.avi", "mpeg4", "avi", (7680, 4320), "yuv420p", {}),
        ("mpeg2-4080.ts", "mpeg2video", "mpegts", (4080, 2304), "yuv420p", {}),
        ("vp8-2048.webm", "libvpx", "webm", (2048, 1152), "yuv420p", quick),
        ("vp9-1920.webm", "libvpx-vp9", "webm", (1920, 1080), "yuv420p", quick),
        ("ffv1-2048.mkv", "ffv1", "matroska", (2048, 1152), "yuv420p", {}),
        ("qtrle-4096.mov", "qtrle", "mov", (4096, 2304), "rgb24", {}),
        ("zlib-4096.avi", "zlib", "avi", (4096, 2304), "bgr24", {}),
    ):
        yield name, partial(film, codec, kind, 2, size, pix_fmt, options=options, plain=True)


def within(offset: int, *new: int | bytes) -> Callable[[bytes], bytes]:
    """What puts other bytes or numbers, as many, at an offset of a box."""
    data = new[0] if isinstance(new[0], bytes) else numbers(*new)
    return lambda old: old[:offset] + data + old[offset + len(data) :]


def with_movie_first(data: bytes) -> bytes:
    """An MP4 file with its tables before what they are about."""
    rest = with_box(data, b"moov", None)
    moved = data[data.index(b"moov") - 4 :]

    def shifted(old: bytes) -> bytes:
        return old[:8] + numbers(*(offset + len(moved) for (offset,) in struct.iter_unpack(">I", old[8:])))

    start = struct.unpack_from(">I", data)[0]
    return rest[:start] + with_box(moved, b"stco", shifted) + rest[start:]


def table_films(silent: bytes, count: int) -> Items:
    """An MP4 of so many frames one of whose boxes lies, or is missing."""
    falling = [value for index in range(count) for value in (1, 2**32 - 2000 * index - 1)]
    for name, new in {
        "stts-2-to-the-31-entries": (0, 2**31, count, 1024), "stts-2-to-the-32-entries": (0, 2**32 - 1, count, 1024),
        "stts-10-million-entries": (0, 10**7, count, 1024), "stts-one-entry-of-2-to-the-31": (0, 1, 2**31 - 1, 1024),
        "stts-one-entry-of-2-to-the-32": (0, 1, 2**32 - 1, 1),
        "stts-differences-of-2-to-the-32": (0, 1, count, 2**32 - 1), "stts-differences-of-zero": (0, 1, count, 0),
        "stts-200000-entries-of-nothing": (0, 200_000, *[0] * 400_000), "stts-empty": (0, 0), "stts-missing": None,
        "stsz-100-million-of-one-byte": (0, 1, 10**8), "stsz-100-million-of-1000-bytes": (0, 1000, 10**8),
        "stsz-2-to-the-31-of-one-byte": (0, 1, 2**31), "stsz-2-to-the-32-in-a-table": (0, 0, 2**32 - 1, *[50] * count),
        "stsz-100-million-in-a-table": (0, 0, 10**8, *[50] * count),
        "stsz-samples-of-2-to-the-31-bytes": (0, 0, count, *[2**31 - 1] * count),
        "stsz-samples-of-a-gigabyte": (0, 10**9, count), "stsz-samples-of-nothing": (0, 0, count, *[0] * count),
        "stsz-missing": None, "stsc-first-chunk-0": (0, 1, 0, count, 1),
        "stsc-first-chunk-2-to-the-32": (0, 2, 1, 1, 1, 2**32 - 1, 1, 1),
        "stsc-falling": (0, 3, 9, 1, 1, 5, 1, 1, 1, 1, 1), "stsc-100-million-samples-a-chunk": (0, 1, 1, 10**8, 1),
        "stsc-no-samples-a-chunk": (0, 1, 1, 0, 1), "stsc-description-99": (0, 1, 1, count, 99),
        "stsc-2-to-the-32-entries": (0, 2**32 - 1, 1, count, 1), "stco-2-to-the-32-entries": (0, 2**32 - 1, 48),
        "stco-100-million-entries": (0, 10**8, 48), "stco-beyond-the-file": (0, 1, 2**32 - 1),
        "stco-at-nothing": (0, 1, 0), "stco-200000-entries": (0, 200_000, *[48] * 200_000),
        "ctts-of-2-to-the-31-entries": (0, 2**31, 1, 1024), "ctts-one-entry-of-2-to-the-32": (0, 1, 2**32 - 1, 1024),
        "ctts-offsets-of-2-to-the-31": (0, 1, count, 2**31), "ctts-offsets-falling": (1 << 24, count, *falling),
        "stss-empty": (0, 0), "stss-2-to-the-32-entries": (0, 2**32 - 1, 1),
        "stss-beyond-the-film": (0, 3, 500, 2**31, 2**32 - 1), "mdhd-timescale-0": within(12, 0),
        "mdhd-timescale-1": within(12, 1), "mdhd-timescale-2-to-the-32": within(12, 2**32 - 1),
        "mdhd-duration-2-to-the-32": within(16, 2**32 - 1),
        "mdhd-of-64-bits-and-2-to-the-63": (1 << 24, 0, 0, 0, 0, 1, 2**31 - 1, 2**32 - 1, 0),
        "mvhd-timescale-0": within(12, 0), "mvhd-duration-2-to-the-32": within(16, 2**32 - 1),
        "tkhd-of-65535": within(76, 2**32 - 1, 2**32 - 1), "tkhd-of-nothing": within(76, 0, 0),
        "tkhd turned-by-90-degrees": within(40, 0, 2**16, 0, 2**32 - 2**16, 0, 0, 0, 0, 2**30),
        "tkhd turned-by-45-degrees": within(40, 46_341, 46_341, 0, 2**32 - 46_341, 46_341),
        "tkhd turned-by-a-matrix-of-zeros": within(40, bytes(36)),
        "tkhd turned-by-a-matrix-of-ones": within(40, b"\xff" * 36),
        "elst-2-to-the-32-entries": (0, 2**32 - 1, 1000, 0, 2**16),
        "elst-of-50000-edits": (0, 50_000, *[100, 0, 2**16] * 50_000),
        "elst-from-2-to-the-31": (0, 1, 1000, 2**31 - 1, 2**16),
        "elst-empty-for-ever": (0, 2, 2**32 - 1, 2**32 - 1, 2**16, 1000, 0, 2**16), "elst-rate-0": (0, 1, 1000, 0, 0),
        "dref-to-passwd": numbers(0, 1) + box(b"url ", numbers(0), b"file:///etc/passwd\0"),
        "dref-2-to-the-32-entries": (0, 2**32 - 1), "stsd-2-to-the-32-entries": within(4, 2**32 - 1),
        "stsd-empty": (0, 0), "stsd-entry-of-4-gigabytes": within(8, 2**32 - 1),
        "stsd-says-16000": within(40, struct.pack(">HH", 16_000, 8000)), "stsd-unknown-codec": within(12, b"zzzz"),
        "stsd-says-png": within(12, b"png "), "stsd-without-avcc": lambda old: patched(old, b"avcC", 0, b"free"),
        "stsd avcc-cut": lambda old: old[: old.index(b"avcC") + 9],
        "stsd avcc-of-31-parameters": lambda old: patched(old, b"avcC", 9, b"\xff"),
        "stsd avcc-parameters-of-65535-bytes": lambda old: patched(old, b"avcC", 10, b"\xff\xff"),
        "stsd avcc-lengths-of-one-byte": lambda old: patched(old, b"avcC", 8, b"\xfc"), "hdlr-missing": None,
        "hdlr-says-sound": within(8, b"soun"), "hdlr-says-text": within(8, b"text"),
        "moov two-movies": lambda old: old + box(b"moov", old), "moov without-movie": None, "mdat without-data": None,
        "mdat data-of-noise": lambda old: np.random.default_rng(0).bytes(len(old)),
        "mdat data-of-zeros": lambda old: bytes(len(old)),
    }.items():  # fmt: skip
        if isinstance(new, tuple):
            new = numbers(*new)
        made = with_box(silent, name[:4].encode(), new)
        if made == silent:
            raise ValueError(f"{name} changes nothing")
        yield f"mp4-{name.split()[-1]}.mp4", made


def mp4_films() -> Items:
    count = 12
    start = box(b"ftyp", b"isom", numbers(512), b"isom")
    if silent := attempt(film, frames=count):
        yield "h264-in-mp4.mp4", silent
        yield from table_films(silent, count)
        second = within(12, 1, 2**32 - 1)
        huge = with_box(with_box(silent, b"stsz", numbers(0, 1, 5 * 10**7)), b"stsc", numbers(0, 1, 1, 5 * 10**7, 1))
        track_box = silent[silent.index(b"trak") - 4 : silent.index(b"udta") - 4]
        tag = box(b"meta", numbers(0), box(b"ilst", numbers(10**9) + b"covr" + bytes(500)))

        def offsets(*values: int) -> bytes:
            return with_box(silent, b"stco", numbers(0, *values)).replace(b"stco", b"co64")

        yield from named("mp4-{}.mp4", {
            "both-durations-2-to-the-32": with_box(with_box(silent, b"mdhd", second), b"mvhd", second),
            "co64-of-2-to-the-63": offsets(1, 2**31, 0), "co64-of-2-to-the-32-entries": offsets(2**32 - 1, 0, 48),
            "50-million-samples-in-all-tables": with_box(huge, b"stts", numbers(0, 1, 5 * 10**7, 1)),
            "of-900-tracks": with_box(silent, b"moov", lambda old: old + track_box * 900),
            "of-2000-tracks": with_box(silent, b"moov", lambda old: old + track_box * 2000),
            "box-of-2-to-the-63-bytes": silent.replace(silent[:12], numbers(1) + b"ftyp\x7f\xff\xff\xff", 1),
            "of-100000-brands": silent + box(b"ftyp", b"isom" + bytes(4) + b"isom" * 100_000),
            "movie-of-4-gigabytes": patched(silent, b"moov", -4, numbers(2**32 - 1)),
            "movie-before-the-data": with_movie_first(silent), "tag-of-a-gigabyte": with_box(silent, b"udta", tag),
        })  # fmt: skip
        for size in (0, 1, 7, 2**31, 2**32 - 1):
            yield f"mp4-box-of-{size}-bytes.mp4", patched(silent, b"mdat", -4, numbers(size))
        compressed = zlib_of(MEGABYTE, 1000)
        for size in (10**9, 2**31, 2**32 - 1):
            inner = box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", numbers(size), compressed))
            yield f"mp4-movie-compressed-from-{size}-bytes.mov", with_box(silent, b"moov", inner)
        yield from damaged("mp4-movie-first", "mp4", with_movie_first(silent), (30, 70, 95), 2)
        yield from damaged("mp4", "mp4", silent, (5, 30, 60, 90, 99), 4)
    index_box = box(b"sidx", numbers(0, 1, 1000, 0, 0, 65_535), numbers(2**31, 1, 0) * 5000)
    yield from named("mp4-{}.mp4", {
        "of-one-frame": partial(film, frames=1), "of-300-frames": partial(film, frames=300, size=(32, 32)),
        "without-frames": movie([], b"avc1", (64, 64)), "of-48-by-32": partial(film, size=(48, 32)),
        "of-2-by-2": partial(film, size=(2, 2)), "with-only-sound": partial(track, "aac", "mp4"),
        "at-odd-times": partial(film, times=[0, 1, 2, 500, 501, 10**5, 10**5 + 1, 10**7], options={"bf": "0"}),
        "at-one-frame-a-day": partial(film, rate=1, times=range(0, 8 * 86_400, 86_400), options={"bf": "0"}),
        "at-100000-frames-a-second": partial(film, rate=100_000),
        "movie-10000-deep": start + b"".join(numbers(8 * depth) + b"moov" for depth in range(10_000, 0, -1)),
        "of-200000-empty-boxes": start + box(b"free") * 200_000,
        "index-of-indices": box(b"ftyp", b"iso5", numbers(512), b"iso5") + index_box,
    })  # fmt: skip
    muxer = {"movflags": "frag_keyframe+empty_moov"}
    if parts := attempt(film, frames=count, muxer=muxer, options={"g": "3"}):
        yield "mp4-in-fragments.mp4", parts
        for name, (kind, new) in {
            "of-100-million-samples": (b"trun", numbers(1, 10**8, 100)),
            "of-2-to-the-32-samples": (b"trun", numbers(1, 2**32 - 1, 100)),
            "of-100-million-samples-in-a-table": (b"trun", numbers(0x301, 10**8, 100)),
            "data-outside": (b"trun", numbers(1, 5, 2**31 - 1)), "track-unknown": (b"tfhd", within(4, 99)),
            "track-unannounced": (b"mvex", b""), "base-at-2-to-the-63": (b"tfhd", numbers(1, 1, 2**31 - 1, 2**32 - 1)),
            "time-2-to-the-63": (b"tfdt", numbers(1 << 24, 2**31 - 1, 2**32 - 1)),
        }.items():  # fmt: skip
            yield f"mp4-fragments-{name}.mp4", with_box(parts, kind, new)
        yield from damaged("mp4-in-fragments", "mp4", parts, (20, 50, 80))
    if made := attempt(film, sound="aac"):
        yield "h264-and-aac-in-mp4.mp4", made
        yield from damaged("mp4-with-sound", "mp4", made, (50,), 4)


def element(name: str, *parts: bytes) -> bytes:
    """An element of Matroska, its name in hexadecimal digits, its size in eight bytes."""
    data = b"".join(parts)
    return bytes.fromhex(name) + (1 << 56 | len(data)).to_bytes(8, "big") + data


def matroska(
    frames: list[bytes], codec: bytes, size: Size, private: bytes = b"", more: bytes = b"", lacing: int = 0
) -> bytes:
    """A Matroska film, one frame a second."""
    header = element("1a45dfa3", element("4282", b"matroska"), element("4287", b"\4"), element("4285", b"\2"))
    shown = element("e0", element("b0", struct.pack(">H", size[0])), element("ba", struct.pack(">H", size[1])))
    entry = element("d7", b"\1") + element("73c5", b"\1") + element("83", b"\1") + element("86", codec) + shown + more
    if private:
        entry += element("63a2", private)
    clusters = b""
    for start in range(0, len(frames), 32):
        clock = element("e7", struct.pack(">I", 1000 * start))
        blocks = (
            element("a3", b"\x81" + struct.pack(">HB", index * 1000, 0x80 | lacing) + data)
            for index, data in enumerate(frames[start : start + 32])
        )
        clusters += element("1f43b675", clock, *blocks)
    info = element("1549a966", element("2ad7b1", struct.pack(">I", 10**6)), element("4489", struct.pack(">d", 9000)))
    return header + element("18538067", info, element("1654ae6b", element("ae", entry)), clusters)


def matroska_films() -> Items:
    header = element("1a45dfa3", element("4282", b"matroska"))
    segment, cluster = bytes.fromhex("18538067"), bytes.fromhex("1f43b675")
    frames_in_zlib = element("6d80", element("6240", element("5034", element("4254", b"\0"))))
    private_in_zlib = element("6d80", element("6240", element("5032", b"\2"), element("5034", b"")))
    bomb = zlib_of(MEGABYTE, 1000)
    raw = [bytes(64 * 48 * 3 // 2)] * 5
    codec, fields = b"V_MS/VFW/FOURCC", struct.pack("<IiiHH4sIiiII", 40, 64, 48, 1, 24, b"I420", 0, 0, 0, 0, 0)
    coded = (codec, (64, 48), fields)
    png, jpeg = flat_png("rgb", 16_000, 8000), [flat_jpeg(64, 48), flat_jpeg(64, 48), flat_jpeg(12_000, 8000)]
    config = h264_config(*h264_parameters(16_000, 8000))
    frames = [sized([data]) for data in h264_frames(16_000, 8000, 5)]
    dots = fields.replace(struct.pack("<ii", 64, 48), struct.pack("<ii", 2, 2))
    deep = (segment + (1 << 56 | 12 * depth).to_bytes(8, "big") for depth in range(10_000, 0, -1))
    unknown = b"\1" + b"\xff" * 7
    yield from named("mkv-{}.mkv", {
        "of-raw-frames": matroska(raw, *coded), "frames-of-a-gigabyte": matroska([bomb], *coded, frames_in_zlib),
        "private-data-of-a-gigabyte": matroska(raw, codec, (64, 48), bomb, private_in_zlib),
        "laced-by-255": matroska([b"\xff" * 500] * 5, *coded, lacing=6),
        "laced-in-equal-parts": matroska([b"\xff" + bytes(500)] * 5, *coded, lacing=4),
        "of-a-png-of-16000": matroska([png] * 2, codec, (64, 48), fields.replace(b"I420", b"MPNG")),
        "of-mjpeg-growing": matroska(jpeg, b"V_MJPEG", (64, 48)),
        "of-h264-said-to-be-64": matroska(frames, b"V_MPEG4/ISO/AVC", (64, 48), config),
        "of-10000-frames": matroska([bytes(6)] * 10_000, codec, (2, 2), dots),
        "said-to-be-65535": matroska(raw, codec, (65_535, 65_535), fields), "10000-deep": header + b"".join(deep),
        "of-unknown-sizes": header + (segment + unknown + cluster + unknown) * 1000,
    })  # fmt: skip
    made = attempt(film, "libx264", "matroska", sound="aac")
    yield from lying("mkv-{}.mkv", made, {
        "said-to-last-a-billion-seconds": (b"\x44\x89\x88", 3, struct.pack(">d", 1e12)),
        "said-to-last-minus-one-seconds": (b"\x44\x89\x88", 3, struct.pack(">d", -1e3)),
        "said-to-last-infinite-seconds": (b"\x44\x89\x88", 3, struct.pack(">d", np.inf)),
        "said-to-last-nan-seconds": (b"\x44\x89\x88", 3, struct.pack(">d", np.nan)),
        "timestamps-in-hours": (b"\x2a\xd7\xb1\x83", 4, b"\xff\xff\xff"),
        "timestamps-in-nothing": (b"\x2a\xd7\xb1\x83", 4, bytes(3)), "width-of-nothing": (b"\xb0\x81\x40", 2, b"\0"),
        "cluster-of-2-to-the-56-bytes": (cluster, 4, b"\1" + b"\xff" * 6 + b"\xfe"),
    })  # fmt: skip
    yield from damaged("mkv", "mkv", made)
    yield "h264-in-mkv.mkv", lambda: made
    yield from damaged("webm", "webm", attempt(film, "libvpx", "webm"), (20, 60))


def ivf(codec: bytes, frames: Iterable[bytes], size: Size = (64, 48), count: int = 0) -> bytes:
    made = b"DKIF" + struct.pack("<HH4sHHIIII", 0, 32, codec, *size, 10, 1, count, 0)
    return made + b"".join(struct.pack("<IQ", len(data), index) + data for index, data in enumerate(frames))


def packets(data: bytes) -> list[bytes]:
    return [bytes(packet) for packet in av.open(BytesIO(data)).demux() if packet.size] if data else []


def vp9_resized(frame: bytes, side: int) -> bytes:
    """A key frame of VP9 that says that it is of another size."""
    shift = 8 * len(frame) - 36 - 32  # The size, twice sixteen bits, follows 36 bits.
    value = int.from_bytes(frame, "big") & ~((2**32 - 1) << shift)
    return (value | ((side - 1) << 16 | side - 1) << shift).to_bytes(len(frame), "big")


def vpx_films() -> Items:
    if frames := packets(attempt(film, "libvpx", "ivf", 5)):
        large = patched(frames[0], b"\x9d\x01\x2a", 3, struct.pack("<HH", 16_383, 16_383))
        yield from named("vp8-{}.ivf", {
            "said-to-be-16383": ivf(b"VP80", [large, *frames[1:]]),
            "growing-to-16383": ivf(b"VP80", [*frames, large, large]),
            "of-2-to-the-32-frames": ivf(b"VP80", frames, (65_535, 65_535), 2**32 - 1),
            "frame-of-4-gigabytes": patched(ivf(b"VP80", frames), b"DKIF", 32, b"\xff" * 4),
            "of-100000-empty-frames": ivf(b"VP80", [frames[0], *[b""] * 100_000]),
            "said-to-be-av1": ivf(b"AV01", frames),
        })  # fmt: skip
        yield from damaged("vp8", "ivf", ivf(b"VP80", frames), (60,), 3)
    vp9 = partial(film, "libvpx-vp9", options={"deadline": "realtime", "lag-in-frames": "0"}, frames=5)
    if frames := packets(attempt(vp9, kind="ivf")):
        yield from named("vp9-{}.ivf", {
            "said-to-be-8000": ivf(b"VP90", [vp9_resized(frames[0], 8000), *frames[1:]]),
            "said-to-be-16384": ivf(b"VP90", [vp9_resized(frames[0], 16_384), *frames[1:]]),
            "said-to-be-65536": ivf(b"VP90", [vp9_resized(frames[0], 65_536), *frames[1:]]),
            "growing-to-16384": ivf(b"VP90", [*frames, *[vp9_resized(frames[0], 16_384)] * 3]),
            "shown-again-30000-times": ivf(b"VP90", [frames[0], *[b"\x88"] * 30_000]),
        })  # fmt: skip
        yield from damaged("vp9", "ivf", ivf(b"VP90", frames), (60,), 3)
    yield "vp9-of-odd-sizes.webm", partial(vp9, kind="webm", size=(33, 17))
    yield "vp9-with-alpha.webm", partial(vp9, kind="webm", size=(64, 64), pix_fmt="yuva420p")


def avi_films() -> Items:
    made = attempt(film, "mpeg4", "avi", sound="mp2")
    yield "mpeg4-and-mp2-in-avi.avi", lambda: made
    yield from lying("avi-{}.avi", made, {
        "of-2-to-the-32-frames": (b"avih", 24, b"\xff" * 4), "frames-of-no-time": (b"avih", 8, bytes(4)),
        "of-2-to-the-32-streams": (b"avih", 32, b"\xff" * 4), "rate-0": (b"strh", 32, bytes(4)),
        "scale-0": (b"strh", 28, bytes(4)), "scale-and-rate-2-to-the-32": (b"strh", 28, b"\xff" * 8),
        "stream-of-2-to-the-32-frames": (b"strh", 40, b"\xff" * 4),
        "said-to-be-2-to-the-31-wide": (b"strf", 12, b"\xff\xff\xff\x7f"),
        "said-to-be-16000": (b"strf", 12, struct.pack("<ii", 16_000, 8000)), "said-to-be-raw": (b"strf", 24, bytes(4)),
        "said-to-be-h264": (b"strf", 24, b"H264"), "index-beyond-the-file": (b"idx1", 16, b"\xff" * 8),
        "index-of-4-gigabytes": (b"idx1", 4, b"\xff" * 4), "list-of-4-gigabytes": (b"LIST", 4, b"\xff" * 4),
        "list-of-nothing": (b"LIST", 4, bytes(4)), "chunk-of-2-gigabytes": (b"00dc", 4, b"\xff\xff\xff\x7f"),
    })  # fmt: skip
    yield from damaged("avi", "avi", made, (3, 50, 90))
    header = struct.pack("<IiiHH4sIiiII", 40, 12_000, 10_000, 1, 8, b"\1\0\0\0", 0, 0, 0, 256, 0) + bytes(1024)
    stream = b"vidsMRLE" + struct.pack("<IHHIIIIIIII", 0, 0, 0, 0, 1, 10, 0, 5, 10_000, 10_000, 0) + bytes(8)
    entries = riff_chunk(b"avih", struct.pack("<14I", 10**5, 0, 0, 0, 5, 0, 1, 10_000, 12_000, 10_000, 0, 0, 0, 0))
    entries += riff_chunk(b"LIST", b"strl" + riff_chunk(b"strh", stream) + riff_chunk(b"strf", header))
    frames = riff_chunk(b"LIST", b"movi" + riff_chunk(b"00dc", b"\xff\7" * 200_000 + b"\0\1") * 3)
    yield "avi-runs-of-12000.avi", riff(riff_chunk(b"LIST", b"hdrl" + entries), frames, form=b"AVI ")


def avif_film() -> bytes:
    """A film by Pillow, which says when it was made unless told otherwise."""
    made = saved("AVIF", **followed_by(1, 2), codec="aom", max_threads=1)
    for kind in (b"mvhd", b"tkhd", b"mdhd"):
        made = with_box(made, kind, within(4, bytes(16)))
    return made


def encoded_films() -> Items:
    small, even = (64, 48), (128, 96)
    for name, codec, kind, size, pix_fmt in (
        ("mpeg2-in-ts.ts", "mpeg2video", "mpegts", small, "yuv420p"),
        ("mpeg1-in-ps.mpg", "mpeg1video", "mpeg", small, "yuv420p"),
        ("mpeg2-in-vob.vob", "mpeg2video", "vob", small, "yuv420p"),
        ("flv1-in-flv.flv", "flv", "flv", small, "yuv420p"), ("h264-in-flv.flv", "libx264", "flv", small, "yuv420p"),
        ("theora-in-ogg.ogv", "libtheora", "ogg", small, "yuv420p"),
        ("vp8-in-ogg.ogv", "libvpx", "ogg", small, "yuv420p"), ("film-gif.gif", "gif", "gif", small, "rgb8"),
        ("mjpeg-bare.mjpeg", "mjpeg", "mjpeg", small, "yuvj420p"),
        ("mjpeg-in-avi.avi", "mjpeg", "avi", small, "yuvj422p"),
        ("y4m.y4m", "wrapped_avframe", "yuv4mpegpipe", small, "yuv420p"),
        ("h264-bare.h264", "libx264", "h264", small, "yuv420p"),
        ("hevc-in-mp4.mp4", "libx265", "mp4", even, "yuv420p"), ("wmv2-in-asf.wmv", "wmv2", "asf", small, "yuv420p"),
        ("prores-in-mov.mov", "prores", "mov", small, "yuv422p10le"),
        ("qtrle-in-mov.mov", "qtrle", "mov", small, "argb"), ("rv20-in-rm.rm", "rv20", "rm", even, "yuv420p"),
        ("h263-in-3gp.3gp", "h263", "3gp", even, "yuv420p"),
        ("mpeg2-in-mxf.mxf", "mpeg2video", "mxf", small, "yuv420p"),
        ("ffv1-in-nut.nut", "ffv1", "nut", small, "yuv420p"), ("film-png.apng", "apng", "apng", small, "rgba"),
        ("film-webp.webp", "libwebp_anim", "webp", small, "yuva420p"),
    ):  # fmt: skip
        rate = 25 if codec.startswith(("mpeg1", "mpeg2")) else 10
        options = {"x265-params": "log-level=none:pools=none"} if codec == "libx265" else {}
        made = attempt(film, codec, kind, 5, size, pix_fmt, rate=rate, options=options)
        yield from damaged(*name.split("."), ogg(made) if kind == "ogg" else made, (100, 55), 3)
    for name, *arguments in (
        ("h264-of-10-bits.mp4", "libx264", "mp4", 5, small, "yuv420p10le"),
        ("h264-of-444.mp4", "libx264", "mp4", 5, small, "yuv444p"),
        ("h264-of-one-pixel.mp4", "libx264", "mp4", 5, (1, 1), "yuv444p"),
        ("ffv1-of-33-by-17.mkv", "ffv1", "matroska", 5, (33, 17), "yuv444p"),
        ("h264-of-rgb.mp4", "libx264rgb", "mp4", 5, small, "rgb24"),
        ("ffv1-of-16-bits.mkv", "ffv1", "matroska", 3, small, "gray16le"),
        ("ffv1-of-one-pixel.mkv", "ffv1", "matroska", 3, (1, 1), "gray"),
        ("ffv1-of-alpha.mkv", "ffv1", "matroska", 3, small, "bgra"),
        ("huffyuv.avi", "huffyuv", "avi", 3, small, "yuv422p"),
        ("raw-frames-of-colours.avi", "rawvideo", "avi", 3, small, "bgr24"),
        ("raw-frames-of-15-bits.nut", "rawvideo", "nut", 3, small, "rgb555le"),
        ("cinepak.mov", "cinepak", "mov", 3, small, "rgb24"),
    ):
        yield name, partial(film, *arguments)
    yield "mpeg4-of-20000-frames.avi", partial(film, "mpeg4", "avi", 20_000, (16, 16), plain=True)
    yield "avif-film.avif", avif_film


def other_films() -> Items:
    """Y4M, FLV, MPEG's streams, and what is no film."""

    def y4m(heading: bytes, size: int, frames: int = 1) -> bytes:
        return b"YUV4MPEG2 " + heading + b"\n" + (b"FRAME\n" + bytes(size)) * frames

    yield from named("y4m-{}.y4m", {
        "said-to-be-16000": y4m(b"W16000 H8000 F10:1 C420", 5000),
        "said-to-be-2-to-the-31": y4m(b"W2147483647 H2147483647 F10:1 C420", 5000),
        "no-frames-a-second": y4m(b"W16 H16 F0:0 C420", 384, 5), "of-5000-frames": y4m(b"W2 H2 F10:1 C420", 6, 5000),
        "heading-of-a-megabyte": y4m(b"W16 H16 X" + b"a" * 1_000_000, 384),
    })  # fmt: skip
    tag = b"\2\0\x0aonMetaData\x08\xff\xff\xff\xff\0\x08duration\0" + struct.pack(">d", 1e9)
    tag += b"\0\x09keyframes\3\0\5times\x0a\xff\xff\xff\xff" + bytes(1000)
    for name, flags, tags in (
        ("of-2-to-the-32-key-frames", b"\1", b"\x12" + len(tag).to_bytes(3, "big") + bytes(7) + tag),
        ("tag-of-16-megabytes", b"\5", b"\x09\xff\xff\xff" + bytes(7) + b"\x17" + bytes(1000)),
        ("of-50000-empty-tags", b"\1", (b"\x09" + bytes(14)) * 50_000),
    ):
        yield f"flv-{name}.flv", b"FLV\1" + flags + b"\0\0\0\x09\0\0\0\0" + tags
    programs = b"".join(struct.pack(">HH", index + 1, 0xE020 + index) for index in range(40))
    section = b"\0" + struct.pack(">H", 0xB000 | len(programs) + 9) + b"\0\1\xc1\0\0" + programs
    section += struct.pack(">I", crc32(section, 2**32 - 1))
    packets = (b"G\x40\0\x10\0" + section).ljust(188, b"\xff")
    for index in range(40):
        packets += (b"G" + struct.pack(">H", 0x4020 + index) + b"\x10\0\2\xb0\xff").ljust(188, b"\x1b")
    yield from named("ts-{}.ts", {
        "of-sync-bytes": b"G" * 188 * 5000, "of-null-packets": (b"G\x1f\xff\x10" + b"\xff" * 184) * 5000,
        "of-40-programs-that-lie": packets * 100,
    })  # fmt: skip
    yield "ps-of-start-codes.mpg", b"\0\0\1\xba" + bytes(8) + b"\0\0\1\xe0\0\0" * 100_000
    header = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + struct.pack("<QIBB", 2**62, 2**32 - 1, 1, 2)
    yield "asf-header-of-2-to-the-62-bytes.wmv", header + bytes(500)
    yield "h264-of-start-codes.h264", b"\0\0\1\x65" * 100_000
    yield "swf.swf", b"CWS\x06" + struct.pack("<I", 10**9) + zlib_of(MEGABYTE, 500)
    yield from named("{}-named-mp4.mp4", {
        "picture": saved("PNG"), "large-picture": flat_png("rgb", *LARGE[170]), "wav": wave(bytes(32_000)),
        "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\nNothing to see\n\n" * 50,
        "zip": b"PK\3\4\x14" + bytes(25) + b"PK\5\6" + bytes(18), "elf": b"\x7fELF\2\1\1" + bytes(500),
    })  # fmt: skip
    yield "jpeg-named-mov.mov", saved("JPEG")
    yield "flac-named-mkv.mkv", flac(15, 16_000)
    yield "mp4-in-gzip.mp4", lambda: gzip.compress(film(), mtime=0)
    for number in ("001", "002", "003", "%03d"):
        yield f"frames-{number}.png", saved("PNG", size=(32, 32))
    yield "frames-%0999999999d.jpg", saved("JPEG", size=(32, 32))
    yield "frames-%s%n.mp4", b"not a film"


def film_lists() -> Items:
    disguises = {"ffconcat": "mkv ts ffconcat", "hls": "mkv ts m3u8", "dash": "mkv mpd", "pls": "pls"}
    yield from lists("video", "mp4", disguises, "H264/90000")
    for kind in ("ffconcat", "hls", "dash"):
        yield f"video-{kind}-naming-passwd-without-extension", playlists("/etc/passwd")[kind]
    for kind in ("ffconcat", "hls", "hls-live", "m3u", "dash"):
        yield f"video-{kind}-naming-a-neighbour.mp4", playlists("h264-in-mp4.mp4")[kind]
    yield "video-hls-naming-a-neighbour-as-m3u8.m3u8", playlists("mpeg2-in-ts-cut-at-100-percent.ts")["hls"]
    for kind in ("ffconcat", "hls"):
        name = f"video-{kind}-naming-itself.mp4"
        yield name, playlists(name)[kind]
    for name, target in {
        "a-port": "http://127.0.0.1:9/film.ts", "a-socket-that-says-nothing": "udp://127.0.0.1:9", "a-pipe": "pipe:0",
        "a-device": "/dev/zero", "the-terminal": "/dev/stdin",
        "a-part-of-a-file": "subfile,,start,0,end,99,,:/etc/passwd", "a-filter": "lavfi:testsrc",
        "data": "data:text/plain;base64,aGVsbG8=",
    }.items():  # fmt: skip
        yield f"video-ffconcat-naming-{name}.mp4", playlists(f"'{target}'")["ffconcat"]
        yield f"video-hls-naming-{name}.mp4", playlists(target)["hls"]
    line = b"file h264-in-mp4.mp4\n"
    yield "video-ffconcat-of-50000-files.mp4", b"ffconcat version 1.0\n" + line * 50_000
    forever = b"ffconcat version 1.0\n" + line + b"duration 999999999999\n"
    yield "video-ffconcat-lasting-for-ever.mp4", forever * 3
    segments = b"#EXTINF:9,\nh264-in-mp4.mp4\n" * 20_000
    yield "video-hls-of-20000-segments.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n" + segments + b"#EXT-X-ENDLIST\n"


def films() -> Items:
    return all_of(
        "video", "mp4",
        large_films, mp4_films, matroska_films, vpx_films, avi_films,
        encoded_films, other_films, film_lists,
    )  # fmt: skip
