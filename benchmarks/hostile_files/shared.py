"""What pictures, sounds and films share: bytes, damage to them, RIFF, playlists, and what is no media at all."""

import contextlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import reduce

import av
import numpy as np
import soundfile
from av.codec.codec import UnknownCodecError


# Something to call needs an encoder, which not every build of the libraries has.
Data = bytes | Callable[[], bytes]
Items = Iterator[tuple[str, Data]]
Size = tuple[int, int]
MEGABYTE = bytes(2**20)

# How the libraries say that they were built without an encoder.
UNAVAILABLE = (av.FFmpegError, UnknownCodecError, soundfile.SoundFileError, KeyError, OSError)


def attempt(make: Callable[..., bytes], *args, **options) -> bytes:
    """What is made, or nothing if there is no encoder for it."""
    with contextlib.suppress(*UNAVAILABLE):
        return make(*args, **options)
    return b""


def named(pattern: str, files: dict[str | int, Data]) -> Items:
    """Files whose names start and end alike."""
    yield from ((pattern.format(name), data) for name, data in files.items())


def patched(data: bytes, mark: bytes, offset: int, new: bytes) -> bytes:
    """The data with other bytes, so many of them, at an offset from where a mark is first found."""
    start = data.index(mark) + offset
    return data[:start] + new + data[start + len(new) :]


def lying(pattern: str, data: bytes, lies: dict[str | int, tuple[bytes, int, bytes]]) -> Items:
    """A file `patched` in one place after the other; none if there is no file."""
    if data:
        yield from named(pattern, {name: patched(data, *lie) for name, lie in lies.items()})


