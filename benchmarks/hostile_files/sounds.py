"""Sounds that lie: WAV, FLAC, Ogg, MP3 and AAC, what else libsndfile and FFmpeg would open, and playlists."""

import gzip
import re
import struct
from collections.abc import Callable
from functools import partial
from io import BytesIO

import av
import numpy as np
import soundfile
from av.codec.context import Flags

from .pictures import LARGE, flat_png, saved
from .shared import (
    Items,
    all_of,
    attempt,
    crc8,
    crc16,
    crc32,
    damaged,
    flipped,
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
    wave_format,
    with_box,
)


def tone(seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """A tone with noise, samples by channels."""
    times = np.arange(int(seconds * rate)) / rate
    generator = np.random.default_rng(0)
    made = 0.3 * np.sin(2 * np.pi * 440 * times)[:, None] + generator.normal(0, 0.01, (len(times), channels))
    return made.astype(np.float32)


def short_tone() -> np.ndarray:
    return (tone()[:, 0] * 20_000).astype("<i2")


def sound(kind: str, samples: np.ndarray | None = None, rate: int = 16_000, subtype: str | None = None) -> bytes:
    """Samples in one of soundfile's formats."""
    file = BytesIO()
    soundfile.write(file, tone(rate=rate) if samples is None else samples, rate, subtype, format=kind)
    return file.getvalue()


def track(codec: str, kind: str, seconds: float = 0.5, rate: int = 16_000, layout: str = "mono", **options) -> bytes:
    """A tone by one of FFmpeg's encoders."""
    file = BytesIO()
    with av.open(file, "w", format=kind, options={"fflags": "+bitexact"}) as container:
        add_tone(container, codec, rate, layout, **options)(seconds)
    return file.getvalue()


def add_tone(
    container: av.container.OutputContainer, codec: str, rate: int = 16_000, layout: str = "mono", **options
) -> Callable[[float], None]:
    """Gives a file a track; what is returned fills it with so many seconds."""
    stream = container.add_stream(codec, rate=rate, layout=layout, options=options)
    stream.codec_context.flags |= Flags.bitexact
    stream.codec_context.thread_count = 1

    def fill(seconds: float) -> None:
        samples = (tone(seconds, stream.rate, stream.channels) * 20_000).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=stream.layout.name)
        frame.rate, frame.pts = stream.rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return fill


