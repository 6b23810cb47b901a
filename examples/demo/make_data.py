"""
Writes the demo's data set: PNG, MP4 and WAV files, and JSON lines of conversations about them.

    python examples/demo/make_data.py outputs/demo/data

One file per stage (`stage1.jsonl`, `stage2_<expert>.jsonl`, `stage3.jsonl`) and `test.jsonl`, whose rows also carry
`task` and `answer`. Paths are relative to the folder.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import world
from tqdm import tqdm

from uni_moe_hf.evaluation.speaking import speak


@dataclass(frozen=True)
class Sizes:
    """
    How much of everything there is.

    Args:
        train_files (`dict[str, int]`): Of each kind.
        question_files (`int`): Spoken questions.
        mixed_rows (`dict[str, int]`): In stage 3, of each combination.
        single_rows (`int`): In stage 3, of each kind.
        test_questions (`int`): Of each task.
        expert_rows (`float`): Share of the training files that a stage-2 expert sees.
        picture_noise, sound_noise (`float`): On pictures and frames, and on sounds and voices, as shares of the full
            scale.
    """

    train_files: dict[str, int]
    question_files: int
    mixed_rows: dict[str, int]
    single_rows: int = 250
    test_questions: int = 240
    expert_rows: float = 0.7
    picture_noise: float = 0.0
    sound_noise: float = 0.0


TRAIN_FILES = {"image": 5000, "video": 2800, "audio": 900, "speech": 1800}
DEMO = Sizes(TRAIN_FILES, 1600, {"image+speech": 3000, "image+audio": 600, "video+audio": 600})

COLOUR, SHAPE = "What colour is it?", "What shape is it?"
SOUND, WORD = "What do you hear?", "Which word is spoken?"
COLOUR_AND_SOUND = "Name the colour and the sound."
EXPERTS = {"vision": ("image", "video"), "audio": ("audio",), "speech": ("speech",)}


def draw_facts(kind: str, split: str, rng: np.random.Generator) -> dict:
    """What a clip of a kind is to show."""

    while kind in ("image", "video"):
        colour, shape = int(rng.integers(8)), int(rng.integers(8))
        names = {"colour": list(world.COLOURS)[colour], "shape": world.SHAPES[shape]}
        if split == "train" and rng.random() < 0.5:
            return {**names, "colour": world.GREY}
        if world.pair_split(colour, shape) == split:
            return names
    if kind == "audio":
        return {"sound": str(rng.choice(world.SOUNDS))}
    if kind == "question":
        about = str(rng.choice(list(world.SPOKEN_QUESTIONS)))
        return {"about": about, "text": str(rng.choice(world.SPOKEN_QUESTIONS[about])), **draw_voice(split, rng)}
    return {"text": str(rng.choice(world.WORDS)), **draw_voice(split, rng)}


def draw_voice(split: str, rng: np.random.Generator) -> dict:
    """Voice, speed and pitch of a split."""
    train = split == "train"
    return {
        "voice": str(rng.choice(world.TRAIN_VOICES if train else world.TEST_VOICES)),
        "speed": int(rng.choice(world.TRAIN_SPEEDS if train else world.TEST_SPEEDS)),
        "pitch": int(rng.choice(world.TRAIN_PITCHES if train else world.TEST_PITCHES)),
    }


def make_clip(job: tuple[str, str, dict, str, int, float]) -> None:
    """Writes one file."""
    kind, split, facts, path, seed, noise = job
    rng = np.random.default_rng(seed)
    if kind == "image":
        pixels = world.picture(world.tint(facts["colour"], rng), facts["shape"], split, rng)
        Path(path).write_bytes(world.png_bytes(world.noisy(pixels, noise, rng)))
    elif kind == "video":
        frames = world.video(world.tint(facts["colour"], rng), facts["shape"], split, rng)
        world.write_mp4(path, world.noisy(frames, noise, rng))
    elif kind == "audio":
        soundfile.write(path, world.noisy(world.sound(facts["sound"], split, rng), noise, rng), world.RATE)
    else:
        wave, rate = speak(facts["text"], facts["voice"], facts["speed"], facts["pitch"])
        soundfile.write(path, world.noisy(wave, noise, rng), rate)


class Recorder:
    """Collects the files to write; gives each a path and hands out the conversation part for it."""

    def __init__(self, folder: Path, split: str, seed: int, sizes: Sizes):
        self.folder, self.split, self.sizes = folder, split, sizes
        self.rng, self.jobs = np.random.default_rng(seed), []

    def clip(self, kind: str, facts: dict | None = None) -> tuple[dict, dict]:
        """A new file: its facts and its message part."""
        facts = draw_facts(kind, self.split, self.rng) if facts is None else facts
        part_type = "speech" if kind == "question" else kind
        suffix = {"image": "png", "video": "mp4"}.get(kind, "wav")
        path = f"{self.split}/{kind}/{len(self.jobs):05d}.{suffix}"
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        seed = int(self.rng.integers(2**31))
        noise = self.sizes.picture_noise if kind in ("image", "video") else self.sizes.sound_noise
        self.jobs.append((kind, self.split, facts, str(self.folder / path), seed, noise))
        return facts, {"type": part_type, "path": path}


def row(parts: list[dict], question: str | None, answer: str, **extra: str) -> dict:
    """A conversation: media, question, answer."""
    content = [*parts, *([{"type": "text", "text": question}] if question else [])]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        **extra,
    }


def caption(kind: str, facts: dict) -> tuple[str, str]:
    """A prompt for stage 1, and a caption or transcript."""
    return {
        "image": lambda: ("Describe the picture.", f"{facts['colour']} {facts['shape']}"),
        "video": lambda: ("Describe the video.", f"{facts['colour']} {facts['shape']}"),
        "audio": lambda: ("Describe the sound.", facts["sound"]),
    }.get(kind, lambda: ("What is said?", facts["text"]))()


def single_question(kind: str, facts: dict, rng: np.random.Generator) -> tuple[str, str]:
    """A question about one clip, and its answer."""
    if kind in ("audio", "speech"):
        return (SOUND, facts["sound"]) if kind == "audio" else (WORD, facts["text"])
    about_colour = rng.random() < 0.5 and facts["colour"] != world.GREY
    return (COLOUR, facts["colour"]) if about_colour else (SHAPE, facts["shape"])


def mixed_row(task: str, image: tuple, video: tuple, audio: tuple, question: tuple) -> dict:
    """A question that needs two clips; each argument is a clip's facts and part."""
    seen = image if task.startswith("image") else video
    if task.endswith("speech"):
        return row([seen[1], question[1]], None, seen[0][question[0]["about"]], task=task)
    return row([seen[1], audio[1]], COLOUR_AND_SOUND, f"{seen[0]['colour']} {audio[0]['sound']}", task=task)


