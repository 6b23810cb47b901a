"""
Conversations: messages with parts of any modality to prompts with placeholders, and back to who says what.

Whatever stands in somebody's text stays text, `<image>` and `</s>` too; media go to the processor, in reading order.
"""

import dataclasses
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain, product
from typing import Any


from .compat_uni_moe import answers_requests, render_jinja_template  # isort: skip  a library that is too old is refused there

from transformers import BatchFeature
from transformers.utils import logging

from .configuration_uni_moe import MODALITIES
from .files_uni_moe import from_base64
from .media_uni_moe import MEDIA_NAMES, Clip


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

# A private-use character that the tokenizer's normaliser removes. Inside "<image>" it hides the placeholder from every
# search for it, so that the word can be written in a conversation as ordinary text.
LITERAL_MARK = "\uf8ee"
# Stands for a message's text while it is looked for in what a template makes of it.
SENTINEL = "\uf8e0\uf8e1\uf8e0"

# Vicuna v1.1 as `*/conversation.py@f5e82dd` renders it: `{system} USER: {question} ASSISTANT: {answer}</s>`.
# Media and neighbouring parts are separated by a line break, as in the original's prompts ("<image>\n{question}").
VICUNA_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- set after_text = not loop.first and content[loop.index0 - 1]['type'] == 'text' -%}
            {%- if not loop.first and not (after_text and part['type'] == 'text') -%}{{ '\\n' }}{%- endif -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '<' + part['type'] + '>' }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {{- render(messages[0]['content']) + ' ' -}}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {{- "A chat between a curious user and an artificial intelligence assistant. " -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set is_known = message['role'] in ('user', 'assistant') -%}
    {%- if not is_known or (not loop.first and message['role'] == turns[loop.index0 - 1]['role']) -%}
        {%- set order = "Roles must alternate user, assistant, user, ... after an optional system message" -%}
        {{- raise_exception(order + ", but message " + loop.index|string + " is by '" + message['role'] + "'.") -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + render(message['content']) -}}
    {%- else -%}
        {{- 'ASSISTANT:' if loop.first else ' ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""


# By which that template is known, in this form or an earlier one.
VICUNA_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "


class ConversationMixin:
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
            if value and not _reads(template, name):
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
            elif not _reads(template, name):
                logger.warning_once(
                    f"Neither the chat template nor the processor knows `{name}`, so it is ignored; settings of "
                    "`generate` go to `generate`, those of a pipeline into its `generate_kwargs`."
                )
        if return_tensors not in (None, "auto"):
            processor_kwargs["return_tensors"] = return_tensors
        rendering = {"tools": tools, "documents": documents, **kwargs}
        rendering |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}

        def render(messages: list[dict], **changes: Any) -> str:
            try:
                settings = {"chat_template": template, "tokenize": False, **rendering, **changes}
                return self.tokenizer.apply_chat_template(messages, **settings)
            except Exception as error:
                if not type(error).__module__.startswith("jinja2"):
                    raise
                raise ValueError(f"The chat template refuses this conversation: {error}") from error

        words = [self._words(messages, template, render) for messages in conversations]
        prompts = [render(messages) for messages in words]
        if not tokenize:
            return prompts if is_batched else prompts[0]
        clips = self._clips(conversations, load_audio_from_video)
        if VICUNA_SYSTEM not in template:  # which leaves `<s>` to the tokenizer; others write it themselves
            processor_kwargs["add_special_tokens"] = False
        if return_assistant_tokens_mask:
            if continue_final_message:
                raise ValueError("`return_assistant_tokens_mask` and `continue_final_message` exclude each other.")
            if not getattr(self.tokenizer, "is_fast", False):
                raise ValueError(
                    f"A {type(self.tokenizer).__name__} does not tell where its tokens stand in the text, so there is "
                    "no `return_assistant_tokens_mask`; use a fast tokenizer."
                )
            processor_kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        inputs = self(text=prompts if is_batched else prompts[0], **clips, **processor_kwargs)
        if return_assistant_tokens_mask:
            spans = self._assistant_spans(words, prompts, template, rendering, render)
            spans = [_learned_spans(*row) for row in zip(conversations, spans, prompts, strict=True)]
            masks = _assistant_masks(spans, inputs.pop("text_replacement_offsets"), inputs.pop("offset_mapping"))
            tensor_type = self._grouped_kwargs(processor_kwargs)["common_kwargs"]["return_tensors"]
            inputs.update(BatchFeature({"assistant_masks": masks}, tensor_type=tensor_type))
        return inputs if return_dict else inputs["input_ids"]

    def _template(self, name_or_template: str | None) -> str:
        """The template that is meant, by name where the processor has several."""
        templates = self.chat_template
        if isinstance(templates, dict):
            name = name_or_template or "default"
            if name in templates:
                return templates[name]
            if name_or_template is None:
                raise ValueError(
                    f"The processor has the templates {sorted(templates)}, none of them named 'default'; name one in "
                    "`chat_template`."
                )
        return name_or_template or templates

    def _words(self, messages: list[dict], template: str, render: Callable) -> list[dict]:
        """
        Messages as a template reads them: their text with a placeholder for each clip, media and what stands beside
        them separated by a line break as in the original's prompts; parts for a template that wants nothing else.
        """
        takes_text = self._takes_text(template, render)
        words = []
        for message in messages:
            message = {key: value for key, value in message.items() if key not in ("learned", "unlearned")}
            parts = [{key: value for key, value in part.items() if key != "source"} for part in message["content"]]
            words.append({**message, "content": _joined_text(parts) if takes_text else parts})
        return words

    def _takes_text(self, template: str, render: Callable) -> bool:
        """Whether a template reads messages whose content is text, as nearly all do; some read parts alone."""
        known = self.__dict__.setdefault("_templates_of_text", {})
        for before, after in product(([], ["system"]), ([], ["assistant"])):
            if template in known:
                break
            for content in (SENTINEL, [{"type": "text", "text": SENTINEL}]):
                roles = [*before, "user", *after]
                probe = [{"role": role, "content": content} for role in roles]
                with suppress(ValueError, TypeError):
                    text = render(probe, add_generation_prompt=False, continue_final_message=False)
                    if text.count(SENTINEL) >= len(roles) and "'type'" not in text:
                        known[template] = content is SENTINEL
                        break
        return known.get(template, True)

    def _assistant_spans(
        self, words: list[list[dict]], prompts: list[str], template: str, rendering: dict, render: Callable
    ) -> list[list[tuple[int, int]]]:
        """Characters of each prompt that the assistant says, message by message."""
        if render_jinja_template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", template):
            variables = {**self.tokenizer.special_tokens_map, **rendering, "chat_template": template}
            return render_jinja_template(conversations=words, return_assistant_tokens_mask=True, **variables)[1]
        render_plain = partial(render, add_generation_prompt=False, continue_final_message=False)
        opening = ""
        with suppress(ValueError):  # of a template that does not take a question alone
            question = [{"role": "user", "content": _as_content(SENTINEL, words[0])}]
            before, after = (
                render_plain(question),
                render(question, continue_final_message=False, add_generation_prompt=True),
            )
            opening = after[len(before) :] if after.startswith(before) else ""
        return [
            list(self._spans_by_rendering(messages, prompt, opening, render, render_plain))
            for messages, prompt in zip(words, prompts, strict=True)
        ]

    def _spans_by_rendering(
        self, messages: list[dict], prompt: str, opening: str, render: Callable, render_plain: Callable
    ) -> Iterator[tuple[int, int]]:
        """
        Where a message stands is seen by rendering another text in its place. It begins behind what opens the
        assistant's turn, and ends behind what is written after it whether or not others follow.
        """

        def behind(rendered: list[dict]) -> str | None:
            with suppress(ValueError):
                return render_plain(rendered).rpartition(SENTINEL)[2]
            return None  # the template refuses it

        sentinel = _as_content(SENTINEL, messages)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            until, rest = [*messages[:index], {**message, "content": sentinel}], messages[index + 1 :]
            before, found, after = render([*until, *rest]).partition(SENTINEL)
            # What the template writes between this message and the one before.
            gap = before
            if index:
                others = [*messages[: index - 1], {**messages[index - 1], "content": sentinel}, *until[index:], *rest]
                with suppress(ValueError):
                    pieces = render(others).split(SENTINEL)
                    gap = pieces[-2] if len(pieces) == 3 else ""
            start = len(before) - len(gap) + gap.rfind(opening) + len(opening)
            if not opening or opening not in gap:
                start = len(before.rstrip(" "))
            stop = len(prompt) - len(after)
            if not found or stop < start or not (prompt.startswith(before[:start]) and prompt.endswith(after)):
                raise ValueError(
                    f"The chat template writes around message {index + 1} what depends on its text, and does not mark "
                    "with `{% generation %}` what the assistant says; add these marks to the template."
                )
            alone = behind(until)
            alone = after if alone is None else alone
            question = {"role": "user", "content": _as_content("x", messages)}
            followed = after if rest else behind([*until, question])
            ending = alone if followed is None else os.path.commonprefix([alone, followed])
            ending = self._without_half_token(ending, alone)
            yield start, stop + len(ending.rstrip() or ending)

    def _without_half_token(self, ending: str, whole: str) -> str:
        """`ending`, the beginning of `whole`, up to the special token that it cuts through."""
        for match in self._control_tokens.finditer(whole):
            if match.start() < len(ending) < match.end():
                return ending[: match.start()]
        return ending

    @property
    def _control_tokens(self) -> re.Pattern:
        """What the tokenizer reads as one special token, wherever it stands."""
        known = self.__dict__.get("_known_control_tokens")
        if known is None or known[0] != len(self.tokenizer):
            added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
            tokens = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
            longest = sorted((token for token in tokens if len(token) > 1), key=lambda token: (-len(token), token))
            known = (len(self.tokenizer), re.compile("|".join(map(re.escape, longest)) or r"(?!)"))
            self._known_control_tokens = known
        return known[1]

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
            elif _reads(template, name):
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
                end = len(_joined_text(self._joined_parts(parts[: index + 1])))
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


def _as_content(text: str, messages: list[dict]) -> str | list[dict]:
    """A text in the form that the template of these messages reads."""
    return [{"type": "text", "text": text}] if isinstance(messages[0]["content"], list) else text


def _joined_text(parts: list[dict]) -> str:
    """The text of a message, a placeholder for each clip."""
    pieces = [part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts]
    return "\n".join(pieces)


def _reads(template: str, name: str) -> bool:
    """Whether a template speaks of a field or variable."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


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


def _learned_spans(messages: list[dict], spans: list[tuple[int, int]], prompt: str) -> list[tuple[int, int]]:
    """Spans of what the assistant says, without messages and texts that are not to be learned."""
    said = [message for message in messages if message["role"] == "assistant"]
    if all(message["learned"] and not message["unlearned"] for message in said):
        return spans
    if len(said) != len(spans):
        raise ValueError(
            f"The chat template marks {len(spans)} pieces as said by the assistant in {len(said)} messages, so it is "
            "unknown which of them are not to be learned."
        )
    learned = []
    for message, (start, stop) in zip(said, spans, strict=True):
        if not message["learned"]:
            continue
        text = _joined_text(message["content"])
        whole, shift = text.strip(), len(text) - len(text.lstrip())
        place = prompt.find(whole, start, stop)
        if message["unlearned"] and place < 0:
            raise ValueError("The chat template changes a text of which a part is not to be learned; mark all of it.")
        for begin, end in message["unlearned"]:
            begin, end = (place + max(0, min(each - shift, len(whole))) for each in (begin, end))
            # A space before a word is part of the word's token.
            learned.append((start, start + len(prompt[start:begin].rstrip())))
            start = end - len(prompt[begin:end]) + len(prompt[begin:end].rstrip())
        learned.append((start, stop))
    return learned


def _assistant_masks(spans: list, replaced: list[list[dict]], offsets: Any) -> list[list[int]]:
    """
    `(B, T)` 1 for tokens inside the spans of their row. Spans count characters before placeholders were repeated,
    tokens' offsets those behind.
    """
    masks = []
    for row_spans, row_replaced, row in zip(
        spans, replaced, offsets.tolist() if hasattr(offsets, "tolist") else offsets, strict=True
    ):
        ends = [each["span"][1] for each in row_replaced]
        gained = [0, *(each["new_span"][1] - each["span"][1] for each in row_replaced)]
        moved = [[place + gained[bisect_right(ends, place)] for place in span] for span in row_spans]
        masks.append([int(any(start < last and end > first for first, last in moved)) for start, end in row])
    return masks


__all__ = ["LITERAL_MARK", "VICUNA_CHAT_TEMPLATE", "ConversationMixin"]
