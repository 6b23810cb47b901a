"""
Spoken variants of written rows, as the paper made its spoken questions and passages: by espeak-ng, or by any command.
"""

import ctypes
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..hub.files_uni_moe import reason
from ..hub.media_uni_moe import MEDIA_NAMES
from ..training.row_files import iter_rows
from ..training.rows import PLACE, QUESTIONS, describe_row
from .questions import filled_prompt, single_questions
from .references import INSTRUCTION, written_options
from .tasks import Task


# Writes a text as a WAV file; recordings of one `name` are not made twice.
Voice = Callable[[str, Path], None]


@cache
def _espeak() -> tuple[ctypes.CDLL, bytearray]:
    """The synthesiser, and the buffer that its callback fills; one per process."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            "Speaking needs espeak-ng: `pip install uni-moe-hf[evaluate]`, or name another voice with --command."
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    buffer = bytearray()
    callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def collect(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            buffer.extend(ctypes.string_at(samples, 2 * count))
        return 0

    library.collect = callback_type(collect)  # kept alive with the library
    synchronous = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples to the callback, in this thread, none to a sound card
    rate = library.espeak_Initialize(synchronous, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise OSError(f"espeak-ng could not start (code {rate}).")
    library.espeak_SetSynthCallback(library.collect)
    library.rate = rate
    return library, buffer


def speak(text: str, voice: str = "en-us", speed: int = 160, pitch: int = 50) -> tuple[np.ndarray, int]:
    """
    Args:
        text (`str`): What is said.
        voice (`str`, *optional*, defaults to `"en-us"`): Of espeak-ng, such as `de` or `en-gb+f3`.
        speed (`int`, *optional*, defaults to 160): Words a minute.
        pitch (`int`, *optional*, defaults to 50): 0 to 99.

    Returns:
        `tuple(np.ndarray, int)`: `(num_samples,)` int16, and samples a second.

    Raises:
        ValueError: there is no such voice.
        ImportError: without `espeakng_loader`.
    """
    library, buffer = _espeak()
    buffer.clear()
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice '{voice}'.")
    for parameter, value in ((1, speed), (3, pitch)):  # espeakRATE, espeakPITCH
        library.espeak_SetParameter(parameter, value, 0)
    data = text.encode()
    library.espeak_Synth(data, len(data) + 1, 0, 0, 0, 1, None, None)  # 1: text is UTF-8
    return np.frombuffer(bytes(buffer), dtype=np.int16), library.rate


def espeak_voice(voice: str = "en-us", speed: int = 160) -> Voice:
    """A voice for [`speak_rows`] that writes WAV by espeak-ng."""
    speak("", voice, speed)  # a voice that is not there is said at once

    def write(text: str, path: Path) -> None:
        samples, rate = speak(text, voice, speed)
        soundfile.write(path, samples, rate, format="WAV")

    write.name = f"espeak-ng {voice} {speed}"
    return write


def command_voice(command: str) -> Voice:
    """
    Args:
        command (`str`): With `{output}` for the WAV file to write, and `{text}` for what is said; without that the
            text comes on standard input. Such as `piper --model en.onnx --output_file {output}`.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"The command {command!r} cannot be read as a shell would ({error}).") from error
    if not any("{output}" in word for word in words):
        raise ValueError(
            f"The command {command!r} does not say where to write; put {{output}} in place of the WAV file."
        )
    has_text = any("{text}" in word for word in words)

    def write(text: str, path: Path) -> None:
        filled = [word.replace("{output}", str(path)).replace("{text}", text) for word in words]
        try:
            done = subprocess.run(
                filled, input=None if has_text else text, text=True, errors="replace", capture_output=True, check=False
            )
        except (OSError, ValueError) as error:  # a text may hold what no argument can
            raise ValueError(f"The command {words[0]!r} cannot be run ({reason(error)}).") from error
        if done.returncode != 0 or not path.is_file():
            said = " ".join(done.stderr.split())[-200:]
            raise ValueError(f"The command {words[0]!r} wrote no recording (exit code {done.returncode}: {said}).")

    write.name = command
    return write