def wave_sounds() -> Items:
    samples = short_tone().tobytes()
    noise = np.random.default_rng(0).bytes(64_000)
    for channels in (0, 2, 3, 255, 1024, 65_535):
        yield f"wav-of-{channels}-channels.wav", wave(noise, channels=channels)
    for rate in (0, 1, 2, 100, 8000, 384_000, 2**31 - 1, 2**31, 2**32 - 1):
        yield f"wav-at-{rate}-hertz.wav", wave(samples, rate=rate)
    for bits in (0, 1, 3, 7, 8, 12, 24, 32, 33, 64, 255, 65_535):
        yield f"wav-of-{bits}-bits.wav", wave(noise[:24_000], bits=bits)
    for tag, name in {
        0: "0", 2: "ms-adpcm", 0x11: "ima-adpcm", 0x31: "gsm", 0x50: "mpeg", 0x55: "mp3", 0x161: "wma",
        0xFFFE: "extensible-without-extension", 0xFFFF: "65535",
    }.items():  # fmt: skip
        yield f"wav-said-to-be-{name}.wav", wave(samples, tag=tag)
    for name, value in {
        "nan": np.nan, "infinity": np.inf, "1e30": 1e30, "1e15": 1e15, "minus-1e15": -1e15, "denormal": 1e-42
    }.items():  # fmt: skip
        yield f"wav-float-of-{name}.wav", wave(np.full(8000, value, "<f4").tobytes(), bits=32, tag=3)
        spoilt = tone()[:, 0].astype("<f4")
        spoilt[4000] = value
        yield f"wav-float-with-one-{name}.wav", wave(spoilt.tobytes(), bits=32, tag=3)
    for size in (0, 1, 15_999, 16_001, 2**31, 2**32 - 1):
        yield f"wav-data-said-to-be-{size}-bytes.wav", wave(samples, size=size)
    for size in (0, 3, 2**32 - 1):
        yield f"wav-whole-said-to-be-{size}-bytes.wav", wave(samples, whole=size)
    form, data = riff_chunk(b"fmt ", wave_format()), riff_chunk(b"data", samples)
    for magic in (b"RF64", b"BW64"):
        for size in (len(samples), 2**40, 2**63):
            sizes = riff_chunk(b"ds64", struct.pack("<QQQI", size + 72, size, size // 2, 0))
            made = riff(sizes, form, riff_chunk(b"data", samples, 2**32 - 1), magic=magic, size=2**32 - 1)
            yield f"wav-{magic.decode().lower()}-of-{size}-bytes.wav", made
    table = riff_chunk(b"ds64", struct.pack("<QQQI", 99, 99, 99, 2**32 - 1))
    adpcm = partial(wave, samples, tag=2, bits=4)
    extensible = partial(wave, samples, tag=0xFFFE)
    extension = struct.pack("<HHI", 22, 16, 2**32 - 1)
    known = b"\1\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    yield from named("wav-{}.wav", {
        "mu-law": wave(noise[:8000], bits=8, tag=7), "a-law": wave(noise[:8000], bits=8, tag=6),
        "mu-law-of-16-bits": wave(noise[:8000], tag=7),
        "ms-adpcm-block-0": adpcm(block=0, more=struct.pack("<HHH", 32, 500, 7)),
        "ms-adpcm-of-65535-coefficients": adpcm(block=256, more=struct.pack("<HHH", 32, 65_535, 65_535)),
        "ima-adpcm-block-65535": wave(samples, tag=17, bits=4, block=65_535, more=b"\2\0\xff\xff"),
        "double-of-1e300": wave(np.full(8000, 1e300).tobytes(), bits=64, tag=3),
        "float-of-noise": wave(noise, bits=32, tag=3), "float-of-16-bits": wave(noise, bits=16, tag=3),
        "of-no-samples": wave(b""), "of-one-sample": wave(b"\0\x40"), "of-half-a-sample": wave(b"\x40"),
        "block-0": wave(samples, block=0), "block-65535": wave(samples, block=65_535), "without-format": riff(data),
        "without-data": riff(form), "format-after-data": riff(data, form),
        "of-two-formats": riff(form, riff_chunk(b"fmt ", wave_format(8, 96_000, 32)), data),
        "of-two-data": riff(form, data, data),
        "format-of-4-gigabytes": riff(riff_chunk(b"fmt ", wave_format(), 2**32 - 1), data),
        "format-of-2-bytes": riff(riff_chunk(b"fmt ", b"\1\0"), data),
        "list-of-4-gigabytes": riff(form, riff_chunk(b"LIST", b"INFO", 2**32 - 1), data),
        "of-100000-empty-chunks": riff(form, riff_chunk(b"junk", b"") * 100_000, data),
        "text-of-a-megabyte": riff(form, riff_chunk(b"LIST", b"INFOINAM\0\0\x10\0" + b"a" * 2**20), data),
        "of-2-to-the-32-cues": riff(form, riff_chunk(b"cue ", b"\xff" * 28), data),
        "big-endian": riff(form, data, magic=b"RIFX"), "extensible": extensible(channels=2, more=extension + known),
        "extensible-unknown": extensible(channels=2, more=extension + bytes(16)),
        "extensible-of-48-valid-bits": extensible(more=struct.pack("<HHI", 22, 48, 4) + known),
        "rf64-table-of-2-to-the-32": riff(table, form, data, magic=b"RF64", size=2**32 - 1),
        "rf64-without-sizes": riff(form, data, magic=b"RF64"),
        "of-an-hour-at-1000-hertz": wave(b"\x80" * 3_700_000, rate=1000, bits=8),
        "of-a-day-at-10-hertz": wave(b"\x80" * 864_000, rate=10, bits=8),
        "of-11-days-at-1-hertz": wave(b"\x80" * 1_000_000, rate=1, bits=8),
        "of-an-hour-of-500-channels-at-1-hertz": wave(bytes(1_900_000), rate=1, bits=8, channels=500),
        "followed-by-a-tag": wave(samples) + b"TAG" + bytes(125),
        "behind-a-tag": b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + wave(samples),
        "loudest-square": wave(b"\xff\x7f\0\x80" * 8000), "in-gzip": gzip.compress(wave(samples), mtime=0),
    })  # fmt: skip
    yield "wav-named-flac.flac", wave(samples)
    yield from damaged("wav", "wav", wave(samples, before=riff_chunk(b"LIST", b"INFO")), (0, 50), 4)


