"""
Real pictures, sounds and recordings as training rows: the stamps of Tux Paint with their captions and, where they have
one, the sound of the thing; and the prompts of Asterisk with their transcripts, both from Debian.

    apt-get download tuxpaint-stamps-default asterisk-core-sounds-en asterisk-core-sounds-en-g722
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    python examples/real_parts/make_data.py unpacked outputs/real_parts/data

Held out are captions and transcripts, not files: no caption of a test row is one of a training row.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image


RATE = 16000
SIDE = 224
LONGEST = 12.0  # seconds of a recording
QUESTIONS = {
    "picture": "What is in the picture?",
    "kind": "What kind of thing is it?",
    "sound": "What makes this sound?",
    "recording": "Write down what is said.",
    "both": "What is in the picture, and what is said?",
}


def held_out(text: str) -> bool:
    """Every sixth text, the same ones on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 6 == 0


def stamps(unpacked: Path, out: Path) -> list[dict]:
    """
    `caption`, `spanish`, `kind`, `path` and `sound` of each stamp that shows something; letters are left out.
    """
    root = unpacked / "usr/share/tuxpaint/stamps"
    found = []
    for png in sorted(root.rglob("*.png")):
        words = png.with_suffix(".txt")
        name = png.relative_to(root).with_suffix("")
        if not words.is_file() or name.parts[0] == "symbols":
            continue
        caption, *translations = words.read_text(encoding="utf-8", errors="replace").splitlines()
        spanish = next((line.partition("=")[2].strip() for line in translations if line.startswith("es.utf8=")), None)
        picture = Image.open(png).convert("RGBA")
        picture.thumbnail((SIDE, SIDE))
        square = Image.new("RGB", (max(picture.size),) * 2, "white")
        square.paste(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2), picture)
        target = out / "pictures" / f"{'-'.join(name.parts)}.png"
        square.save(target)
        item = {"caption": caption.strip(), "spanish": spanish, "kind": name.parts[0], "path": str(target)}
        sound = next((file for ending in (".ogg", ".wav") if (file := png.with_suffix(ending)).is_file()), None)
        if sound is not None:
            item["sound"] = str(out / "sounds" / f"{'-'.join(name.parts)}{sound.suffix}")
            shutil.copyfile(sound, item["sound"])
        found.append(item)
    return found


def prompts(unpacked: Path, out: Path) -> list[dict]:
    """`transcript` and `path` of each recording of words."""
    listed = unpacked / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    found = []
    for line in gzip.decompress(listed.read_bytes()).decode().splitlines():
        name, _, transcript = line.partition(":")
        source = next(unpacked.glob(f"usr/share/asterisk/sounds/*/{name}.g722"), None)
        # Brackets hold stage directions; digits may be read in more ways than one.
        if line.startswith(";") or source is None or re.search(r"[\[\](){}<>*0-9]", transcript):
            continue
        with av.open(str(source), format="g722") as recording:
            samples = np.concatenate([frame.to_ndarray().ravel() for frame in recording.decode(audio=0)])
        if len(samples) <= LONGEST * RATE:
            target = out / "recordings" / f"{name.replace('/', '-')}.flac"
            soundfile.write(target, samples, RATE)
            found.append({"transcript": transcript.strip(), "path": str(target)})
    return found


def row(task: str, media: list[dict], question: str, answer: str) -> dict:
    asked = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
    return {"task": task, "messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def rows(pictures: list[dict], recordings: list[dict], shuffler: random.Random) -> dict[str, list[dict]]:
    """Task -> its rows."""
    made: dict[str, list[dict]] = {task: [] for task in (*QUESTIONS, "text")}
    for stamp in pictures:
        image = {"type": "image", "path": stamp["path"]}
        made["picture"].append(row("picture", [image], QUESTIONS["picture"], stamp["caption"]))
        made["kind"].append(row("kind", [image], QUESTIONS["kind"], stamp["kind"]))
        prompt = shuffler.choice(recordings)
        speech = {"type": "speech", "path": prompt["path"]}
        answer = f"{stamp['caption']} {prompt['transcript']}"
        made["both"].append(row("both", [image, speech], QUESTIONS["both"], answer))
        if "sound" in stamp:
            sound = {"type": "audio", "path": stamp["sound"]}
            made["sound"].append(row("sound", [sound], QUESTIONS["sound"], stamp["caption"]))
        if stamp["spanish"]:
            made["text"].append(row("text", [], f"Translate into Spanish: {stamp['caption']}", stamp["spanish"]))
    for prompt in recordings:
        speech = {"type": "speech", "path": prompt["path"]}
        made["recording"].append(row("recording", [speech], QUESTIONS["recording"], prompt["transcript"]))
    return made


def main(unpacked: str, out: str) -> None:
    """Writes `out/{stage1,stage2_vision,stage2_sound,stage2_speech,stage3,test}.jsonl`, and folders of media."""
    folder = Path(out)
    for name in ("pictures", "sounds", "recordings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pictures, recordings = stamps(Path(unpacked), folder), prompts(Path(unpacked), folder)
    for item in (*pictures, *recordings):
        for key in item.keys() & {"path", "sound"}:
            item[key] = str(Path(item[key]).relative_to(folder))
    shuffler = random.Random(0)

    def split(items: list[dict], key: str, test: bool) -> list[dict]:
        return [item for item in items if held_out(item[key]) is test]

    train, test = (
        rows(split(pictures, "caption", which), split(recordings, "transcript", which), shuffler)
        for which in (False, True)
    )
    files = {
        "stage1": train["picture"] + train["sound"] + train["recording"],
        "stage2_vision": train["picture"] + train["kind"],
        "stage2_sound": train["sound"],
        "stage2_speech": train["recording"],
        "stage3": [made for task in train.values() for made in task],
        "test": [made for task, kind in test.items() if task != "text" for made in kind],
    }
    for name, lines in files.items():
        if name != "test":
            shuffler.shuffle(lines)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(lines)} rows", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("unpacked", help="where the packages were unpacked")
    parser.add_argument("out")
    main(**vars(parser.parse_args()))