def speak_rows(
    source: Any,
    output: str | Path,
    voice: Voice,
    field: str | None = None,
    whole: bool = False,
    task: Task | None = None,
    media_root: str | Path | None = None,
    **reading: Any,
) -> Iterator[str]:
    r"""
    Writes `output/rows.jsonl` with a recording in place of a text, and the recordings in `output/speech`. A recording
    that is there stays: a run that was stopped goes on.

    Args:
        source: Rows, as in [`load_rows`].
        output (`str` or `Path`): Folder.
        voice (`Callable`): Writes a text as a WAV file: [`espeak_voice`], [`command_voice`] or your own.
        field (`str`, *optional*): The column that is said, such as `article` of RACE; the question by default. Its row
            gets `speech` in its place. Of a conversation it is the last question, in whose place a `speech` part
            stands; one whose media ask by themselves stays as it is.
        whole (`bool`, *optional*, defaults to `False`): Whether "Answer the question using a single word or phrase."
            is said too; else it stays written.
        task ([`Task`], *optional*): Whose whole prompt is said of plain rows, with hint and options, as MMBench-Audio
            has it.
        media_root (`str` or `Path`, *optional*): Where the rows' other paths start; else beside their file.
        reading: As in [`~row_files.iter_rows`].

    Yields:
        `str`: what was said of each row; nothing where it stays as it is.

    Raises:
        ValueError: a row has nothing to say, or the voice fails.
    """
    folder = Path(output)
    (folder / "speech").mkdir(parents=True, exist_ok=True)
    partial = folder / f".rows.jsonl.{os.getpid()}.partial"
    half = folder / "speech" / f".{os.getpid()}.wav"
    target = (folder / "rows.jsonl").resolve()
    if task is not None and field is not None:
        raise ValueError("A task's prompt and a column were named; what is said is one of the two.")
    speaker = getattr(voice, "name", "")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in single_questions(iter_rows(source, **reading)):
                if Path(str(row.get("_source"))).resolve() == target:
                    raise ValueError(f"'{target}' would be written over itself; name another folder.")
                try:
                    text, made = _spoken(row, field, whole, task)
                    name = f"speech/{sha256(f'{speaker} {text}'.encode()).hexdigest()[:16]}.wav"
                    if text and not _is_recording(folder / name):
                        voice(text, half)
                        if not _is_recording(half):
                            raise ValueError("the voice wrote no sound.")
                        half.replace(folder / name)
                except (ValueError, soundfile.SoundFileError) as error:
                    raise ValueError(f"{describe_row(row)} cannot be spoken: {error}") from error
                root = media_root or row.get("_root")
                file.write(_line(row, _moved(made(name), None if root is None else Path(root).resolve())))
                yield text
        partial.replace(folder / "rows.jsonl")
    finally:
        partial.unlink(missing_ok=True)
        with suppress(OSError):
            half.unlink(missing_ok=True)


def _is_recording(path: Path) -> bool:
    try:
        return path.is_file() and soundfile.info(path).frames > 0
    except (soundfile.SoundFileError, OSError):
        return False


def _line(row: Mapping[str, Any], made: dict[str, Any]) -> str:
    try:
        line = json.dumps(made, ensure_ascii=False) + "\n"
        line.encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"{describe_row(row)} cannot be written as JSON ({error}); give media as files, and whole characters."
        ) from error
    return line


def _spoken(
    row: Mapping[str, Any], field: str | None, whole: bool, task: Task | None
) -> tuple[str, Callable[[str], dict[str, Any]]]:
    """What is said, and what makes the new row of a recording's name; no text where media ask by themselves."""
    if row.get("_unreadable"):
        raise ValueError(row["_unreadable"])
    kept = {name: value for name, value in row.items() if name not in PLACE and value is not None}
    if any(kept.get(name) for name in ("speech", "voice")) and not isinstance(kept.get("conversations"), list):
        raise ValueError("it has a recording already, which this one would take the place of.")
    whole_name = next((name for name in ("messages", "conversations") if isinstance(kept.get(name), list)), None)
    if field is None and whole_name is not None:
        return _spoken_turn(kept, whole_name, whole)
    if task is not None and field is None:
        prompt, _ = filled_prompt(task, kept)
        text, rest = _parted(prompt, whole)
        if not text:
            raise ValueError("there is no text to say.")
        kept = {name: value for name, value in kept.items() if name not in (*QUESTIONS, "hint")}
        kept |= {"question": rest.strip()} if rest else {}
        return text, lambda recording: {**kept, "spoken": text, "speech": recording}
    name = field or next((name for name in QUESTIONS if isinstance(kept.get(name), str)), None)
    if name is None or not isinstance(kept.get(name), str):
        raise ValueError(
            f"it has no text in '{field or 'question'}'; name its column with --field ({', '.join(kept)})."
        )
    text, rest = _parted(kept.pop(name).strip(), whole)
    if not text:
        raise ValueError(f"there is no text to say in '{name}'.")
    if field is None and rest:
        kept[name] = rest.strip()
    return text, lambda recording: {**kept, "spoken": text, "speech": recording}