def flac_header(total: int, rate: int, channels: int, bits: int) -> bytes:
    fields = rate << 44 | (channels - 1) << 41 | (bits - 1) << 36 | total
    return b"\xff" * 4 + bytes(6) + fields.to_bytes(8, "big") + bytes(16)


def flac_block(kind: int, data: bytes) -> bytes:
    """The last of the blocks before the frames."""
    return bytes([0x80 | kind]) + len(data).to_bytes(3, "big") + data


def flac(
    frames: int, rate: int, channels: int = 1, bits: int = 16, total: int | None = None, more: bytes = b""
) -> bytes:
    """A FLAC of digital silence, 65,535 samples a frame in some dozen bytes; other blocks of metadata by `more`."""
    silence = packed(f"{0:0{8 + bits}b}" * channels)
    header = flac_header(frames * 65_535 if total is None else total, rate, channels, bits)
    made = [b"fLaC", b"\0" if more else b"\x80", len(header).to_bytes(3, "big"), header, more]
    start = b"\xff\xf8\x70" + bytes([channels - 1 << 4])
    for number in range(frames):
        # FLAC writes numbers as UTF-8 writes letters.
        frame = start + chr(number).encode("utf-8", "surrogatepass") + b"\xff\xfe"
        frame += bytes([crc8(frame)]) + silence
        made.append(frame + struct.pack(">H", crc16(frame)))
    return b"".join(made)


def flac_of_an_hour() -> bytes:
    """59 minutes of silence at 96 kHz, by soundfile."""
    file = BytesIO()
    second = np.zeros(96_000, np.int16)
    with soundfile.SoundFile(file, "w", 96_000, 1, "PCM_16", format="FLAC", compression_level=0.6) as writer:
        for _ in range(59 * 60):
            writer.write(second)
    return file.getvalue()


