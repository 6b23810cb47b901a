"""
What the processor makes of files that lie: read or refused by one sentence, in how much memory and time.

    python benchmarks/bench_hostile_files.py [--limit 50] [--output benchmarks/results/hostile_files.md]

Every file of `hostile_files` goes to a child of this process, sounds once as audio and once as speech. Memory is the
child's peak above what it had at its start. Linux only; four minutes on two cores.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from comparing import publish
from hostile_files import write_files
from transformers import CLIPImageProcessorPil

from uni_moe_hf import UniMoEProcessor


sys.path.append(str(Path(__file__).parents[1] / "modeling_tests"))
from tiny import tiny_processor, user


PATIENCE = 300  # seconds, after which a child is ended
LONGEST = 700  # characters of a sentence
# What only somebody who looks into the process could make use of.
LEAKS = (" at 0x", f"{tempfile.gettempdir()}/tmp")


class Outcome(NamedTuple):
    """What became of one file: the error it ended in, if any, and its message."""

    kind: str
    name: str
    error: str
    message: str
    megabytes: float
    seconds: float

    @property
    def verdict(self) -> str:
        sentence = "\n" not in self.message and len(self.message) <= LONGEST
        if self.error == "ValueError" and sentence and not any(leak in self.message for leak in LEAKS):
            return "refused"
        return "other" if self.error else "read"


def memory(entry: str) -> float:
    """Megabytes that the kernel has for this process under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) / 1024


def tried(processor: UniMoEProcessor, kind: str, path: Path) -> tuple[str, str, float]:
    """Error, message and megabytes, in the process that reads the file."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = memory("VmRSS")
    error = message = ""
    asked = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        processor.apply_chat_template(user({"type": kind, "path": str(path)}, "what"), **asked)
    except BaseException as failure:
        error = "ValueError" if isinstance(failure, ValueError) else type(failure).__name__
        message = str(failure)
    return error, message, memory("VmHWM") - before


def outcome(processor: UniMoEProcessor, kind: str, path: Path) -> Outcome:
    """What becomes of a file in a child of this process, which may die of it."""
    source, sink = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        # What decoders print is not what is said to whoever gave the file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(PATIENCE)
        with open(sink, "w") as pipe:
            json.dump(tried(processor, kind, path), pipe)
        os._exit(0)
    os.close(sink)
    with open(source) as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.perf_counter() - start
    found = json.loads(told) if told else ("death", f"the child ended with {status}", 0.0)
    return Outcome(kind, path.name, *found, seconds)


def outcomes(limit: int | None) -> list[Outcome]:
    """All files, or of every kind of media as many as the limit says, evenly spread."""
    processor = tiny_processor(image_processor=CLIPImageProcessorPil())
    found = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        for media, paths in write_files(Path(folder)).items():
            step = -(-len(paths) // limit) if limit else 1
            for kind in ("audio", "speech") if media == "audio" else (media,):
                found += [outcome(processor, kind, path) for path in sorted(paths)[::step]]
    return found


def report(found: list[Outcome]) -> list[str]:
    """A table, the files that cost most, and what is neither read nor refused as it should be."""
    kinds = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one)
    lines = [
        "| kind | files | read | refused by one sentence | other | largest memory above the process, MB "
        "| longest time, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, ones in kinds.items():
        verdicts = [one.verdict for one in ones]
        counts = " | ".join(str(verdicts.count(verdict)) for verdict in ("read", "refused", "other"))
        megabytes, seconds = max(one.megabytes for one in ones), max(one.seconds for one in ones)
        lines.append(f"| {kind} | {len(ones)} | {counts} | {megabytes:.0f} | {seconds:.1f} |")
    for title, field, unit in (("Largest memory", "megabytes", "MB"), ("Longest time", "seconds", "s")):
        most = sorted(found, key=attrgetter(field), reverse=True)[:3]
        names = (f"`{one.name}` as {one.kind} ({getattr(one, field):.1f} {unit}, {one.verdict})" for one in most)
        lines += ["", f"{title}: {', '.join(names)}."]
    others = [one for one in found if one.verdict == "other"]
    if others:
        lines += ["", "Other:", ""]
        lines += [f"* `{one.name}` as {one.kind}: {one.error}: {one.message[: 2 * LONGEST]!r}" for one in others]
    return lines


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--limit", type=int, help="take every k-th file, so that so many of a kind are left")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = outcomes(args.limit)
    heading = f"Files that lie, {date.today()}, torch {torch.__version__}, {platform.machine()}, 1 thread."
    publish([heading, "", *report(found)], args.output)


if __name__ == "__main__":
    main()
