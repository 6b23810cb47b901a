"""
Rows of any known form to messages with typed parts: conversations with their media in the parts or in columns beside
them, the original's records, and plain columns such as `image` and `caption`.
"""

import json
import mimetypes
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

from transformers.utils import logging

from ..hub.configuration_uni_moe import MODALITIES
from ..hub.conversations_uni_moe import OTHER_TYPES, SOURCE_KEYS
from ..hub.media_uni_moe import MEDIA_COLUMNS, MEDIA_NAMES


logger = logging.get_logger(__name__)

# Columns of plain questions and answers. What is in none of these may be named so with `columns`.
QUESTIONS = ("question", "prompt", "instruction", "query")
ANSWERS = ("answer", "caption", "completion", "response", "output", "transcription", "transcript", "sentence", "text")
# The last three are for evaluation.
ROLES = (*MODALITIES, "question", "answer", "messages", "conversations", "system", "options", "id", "task")
# What a row knows of where it comes from, put there by `row_files`.
PLACE = ("_row", "_source", "_root", "_unreadable")

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def row_to_messages(row: Mapping[str, Any], voice: str = "speech") -> list[dict[str, Any]]:
    r"""
    Args:
        row (`dict`): One of

            * `{"messages": [...]}` in the library's format, media in their parts; or in columns beside it (`images`,
              `videos`, `audios`, `speech`, or one of them), where each typed part without a source and each `<image>`,
              `<video>`, `<audio>` or `<speech>` in a text takes the next file of its column. Texts with neither get
              the files before the first question, as in TRL;
            * the same with `{"prompt": [...], "completion": [...]}`;
            * the original's record: `{"conversations": [{"from": "human" | "gpt", "value": "<image>\n..."}], "image":
              path, "voice": [paths], "video": [frame paths]}`;
            * plain columns: a question (`question`, `prompt`, `instruction`), media or both, and one answer
              (`answer`, `caption`, `text`, `transcription`, ...).
        voice (`str`, *optional*, defaults to `"speech"`): Whether `voice` files are `"speech"` or `"audio"`.

    Returns:
        `list[dict]`: messages with typed parts.

    Raises:
        ValueError: none of these forms, something of it is not what it should be, or places and files differ in
            number.

    Source: `*/train/data.py@f5e82dd`; records as in the original's `data_sample`.
    """
    if row.get("_unreadable"):
        raise ValueError(row["_unreadable"])
    fields = _fields(row)
    if used := _wholes(fields):
        messages = [message for name in used for message in _messages(fields[name], name)]
    else:
        messages, used = _plain_columns(fields)
    if fields.get("system"):
        if messages and messages[0].get("role") == "system":
            raise ValueError("a row has a system message and the field 'system' beside it; put both into one")
        messages = [{"role": "system", "content": _checked_text(fields["system"])}, *messages]
    columns = {
        kind: [name for name in names if name in fields and name not in used] for kind, names in MEDIA_COLUMNS.items()
    }
    _refuse_unread_media(fields, [*used, *chain.from_iterable(columns.values())], messages)
    for names in columns.values():
        if len(names) > 1:
            raise ValueError(f"a row has both '{names[0]}' and '{names[1]}'; put all of them into one")
    if columns["audio"] and columns["voice"]:
        raise ValueError("a row has both 'audio' and 'voice', and `<audio>` can mean either; rename one to 'speech'")
    strict = "conversations" in used
    is_plain = not strict and all(isinstance(message["content"], str) for message in messages)
    has_sound = any(columns[kind] for kind in ("audio", "speech", "voice"))
    for kind, names in columns.items():
        mark = f"<{'audio' if kind == 'voice' else kind}>"
        if kind == "speech" and not columns["audio"] and not columns["voice"] and not _places(messages, mark):
            mark = "<audio>"
        declared = [name for name in MEDIA_COLUMNS[kind] if name in row]
        if names:
            files = _files(fields[names[0]], kind, names[0])
        elif (strict or declared) and _places(messages, mark) and not (mark == "<audio>" and has_sound):
            files = []
        else:
            continue
        messages = _with_files(messages, voice if kind == "voice" else kind, mark, files, is_plain)
    return messages


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row holds, its names in small letters where they are known so."""
    fields = {name: value for name, value in row.items() if value is not None and name not in PLACE}
    known = {*MEDIA_NAMES, *QUESTIONS, *ANSWERS, *MODALITIES, "messages", "conversations", "system"}
    lower = {name: name.lower() for name in fields if name.lower() in known}
    if len({lower.get(name, name) for name in fields}) < len(fields):
        raise ValueError(f"a row has fields that differ in capitals alone: {sorted(lower)}")
    fields = {lower.get(name, name): value for name, value in fields.items()}
    return {name: value for name, value in fields.items() if not (name in MEDIA_NAMES and is_nothing(value))}


def is_nothing(value: Any) -> bool:
    """Whether a field of media is empty, as tables have it."""
    return value is None or (isinstance(value, str) and not value)


def unread_fields(row: Mapping[str, Any]) -> list[str]:
    """
    Args:
        row (`dict`): As in [`row_to_messages`].

    Returns:
        `list[str]`: fields that nothing is made of.
    """
    fields = _fields(row)
    read = {*MEDIA_NAMES, "system", "id", "task"}  # the last two are evaluation's
    read |= {*_wholes(fields)} or {*QUESTIONS, *ANSWERS, "input"}
    return [name for name in fields if name not in read]


def _wholes(fields: Mapping[str, Any]) -> list[str]:
    """The fields that hold a whole conversation; none where a row has plain columns."""
    for name in ("messages", "conversations"):
        if name in fields:
            return [name]
    pair = ["prompt", "completion"]
    return pair if all(isinstance(fields.get(name), list) for name in pair) else []


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages of `role` and `content`, or the original's turns of `from` and `value`."""
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"'{name}' is not a list of objects but {shortened_json(value)}")
    if not value:
        raise ValueError(f"'{name}' is empty")
    if not any("from" in each or "value" in each for each in value):
        return [_checked_message(message) for message in value]
    messages = []
    for turn in value:
        if turn.get("from") not in SPEAKERS:
            raise ValueError(f"a turn is by {turn.get('from')!r}; known are {list(SPEAKERS)}")
        others = {key: each for key, each in turn.items() if key not in ("from", "value") and each is not None}
        text = _checked_text("" if turn.get("value") is None else turn["value"])
        messages.append({"role": SPEAKERS[turn["from"]], **others, "content": text})
    if messages[0]["role"] == "assistant":
        logger.warning_once("A conversation's first turn is by 'gpt' and left out, as in the original.")
        messages = messages[1:]
    return messages