def flipped(data: bytes, name: str, count: int) -> bytes:
    """The data with some bits flipped; which ones, the name decides."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    changed = bytearray(data)
    for position in generator.integers(8 * len(data), size=count):
        changed[position // 8] ^= 1 << (position % 8)
    return bytes(changed)


def damaged(name: str, extension: str, data: bytes, cuts: Iterable[int] = (20, 60, 97), flips: int = 3) -> Items:
    """Beginnings of a file, in percent of its length, and the file with one, eight, 64 ... bits flipped."""
    if data:
        for percent in cuts:
            yield f"{name}-cut-at-{percent}-percent.{extension}", data[: len(data) * percent // 100]
        for count in (8**power for power in range(flips)):
            made = f"{name}-with-{count}-bits-flipped"
            yield f"{made}.{extension}", flipped(data, made, count)


def packed(bits: str, order: str = "big", last: str = "0") -> bytes:
    """Bits, given as zeros and ones, in bytes; the last byte filled."""
    bits += last * (-len(bits) % 8)
    return np.packbits(np.frombuffer(bits.encode(), np.uint8) - ord("0"), bitorder=order).tobytes()


def zlib_of(row: bytes, count: int) -> bytes:
    """A zlib stream of equal rows, in the time and memory it takes to compress a megabyte."""
    stream = b"\x78\xda"
    low, high = 1, 0
    group = max(1, min(count, 2**20 // len(row)))
    for piece, times in ((row * group, count // group), (row, count % group)):
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
        # A full flush ends on a whole byte and forgets what came before: what it returns may be repeated.
        stream += (compressor.compress(piece) + compressor.flush(zlib.Z_FULL_FLUSH)) * times
        checksum = zlib.adler32(piece)
        rise, alone = (checksum & 0xFFFF) - 1, checksum >> 16
        high += times * (len(piece) * (low - 1) + alone) + len(piece) * rise * times * (times - 1) // 2
        low += times * rise
    return stream + b"\x03\x00" + struct.pack(">I", high % 65521 << 16 | low % 65521)


def crc(polynomial: int, bits: int) -> Callable[..., int]:
    """A cyclic redundancy check of bytes, highest bit first, from zero or a given number."""

    def shifted(value: int, _: int) -> int:
        return (value << 1 ^ polynomial * (value >> bits - 1)) % 2**bits

    table = [reduce(shifted, range(8), byte << bits - 8) for byte in range(256)]

    def check(data: bytes, value: int = 0) -> int:
        for byte in data:
            value = (value << 8) % 2**bits ^ table[value >> (bits - 8) ^ byte]
        return value

    return check


crc8, crc16, crc32 = crc(0x07, 8), crc(0x8005, 16), crc(0x04C11DB7, 32)


def riff_chunk(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(data) if size is None else size) + data + bytes(len(data) % 2)


def riff(*chunks: bytes, form: bytes = b"WAVE", magic: bytes = b"RIFF", size: int | None = None) -> bytes:
    data = form + b"".join(chunks)
    return magic + struct.pack("<I", len(data) if size is None else size) + data


def wave_format(
    channels: int = 1, rate: int = 16_000, bits: int = 16, tag: int = 1, block: int | None = None, more: bytes = b""
) -> bytes:
    block = channels * bits // 8 if block is None else block
    return struct.pack("<HHIIHH", tag, channels, rate, rate * block % 2**32, block % 2**16, bits) + more


def wave(data: bytes, *, size: int | None = None, whole: int | None = None, before: bytes = b"", **fields) -> bytes:
    """A WAV whose header says what it is told to."""
    return riff(riff_chunk(b"fmt ", wave_format(**fields)), before, riff_chunk(b"data", data, size), size=whole)


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def box(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", len(data) + 8) + kind + data


def with_box(data: bytes, kind: bytes, new: bytes | Callable[[bytes], bytes] | None) -> bytes:
    """An MP4 file whose boxes of a kind have other contents, made of the old if need be; None leaves them out."""
    made, start = b"", 0
    while start < len(data):
        size, found = struct.unpack_from(">I4s", data, start)
        inner = data[start + 8 : start + size]
        if found == kind:
            made += b"" if new is None else box(kind, new(inner) if callable(new) else new)
        elif found in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"mvex", b"moof", b"traf"):
            made += box(found, with_box(inner, kind, new))
        else:
            made += data[start : start + size]
        start += size
    return made


def all_of(kind: str, extension: str, *makers: Callable[[], Items]) -> Items:
    """What is no media file at all, and then what each of `makers` makes."""
    yield from everywhere(kind, extension)
    for make in makers:
        yield from make()


def everywhere(kind: str, extension: str) -> Items:
    """What is no media file at all."""
    generator = np.random.default_rng(0)
    page = "<!DOCTYPE html><html><head><title>404</title></head><body>" + "<p>Not found</p>" * 200 + "</body></html>"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 12345\n"
    yield from named(f"{kind}-{{}}.{extension}", {
        "empty": b"", "of-one-byte": b"\x89", "of-zeros": bytes(100_000), "of-ones": b"\xff" * 100_000,
        "of-noise": generator.bytes(100_000), "of-text": b"not a file of media\n" * 5000,
        "of-one-long-line": b"a" * 1_000_000, "error-page": page.encode(), "git-lfs-pointer": pointer.encode(),
        "of-json": b"[" * 100_000, "of-utf-16": ("\ufeff" + "média 🙂\n" * 1000).encode("utf-16-le"),
    })  # fmt: skip
    yield f"{kind}-without-extension", generator.bytes(3000)


def playlists(target: str) -> dict[str, bytes]:
    """What tells a player to open another file, by kind."""
    media = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n"
    address = f"file://{target}" if target.startswith("/") else target
    texts = {
        "ffconcat": f"ffconcat version 1.0\nfile {target}\n",
        "hls": f"{media}#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n",
        "hls-live": f"{media}#EXTINF:9,\n{address}\n",
        "hls-key": f'{media}#EXT-X-KEY:METHOD=AES-128,URI="{address}"\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n',
        "m3u": f"#EXTM3U\n{target}\n",
        "pls": f"[playlist]\nNumberOfEntries=1\nFile1={target}\nLength1=-1\n",
        "xspf": '<?xml version="1.0"?><playlist version="1" xmlns="http://xspf.org/ns/0/"><trackList><track>'
        f"<location>{address}</location></track></trackList></playlist>",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT9S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" codecs="avc1.42c01e">'
        f"<BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    }
    return {kind: text.encode() for kind, text in texts.items()}


def lists(kind: str, extension: str, disguises: dict[str, str], encoding: str) -> Items:
    """Playlists that name a file of the system, under one extension and under others, and an SDP that does."""
    for player, text in playlists("/etc/passwd").items():
        yield f"{kind}-{player}-naming-passwd.{extension}", text
        for other in disguises.get(player, "").split():
            yield f"{kind}-{player}-naming-passwd-as-{other}.{other}", text
    text = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m={kind} 9 RTP/AVP 96\na=rtpmap:96 {encoding}\na=control:file:///etc/passwd\n"
    )
    for other in (extension, "sdp"):
        yield f"{kind}-session-as-{other}.{other}", text.encode()
