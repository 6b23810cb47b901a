"""
The small world of the demo: what its pictures, videos, sounds and voices look and sound like.

Every generator takes the attributes to show and a random generator for everything else. `split` decides which values
of the nuisances (positions, speeds, pitches, voices) and which attribute pairs belong to training and which to
testing; the two never overlap.
"""

import math
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw


COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 220, 50),
    "purple": (160, 50, 200),
    "cyan": (60, 215, 220),
    "white": (240, 240, 240),
    "orange": (245, 140, 30),
}
# Only in training, with every shape: it teaches that a shape is the same in any colour.
GREY = "grey"
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "bar", "dots")
SOUNDS = ("beep", "siren", "drum", "bell", "buzz", "wind", "whistle", "rain", "clock", "engine")
WORDS = ("apple", "bridge", "cloud", "doctor", "engine", "forest", "guitar", "hammer", "island", "jungle")
SPOKEN_QUESTIONS = {
    "colour": ("what colour is it", "tell me the colour", "which colour do you see"),
    "shape": ("what shape is it", "name the shape please", "which form has the thing"),
}

SIDE = 32  # pixels of pictures and frames
FRAMES = 8
RATE = 16000
SECONDS = 2  # of every sound, and of the model's windows

# Accent + timbre, as espeak-ng names them. No test timbre is ever trained on.
TRAIN_VOICES = tuple(
    f"{accent}+{timbre}"
    for accent in ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
    for timbre in ("m1", "m2", "m3", "m4", "m7", "m8", "f1", "f2", "f4")
)
TEST_VOICES = ("en-us+m5", "en-us+f3", "en+m5", "en+f3", "en+m6")
TRAIN_SPEEDS, TEST_SPEEDS = (130, 150, 170, 190), (140, 160, 180)  # words per minute
TRAIN_PITCHES, TEST_PITCHES = (35, 50, 65), (42, 58)  # espeak's scale of 0 to 99


def pair_split(first: int, second: int) -> str:
    """Which split a pair of colour and shape belongs to: every colour has a shape that it is never trained with."""
    return "test" if (second - first) % 8 == 2 else "train"


def position(split: str, rng: np.random.Generator) -> tuple[int, int]:
    """A centre in pixels; every fifth lattice point is never trained on."""
    while True:
        x, y = (int(value) for value in rng.integers(12, 21, 2))
        if ((x + 2 * y) % 5 == 0) == (split == "test"):
            return x, y


def level(split: str, rng: np.random.Generator) -> float:
    """A nuisance of sounds in [0, 1]; two of nine bands are never trained on."""
    band = rng.choice([2, 6] if split == "test" else [0, 1, 3, 4, 5, 7, 8])
    return float((band + rng.random()) / 9)


def _background(rng: np.random.Generator) -> np.ndarray:
    shade = rng.integers(0, 60)
    return np.clip(rng.normal(shade, 8, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def _paint(canvas: Image.Image, shape: str, colour: tuple, x: float, y: float, radius: float) -> None:
    draw = ImageDraw.Draw(canvas)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=3)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "bar":
        draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=colour)
    elif shape == "dots":
        for dot_x in (x - 0.65 * radius, x + 0.65 * radius):
            for dot_y in (y - 0.65 * radius, y + 0.65 * radius):
                draw.ellipse((dot_x - 2.5, dot_y - 2.5, dot_x + 2.5, dot_y + 2.5), fill=colour)
    elif shape == "cross":
        draw.rectangle((x - radius, y - 1.5, x + radius, y + 1.5), fill=colour)
        draw.rectangle((x - 1.5, y - radius, x + 1.5, y + radius), fill=colour)
    else:
        count = {"triangle": 3, "star": 10}[shape]
        points = []
        for corner in range(count):
            reach = radius * (0.4 if corner % 2 and shape == "star" else 1.0)
            angle = 2 * math.pi * corner / count - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        draw.polygon(points, fill=colour)


def tint(colour: str, rng: np.random.Generator) -> np.ndarray:
    """`(3,)` a shade of a named colour; greys vary the most."""
    if colour == GREY:
        return rng.integers(80, 160) + rng.integers(-25, 26, 3)
    return np.clip(np.array(COLOURS[colour]) + rng.normal(0, 14, 3), 0, 255)


def picture(tint: np.ndarray, shape: str, split: str, rng: np.random.Generator) -> np.ndarray:
    """`(SIDE, SIDE, 3)` uint8: one shape somewhere on a noisy ground."""
    canvas = Image.fromarray(_background(rng))
    _paint(canvas, shape, tuple(int(value) for value in tint), *position(split, rng), rng.uniform(9.0, 11.0))
    return np.asarray(canvas)


