"""Pictures that lie: PNG, JPEG, GIF, WebP, BMP, TIFF, and what else Pillow would open."""

import gzip
import struct
import zlib
from fractions import Fraction
from functools import cache, partial
from io import BytesIO

import av
import numpy as np
from av.codec.context import Flags
from PIL import Image

from .shared import (
    MEGABYTE,
    Items,
    Size,
    all_of,
    attempt,
    damaged,
    lying,
    named,
    packed,
    patched,
    riff,
    riff_chunk,
    wave,
    zlib_of,
)


# Widths and heights of so many million pixels.
WIDTHS = {20: 5000, 50: 10_000, 60: 10_000, 80: 10_000, 120: 12_000, 170: 17_000, 400: 20_000}
LARGE = {millions: (width, millions * 10**6 // width) for millions, width in WIDTHS.items()}
# Bits, type of colours, and bytes of a pixel.
PNG_MODES = {"grey": (8, 0, 1), "rgb": (8, 2, 3), "rgba": (8, 6, 4), "palette": (8, 3, 1), "1-bit": (1, 0, 1 / 8)}
PNG_MODES |= {"16-bit": (16, 0, 2), "16-bit-rgba": (16, 6, 8)}


def picture(seed: int = 0, width: int = 96, height: int = 64) -> np.ndarray:
    """A gradient with noise."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    colours = np.stack([2 * columns, 3 * rows, rows + columns], -1)
    return ((colours + generator.integers(0, 24, colours.shape)) % 256).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """A picture in one of Pillow's formats."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved(kind: str, mode: str = "RGB", size: Size = (96, 64), **options) -> bytes:
    return encoded(Image.fromarray(picture(0, *size)).convert(mode), kind, **options)


def followed_by(*seeds: int, size: Size = (96, 64)) -> dict:
    """Pillow's options for saving other pictures behind the first."""
    return {"save_all": True, "append_images": [Image.fromarray(picture(seed, *size)) for seed in seeds]}


def still(codec: str, pix_fmt: str) -> bytes:
    """A picture by one of FFmpeg's encoders."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 96, 64, pix_fmt, Fraction(1, 10)
    encoder.flags |= Flags.bitexact
    encoder.thread_count = 1
    frame = av.VideoFrame.from_ndarray(picture(), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def exif(
    count: int = 1, kind: int = 3, number: int = 1, value: int = 6, following: int = 0, tag: int = 0x112
) -> bytes:
    """One entry of EXIF data (the orientation by default) in a directory that says that it has `count` of them."""
    entry = struct.pack("<HHII", tag, kind, number, value)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, count) + entry + struct.pack("<I", following)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int, colours: int, method: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, *method))


def png(
    width: int, height: int, stream: bytes, depth: int = 8, colours: int = 0, *, before: bytes = b"", **more
) -> bytes:
    """A PNG whose header says what it is told to, with other chunks before and `after` the pixels."""
    after = more.pop("after", b"")
    header = b"\x89PNG\r\n\x1a\n" + png_header(width, height, depth, colours, **more)
    return header + before + png_chunk(b"IDAT", stream) + after + png_chunk(b"IEND", b"")


def flat_png(mode: str, width: int, height: int, colour: bytes = b"\0") -> bytes:
    """A PNG of one colour, given as the bytes of a pixel (or as one byte, which is repeated)."""
    depth, colours, size = PNG_MODES[mode]
    length = -int(-width * size // 1)
    row = b"\0" + (colour * (length // len(colour) + 1))[:length]
    palette = png_chunk(b"PLTE", bytes(range(6)) * 128) if mode == "palette" else b""
    return png(width, height, zlib_of(row, height), depth, colours, before=palette)


def png_images() -> Items:
    for millions, modes in {
        20: "grey rgb rgba palette 16-bit", 50: "grey rgb palette", 60: "rgb rgba", 80: "grey rgb 16-bit-rgba",
        120: "grey rgb 16-bit", 170: "grey rgb rgba palette 1-bit", 400: "1-bit palette rgb rgba 16-bit",
    }.items():  # fmt: skip
        for mode in modes.split():
            yield f"flat-{millions}-million-pixels-{mode}.png", flat_png(mode, *LARGE[millions], b"\x55")
    yield "row-of-60000.png", flat_png("rgb", 60_000, 1, b"\x10\x80\xf0")
    yield "column-of-60000.png", flat_png("rgb", 1, 60_000, b"\x10\x80\xf0")
    yield "row-of-20-million.png", flat_png("grey", 20_000_000, 1)
    yield "column-of-20-million.png", flat_png("grey", 1, 20_000_000)
    for name, size in {
        "zero": (0, 0), "no-width": (0, 9), "2-to-the-31": (2**31 - 1, 2**31 - 1), "9000": (9000, 9000),
        "negative": (2**32 - 1, 2**32 - 5),
    }.items():  # fmt: skip
        yield f"png-declares-{name}.png", png(*size, zlib.compress(bytes(100)))
    grey = zlib.compress(bytes(65 * 64))
    small = partial(png, 64, 64)
    bomb = zlib_of(MEGABYTE, 1000)
    text = png_chunk(b"zTXt", b"Comment\0\0" + bomb)

    def animation(count: int, *frame: int) -> bytes:
        control = struct.pack(">IIIIIHHBB", 0, 64, 64, *frame, 2, 1)
        return png_chunk(b"acTL", struct.pack(">II", count, 0)) + png_chunk(b"fcTL", control)

    for name, before in {
        "ztxt-of-one-gigabyte": text, "itxt-of-one-gigabyte": png_chunk(b"iTXt", b"Comment\0\1\0en\0c\0" + bomb),
        "iccp-of-one-gigabyte": png_chunk(b"iCCP", b"profile\0\0" + bomb),
        "text-of-1500-kilobytes": png_chunk(b"tEXt", b"Comment\0" + b"a" * 1_500_000),
        "100-ztxt-of-a-megabyte": png_chunk(b"zTXt", b"Comment\0\0" + zlib_of(bytes(1_000_000), 1)) * 100,
        "20000-text-chunks": b"".join(png_chunk(b"tEXt", b"key%d\0value" % index) for index in range(20_000)),
        "exif-loop": png_chunk(b"eXIf", exif(following=8)[6:]),
        "exif-of-65535-entries": png_chunk(b"eXIf", exif(65_535)[6:]),
        "exif-value-of-4-gigabytes": png_chunk(b"eXIf", exif(number=2**32 - 1, value=2**31)[6:]),
        "gamma-zero": png_chunk(b"gAMA", bytes(4)), "physical-size-zero": png_chunk(b"pHYs", bytes(9)),
        "two-headers": png_header(9999, 9999, 8, 6), "transparency-too-long": png_chunk(b"tRNS", bytes(5000)),
        "unknown-critical-chunk": png_chunk(b"ABCD", b"must be understood"),
        "apng-of-2-to-the-31-frames": animation(2**31 - 1, 0, 0, 0, 0),
        "apng-frame-outside": animation(2, 2**31 - 1, 2**31 - 1, 1, 0),
    }.items():  # fmt: skip
        yield f"png-{name}.png", small(grey, before=before)
    yield from named("png-{}.png", {
        "ztxt-after-the-pixels": small(grey, after=text),
        "pixels-split-by-byte": small(b"", before=b"".join(png_chunk(b"IDAT", bytes([byte])) for byte in grey)),
        "palette-missing": small(grey, colours=3),
        "palette-index-too-large": small(
            zlib.compress((b"\0" + b"\xff" * 64) * 64), colours=3, before=png_chunk(b"PLTE", b"\1\2\3")
        ),
        "filter-unknown": small(zlib.compress(b"\x63" * 65 * 64)), "depth-3": small(grey, 3),
        "colour-type-5": small(grey, colours=5), "compression-unknown": small(grey, method=(9, 0, 0)),
        "interlaced-50-million-pixels": png(10_000, 5000, zlib_of(MEGABYTE, 49), method=(0, 0, 1)),
        "too-many-pixels": png(8, 8, zlib_of(MEGABYTE, 500)),
        "without-pixels": small(b"")[:33] + png_chunk(b"IEND", b""),
        "chunk-of-4-gigabytes": patched(small(grey), b"IDAT", -4, b"\xff" * 4),
        "checksum-wrong": patched(small(grey), b"IDAT", -8, b"\0\0\0\0"),
        "followed-by-a-megabyte": small(grey) + bytes(1_000_000),
        "orientation-6": png(64, 32, zlib.compress(bytes(65 * 32)), before=png_chunk(b"eXIf", exif()[6:])),
        "palette-with-transparency": saved("PNG", "P", transparency=bytes(range(256))),
        "palette-with-one-transparent-colour": saved("PNG", "P", transparency=7),
        "grey-with-transparent-colour": saved("PNG", "L", transparency=7), "16-bit": saved("PNG", "I;16"),
        "1-bit": saved("PNG", "1"), "grey-with-alpha": saved("PNG", "LA"), "one-pixel": saved("PNG", size=(1, 1)),
        "animated": saved("PNG", **followed_by(1, 2), duration=50), "in-gzip": gzip.compress(saved("PNG"), mtime=0),
    })  # fmt: skip
    loud = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    loud[..., 3] = 0
    yield "transparent-over-loud-colours.png", encoded(Image.fromarray(loud), "PNG")
    yield "jpeg-named-png.png", saved("JPEG")
    yield "png-named-jpeg.jpg", saved("PNG")
    yield "wave-named-png.png", wave(bytes(3200))
    yield from damaged("png", "png", saved("PNG"), (10, 35, 60, 85, 99), 4)


# Of a progressive scan: the first and the last coefficient, and how far they were approximated before and are now.
Bands = list[tuple[int, int, int, int]]


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def end_of_blocks(count: int) -> bytes:
    """The data of a progressive scan in which so many blocks have nothing in the band; see `flat_jpeg`."""
    bits = []
    while count:
        run = min(count, 32_767)
        bits.append(f"{run.bit_length() - 1:04b}" + f"{run:b}"[1:])
        count -= run
    return packed("".join(bits), last="1").replace(b"\xff", b"\xff\0")


def flat_jpeg(width: int, height: int, channels: int = 3, halved: bool = False, bands: Bands | None = None) -> bytes:
    """A grey JPEG, baseline or, where bands are given, progressive.

    Of the Huffman tables, the first says a difference of zero, and in a baseline picture the second the end of a
    block, by one zero bit: all the data of a scan are zeros. In a progressive picture the second table has the ends of
    2^n blocks, each in four bits.
    """
    side = 16 if halved else 8
    blocks = -(-width // side) * -(-height // side) * (channels + 3 if halved else channels)
    frame = struct.pack(">BHHB", 8, height, width, channels)
    for index in range(channels):
        frame += bytes([index + 1, 0x22 if halved and not index else 0x11, 0])
    first = bytes([0, 1, *[0] * 15, 0])
    second = bytes([16, 1, *[0] * 15, 0]) if bands is None else bytes([16, 0, 0, 0, 15, *[0] * 12, *range(0, 240, 16)])
    made = b"\xff\xd8" + jpeg_segment(0xDB, b"\0" + b"\1" * 64)
    made += jpeg_segment(0xC0 if bands is None else 0xC2, frame) + jpeg_segment(0xC4, first + second)

    def scan(components: range, band: tuple[int, int, int, int], data: bytes) -> bytes:
        heading = bytes([len(components)]) + b"".join(bytes([index + 1, 0]) for index in components)
        return jpeg_segment(0xDA, heading + bytes([band[0], band[1], band[2] << 4 | band[3]])) + data

    if bands is None:
        return made + scan(range(channels), (0, 63, 0, 0), packed("0" * 2 * blocks, last="1")) + b"\xff\xd9"
    scans = [scan(range(channels), (0, 0, 0, 0), packed("0" * blocks, last="1"))]
    empty = {size: end_of_blocks(-(-width // size) * -(-height // size)) for size in (8, 16)}
    for band in bands:
        for index in range(channels):
            scans.append(scan(range(index, index + 1), band, empty[16 if halved and index else 8]))
    return made + b"".join(scans) + b"\xff\xd9"


def jpeg_images() -> Items:
    whole = (1, 63, 0, 0)
    each = [(index, index, 0, 0) for index in range(1, 64)]
    steps = [(0, 13), *((step + 1, step) for step in range(12, -1, -1))]
    refined = [(index, index, *step) for index in range(1, 64) for step in steps]
    small = flat_jpeg(64, 64)
    opened, rest = small[:2], small[2:]
    profile = [jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes([index, 255]) + bytes(5000)) for index in range(1, 256)]
    pictures = struct.pack(">HHIIHHIIHHII", 0xB000, 7, 4, 0x30313030, 0xB001, 4, 1, 2**31, 0xB002, 7, 2**32 - 1, 50)
    pictures = b"MPF\0MM\0*" + struct.pack(">IH", 8, 3) + pictures + bytes(4)
    restarts = jpeg_segment(0xDD, b"\0\1") + b"\xff\xc0"
    yield from named("jpeg-{}.jpg", {
        "progressive-flat-8000": flat_jpeg(8000, 8000, bands=[whole]),
        "progressive-flat-13000": flat_jpeg(13_000, 13_000, bands=[whole]),
        "progressive-of-189-scans": flat_jpeg(8000, 8000, bands=each),
        "progressive-of-2646-scans": flat_jpeg(4000, 4000, bands=refined),
        "progressive-of-10000-scans": flat_jpeg(2000, 2000, 1, bands=[whole] * 10_000),
        "baseline-flat-8000": flat_jpeg(8000, 8000), "baseline-flat-13000-grey": flat_jpeg(13_000, 13_000, 1),
        "baseline-flat-13000-halved": flat_jpeg(13_000, 13_000, halved=True),
        "baseline-flat-10000-cmyk": flat_jpeg(10_000, 10_000, 4), "row-of-65500": flat_jpeg(65_500, 1),
        "column-of-65500": flat_jpeg(1, 65_500), "of-2-channels": flat_jpeg(64, 64, 2),
        "said-to-be-arithmetic": patched(flat_jpeg(9000, 9000)[:400], b"\xff\xc0", 1, b"\xc9"),
        "quantised-by-zero": patched(saved("JPEG"), b"\xff\xdb", 5, bytes(64)),
        "with-two-frames": opened + jpeg_segment(0xC0, bytes([8, 99, 99, 99, 99, 1, 1, 17, 0])) + rest,
        "of-comments": opened + jpeg_segment(0xFE, b"a") * 100_000 + rest,
        "of-fill-bytes": opened + b"\xff" * 1_000_000 + rest,
        "thumbnail-lies": opened + jpeg_segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\xff\xff" + b"a" * 9) + rest,
        "profile-in-255-parts": opened + b"".join(profile) + rest,
        "profile-part-missing": opened + b"".join(profile[::2][:5]) + rest,
        "of-2-to-the-31-pictures": opened + jpeg_segment(0xE2, pictures) + rest, "cmyk": saved("JPEG", "CMYK"),
        "grey": saved("JPEG", "L"), "without-end": saved("JPEG")[:-2], "of-two-pictures": saved("JPEG") * 2,
        "starting-twice": b"\xff\xd8" + saved("JPEG"),
        "restarting-at-every-block": saved("JPEG").replace(b"\xff\xc0", restarts, 1),
        "lossless": partial(still, "ljpeg", "bgr24"),
    })  # fmt: skip
    for name, (offset, new) in {
        "of-12-bits": (4, b"\x0c"), "of-16-bits": (4, b"\x10"),
        "declares-65500": (5, struct.pack(">HH", 65_500, 65_500)),
        "declares-12000-has-little": (5, struct.pack(">HH", 12_000, 12_000)), "declares-no-height": (5, b"\0\0"),
        "of-255-channels": (9, b"\xff"), "sampled-15-by-15": (11, b"\xff"), "sampled-0-by-0": (11, b"\0"),
        "said-to-be-lossless": (1, b"\xc3"),
    }.items():  # fmt: skip
        yield f"jpeg-{name}.jpg", patched(small, b"\xff\xc0", offset, new)
    for name, data in {
        "loop": exif(following=8), "of-65535-entries": exif(65_535),
        "value-of-4-gigabytes": exif(number=2**32 - 1, value=2**31),
        "pointer-to-itself": exif(tag=0x8769, kind=4, value=8), "resolution-by-zero": exif(tag=0x11A, kind=5, value=8),
        "orientation-5": exif(value=5), "orientation-99": exif(value=99), "of-nothing": b"Exif\0\0",
    }.items():  # fmt: skip
        yield f"jpeg-exif-{name}.jpg", opened + jpeg_segment(0xE1, data) + flat_jpeg(64, 32)[2:]
    yield "jpeg-ls.jls", partial(still, "jpegls", "rgb24")
    yield "mpo-of-two-pictures.mpo", partial(saved, "MPO", **followed_by(1, size=(30, 20)))
    yield from damaged("jpeg", "jpg", saved("JPEG"), (10, 35, 60, 85, 99), 4)
    yield from damaged("jpeg-progressive", "jpg", saved("JPEG", progressive=True), (15, 50, 90))
    yield from damaged("jpeg-cmyk", "jpg", saved("JPEG", "CMYK"), (50,), 2)


@cache
def lzw_zeros(pixels: int) -> bytes:
    """Data of a GIF whose pixels are all of the first of at most four colours.

    The table is never cleared, so that in the end every twelve bits say 4091 pixels.
    """
    codes = ["001", "000"]  # lowest bit first: clear, one pixel
    left, code = pixels - 1, 6
    while left > 0:
        length = min(left, code - 4)
        codes.append(f"{length + 4 if length > 1 else 0:0{code.bit_length()}b}"[::-1])
        left -= length
        code = min(code + 1, 4095)
    codes.append(f"{5:0{code.bit_length()}b}"[::-1])
    data = packed("".join(codes), "little")
    return b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)) + b"\0"


def gif(canvas: Size, *frames: tuple[int, int, int, int], size: int = 2, data: bytes = b"") -> bytes:
    """A GIF with frames (left, top, width, height) of one colour each."""
    made = [b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x91, 0, 0) + bytes(range(0, 240, 20))]
    made.append(b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0")
    for place in frames:
        made.append(b"!\xf9\4\4\5\0\0\0," + struct.pack("<HHHHB", *place, 0) + bytes([size]))
        made.append(data or lzw_zeros(place[2] * place[3]))
    return b"".join([*made, b";"])


def gif_images() -> Items:
    small = gif((16, 16), (0, 0, 16, 16))
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 4000 + b"\0!\xff"
    films = followed_by(*range(4), size=(48, 32))
    yield from named("gif-{}.gif", {
        "canvas-of-65535": gif((65_535, 65_535), (0, 0, 4, 4)),
        "frame-of-65535": gif((16, 16), (0, 0, 65_535, 65_535), data=lzw_zeros(100)),
        "frame-outside": gif((16, 16), (500, 500, 4, 4)),
        "frame-far-outside": gif((16, 16), (0, 0, 16, 16), (65_000, 65_000, 500, 500)),
        "canvas-of-nothing": gif((0, 0), (0, 0, 4, 4)),
        "frame-of-nothing": gif((16, 16), (0, 0, 0, 0), data=lzw_zeros(1)),
        "flat-13000": gif((13_000, 13_000), (0, 0, 13_000, 13_000)),
        "flat-20000": gif((20_000, 20_000), (0, 0, 20_000, 20_000)),
        "of-50-frames-of-8000": gif((8000, 8000), *[(0, 0, 8000, 8000)] * 50),
        "of-20000-tiny-frames": gif((16, 16), *[(3, 3, 2, 2)] * 20_000),
        "growing": gif((16, 16), (0, 0, 16, 16), (0, 0, 10_000, 10_000)),
        "code-size-12": gif((16, 16), (0, 0, 16, 16), size=12),
        "code-size-255": gif((16, 16), (0, 0, 16, 16), size=255), "without-frames": gif((16, 16)),
        "without-end": small[:-1], "of-comments": small[:-1] + b"!\xfe\xff" + b"a" * 255 + b"\xff" * 300_000,
        "comment-of-a-megabyte": small.replace(b"!\xff", comment, 1),
        "animated": saved("GIF", size=(48, 32), **films, duration=30, loop=0),
        "with-transparency": saved("GIF", "P", transparency=3),
    })  # fmt: skip
    yield from damaged("gif", "gif", saved("GIF", "P"), (30, 90))


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    return riff(*(riff_chunk(*chunk) for chunk in chunks), form=b"WEBP")


def flat_vp8l(width: int, height: int) -> bytes:
    """A lossless WebP picture of one colour: with one symbol in every table a pixel takes no bit."""
    fields = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 1), (0, 3), (0, 3)]
    for symbol in (200, 30, 60, 255, 0):
        fields += [(1, 1), (0, 1), (1, 1), (symbol, 8)]
    return packed("".join(f"{value:0{size}b}"[::-1] for value, size in fields), "little")


def animated_webp(canvas: Size, *frames: tuple[int, int, int, int]) -> bytes:
    """An animated WebP with frames (left, top, width, height) of one colour each."""

    def three(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    chunks = [(b"VP8X", b"\x02\0\0\0" + three(canvas[0] - 1, canvas[1] - 1)), (b"ANIM", bytes(6))]
    for left, top, width, height in frames:
        place = three(left // 2, top // 2, width - 1, height - 1, 40) + b"\0"
        chunks.append((b"ANMF", place + riff_chunk(b"VP8L", flat_vp8l(width, height))))
    return webp(*chunks)


def webp_images() -> Items:
    small = (b"VP8L", flat_vp8l(16, 16))
    lie = webp((b"VP8X", bytes(4) + b"\xff\xff\xff" * 2), small)
    loop = webp((b"VP8X", b"\x08\0\0\0" + bytes([15, 0, 0] * 2)), small, (b"EXIF", exif(following=8)))
    lossy, lossless = (attempt(saved, "WEBP", lossless=lossless) for lossless in (False, True))
    largest = struct.pack("<HH", 16_383, 16_383)
    yield from named("webp-{}.webp", {
        "flat-16383": webp((b"VP8L", flat_vp8l(16_383, 16_383))),
        "flat-13000": webp((b"VP8L", flat_vp8l(13_000, 13_000))), "flat-7000": webp((b"VP8L", flat_vp8l(7000, 7000))),
        "row-of-16383": webp((b"VP8L", flat_vp8l(16_383, 1))),
        "canvas-of-13000": animated_webp((13_000, 13_000), (0, 0, 16, 16), (16, 16, 16, 16)),
        "canvas-of-16-million": animated_webp((2**24, 200), (0, 0, 16, 16)),
        "frame-outside": animated_webp((16, 16), (4000, 4000, 16, 16)),
        "of-1000-frames-of-8000": animated_webp((8000, 8000), *[(0, 0, 8000, 8000)] * 1000),
        "of-10000-tiny-frames": animated_webp((16, 16), *[(0, 0, 16, 16)] * 10_000), "canvas-lies": lie,
        "declares-4-gigabytes": patched(lie, b"RIFF", 4, b"\xff" * 4), "exif-loop": loop,
        "with-alpha": partial(saved, "WEBP", "RGBA"),
        "animated": partial(saved, "WEBP", **followed_by(1, 2), duration=40),
    })  # fmt: skip
    yield from lying("webp-{}.webp", lossy, {"lossy-declares-16383": (b"\x9d\x01\x2a", 3, largest)})
    yield from damaged("webp-lossy", "webp", lossy, (40, 95))
    yield from damaged("webp-lossless", "webp", lossless, (40, 95))


def bmp(width: int, height: int, bits: int, data: bytes, compression: int = 0, palette: int = 256, **lies) -> bytes:
    """A BMP whose headers say what they are told to."""
    colours = bytes(range(256)) * 4 if bits <= 8 else b""
    start = lies.get("start", 54 + len(colours))
    shape = struct.pack("<IiiHH", lies.get("header", 40), width, height, lies.get("planes", 1), bits)
    count = lies.get("colours", palette if bits <= 8 else 0)
    header = shape + struct.pack("<IIiiII", compression, len(data), 2835, 2835, count, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(colours) + len(data), 0, 0, start) + header + colours + data


def bmp_images() -> Items:
    rows = picture(0, 64, 48).tobytes()
    small = partial(bmp, 64, 48)
    row = b"\xff\x07" * 39 + b"\x37\x07\0\0"
    yield from named("bmp-{}.bmp", {
        "upside-down": bmp(64, -48, 24, rows), "32-bits": small(32, bytes(range(256)) * 48),
        "negative-width": bmp(-64, 48, 24, rows), "height-of-2-to-the-31": bmp(64, -(2**31), 24, rows),
        "declares-12000": bmp(12_000, 12_000, 24, rows), "declares-2-to-the-31": bmp(2**31 - 1, 2**31 - 1, 1, rows),
        "of-nothing": bmp(0, 0, 24, b""), "pixels-at-4-gigabytes": small(24, rows, start=2**32 - 1),
        "pixels-at-the-header": small(24, rows, start=0), "header-of-4-gigabytes": small(24, rows, header=2**32 - 1),
        "of-2-to-the-32-colours": small(8, rows, colours=2**32 - 1), "of-3-bits": small(3, rows),
        "of-65535-planes": small(24, rows, planes=65_535), "compression-unknown": small(24, rows, compression=99),
        "bit-fields-of-zero": small(32, bytes(12) + rows, compression=3),
        "runs": small(8, (b"\x40\x07\0\0" * 48) + b"\0\1", compression=1),
        "runs-of-4-bits": small(4, (b"\x40\x21\0\0" * 48) + b"\0\1", compression=2),
        "runs-too-long": small(8, b"\xff\x07" * 100_000, compression=1),
        "runs-of-nothing": small(8, b"\0\0" * 500_000, compression=1),
        "runs-jumping-outside": small(8, b"\0\2\xff\xff" * 1000 + b"\0\1", compression=1),
        "runs-of-100-million-pixels": bmp(10_000, 10_000, 8, row * 10_000 + b"\0\1", compression=1),
        "runs-end-at-once": bmp(13_000, 13_000, 8, b"\0\1", compression=1),
        "of-one-bit-and-12-million-pixels": bmp(4000, 3000, 1, bytes(1_500_000), palette=2),
    })  # fmt: skip
    yield from damaged("bmp", "bmp", saved("BMP"), (1, 50), 2)


def entry(kind: int, count: int, value: int) -> bytes:
    """What a TIFF says of a tag, true or not."""
    return struct.pack("<HII", kind, count, value)


def tiff(data: bytes, tags: dict[int, int | tuple[int, ...] | bytes], following: int = 0) -> bytes:
    """A TIFF with its pixels at the eighth byte and one directory behind them."""
    data += bytes(len(data) % 2)
    directory, values = struct.pack("<H", len(tags)), b""
    for tag, value in sorted(tags.items()):
        if not isinstance(value, bytes):
            value = value if isinstance(value, tuple) else (value,)
            kind, code = (3, "H") if max(value) < 65_536 else (4, "I")
            raw = struct.pack(f"<{len(value)}{code}", *value).ljust(4, b"\0")
            if len(raw) > 4:
                place = 8 + len(data) + 2 + 12 * len(tags) + 4 + len(values)
                values += raw + bytes(len(raw) % 4)
                raw = struct.pack("<I", place)
            value = struct.pack("<HI", kind, len(value)) + raw
        directory += struct.pack("<H", tag) + value
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", following) + values


def strip(width: int, height: int, data: bytes, tags: dict | None = None, following: int = 0) -> bytes:
    """A TIFF of one strip of one byte a pixel, unless its tags say otherwise."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 278: height, 279: len(data)} | (tags or {})
    channels = len(tags[258]) if isinstance(tags[258], tuple) else 1
    return tiff(data, {277: channels} | tags, following)


def tiff_images() -> Items:
    # 258 are the bits, 259 the compression (8: zlib), 262 what colours mean, 273 where strips start, 277 how many
    # channels there are, 278 rows in a strip, 279 bytes in it, 339 the kind of numbers.
    grey = bytes(range(64)) * 64
    small = partial(strip, 64, 64)
    deflated = zlib.compress(grey)
    deflated_rgb = zlib_of(bytes(36_000), 10_000)
    colours, black = {258: (8, 8, 8), 262: 2}, Image.new("L", (5000, 4000))
    pages = {"save_all": True, "append_images": [Image.new("L", (8, 8), shade) for shade in range(99)]}
    yield from named("tiff-{}.tif", {
        "16-bit": small(np.arange(4096).astype(np.uint16).tobytes(), {258: 16}),
        "int32": small((np.arange(4096).astype(np.int32) * 100_000).tobytes(), {258: 32}),
        "float-64-bits": small(np.linspace(0, 1, 4096).tobytes(), {258: 64, 339: 3}),
        "signed-16-bit": small(np.arange(-2048, 2048).astype(np.int16).tobytes(), {258: 16, 339: 2}),
        "1-bit": small(grey[:512], {258: 1}), "4-bit": small(grey[:2048], {258: 4}),
        "of-0-bits": small(grey, {258: 0}), "of-65535-bits": small(grey, {258: 65_535}),
        "lab": strip(32, 32, grey[:3072], {258: (8, 8, 8), 262: 8}),
        "five-channels": strip(16, 16, grey[:1280], {258: (8,) * 5, 262: 2, 338: (0, 0)}),
        "deflate": small(deflated, {259: 8}), "deflate-predicted": small(deflated, {259: 8, 317: 2}),
        "deflate-predictor-unknown": small(deflated, {259: 8, 317: 77}),
        "lzw-20-million-pixels": partial(encoded, black, "TIFF", compression="tiff_lzw"),
        "deflate-120-million-pixels-rgb": strip(12_000, 10_000, deflated_rgb, colours | {259: 8}),
        "declares-2-to-the-31": strip(2**31 - 1, 2**31 - 1, grey), "declares-12000": strip(12_000, 12_000, grey),
        "of-nothing": strip(0, 0, b""), "directory-following-itself": small(grey, following=8 + len(grey)),
        "planes-apart": strip(32, 32, grey[:3072], colours | {273: (8, 1032, 2056), 279: (1024,) * 3, 284: 2}),
        "big": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**40) + bytes(64),
        "of-100-pages": saved("TIFF", "L", (8, 8), **pages), "white-is-zero": small(grey, {262: 0}),
        "palette-missing": small(grey, {262: 3}), "strips-at-4-gigabytes": small(grey, {273: 2**32 - 1}),
        "of-2-to-the-32-strips": small(grey, {tag: entry(4, 2**32 - 1, 8) for tag in (273, 279)} | {278: 1}),
        "strip-of-4-gigabytes": small(grey, {279: 2**32 - 1}), "no-rows-per-strip": small(grey, {278: 0}),
        "of-65535-channels": small(grey, {277: 65_535}),
        "resolution-by-zero": small(grey, {282: entry(5, 1, 60_000), 283: entry(5, 1, 0)}),
        "tag-of-4-gigabytes": small(grey, {270: entry(2, 2**32 - 1, 8)}),
        "tag-of-unknown-kind": small(grey, {270: entry(99, 5, 8)}),
        "directory-inside-itself": small(grey, {330: entry(4, 1, 8 + len(grey))}),
        "fax-170-million-pixels": strip(17_000, 10_000, b"\xff" * 1250 + b"\0\x10\x01", {258: 1, 259: 4, 262: 0}),
        "fax-row-of-100-million": strip(100_000_000, 1, b"\x80\x08\0\x80", {258: 1, 259: 4, 262: 0}),
    })  # fmt: skip
    for name, value in {"0-to-1": 1.0, "huge": 1e38, "nan": np.nan, "infinite": np.inf}.items():
        numbers = np.linspace(0, 1, 4096, dtype=np.float32)
        numbers[::5] = value
        yield f"tiff-float-{name}.tif", small(numbers.tobytes(), {258: 32, 339: 3})
    for mode in ("tiff_lzw", "packbits", "jpeg", "group4", "tiff_adobe_deflate", "zstd", "lzma"):
        name = mode.removeprefix("tiff_").replace("_", "-")
        colours = "1" if mode == "group4" else "RGB"
        yield f"tiff-by-pillow-{name}.tif", partial(saved, "TIFF", colours, compression=mode)
    for millions in (50, 120, 170, 400):
        width, height = LARGE[millions]
        stream = zlib_of(bytes(width), height)
        yield f"tiff-deflate-{millions}-million-pixels.tif", strip(width, height, stream, {259: 8})
    row = zlib.compress(bytes(1000))
    tags = {259: 8, 273: (8,) * 20_000, 278: 1, 279: (len(row),) * 20_000}
    yield "tiff-of-20000-strips-of-the-same.tif", strip(1000, 20_000, row, tags)
    tiles = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1}
    places = {322: 32, 323: 32, 324: (8, 1032, 2056, 3080), 325: (1024,) * 4}
    yield "tiff-tiled.tif", tiff(grey, tiles | places)
    yield "tiff-tiles-of-2-to-the-31.tif", tiff(grey, tiles | places | {322: 2**31 - 16, 323: 2**31 - 16})
    yield "tiff-tile-of-nothing.tif", tiff(grey, tiles | places | {322: 0, 323: 0})
    stream = zlib_of(bytes(12_000), 12_000)
    places = {259: 8, 322: 12_000, 323: 12_000, 324: 8, 325: len(stream)}
    yield "tiff-tile-of-12000.tif", tiff(stream, tiles | places)
    yield from damaged("tiff", "tif", saved("TIFF"), (5, 50, 99))
    yield from damaged("tiff-lzw", "tif", attempt(saved, "TIFF", compression="tiff_lzw"), (50,), 2)