def _spoken_turn(kept: dict[str, Any], name: str, whole: bool) -> tuple[str, Callable[[str], dict[str, Any]]]:
    """The last question of a conversation."""
    is_original = name == "conversations"
    turns = kept[name]
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"'{name}' is not a list of objects.")
    asks = [i for i, turn in enumerate(turns) if turn.get("from" if is_original else "role") in ("human", "user")]
    if not asks:
        raise ValueError(f"no turn is by '{'human' if is_original else 'user'}'.")
    last = turns[asks[-1]]

    def with_turn(turn: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {**kept, name: [*turns[: asks[-1]], turn, *turns[asks[-1] + 1 :]], **more}

    if is_original:
        value = str(last.get("value") or "")
        if "<audio>" in value:
            raise ValueError("its question is spoken already.")
        marks = [mark for mark in ("<image>", "<video>") if mark in value]
        for mark in marks:
            value = value.replace(mark, "")
        text, rest = _parted(value.strip(), whole)
        asked = {**last, "value": "\n".join([*marks, "<audio>"]) + rest}
        options = written_options(text)  # can no longer be read where they are only heard
        kept |= {"options": options} if options and "options" not in kept else {}
        before = kept.get("voice") or []
        before = before if isinstance(before, list) else [before]
        if len(before) != sum(str(turn.get("value", "")).count("<audio>") for turn in turns):
            raise ValueError("it has recordings without a place in the text, or places without a recording.")
        made = lambda recording: with_turn(asked, spoken=text, voice=[*before, recording])  # noqa: E731
    else:
        content = last.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError("its last question is neither text nor a list of parts.")
        media = [part for part in parts if part.get("type") != "text"]
        text, rest = _parted(
            "\n".join(str(part.get("text", "")) for part in parts if part.get("type") == "text").strip(), whole
        )
        rests = [{"type": "text", "text": rest.strip()}] if rest else []
        if not text and media:
            return "", lambda recording: kept
        made = lambda recording: with_turn(  # noqa: E731
            {**last, "content": [*media, {"type": "speech", "path": recording}, *rests]}, spoken=text
        )
    if not text:
        raise ValueError("there is no text to say.")
    return text, made


def _parted(text: str, whole: bool) -> tuple[str, str]:
    """A question, and the line that says how to answer where that stays written."""
    match = None if whole else INSTRUCTION.search(text)
    return (text, "") if match is None else (text[: match.start()].strip(), match[0])


def _moved(row: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """A row whose media are named by paths that hold from the new folder."""
    if root is None:
        return row
    made = {}
    for name, value in row.items():
        if name in ("messages", "prompt", "completion") and isinstance(value, list):
            value = [_moved_message(message, root) for message in value]
        elif name.lower() in MEDIA_NAMES:
            value = _moved_file(value, root)
        made[name] = value
    return made


def _moved_message(message: Any, root: Path) -> Any:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    parts = [
        part
        if not isinstance(part, Mapping) or part.get("type") == "text"
        else {key: value if key == "type" else _moved_file(value, root) for key, value in part.items()}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _moved_file(value: Any, root: Path) -> Any:
    if isinstance(value, list):
        return [_moved_file(each, root) for each in value]
    is_path = isinstance(value, str) and len(value) < 1000 and not value.startswith(("http://", "https://", "data:"))
    return str(root / value) if is_path and (root / value).is_file() else value


__all__ = ["command_voice", "espeak_voice", "speak", "speak_rows"]