def video(tint: np.ndarray, shape: str, split: str, rng: np.random.Generator) -> np.ndarray:
    """`(FRAMES, SIDE, SIDE, 3)` uint8: a drifting shape that comes late or leaves early; some frames are empty."""
    ground, radius = _background(rng), rng.uniform(9.0, 11.0)
    x, y = position(split, rng)
    dx, dy = rng.uniform(-2, 2, 2)
    missing = int(rng.integers(1, 4))
    visible = range(missing, FRAMES) if rng.random() < 0.5 else range(FRAMES - missing)
    frames = []
    for frame in range(FRAMES):
        canvas = Image.fromarray(ground)
        along = 2 * frame / (FRAMES - 1) - 1  # from -1 to 1
        if frame in visible:
            _paint(canvas, shape, tuple(int(value) for value in tint), x + along * dx, y + along * dy, radius)
        frames.append(np.asarray(canvas))
    return np.stack(frames)


def sound(kind: str, split: str, rng: np.random.Generator) -> np.ndarray:
    """`(RATE * SECONDS,)` float32: a sound event over faint noise; pitch or pace comes from [`level`]."""
    time = np.arange(RATE * SECONDS) / RATE
    at = level(split, rng)
    noise = rng.normal(0, 1, len(time))
    pitch = 300 * 4**at

    def pulses(rate: float, decay: float) -> np.ndarray:
        return np.exp(-decay * ((time + rng.random() / rate) % (1 / rate)))

    def coloured(low: float, high: float) -> np.ndarray:
        spectrum = np.fft.rfft(noise)
        frequency = np.fft.rfftfreq(len(time), 1 / RATE)
        band = np.fft.irfft(spectrum * ((frequency > low) & (frequency < high)), len(time))
        return band / (band.std() + 1e-9)

    wave = {
        "beep": lambda: np.sin(2 * np.pi * pitch * time) * ((time * (2 + 2 * at)) % 1 < 0.5),
        "siren": lambda: np.sin(2 * np.pi * np.cumsum(600 + 350 * np.sin(2 * np.pi * (0.8 + at) * time)) / RATE),
        "drum": lambda: np.sin(2 * np.pi * (70 + 50 * at) * time) * pulses(2 + 2 * at, 18),
        "bell": lambda: (
            sum(np.sin(2 * np.pi * pitch * ratio * time) / (k + 1) for k, ratio in enumerate((1, 2.76, 5.4)))
            * np.exp(-2.5 * time)
        ),
        "buzz": lambda: np.sign(np.sin(2 * np.pi * (90 + 120 * at) * time)) * 0.6,
        "wind": lambda: coloured(80, 500 + 500 * at) * (0.6 + 0.4 * np.sin(2 * np.pi * (0.4 + 0.4 * at) * time)) * 0.5,
        "whistle": lambda: np.sin(2 * np.pi * (1500 + 1800 * at) * time + 6 * np.sin(2 * np.pi * 6 * time)),
        "rain": lambda: coloured(2500, 7500) * (0.35 + 0.1 * at) * (rng.random(len(time)) < 0.3 + 0.5 * at),
        "clock": lambda: coloured(1500, 5000) * pulses(3 + 3 * at, 120) * 0.8,
        "engine": lambda: (
            sum(np.sin(2 * np.pi * (35 + 30 * at) * k * time) / k for k in range(1, 12))
            * (0.6 + 0.4 * coloured(5, 20))
        ),
    }[kind]()
    wave = wave / (np.abs(wave).max() + 1e-9) * rng.uniform(0.3, 0.9) + rng.normal(0, 0.003, len(time))
    return np.clip(wave, -1, 1).astype(np.float32)


def noisy(values: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Pixels or samples of any dtype with Gaussian noise, a share of the full scale; unchanged for 0."""
    if not noise:
        return values
    low, high = (-1, 1) if values.dtype.kind == "f" else (np.iinfo(values.dtype).min, np.iinfo(values.dtype).max)
    return np.clip(values + rng.normal(0, noise * high, values.shape), low, high).astype(values.dtype)


def png_bytes(pixels: np.ndarray) -> bytes:
    """A picture as a PNG file's contents."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_mp4(path: str, frames: np.ndarray) -> None:
    """Frames as an H.264 file of 8 frames per second, each pixel doubled so that chroma survives."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "14", "preset": "ultrafast"})
        stream.width = stream.height = 2 * SIDE
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels.repeat(2, axis=0).repeat(2, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