def plain_images() -> Items:
    """Netpbm, icons, and what else is a short heading before the pixels."""
    numbers = picture(0, 16, 16)
    yield from named("ppm-{}.ppm", {
        "plain": b"P3 16 16 255\n" + " ".join(map(str, numbers.ravel())).encode(),
        "plain-numbers-too-large": b"P3 16 16 255\n" + b"99999999999999999999 " * 768,
        "plain-one-number": b"P3 16 16 255\n" + b"9" * 1_000_000,
        "declares-12000": b"P6 12000 12000 255\n" + bytes(1000),
        "declares-many-digits": b"P6 " + b"9" * 5000 + b" 1 255\n" + bytes(1000),
        "negative": b"P6 -16 -16 255\n" + bytes(1000), "greatest-value-zero": b"P6 16 16 0\n" + bytes(1000),
        "greatest-value-1": b"P6 16 16 1\n" + bytes(1000),
    })  # fmt: skip
    yield "pgm-16-bit.pgm", b"P5 16 16 65535\n" + numbers[..., :2].tobytes()
    yield "pgm-greatest-value-1000.pgm", b"P5 16 16 1000\n" + numbers[..., :2].tobytes()
    yield "pgm-comment-of-a-megabyte.pgm", b"P5 #" + b"a" * 1_000_000 + b"\n16 16 255\n" + bytes(256)
    yield "pbm-of-32-million-pixels-cut.pbm", b"P4 4000 8000\n" + b"\x55" * (500 * 3999)
    yield "pfm-of-nan.pfm", b"Pf\n16 16\n-1.0\n" + np.full(256, np.nan, np.float32).tobytes()
    yield "pfm-scale-zero.pfm", b"Pf\n16 16\n0.0\n" + bytes(1024)
    heading = b"P7\nWIDTH 12000\nHEIGHT 12000\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"
    yield "pam-12000.pam", heading + bytes(99)
    names = ("SIMPLE  =  T", "BITPIX  =  -64", "NAXIS   =  2", "NAXIS1  =  12000", "NAXIS2  =  12000", "END")
    cards = "".join(f"{card:<80}" for card in names)
    yield "fits-declares-12000.fits", cards.ljust(2880).encode() + bytes(2880)
    heading = struct.pack("<IHHHHHH", 128, 0xAF12, 65_535, 20_000, 20_000, 8, 3)
    yield "fli-of-65535-frames.fli", heading.ljust(2000, b"\0")
    yield "qoi-declares-20000.qoi", b"qoif" + struct.pack(">IIBB", 20_000, 20_000, 4, 0) + b"\xfd" * 10_000
    heading = b"qoif" + struct.pack(">IIBB", 12_000, 10_000, 3, 0)
    yield "qoi-flat-120-million-pixels.qoi", heading + b"\xfd" * 1_935_484 + bytes(7) + b"\1"


