"""
Conversations: messages with parts of any modality to prompts with placeholders, and back to who says what.

Whatever stands in somebody's text stays text, `<image>` and `</s>` too; media go to the processor, in reading order.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any


from .compat_uni_moe import answers_requests  # isort: skip  a library that is too old is refused there

from transformers import BatchFeature
from transformers.utils import logging

from .configuration_uni_moe import MODALITIES
from .files_uni_moe import from_base64
from .media_uni_moe import MEDIA_NAMES, Clip
from .templates_uni_moe import (
    LITERAL_MARK,
    TemplateMixin,
    assistant_masks,
    for_us,
    joined_text,
    learned_spans,
    leaves_beginning,
    reads,
)


logger = logging.get_logger(__name__)

# What `__call__` names the clips of each modality, as the library does.
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "speech": "speech"}
# Where a message part may keep its clip, besides a key of its type's own name.
SOURCE_KEYS = ("url", "path", "base64", "bytes")
# What else it may say of it, here and in Qwen's tools, and what messages and texts may say of being learned.
CLIP_KEYS = {
    "start": "start",
    "video_start": "start",
    "audio_start": "start",
    "end": "end",
    "video_end": "end",
    "audio_end": "end",
    "num_frames": "num_frames",
    "nframes": "num_frames",
    "fps": "fps",
}
CLIP_SETTINGS = {"image": (), "video": ("start", "end", "num_frames", "fps"), "audio": ("start", "end")}
LEARNED_KEYS = ("weight", "loss", "train")
# The same parts under names of other interfaces: type -> our type and the key of what it holds.
OTHER_TYPES = {
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "video_url": ("video", "video_url"),
    "audio_url": ("audio", "audio_url"),
    "input_audio": ("audio", "input_audio"),
    "input_text": ("text", "text"),
    "output_text": ("text", "text"),
}
# Fields of messages that say something, and would be lost with a template that does not read them.
SAYING = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "thinking", "reasoning", "documents")


class ConversationMixin(TemplateMixin):
    """
    `apply_chat_template` for a processor with a `tokenizer`, a `chat_template`, `_placeholders`, an `_ear` for each
    modality and `_call_settings`, what its `__call__` takes.
    """

    @answers_requests
    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> Any:
        r"""
        As in the library, for all four modalities, alike on every release, with any template: media become
        placeholders before a template sees them. Special tokens in somebody's text are text.

        Args:
            conversation (`list[dict]` or a list of those): Messages with `role` and `content`: text, or parts
                `{"type": "text" | "image" | "video" | "audio" | "speech", "path" | "url" | "base64" | "bytes" |
                <type>: ...}`, in any order and number. Sound and video may have `start` and `end` in seconds, video
                `num_frames` or `fps`. Messages of a user that follow each other are joined.
            chat_template (`str`, *optional*): A template, or the name of one of several; the processor's by default.
            tools, documents (*optional*): For templates that take them.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): Whether the assistant speaks next.
            continue_final_message (`bool`, *optional*, defaults to `False`): Whether the last message is to go on.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`): Adds `assistant_masks` `(B, T)`, 1
                where the assistant speaks, from its first word to the token that ends its turn: as the template marks
                it with `{% generation %}`, else found by rendering turn by turn. 0 for messages and parts with
                `"weight": 0`, `"loss": False` or `"train": False`.
            tokenize (`bool`, *optional*, defaults to `False`): Whether to return model inputs in place of text.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.
            return_dict (`bool`, *optional*, defaults to `False`): All model inputs, or `input_ids` alone.
            load_audio_from_video (`bool`, *optional*, defaults to `False`): Whether an `audio` or `speech` part
                without a source stands for the sound track of the video before it.
            processor_kwargs (`dict`, *optional*): For [`__call__`], such as `{"padding": True}`.
            kwargs: For the template; what [`__call__`] takes is passed to it.

        Returns:
            `str`, or a list of them; with `tokenize`, [`BatchFeature`] or `input_ids`.

        Raises:
            ValueError: a message or part is not of the form above, or says what cannot be done; the template refuses
                the conversation; media as in [`__call__`].
        """
        kwargs.pop("sanitize_control_tokens", None)  # done in any case
        template = self._template(chat_template)
        for name, value in (("tools", tools), ("documents", documents)):
            if value and not reads(template, name):
                raise ValueError(
                    f"The chat template does not read `{name}`; leave them out, or pass a template that does."
                )
        conversations, is_batched = self._conversations(conversation, template)
        processor_kwargs = dict(processor_kwargs or {})
        if given := {"text", *ARGUMENTS.values()} & set(processor_kwargs):
            raise ValueError(f"`processor_kwargs` holds {sorted(given)}; media belong into the conversation's parts.")
        call_settings = self._call_settings if kwargs else ()
        for name in [*kwargs]:
            if name in call_settings:
                processor_kwargs[name] = kwargs.pop(name)
            elif not reads(template, name):
                logger.warning_once(
                    f"Neither the chat template nor the processor knows `{name}`, so it is ignored; settings of "
                    "`generate` go to `generate`, those of a pipeline into its `generate_kwargs`."
                )
        if return_tensors not in (None, "auto"):
            processor_kwargs["return_tensors"] = return_tensors
        rendering = {"tools": tools, "documents": documents, **kwargs}
        rendering |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}

        def render(messages: list[dict], **changes: Any) -> str:
            return self._render(messages, template, **{**rendering, **changes})

        words = [self._words(messages, template) for messages in conversations]
        prompts = [render(messages) for messages in words]
        if not tokenize:
            return prompts if is_batched else prompts[0]
        clips = self._clips(conversations, load_audio_from_video)
        if not leaves_beginning(template):
            processor_kwargs["add_special_tokens"] = False
        if return_assistant_tokens_mask:
            if continue_final_message:
                raise ValueError("`return_assistant_tokens_mask` and `continue_final_message` exclude each other.")
            if not getattr(self.tokenizer, "is_fast", False):
                raise ValueError(
                    f"A {type(self.tokenizer).__name__} does not tell where its tokens stand in the text, so there is "
                    "no `return_assistant_tokens_mask`; use a fast tokenizer."
                )
            processor_kwargs |= {"return_offsets_mapping": True, "return_replacements": True}
        inputs = self(text=prompts if is_batched else prompts[0], **clips, **processor_kwargs)
        if return_assistant_tokens_mask:
            spans = self._assistant_spans(words, prompts, template, rendering, render)
            spans = [learned_spans(*row) for row in zip(conversations, spans, prompts, strict=True)]
            masks = assistant_masks(spans, inputs.pop("text_replacement_offsets"), inputs.pop("offset_mapping"))
            tensor_type = self._grouped_kwargs(processor_kwargs)["common_kwargs"]["return_tensors"]
            inputs.update(BatchFeature({"assistant_masks": masks}, tensor_type=tensor_type))
        return inputs if return_dict else inputs["input_ids"]

    def _template(self, name_or_template: str | None) -> str:
        """The template that is meant, by name where the processor has several."""
        templates = self.chat_template
        if isinstance(templates, dict):
            name = name_or_template or "default"
            if name in templates:
                return for_us(templates[name])
            if name_or_template is None:
                raise ValueError(
                    f"The processor has the templates {sorted(templates)}, none of them named 'default'; name one in "
                    "`chat_template`."
                )
        template = name_or_template or templates
        return for_us(template) if isinstance(template, str) else template

    def _words(self, messages: list[dict], template: str) -> list[dict]:
        """
        Messages as a template reads them: their text with a placeholder for each clip, media and what stands beside
        them separated by a line break as in the original's prompts; parts for a template that wants nothing else.
        """
        takes_text = self._takes_text(template)
        words = []
        for message in messages:
            message = {key: value for key, value in message.items() if key not in ("learned", "unlearned")}
            parts = [{key: value for key, value in part.items() if key != "source"} for part in message["content"]]
            words.append({**message, "content": joined_text(parts) if takes_text else parts})
        return words

    def _conversations(self, conversation: Any, template: str) -> tuple[list[list[dict]], bool]:
        """Copies of conversations in which every part is checked, sent to its ear and cleared of special tokens."""
        if not conversation and not hasattr(conversation, "messages"):
            raise ValueError("The conversation is empty; pass at least one message.")
        if isinstance(conversation, str | dict):
            raise ValueError(f"The conversation is a {type(conversation).__name__}; pass a list of messages.")
        first = conversation[0] if isinstance(conversation, list | tuple) else conversation
        is_batched = first is not conversation and (isinstance(first, list | tuple) or hasattr(first, "messages"))
        conversations = []
        for messages in conversation if is_batched else [conversation]:
            messages = getattr(messages, "messages", messages)
            if not messages:
                raise ValueError("A conversation is empty; pass at least one message.")
            conversations.append([])
            for message in messages:
                message = self._message(message, template)
                last = conversations[-1][-1] if conversations[-1] else None
                if last is not None and last["role"] == message["role"] in ("user", "system"):
                    break_line = [{"type": "text", "text": "\n"}] if last["content"] and message["content"] else []
                    kinds = {part["type"] for part in (*last["content"][-1:], *message["content"][:1])}
                    break_line = break_line if kinds == {"text"} else []  # media have one anyway
                    last["content"] = self._joined_parts([*last["content"], *break_line, *message["content"]])
                else:
                    conversations[-1].append(message)
        return conversations, is_batched

    def _message(self, given: Any, template: str) -> dict:
        """One message: its role, its parts, whether it is `learned` and which of its texts are `unlearned`."""
        message = _as_dict(given, "message")
        if "content" not in message and isinstance(given, Mapping) and "content" in given:
            message["content"] = ""  # as beside tool calls
        if "role" not in message or "content" not in message:
            raise ValueError(f"A message needs 'role' and 'content', got the keys {sorted(message)}.")
        if not isinstance(message["role"], str):
            raise ValueError(f"The role of a message is a {type(message['role']).__name__}; it must be text.")
        message["role"] = {"developer": "system"}.get(message["role"], message["role"])
        for name in [*message.keys() - {"role", "content", "name", *LEARNED_KEYS}]:
            if not message[name]:
                del message[name]
            elif reads(template, name):
                continue
            elif name in SAYING or name in MEDIA_NAMES:
                where = "put media into the parts of `content`" if name in MEDIA_NAMES else "leave it out"
                raise ValueError(f"A message has '{name}', which the chat template does not read; {where}.")
            else:
                logger.warning_once(f"Messages have the field '{name}', which is not read.")
        message["learned"] = _is_learned(message)
        for name in LEARNED_KEYS:
            message.pop(name, None)
        content = message["content"]
        content = [content] if isinstance(content, str | Mapping) else content
        if not isinstance(content, list | tuple):
            raise ValueError(
                f"The content of a message is a {type(content).__name__}; it must be text or a list of parts."
            )
        parts = [self._part(part) for part in content]
        learned = [part.pop("learned", None) for part in parts]
        if message["role"] != "assistant" and any(flag for flag in learned):
            raise ValueError(f"A part asks that a text by '{message['role']}' be learned; only the assistant's are.")
        message["unlearned"] = []  # where in the message's text
        for index, flag in enumerate(learned):
            if flag is False:
                end = len(joined_text(self._joined_parts(parts[: index + 1])))
                message["unlearned"].append((end - len(self._as_text(parts[index]["text"])), end))
        message["content"] = self._joined_parts(parts)
        return message

    def _joined_parts(self, parts: list[dict]) -> list[dict]:
        """Message parts, text that follows text joined to it: a special token could else hide in the seam."""
        joined = []
        for part in parts:
            if part["type"] == "text" and joined and joined[-1]["type"] == "text":
                joined[-1] = {"type": "text", "text": self._as_text(joined[-1]["text"] + part["text"])}
            else:
                joined.append(part)
        return joined

    def _part(self, part: Any) -> dict:
        """One message part in the form that template and loader read."""
        part = {"type": "text", "text": part} if isinstance(part, str) else _as_dict(part, "message part")
        kind = part.get("type")
        if kind is None:  # as Qwen's interfaces write them
            kind = next((name for name in ("text", *MODALITIES) if name in part), None)
        if isinstance(kind, str) and kind in OTHER_TYPES:
            kind, key = OTHER_TYPES[kind]
            held = part.get(key)
            held = held.get("url") or held.get("data") if isinstance(held, Mapping) else held
            source = {"text": held} if kind == "text" else {"base64" if key == "input_audio" else "url": held or None}
            part = {"type": kind, **{k: v for k, v in part.items() if k not in ("type", key)}, **source}
        if kind == "audio" and (ear := part.pop("ear", None) or _ear_of_url(part.get("url"))):
            if ear not in ("audio", "speech"):
                raise ValueError(f"The `ear` of a message part is {ear!r}; it must be 'audio' or 'speech'.")
            part = {ear if key == "audio" else key: value for key, value in part.items()} | {"type": ear}
            kind = ear
        if kind not in ("text", *MODALITIES):
            raise ValueError(f"A message part has the type {kind!r}; known are text, {', '.join(MODALITIES)}.")
        sources = {key: part[key] for key in (*MODALITIES, *SOURCE_KEYS) if not _is_nothing(part.get(key))}
        if kind == "text":
            if sources:
                raise ValueError(
                    f"A part of type 'text' holds '{next(iter(sources))}'; give media a part of their own."
                )
            if not isinstance(text := part.get("text") or "", str):
                raise ValueError(f"The text of a message part is a {type(text).__name__}; it must be text.")
            others = [name for name in part if name not in ("type", "text", *LEARNED_KEYS)]
            if not text and others:
                raise ValueError(f"A part of type 'text' has no 'text' but {others}; put what it says into 'text'.")
            self._warn_of(part, kind, ("text", *LEARNED_KEYS))
            said = {"learned": _is_learned(part)} if any(part.get(name) is not None for name in LEARNED_KEYS) else {}
            return {"type": "text", "text": self._as_text(text), **said}
        if part.get("text"):
            raise ValueError(f"A part of type {kind!r} holds text as well; give it a part of its own.")
        if len(sources) > 1 or sources.keys() & (set(MODALITIES) - {kind}):
            raise ValueError(
                f"A part of type {kind!r} names {len(sources)} sources, {sorted(sources)}; give one of "
                f"{(kind, *SOURCE_KEYS)}."
            )
        source = next(iter(sources.values()), None)
        if "base64" in sources:
            source = from_base64(source)
        elif part.get("sampling_rate") is not None and not isinstance(source, str | bytes | dict | None | os.PathLike):
            source = {"array": source, "sampling_rate": part["sampling_rate"]}
        allowed = CLIP_SETTINGS["audio" if kind == "speech" else kind]
        settings = {name: part[key] for key, name in CLIP_KEYS.items() if part.get(key) is not None}
        if foreign := settings.keys() - {*allowed}:
            raise ValueError(f"A part of type {kind!r} has `{min(foreign)}`, which means nothing there; leave it out.")
        self._warn_of(part, kind, (*SOURCE_KEYS, *CLIP_KEYS, kind, "sampling_rate", "format", "text", *LEARNED_KEYS))
        if settings and source is not None:
            source = Clip(source, **settings)
        return {"type": self._ear(kind), "source": source}

    def _warn_of(self, part: dict, kind: str, known: tuple[str, ...]) -> None:
        """Of what a part says and nobody reads."""
        for name in part.keys() - {"type", *known}:
            if part[name] not in ("", [], {}):
                logger.warning_once(f"Message parts of type '{kind}' have the field '{name}', which is not read.")

    def _as_text(self, text: str) -> str:
        """Text in which special tokens, a literal `<image>` among them, are ordinary text."""
        text = text.replace(LITERAL_MARK, "")
        return self._control_tokens.sub(lambda match: f"{match.group()[0]}{LITERAL_MARK}{match.group()[1:]}", text)

    def _clips(self, conversations: list[list[dict]], load_audio_from_video: bool) -> dict[str, list[list]]:
        """Sources of all parts by row, under the names of [`__call__`]'s arguments; those without any are left out."""
        clips = {modality: [[] for _ in conversations] for modality in MODALITIES}
        for row, messages in enumerate(conversations):
            last_video = None
            for part in chain.from_iterable(message["content"] for message in messages):
                kind, source = part["type"], part.get("source")
                if kind == "text":
                    continue
                if source is None and load_audio_from_video and kind in ("audio", "speech"):
                    source = last_video  # an empty sound part behind a video asks for its sound track
                if source is None:
                    raise ValueError(
                        f"A part of type {kind!r} has no source; give one of {(kind, *SOURCE_KEYS)}, for example "
                        f"{{'type': '{kind}', 'path': 'file'}}."
                    )
                last_video = source if kind == "video" else last_video
                clips[kind][row].append(source)
        return {ARGUMENTS[kind]: rows for kind, rows in clips.items() if any(rows)}


def _as_dict(item: Any, what: str) -> dict:
    """A message or part as a dict of its own, without what is `None`."""
    if hasattr(item, "model_dump"):
        item = item.model_dump()  # pydantic
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        item = dataclasses.asdict(item)
    if not isinstance(item, dict):
        form = " with a 'type', or a string" if what == "message part" else ""
        raise ValueError(f"A {what} is a {type(item).__name__}; it must be a dict{form}.")
    return {key: value for key, value in item.items() if value is not None}


def _ear_of_url(url: Any) -> str | None:
    """What `data:audio/wav;ear=speech;base64,...` names: requests cannot have parts of type "speech"."""
    found = re.match(r"data:[^,]{0,100};ear=(\w+)", url) if isinstance(url, str) else None
    return found and found.group(1)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | dict) and not value)


def _is_learned(item: dict) -> bool:
    """What `weight`, `loss` or `train` say of a message or part: whether the model learns to say it."""
    given = {name: item[name] for name in LEARNED_KEYS if item.get(name) is not None}
    if wrong := [name for name, value in given.items() if value not in (0, 1)]:
        raise ValueError(f"`{wrong[0]}` is {given[wrong[0]]!r}; only 0 and 1 (or False and True) are known.")
    if len({bool(value) for value in given.values()}) > 1:
        raise ValueError(f"{given} contradict each other.")
    if any(given.values()) and item.get("role", "assistant") != "assistant":
        raise ValueError(f"{given} asks that a message by '{item['role']}' be learned; only the assistant's are.")
    return all(given.values())


__all__ = ["ConversationMixin"]