def _checked_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is text or a list of parts, without the fields that a common schema fills into parts."""
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return {**message, "content": _checked_text(content)}
    content = [content] if isinstance(content, Mapping) else content
    if not isinstance(content, list) or not all(isinstance(part, str | Mapping) for part in content):
        raise ValueError(f"the content of a {message.get('role')} message is neither text nor a list of parts")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    parts = [{key: value for key, value in part.items() if value is not None} for part in parts]
    for part in parts:
        if part.get("type") == "text":
            _checked_text(part.get("text", ""))
    return {**message, "content": parts}


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a text is a {type(text).__name__}: {shortened_json(text)}")
    check_characters(text, "a text")
    return text


def check_characters(text: str, what: str) -> None:
    """
    Raises:
        ValueError: the text of `what` holds a surrogate without its other half, as a cut escape in JSON leaves it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character, an unpaired surrogate ({error.reason})") from error


# --- Plain columns


def _plain_columns(fields: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """A question and its answer as messages, and the fields that they were made of."""
    media = [name for name in MEDIA_NAMES if name in fields]
    questions, answers = ([name for name in names if name in fields] for names in (QUESTIONS, ANSWERS))
    if not answers or not (media or questions):
        raise ValueError(
            f"a row has the fields {sorted(fields)}, which is no known form: it needs 'messages', 'conversations', or "
            f"media or a question with an answer{_nearest(fields, media, questions, answers)}"
        )
    for kind, names in (("question", questions), ("answer", answers)):
        if len(names) > 1:
            raise ValueError(
                f"a row has {' and '.join(map(repr, names))}, each of which could be the {kind}; say which with "
                f"columns ({names[0]}={kind})"
            )
    question = _checked_text(fields[questions[0]]) if questions else ""
    if fields.get("input"):
        question = f"{question}\n{_checked_text(fields['input'])}".strip("\n")
    answer = fields[answers[0]]
    if not isinstance(answer, str):
        raise ValueError(f"the answer in '{answers[0]}' is a {type(answer).__name__}, not a text")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _checked_text(answer)}]
    return messages, [*questions, *answers, "system", "input"]