def layered_images() -> Items:
    """Icons, PSD and TGA."""
    large = flat_png("rgb", *LARGE[60], b"\x55")
    size = len(large)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, size, 22) + large
    yield "icon-with-60-million-pixels.ico", icon
    yield from lying("icon-{}.ico", icon[:3000], {
        "of-65535-entries": (b"\0\0\1\0", 4, b"\xff\xff"),
        "entry-of-4-gigabytes": (b"\0\0\1\0", 14, struct.pack("<II", 2**32 - 1, 22)),
        "inside-itself": (b"\0\0\1\0", 14, struct.pack("<II", 3000, 0)),
    })  # fmt: skip
    yield "cursor-cut.cur", b"\0\0\2" + icon[3:3000]
    yield from named("icns-{}.icns", {
        "with-60-million-pixels": b"icns" + struct.pack(">I4sI", size + 16, b"ic10", size + 8) + large,
        "blocks-of-nothing": b"icns" + struct.pack(">I", 8 + 80_000) + b"ic10\0\0\0\0" * 10_000,
        "block-of-4-gigabytes": b"icns" + struct.pack(">I", 100) + b"it32\xff\xff\xff\xff" + bytes(84),
    })  # fmt: skip

    def psd(width: int, height: int, channels: int) -> bytes:
        return b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", channels, height, width, 8, 3) + bytes(8)

    yield from named("psd-{}.psd", {
        "of-300000": psd(300_000, 300_000, 3) + bytes(6) + bytes(10_000),
        "of-12000": psd(12_000, 12_000, 3) + bytes(4) + b"\0\1" + bytes(10_000),
        "of-56-channels": psd(64, 64, 56) + bytes(6) + bytes(10_000),
        "compression-unknown": psd(64, 64, 3) + bytes(4) + b"\0\x63" + bytes(10_000),
        "of-32767-layers": psd(64, 64, 3) + struct.pack(">IIh", 2**31, 2**31, 32_767) + bytes(5000),
    })  # fmt: skip

    def tga(kind: int, width: int, height: int, bits: int, *palette: int, alpha: int = 0) -> bytes:
        colours = palette or (0, 0, 0, 0)
        return struct.pack("<BBBHHBHHHHBB", 0, colours[0], kind, *colours[1:], 0, 0, width, height, bits, alpha)

    row = b"\xff\x55" * (12_000 // 128) + b"\xdf\x55"
    yield from named("tga-{}.tga", {
        "runs-of-120-million-pixels": tga(11, 12_000, 10_000, 8) + row * 10_000,
        "declares-65535": tga(2, 65_535, 65_535, 32, alpha=8) + bytes(99),
        "palette-too-short": tga(1, 64, 64, 8, 1, 65_535, 65_535, 24) + bytes(99),
    })  # fmt: skip


def written_images() -> Items:
    """Pictures that are programs or texts."""

    def eps(program: str, side: int = 64) -> bytes:
        box = f"%%BoundingBox: 0 0 {side} {side}"
        return f"%!PS-Adobe-3.0 EPSF-3.0\n{box}\n%%EndComments\n{program}\n".encode()

    yield from named("eps-{}.eps", {
        "never-ending": eps("{ } loop"),
        "reading-a-file": eps("(/etc/passwd) (r) file 100 string readline pop show showpage"),
        "filling-memory": eps("0 { 10000000 string } loop"), "box-of-100000": eps("showpage", 100_000),
        "of-comments": b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"%%A: a\n" * 200_000,
    })  # fmt: skip
    entities = "".join(f'<!ENTITY a{index + 1} "{f"&a{index};" * 10}">' for index in range(9))
    text = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a0 "a">{entities}]><svg>&a9;</svg>'
    yield "svg-of-entities.svg", text.encode()
    yield "xbm-declares-12000.xbm", b"#define a_width 12000\n#define a_height 12000\nstatic char a_bits[] = {\n0x00};"
    lines = b'"12000 12000 2 1",\n"a c #ff0000",\n"b c None",\n"a"};'
    yield "xpm-declares-12000.xpm", b"/* XPM */\nstatic char *a[] = {\n" + lines


