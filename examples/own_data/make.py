"""
A folder of somebody's pictures and recordings, as people have them, and parts to build a model from. With files of
your own, and parts from the Hub, there is nothing to make: begin with the second command of docs/your_data.md.

    python examples/own_data/make.py outputs/own

In `things`: pictures with a table beside them (JPEG, some lying on their side as cameras leave them, and PNG with
transparent corners); clips of a phone held upright, with sound; sounds as MP3 in folders named by what they are;
memos as M4A with a table of transcripts. A picture and a sound are broken. In `parts`: stand-ins for what would be
downloaded. They are the demo's, and know the demo's shapes, sounds and words.
"""

import argparse
import csv
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import make_data
import parts
import torch
import world

from uni_moe_hf.evaluation.speaking import speak


PICTURES, CLIPS, SOUNDS, MEMOS = 900, 240, 300, 400
ZOOM = 10  # a shape of the demo is 32 pixels wide; a camera's picture is larger
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
UPRIGHT = (0, 1 << 16, -(1 << 16), 0)  # the matrix of a phone that was: a quarter turn


def coloured(kind: str, rng: np.random.Generator) -> dict[str, str]:
    """What a picture or video shows: a shape that is not grey."""
    while (facts := make_data.draw_facts(kind, "train", rng))["colour"] == world.GREY:
        pass
    return facts


def picture(folder: Path, number: int) -> dict[str, str]:
    """A JPEG, every third on its side, or every fourth time a PNG with transparent corners; and its line."""
    rng = np.random.default_rng([1, number])
    facts = coloured("image", rng)
    pixels = world.picture(world.tint(facts["colour"], rng), facts["shape"], "train", rng)
    image = Image.fromarray(pixels).resize((world.SIDE * ZOOM,) * 2, Image.Resampling.NEAREST)
    if number % 4 == 0:
        name, corners = f"cut out {number:04d}.png", Image.new("L", image.size, 0)
        ImageDraw.Draw(corners).rounded_rectangle((0, 0, *(side - 1 for side in image.size)), 24, fill=255)
        image.putalpha(corners)
        image.save(folder / name)
    else:
        name, exif = f"IMG_{number:04d}.JPG", Image.Exif()
        if number % 3 == 0:
            image, exif[ORIENTATION] = image.rotate(90), 6
        image.save(folder / name, quality=90, exif=exif)
    return {"file": name, "what": f"{facts['colour']} {facts['shape']}"}


def encoded(path: Path, wave: np.ndarray, rate: int, codec: str, frames: np.ndarray | None = None) -> None:
    """Sound, and pictures where there are some, as a file of the kind that its name says."""
    with av.open(str(path), "w") as container:
        film = None
        if frames is not None:
            film = container.add_stream("libx264", rate=8, options={"crf": "14", "preset": "ultrafast"})
            film.height, film.width = frames.shape[1:3]
            film.pix_fmt = "yuv420p"
        sound = container.add_stream(codec, rate=rate, layout="mono")
        for pixels in [] if film is None else frames:
            container.mux(film.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts, samples.time_base = rate, 0, Fraction(1, rate)
        container.mux(sound.encode(samples))
        for stream in [sound] if film is None else [film, sound]:
            container.mux(stream.encode(None))


def clip(folder: Path, number: int) -> dict[str, str]:
    """A film of a phone that was held upright: stored on its side, with a note how to turn it; and its line."""
    rng = np.random.default_rng([2, number])
    facts = coloured("video", rng)
    frames = world.video(world.tint(facts["colour"], rng), facts["shape"], "train", rng)
    frames = np.rot90(frames.repeat(4, axis=1).repeat(4, axis=2), axes=(1, 2))
    name, hum = f"VID_{number:04d}.mp4", rng.normal(0, 0.01, world.RATE)
    encoded(folder / name, hum, world.RATE, "aac", np.ascontiguousarray(frames))
    content = bytearray((folder / name).read_bytes())
    track = content.index(b"tkhd") + 4 + 40
    for place, value in zip((0, 4, 12, 16), UPRIGHT, strict=True):
        content[track + place : track + place + 4] = value.to_bytes(4, "big", signed=True)
    (folder / name).write_bytes(content)
    return {"clip": name, "colour": facts["colour"]}


def sound(folder: Path, number: int) -> None:
    """An MP3 in the folder of its kind."""
    rng = np.random.default_rng([3, number])
    kind = world.SOUNDS[number % len(world.SOUNDS)]
    (folder / kind).mkdir(exist_ok=True)
    encoded(folder / kind / f"recording {number:03d}.mp3", world.sound(kind, "train", rng), world.RATE, "libmp3lame")


def memo(folder: Path, number: int) -> dict[str, str]:
    """A spoken word as a phone records it; and its line."""
    rng = np.random.default_rng([4, number])
    facts = make_data.draw_facts("speech", "train", rng)
    spoken, rate = speak(facts["text"], **{name: facts[name] for name in ("voice", "speed", "pitch")})
    name = f"Memo {number:03d}.m4a"
    encoded(folder / name, spoken.astype(np.float32) / 32768, rate, "aac")
    return {"memo": name, "transcript": facts["text"]}


def make_things(folder: Path) -> None:
    """All files and tables."""
    kinds = {
        "pictures": (picture, PICTURES),
        "clips": (clip, CLIPS),
        "sounds": (sound, SOUNDS),
        "memos": (memo, MEMOS),
    }
    with ProcessPoolExecutor() as pool:
        for name, (make, count) in kinds.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            lines = list(pool.map(make, [folder / name] * count, range(count), chunksize=10))
            if lines[0] is not None:
                with open(folder / name / "list.csv", "w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, lines[0])
                    table.writeheader()
                    table.writerows(lines)
    half = BytesIO()
    Image.new("RGB", (320, 320)).save(half, "JPEG")
    (folder / "pictures/IMG_0001.JPG").write_bytes(half.getvalue()[:300])  # cut by a full card
    (folder / "sounds/bell/empty.mp3").write_bytes(b"")


def make_part(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts.PARTS[name](folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--only", choices=["things", "parts"], help="make these alone")
    args = parser.parse_args()
    if args.only != "parts":
        make_things(args.root / "things")
    if args.only != "things":
        with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(make_part, [args.root / "parts"] * len(parts.PARTS), parts.PARTS))
    print(f"Pictures and recordings are in '{args.root / 'things'}', stand-in parts in '{args.root / 'parts'}'.")


if __name__ == "__main__":
    main()