def _nearest(fields: Mapping[str, Any], media: list[str], questions: list[str], answers: list[str]) -> str:
    """What would make a known form of a row."""
    known = (*questions, *answers, *media)
    texts = [name for name, value in fields.items() if isinstance(value, str) and name not in known]
    if not media and (files := [name for name, value in fields.items() if looks_like_media(value)]):
        kind = kind_of_file(fields[files[0]]) or "image"
        return f"; if '{files[0]}' is a file, say so with columns ({files[0]}={kind})"
    if (media or questions) and texts:
        return f"; if '{texts[0]}' is the answer, say so with columns ({texts[0]}=answer)"
    return "; say which column is what with columns (photo=image, label=answer)"


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """
    Args:
        row (`dict`): With any fields.
        columns (`dict[str, str]`): Its column -> what it is, one of `ROLES`.

    Returns:
        `dict`: the same row with these names.

    Raises:
        ValueError: it has no such column.
    """
    if not columns:
        return row
    if lost := [name for name in columns if name not in row]:
        own = sorted(name for name in row if name not in PLACE)
        return {**row, "_unreadable": f"there is no column '{lost[0]}'; a row has the fields {own}"}
    # Whatever else could be that is not what is meant.
    taken = set(columns.values())
    for role, names in (("question", QUESTIONS), ("answer", ANSWERS)):
        taken |= {*names} if role in taken else set()
    kept = {name: value for name, value in row.items() if name not in columns and name not in taken}
    return {**kept, **{role: row[name] for name, role in columns.items()}}


def parse_columns(columns: Any) -> dict[str, str]:
    """
    Args:
        columns (`dict[str, str]`, `str` or `list[str]`, *optional*): Which column is what: `{"photo": "image"}`, its
            JSON, or `photo=image`; either way round.

    Returns:
        `dict[str, str]`: column -> one of `ROLES`.

    Raises:
        ValueError: it is not of this form, or names no such role.
    """
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        pieces = [columns] if isinstance(columns, str) else list(columns)
        if len(pieces) == 1 and pieces[0].lstrip().startswith("{"):
            try:
                columns = json.loads(pieces[0])
            except json.JSONDecodeError as error:
                raise ValueError(f"`columns` is {pieces[0]!r}, which is no JSON ({error}).") from error
        else:
            pairs = [piece.strip().partition("=") for piece in chain.from_iterable(p.split(",") for p in pieces)]
            columns = {name: role if sign else None for name, sign, role in pairs}
    found = {}
    names = {role: role for role in ROLES} | dict.fromkeys(QUESTIONS, "question") | dict.fromkeys(ANSWERS, "answer")
    for name, role in columns.items():
        if role not in names and name in names:
            name, role = role, name
        given, role = role, names.get(role)
        if role not in ROLES or not isinstance(name, str):
            raise ValueError(f"`columns` says that '{name}' is {given!r}; a column can be {', '.join(ROLES)}.")
        if role in found.values():
            raise ValueError(f"`columns` names two columns as {role}; name one.")
        found[name] = role
    return found


def asked(row: dict[str, Any], questions: Iterable[str]) -> dict[str, Any]:
    """
    Args:
        row (`dict`): In any form.
        questions (`Iterable[str]`): What is asked about plain media; each row always draws the same of several.

    Returns:
        `dict`: the row, with a `question` where it holds media and an answer and nothing else that is asked.
    """
    questions = list(questions)
    has_media = not all(is_nothing(row.get(name)) for name in MEDIA_NAMES)
    others = ("messages", "conversations", *QUESTIONS)
    if not questions or not has_media or any(row.get(name) is not None for name in others):
        return row
    drawn = crc32(shortened_json([row.get("_row"), *(row.get(name) for name in ANSWERS)]).encode())
    return {**row, "question": questions[drawn % len(questions)]}