def encoded_images() -> Items:
    """Pictures by encoders that not everybody has."""
    made = {}
    for kind in ("DDS", "IM", "PCX", "SGI", "SPIDER", "MSP", "TGA"):
        made[kind] = attempt(saved, kind, {"SPIDER": "L", "MSP": "1"}.get(kind, "RGB"))
        yield from damaged(kind.lower(), kind.lower(), made[kind], (60,), 2)
    for kind, mark, offset, form, side in (
        ("SGI", b"\x01\xda", 6, ">HH", 20_000), ("PCX", b"\n\5", 8, "<HH", 19_999),
        ("DDS", b"DDS ", 12, "<II", 20_000),
    ):  # fmt: skip
        lie = {kind.lower(): (mark, offset, struct.pack(form, side, side))}
        yield from lying("{0}-declares-20000.{0}", made[kind], lie)
    if wavelets := attempt(saved, "JPEG2000"):
        black = Image.new("L", (5000, 4000))
        yield "jpeg2000-16-bit.jp2", saved("JPEG2000", "I;16")
        yield "jpeg2000-bare.j2k", saved("JPEG2000", no_jp2=True)
        yield "jpeg2000-flat-20-million-pixels.jp2", encoded(black, "JPEG2000", tile_size=(1000, 1000))
        for name, sizes in {
            "declares-60000": (60_000, 60_000, 0, 0, 60_000, 60_000),
            "declares-13000": (13_000, 13_000, 0, 0, 13_000, 13_000), "tiles-of-one-pixel": (9999, 9999, 0, 0, 1, 1),
            "of-2-to-the-32": (2**32 - 1, 2**32 - 1, 2**32 - 65, 2**32 - 65, 2**32 - 1, 2**32 - 1),
        }.items():  # fmt: skip
            yield f"jpeg2000-{name}.jp2", patched(wavelets, b"\xff\x51", 6, struct.pack(">6I", *sizes))
        yield "jpeg2000-of-16384-channels.jp2", patched(wavelets, b"\xff\x51", 38, b"\x40\0")
        yield from damaged("jpeg2000", "jp2", wavelets)
    options, black = {"codec": "aom", "max_threads": 1}, Image.new("L", (2500, 2000))
    modern = attempt(saved, "AVIF", **options)
    yield from lying("avif-{}.avif", modern, {
        "declares-60000": (b"ispe", 8, struct.pack(">II", 60_000, 60_000)),
        "of-65535-items": (b"iinf", 8, b"\xff\xff"), "item-at-4-gigabytes": (b"iloc", 18, b"\xff" * 8),
    })  # fmt: skip
    yield "avif-flat-5-million-pixels.avif", partial(encoded, black, "AVIF", speed=10, **options)
    yield "avif-with-alpha.avif", partial(saved, "AVIF", "RGBA", **options)
    yield from damaged("avif", "avif", modern)


def images() -> Items:
    return all_of(
        "image", "png",
        png_images, jpeg_images, gif_images, webp_images, bmp_images, tiff_images,
        plain_images, layered_images, written_images, encoded_images,
    )  # fmt: skip