def flac_sounds() -> Items:
    small = partial(flac, 15, 16_000)
    art = struct.pack(">II", 3, 9) + b"image/png" + struct.pack(">IIIIII", 0, 99_999, 99_999, 24, 0, 2**32 - 1)
    yield from named("flac-{}.flac", {
        "of-59-minutes-at-96-kilohertz": flac_of_an_hour, "of-59-minutes-at-655-kilohertz": flac(59 * 600, 655_350),
        "of-8-channels-and-12-hours": flac(12 * 3600 * 48_000 // 65_535, 48_000, 8),
        "of-8-channels-of-24-bits-and-29-minutes": flac(29 * 60 * 192_000 // 65_535, 192_000, 8, 24),
        "of-a-week-at-8-kilohertz": flac(7 * 86_400 * 8000 // 65_535, 8000), "of-a-minute": small(),
        "at-1-hertz": flac(15, 1), "at-0-hertz": flac(15, 0), "without-frames": flac(0, 16_000),
        "without-frames-said-to-have-an-hour": flac(0, 16_000, total=57_600_000),
        "picture-of-4-gigabytes": small(more=flac_block(6, art)),
        "of-2-to-the-32-comments": small(more=flac_block(4, b"\0\0\0\0\xff\xff\xff\xff")),
        "comment-of-4-gigabytes": small(more=flac_block(4, b"\xff\xff\xff\xff")),
        "seek-table-of-a-megabyte": small(more=flac_block(3, b"\xff" * 1_000_008)),
        "of-two-headers": small(more=flac_block(0, flac_header(10**9, 655_350, 8, 32))),
        "cue-sheet-of-255-tracks": small(more=flac_block(5, bytes(395) + b"\xff")),
        "padding-of-16-megabytes": small(more=b"\x81\xff\xff\xff"),
        "of-100000-empty-blocks": small(more=b"\1\0\0\0" * 100_000 + b"\x81\0\0\0"),
        "whose-rate-changes": flac(5, 16_000) + flac(5, 48_000, 2)[42:],
        "24-bits": partial(sound, "FLAC", subtype="PCM_24"),
        "of-one-sample": partial(sound, "FLAC", np.full(1, 0.5, np.float32)),
    })  # fmt: skip
    for total in (0, 1, 10**9, 2**36 - 1):
        yield f"flac-said-to-have-{total}-samples.flac", small(total=total)
    yield "flac-named-mp3.mp3", small()
    yield from damaged("flac", "flac", attempt(sound, "FLAC"), (1, 20, 60, 97))


def ogg(
    data: bytes, serial: int = 1, lie: tuple[bytes, int, bytes] | None = None, granule: int | None = None
) -> bytes:
    """An Ogg file with another serial number, which libsndfile draws by the clock, and correct check sums.

    Where a packet starts with the mark of a lie, it is `patched`; the last page may say how many samples there were.
    """
    made, start = [], 0
    while start < len(data):
        table = 27 + data[start + 26]
        length = sum(data[start + 27 : start + table])
        header, body = bytearray(data[start : start + table]), data[start + table : start + table + length]
        if lie and body.startswith(lie[0]):
            body = patched(body, *lie)
        header[14:18], header[22:26] = struct.pack("<I", serial), bytes(4)
        start += table + length
        if granule is not None and start >= len(data):
            header[6:14] = struct.pack("<q", granule)
        header[22:26] = struct.pack("<I", crc32(bytes(header) + body))
        made.append(bytes(header) + body)
    return b"".join(made)


def ogg_sounds() -> Items:
    if vorbis := attempt(lambda: ogg(sound("OGG"))):
        yield from damaged("vorbis", "ogg", vorbis, (1, 20, 60, 97))
        yield from named("vorbis-{}.ogg", {
            "of-8-channels": ogg(sound("OGG", tone(0.2, channels=8))),
            "of-one-sample": ogg(sound("OGG", np.zeros(1, np.float32))),
            "of-no-samples": ogg(sound("OGG", np.zeros(0, np.float32))),
            "at-200-kilohertz": lambda: ogg(sound("OGG", rate=200_000)),
            "whose-rate-changes": vorbis + ogg(sound("OGG", rate=44_100), 2),
            "whose-channels-change": vorbis + ogg(sound("OGG", tone(0.2, channels=2)), 2),
            "chained-30-times": b"".join(ogg(vorbis, index) for index in range(30)),
            "twice-with-one-serial-number": vorbis * 2, "followed-by-flac": vorbis + flac(5, 16_000),
            "checksums-wrong": re.sub(rb"(OggS.{18}).{4}", rb"\1abcd", vorbis, flags=re.DOTALL),
        })  # fmt: skip
        for granule in (-1, 0, 2**40, 2**63 - 1):
            yield f"vorbis-said-to-end-at-{granule}.ogg".replace("--", "-minus-"), ogg(vorbis, granule=granule)
        for channels in (0, 255):
            lie = (b"\1vorbis", 11, bytes([channels]))
            yield f"vorbis-said-to-have-{channels}-channels.ogg", ogg(vorbis, lie=lie)
        for rate in (0, 1, 2**32 - 1):
            lie = (b"\1vorbis", 12, struct.pack("<I", rate))
            yield f"vorbis-said-to-be-at-{rate}-hertz.ogg", ogg(vorbis, lie=lie)
        yield "ogg-of-empty-pages.ogg", ogg(b"OggS\0\2" + bytes(21) + (b"OggS" + bytes(23)) * 20_000)
    if opus := attempt(lambda: ogg(track("libopus", "ogg", rate=48_000))):
        yield from damaged("opus", "opus", opus, (20, 60))
        for name, lie in {
            "0-channels": (9, b"\0"), "255-channels": (9, b"\xff"), "to-skip-65535-samples": (10, b"\xff\xff"),
            "to-be-128-decibels-louder": (16, b"\xff\x7f"), "mapped-by-255": (18, b"\xff"),
        }.items():  # fmt: skip
            yield f"opus-said-{name}.opus", ogg(opus, lie=(b"OpusHead", *lie))
        yield "opus-said-to-end-at-2-to-the-62.opus", ogg(opus, granule=2**62)
        yield "opus-followed-by-vorbis.opus", lambda: opus + ogg(sound("OGG"), 2)


def tag_of_mp3(size: int, data: bytes = b"") -> bytes:
    """An ID3 tag that says that it has so many bytes."""
    return b"ID3\4\0\0" + synchsafe(size) + data


def synchsafe(size: int) -> bytes:
    return bytes(size >> shift & 127 for shift in (21, 14, 7, 0))


def mp3_sounds() -> Items:
    if layer3 := attempt(track, "libmp3lame", "mp3", 1):
        art = b"APIC" + synchsafe(1_000_000) + b"\0\0\0image/png\0\3\0" + flat_png("grey", *LARGE[170])
        mark = b"Xing" if b"Xing" in layer3 else b"Info"
        fast, slow = track("libmp3lame", "mp3", 0.5, 48_000, "stereo"), track("libmp3lame", "mp3", 0.5, 8000)
        yield from named("mp3-{}.mp3", {
            "behind-two-megabytes-of-tag": tag_of_mp3(1_900_000, bytes(1_900_000)) + layer3,
            "tag-of-256-megabytes": tag_of_mp3(2**28 - 1) + layer3,
            "with-a-large-picture": tag_of_mp3(1_100_000, art.ljust(1_100_000, b"\0")) + layer3,
            "behind-1000-tags": tag_of_mp3(10, bytes(10)) * 1000 + layer3,
            "behind-a-megabyte-of-noise": np.random.default_rng(0).bytes(1_000_000) + layer3,
            "of-headers-only": b"\xff\xfb\x90\x64" * 100_000, "of-free-format": b"\xff\xfb\x00\x64" + bytes(500_000),
            "tag-at-the-end-lies": layer3 + b"APETAGEX" + struct.pack("<IIIIQ", 2000, 2**32 - 1, 2**31, 0, 0),
            "said-to-have-2-to-the-32-frames": patched(layer3, mark, 8, b"\xff" * 4),
            "said-to-have-no-frames": patched(layer3, mark, 8, bytes(4)), "whose-rate-changes": layer3 + fast + slow,
        })  # fmt: skip
        yield from damaged("mp3", "mp3", layer3)


def aac_sounds() -> Items:
    if aac := attempt(track, "aac", "ipod"):
        yield from named("aac-{}.m4a", {
            "of-2-to-the-31-samples": with_box(aac, b"stts", numbers(0, 1, 2**31 - 1, 1024)),
            "of-100-million-samples-of-one-byte": with_box(aac, b"stsz", numbers(0, 1, 10**8)),
            "chunk-of-100-million-samples": with_box(aac, b"stsc", numbers(0, 1, 1, 10**8, 1)),
            "data-at-4-gigabytes": with_box(aac, b"stco", numbers(0, 1, 2**32 - 1)),
            "at-0-hertz": patched(aac, b"mp4a", 28, bytes(4)),
            "of-65535-channels": patched(aac, b"mp4a", 20, b"\xff\xff"),
        })  # fmt: skip
        yield from damaged("aac", "m4a", aac)
        yield "mp4-of-a-track-of-sound.mp4", aac


def other_tracks() -> Items:
    for codec, kind, extension in (
        ("alac", "ipod", "m4a"), ("aac", "adts", "aac"), ("ac3", "ac3", "ac3"), ("wmav2", "asf", "wma"),
        ("tta", "tta", "tta"), ("mp2", "mp2", "mp2"), ("flac", "matroska", "mka"), ("libopus", "webm", "weba"),
        ("libopencore_amrnb", "amr", "amr"), ("pcm_s16le", "caf", "caf"), ("adpcm_ima_wav", "avi", "avi"),
    ):  # fmt: skip
        rate = {"amr": 8000, "ac3": 48_000, "webm": 48_000, "asf": 44_100}.get(kind, 16_000)
        made = attempt(track, codec, kind, rate=rate, b="64000")
        yield from damaged(f"{codec}-in-{kind}".replace("_", "-"), extension, made, (100, 60), 2)


def chunked_sounds() -> Items:
    """AIFF, CAF and W64."""
    aiff, caf, w64 = (attempt(sound, kind, short_tone()) for kind in ("AIFF", "CAF", "W64"))
    yield from lying("aiff-{}.aiff", aiff, {
        "of-0-channels": (b"COMM", 8, b"\0\0"), "of-65535-channels": (b"COMM", 8, b"\xff\xff"),
        "of-2-to-the-32-samples": (b"COMM", 10, b"\xff" * 4), "of-65535-bits": (b"COMM", 14, b"\xff\xff"),
        "at-0-hertz": (b"COMM", 16, bytes(10)), "at-infinity": (b"COMM", 16, b"\x7f\xff" + bytes(8)),
        "at-minus-infinity": (b"COMM", 16, b"\xff\xff" + bytes(8)), "common-of-4-gigabytes": (b"COMM", 4, b"\xff" * 4),
        "data-of-4-gigabytes": (b"SSND", 4, b"\xff" * 4), "data-offset-of-4-gigabytes": (b"SSND", 8, b"\xff" * 4),
    })  # fmt: skip
    yield from damaged("aiff", "aiff", aiff, (50,), 2)
    yield from lying("caf-{}.caf", caf, {
        "at-nan": (b"desc", 12, struct.pack(">d", np.nan)), "at-infinity": (b"desc", 12, struct.pack(">d", np.inf)),
        "at-minus-1": (b"desc", 12, struct.pack(">d", -1)), "at-1e300": (b"desc", 12, struct.pack(">d", 1e300)),
        "of-2-to-the-32-channels": (b"desc", 36, b"\xff" * 4), "of-0-bits": (b"desc", 40, bytes(4)),
        "packets-of-2-to-the-32-bytes": (b"desc", 28, b"\xff" * 4), "data-of-minus-1-bytes": (b"data", 4, b"\xff" * 8),
        "data-of-2-to-the-62-bytes": (b"data", 4, struct.pack(">q", 2**62)),
    })  # fmt: skip
    yield from lying("w64-{}.w64", w64, {
        "of-2-to-the-63-bytes": (b"data", 16, struct.pack("<Q", 2**63)), "data-of-no-bytes": (b"data", 16, bytes(8)),
        "format-of-2-to-the-62-bytes": (b"fmt ", 16, struct.pack("<Q", 2**62)),
    })  # fmt: skip


def headed_sounds() -> Items:
    """AU, VOC and SPHERE."""
    samples = short_tone().tobytes()
    for name, fields in {
        **{f"encoding-{encoding}": (24, 16_000, encoding, 16_000, 1) for encoding in (0, 1, 3, 6, 23, 99)},
        "of-4-gigabytes": (24, 2**32 - 1, 3, 16_000, 1), "of-1024-channels": (24, 16_000, 3, 16_000, 1024),
        "starting-at-4-gigabytes": (2**32 - 1, 16_000, 3, 16_000, 1), "at-0-hertz": (24, 16_000, 3, 0, 1),
        "of-2-to-the-32-channels": (24, 16_000, 3, 16_000, 2**32 - 1),
    }.items():  # fmt: skip
        yield f"au-{name}.au", b".snd" + struct.pack(">IIIII", *fields) + samples
    heading = b"Creative Voice File\x1a" + struct.pack("<HHH", 26, 0x10A, 0x1129)
    block = b"\1\x02\x10\0\xa5\0" + samples[:4096]
    yield "voc.voc", heading + block + b"\0"
    for name, blocks in {
        "block-of-16-megabytes": b"\1\xff\xff\xff\xa5\0" + bytes(4000),
        "silences": block + b"\3\3\0\0\xff\xff\xff" * 100_000 + b"\0",
        "repeated-for-ever": b"\6\2\0\0\xff\xff" + block + b"\7\0\0\0\0",
        "divided-by-zero": b"\1\x02\x10\0\xff\xff" + bytes(4096) + b"\0",
        "block-nine-of-0-hertz": b"\x09\x0c\x10\0" + struct.pack("<IBBHI", 0, 0, 0, 4, 0) + bytes(4096),
    }.items():
        yield f"voc-{name}.voc", heading + blocks
    nist = "NIST_1A\n   1024\nchannel_count -i {}\nsample_rate -i {}\nsample_count -i {}\nsample_n_bytes -i {}\n"
    nist += "sample_byte_format -s2 01\nsample_sig_bits -i 16\nsample_coding -s3 pcm\nend_head\n"
    for name, fields in {
        "": (1, 16_000, 8000, 2), "-negative": (-1, -16_000, -8000, -2),
        "-of-many-digits": ("9" * 300, 16_000, 8000, 2), "-of-1024-channels": (1024, 1, 2**40, 8),
    }.items():  # fmt: skip
        yield f"nist{name}.sph", nist.format(*fields).encode().ljust(1024) + samples


def other_sounds() -> Items:
    samples = short_tone()
    heading = struct.pack("<IfII", 0x0001A364, 1e30, 2**31, 2).ljust(1024, b"\0")
    yield "ircam.sf", heading + samples.tobytes()
    heading = b"FORM\xff\xff\xff\xff8SVXVHDR\0\0\0\x14" + b"\xff" * 20 + b"BODY\xff\xff\xff\xff"
    yield "iff.8svx", heading + samples.tobytes()
    yield "htk.htk", struct.pack(">IIHH", 2**31, 1, 2, 0) + samples.tobytes()
    yield "mat5.mat", lambda: sound("MAT5", samples)[116:]
    yield "mod-tracker.mod", b"a" * 952 + bytes(range(128)) + b"M.K." + bytes(20_000)
    yield "midi.mid", b"MThd\0\0\0\6\0\1\xff\xff\0\1" + b"MTrk\xff\xff\xff\xff" + bytes(100)
    for kind in ("SDS", "PVF", "XI", "PAF", "AVR", "MPC2K", "WVE", "MAT4", "SVX"):
        rate, subtype = (8000, "ALAW") if kind == "WVE" else (16_000, "DPCM_16" if kind == "XI" else None)
        if made := attempt(sound, kind, samples, rate, subtype):
            yield f"{kind}-by-soundfile.{kind}".lower(), flipped(made, kind, 2)
    yield "raw-noise.raw", np.random.default_rng(1).bytes(200_000)
    yield "raw-pcm.pcm", samples.tobytes()
    yield "picture-named-wav.wav", saved("PNG")


def sound_lists() -> Items:
    disguises = {
        "ffconcat": "mp3 raw data ffconcat", "hls": "mp3 m3u8", "pls": "pls", "xspf": "xspf", "dash": "mpd m4a"
    }  # fmt: skip
    yield from lists("audio", "wav", disguises, "L16/16000")
    for kind in ("ffconcat", "hls", "m3u"):
        yield f"audio-{kind}-naming-a-neighbour.mp3", playlists("flac-of-a-minute.flac")[kind]


def sounds() -> Items:
    return all_of(
        "audio", "wav",
        wave_sounds, flac_sounds, ogg_sounds, mp3_sounds, aac_sounds, other_tracks,
        headed_sounds, chunked_sounds, other_sounds, sound_lists,
    )  # fmt: skip