# --- Media beside conversations


def _files(value: Any, kind: str, name: str) -> list:
    """What a media column holds, clip by clip."""
    if kind == "video" and name == "video":
        return [value] if value else []  # one video, perhaps as the list of its frames
    if value in ("", [], ()) if isinstance(value, str | list | tuple) else False:
        return []
    if isinstance(value, list) and not (value and all(isinstance(each, int | float) for each in value)):
        return value
    return [value]


def _places(messages: list[dict], mark: str) -> int:
    """How often a mark stands in texts."""
    return sum(part["text"].count(mark) for part in parts_of(messages) if part.get("type") == "text")


def _with_files(messages: list[dict], kind: str, mark: str, files: list, is_plain: bool) -> list[dict]:
    """The messages, each file of a column in its place."""
    empty = sum(_is_empty(part, kind, mark) for part in parts_of(messages))
    marks = _places(messages, mark)
    first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
    if files and is_plain and not empty + marks and first is not None:
        content = messages[first]["content"]
        content = ([{"type": "text", "text": content}] if content else []) if isinstance(content, str) else content
        places = [index for index, part in enumerate(content) if part["type"] == "text"]
        place = places[0] if len(places) == 1 else len(content) - len(places)  # behind the media of other columns
        parts = [*content[:place], *({"type": kind, kind: file} for file in files), *content[place:]]
        return [{**m, "content": parts} if index == first else m for index, m in enumerate(messages)]
    splits = len(files) != empty or not empty  # where typed parts take all, a mark in a text is text
    if len(files) != empty + (marks if splits else 0):
        raise ValueError(
            f"A row has {empty + marks} {mark} in its conversation but {len(files)} such files; they must be as many."
        )
    queue = iter(files)

    def placed(content: Any) -> Any:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        made = []
        for part in parts:
            if _is_empty(part, kind, mark):
                made.append({**part, "type": kind, kind: next(queue)})
            elif part.get("type") == "text" and splits and mark in part["text"]:
                for piece in re.split(rf"\n?({re.escape(mark)})\n?", part["text"]):
                    if piece == mark:
                        made.append({"type": kind, kind: next(queue)})
                    elif piece:
                        made.append({**part, "text": piece})
            else:
                made.append(part)
        return made

    return [{**message, "content": placed(message["content"])} for message in messages]


def _is_empty(part: Mapping[str, Any], kind: str, mark: str) -> bool:
    """Whether a part names a kind of media and no source."""
    named = part.get("type") in (kind, mark[1:-1])
    keys = (*MODALITIES, *SOURCE_KEYS, *(key for kind, key in OTHER_TYPES.values() if kind != "text"))
    return named and not any(part.get(key) is not None for key in keys)


def _refuse_unread_media(fields: Mapping[str, Any], used: list[str], messages: list[dict]) -> None:
    """Media in a field that nothing is made of, in a row without any other."""
    if any(part.get("type") != "text" for part in parts_of(messages)) or {*used} & {*MEDIA_NAMES}:
        return
    for name, value in fields.items():
        if name not in used and name not in ("id", "source") and looks_like_media(value):
            kind = kind_of_file(value) or "image"
            raise ValueError(
                f"the field '{name}' holds media ({shortened_json(value)}) that nothing in the row takes; say so with "
                f"columns ({name}={kind})"
            )


def looks_like_media(value: Any) -> bool:
    """Whether a field's value names or holds a picture, sound or video."""
    if isinstance(value, list | tuple):
        return bool(value) and all(looks_like_media(each) for each in value)
    if isinstance(value, Mapping):
        return bool({"bytes", "array"} & value.keys()) or looks_like_media(value.get("path"))
    if isinstance(value, str):
        return value.startswith("data:") or kind_of_file(value) is not None
    return isinstance(value, bytes) or type(value).__module__.split(".")[0] in ("PIL", "torchcodec", "decord")


def kind_of_file(value: Any) -> str | None:
    """
    Args:
        value (`str`, `dict` or `list`): A path, or what holds one.

    Returns:
        `str`: `"image"`, `"audio"` or `"video"` by the file's name; `None` for whatever else.
    """
    while isinstance(value, list | tuple) and value:
        value = value[0]
    value = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or len(value) > 1000 or " " in value.strip():
        return None
    kind = (mimetypes.guess_type(value)[0] or "").split("/")[0]
    return kind if kind in ("image", "audio", "video") else None