# Which clips a mixed task needs.
CLIPS = {
    "image+speech": ("image", "question"),
    "image+audio": ("image", "audio"),
    "video+audio": ("video", "audio"),
    "video+speech": ("video", "question"),
}
MIXED = tuple(DEMO.mixed_rows)


def plan(folder: Path, seed: int, sizes: Sizes) -> tuple[dict[str, list[dict]], list[tuple]]:
    """All rows of all JSON files, and the files to write."""
    train = Recorder(folder, "train", seed, sizes)
    clips = {kind: [train.clip(kind) for _ in range(count)] for kind, count in sizes.train_files.items()}
    clips["question"] = [train.clip("question") for _ in range(sizes.question_files)]
    rng = train.rng

    rows = {"stage1": [], "stage3": []}
    for kind, made in clips.items():
        rows["stage1"] += [row([part], *caption(kind, facts)) for facts, part in made]
    for expert, kinds in EXPERTS.items():
        rows[f"stage2_{expert}"] = [
            row([part], *single_question(kind, facts, rng))
            for kind in kinds
            for facts, part in clips[kind][: int(sizes.expert_rows * len(clips[kind]))]
        ]
    asked = clips["question"][: int(sizes.expert_rows * sizes.question_files)]
    rows["stage2_speech"] += [row([part], *caption("question", facts)) for facts, part in asked]

    def any_clip(kind: str) -> tuple[dict, dict]:
        return clips[kind][rng.integers(len(clips[kind]))]

    for kind in sizes.train_files:
        last = clips[kind][-sizes.single_rows :]
        rows["stage3"] += [row([part], *single_question(kind, facts, rng)) for facts, part in last]
    for task, count in sizes.mixed_rows.items():
        rows["stage3"] += [
            mixed_row(task, any_clip("image"), any_clip("video"), any_clip("audio"), any_clip("question"))
            for _ in range(count)
        ]

    test = Recorder(folder, "test", seed + 1, sizes)
    rows["test"] = []
    for kind in sizes.train_files:
        for _ in range(sizes.test_questions):
            facts, part = test.clip(kind)
            question, answer = single_question(kind, facts, test.rng)
            rows["test"].append(row([part], question, answer, task=kind))
    for task in sizes.mixed_rows:
        for _ in range(sizes.test_questions):
            made = {kind: test.clip(kind) for kind in CLIPS[task]}
            needed = (made.get(kind, ({}, {})) for kind in ("image", "video", "audio", "question"))
            rows["test"].append(mixed_row(task, *needed))
    for name, made in rows.items():
        if name != "test":
            rng.shuffle(made)
    return rows, train.jobs + test.jobs


def main(folder: str, seed: int = 0, sizes: Sizes = DEMO) -> None:
    """Writes everything; the JSON files come last, so that a broken run leaves none."""
    root = Path(folder)
    rows, jobs = plan(root, seed, sizes)
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(make_clip, jobs, chunksize=64), total=len(jobs), desc="media files", unit="file"))
    for name, made in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made))


if __name__ == "__main__":
    main(*sys.argv[1:])