def named_files(row: dict[str, Any]) -> dict[str, Any]:
    """
    Args:
        row (`dict`): Of a folder's `metadata` file, as `datasets` reads them: files stand in `file_name`,
            `file_names`, `<column>_file_name` or `<column>_file_names`.

    Returns:
        `dict`: the row with columns of media in their place.
    """
    made = {}
    for name, value in row.items():
        column = re.fullmatch(r"(?:(.+)_)?file_names?", name)
        if column is None:
            made[name] = value
        else:
            made[column[1] or kind_of_file(value) or "file_name"] = value
    return made


# --- What rows are like


def parts_of(messages: list[dict]) -> list[Mapping[str, Any]]:
    """All parts of a conversation."""
    contents = (message["content"] for message in messages)
    return [
        part for each in contents for part in ([{"type": "text", "text": each}] if isinstance(each, str) else each)
    ]


def row_modalities(row: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """
    Args:
        row (`dict`): In any form; nothing is read from disk.

    Returns:
        `tuple(tuple[str], int)`: which modalities it has, in the order of `MODALITIES`, and its length in words.
    """
    parts = parts_of(row_to_messages(row))
    kinds = {part.get("type") for part in parts}
    words = sum(len(part.get("text", "").split()) for part in parts if part.get("type") == "text")
    return tuple(modality for modality in MODALITIES if modality in kinds), words


def describe_row(row: Mapping[str, Any]) -> str:
    """
    Args:
        row (`dict`): In any form.

    Returns:
        `str`: its number and file, where [`~row_files.load_rows`] read it, else how it begins.
    """
    if row.get("_row") is not None:
        return f"Row {row['_row']} of '{row['_source']}'"
    fields = {name: value for name, value in row.items() if value is not None and name not in PLACE}
    begin = next((fields[name] for name in ("messages", "conversations", "prompt") if fields.get(name)), fields)
    return f"The row that begins with {shortened_json(begin)}"


def rooted(messages: list[dict], root: Path | None) -> list[dict]:
    """The same messages, relative paths joined to `root`."""

    def joined(value: Any) -> Any:
        if isinstance(value, list):  # a video as a list of frames
            return [joined(item) for item in value]
        if isinstance(value, Mapping):
            return {**value, "path": joined(value.get("path"))}
        is_path = isinstance(value, str | Path) and not str(value).startswith(
            ("http://", "https://", "data:", "file:")
        )
        if not is_path or len(str(value)) >= 4096:
            return value
        path, inside = root / value, root / str(value).lstrip("/")
        # Data sets are published with roots such as "/coco_images", which mean a folder of the data.
        return str(inside if path != inside and not path.exists() and inside.exists() else path)

    def with_root(part: Mapping[str, Any]) -> dict[str, Any]:
        keys = () if part.get("type") == "text" else (*MODALITIES, "path", "url", *(f"{m}_url" for m in MODALITIES))
        return {
            key: ({**value, "url": joined(value.get("url"))} if isinstance(value, Mapping) and "url" in value
                  else joined(value)) if key in keys else value
            for key, value in part.items()
        }  # fmt: skip

    if root is None:
        return messages
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [with_root(part) for part in message["content"]]}
        for message in messages
    ]


def shortened_json(value: Any) -> str:
    """How a value begins, piece by piece: some hold a whole waveform. Objects are told by their type."""

    def plain(each: Any) -> str:
        return f"{len(each)} bytes" if isinstance(each, bytes) else f"a {type(each).__name__}"

    def pieces() -> Iterator[str]:
        try:
            yield from json.JSONEncoder(default=plain, skipkeys=True).iterencode(value)
        except (RecursionError, ValueError):
            yield "..."

    beginning = ""
    for piece in pieces():
        beginning += piece
        if len(beginning) >= 100:
            break
    return beginning[:100]


__all__ = [
    "check_characters",
    "describe_row",
    "kind_of_file",
    "rooted",
    "row_modalities",
    "row_to_messages",
    "unread_fields",
]
