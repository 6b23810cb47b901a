"""
Conversations: messages with parts of any modality to prompts with placeholders, and back to who says what.

A literal `<image>` in somebody's text stays text; the sources of media parts go to the processor, in reading order.
"""

import dataclasses
import re
from bisect import bisect_right
from itertools import chain
from pathlib import Path
from typing import Any


from .compat_uni_moe import render_jinja_template  # isort: skip  a library that is too old is refused there

from transformers import BatchFeature
from transformers.utils import logging

from .configuration_uni_moe import MODALITIES
from .media_uni_moe import from_base64


logger = logging.get_logger(__name__)

# What `__call__` names the clips of each modality, as the library does.
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "speech": "speech"}
# Where a message part may keep its clip, besides a key of its type's own name.
SOURCE_KEYS = ("url", "path", "base64", "bytes")

# A private-use character that the tokenizer's normaliser removes. Inside "<image>" it hides the placeholder from every
# search for it, so that the word can be written in a conversation as ordinary text.
LITERAL_MARK = "\uf8ee"

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
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {%- set order = "Roles must alternate user, assistant, user, ... after an optional system message" -%}
        {{- raise_exception(order + ", but message " + loop.index|string + " is by '" + message['role'] + "'.") -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + render(message['content']) -}}
    {%- else -%}
        {{- ' ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""


class ConversationMixin:
    """
    `apply_chat_template` for a processor with a `tokenizer`, a `chat_template`, `_placeholders`, an `_ear` for each
    modality and `_call_settings`, what its `__call__` takes.
    """

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
        As in the library, for all four modalities and alike on every release.

        Args:
            conversation (`list[dict]` or a list of those): Messages with `role` and `content`: text, or parts
                `{"type": "text" | "image" | "video" | "audio" | "speech", "path" | "url" | "base64" | "bytes" |
                <type>: ...}`, in any order and number.
            chat_template (`str`, *optional*): A template, or the name of one of several; the processor's by default.
            tools, documents (*optional*): For templates that take them.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): Whether the assistant speaks next.
            continue_final_message (`bool`, *optional*, defaults to `False`): Whether the last message is to go on.
            return_assistant_tokens_mask (`bool`, *optional*, defaults to `False`): Adds `assistant_masks` `(B, T)`, 1
                where the assistant speaks: as the template marks it, else found by rendering turn by turn.
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
            ValueError: a message or part is not of the form above; media as in [`__call__`].
            TemplateError: (Jinja's) the roles do not suit the template.
        """
        if kwargs.pop("sanitize_control_tokens", False):
            raise ValueError(
                "`sanitize_control_tokens` is not done here: placeholders in text are plain text in any case, and "
                "control tokens such as '</s>' must be taken out of untrusted text beforehand."
            )
        conversations, is_batched = self._conversations(conversation)
        template = self._template(chat_template)
        processor_kwargs = dict(processor_kwargs or {})
        if given := {"text", *ARGUMENTS.values()} & set(processor_kwargs):
            raise ValueError(f"`processor_kwargs` holds {sorted(given)}; media belong into the conversation's parts.")
        call_settings = self._call_settings if kwargs else ()
        for name in [*kwargs]:
            if name in call_settings:
                processor_kwargs[name] = kwargs.pop(name)
            elif not re.search(rf"\b{re.escape(name)}\b", template):
                logger.warning_once(
                    f"Neither the chat template nor the processor knows `{name}`, so it is ignored; settings of "
                    "`generate` go to `generate`, those of a pipeline into its `generate_kwargs`."
                )
        if return_tensors not in (None, "auto"):
            processor_kwargs["return_tensors"] = return_tensors
        rendering = {"tools": tools, "documents": documents, **kwargs}
        rendering |= {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}

        # Templates see what kind a part is; its source is not for them.
        words = [[_without_sources(message) for message in messages] for messages in conversations]
        prompts = self.tokenizer.apply_chat_template(words, chat_template=template, tokenize=False, **rendering)
        if not tokenize:
            return prompts if is_batched else prompts[0]
        clips = self._clips(conversations, load_audio_from_video)
        if self.tokenizer.bos_token is not None and prompts[0].startswith(self.tokenizer.bos_token):
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
            spans = self._assistant_spans(words, prompts, template, rendering)
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

    def _assistant_spans(
        self, words: list[list[dict]], prompts: list[str], template: str, rendering: dict[str, Any]
    ) -> list[list[tuple[int, int]]]:
        """Characters of each prompt that the assistant says."""
        rendering = {**rendering, "chat_template": template}
        if render_jinja_template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", template):
            variables = {**self.tokenizer.special_tokens_map, **rendering}
            return render_jinja_template(conversations=words, return_assistant_tokens_mask=True, **variables)[1]
        spans = []
        for messages, prompt in zip(words, prompts, strict=True):
            spans.append([])
            for count, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                begin, end = (
                    self.tokenizer.apply_chat_template(
                        messages[:until], tokenize=False, **{**rendering, "add_generation_prompt": until == count}
                    )
                    if until
                    else ""
                    for until in (count, count + 1)
                )
                if not (end.startswith(begin) and prompt.startswith(end)):
                    raise ValueError(
                        f"The chat template writes message {count + 1} differently when others follow it, and does "
                        "not mark with `{% generation %}` what the assistant says; add these marks to the template."
                    )
                spans[-1].append((len(begin), len(end)))
        return spans

    def _conversations(self, conversation: Any) -> tuple[list[list[dict]], bool]:
        """Copies of conversations in which every part is checked, sent to its ear and cleared of placeholders."""
        if not conversation and not hasattr(conversation, "messages"):
            raise ValueError("The conversation is empty; pass at least one message.")
        if isinstance(conversation, str | dict):
            raise ValueError(f"The conversation is a {type(conversation).__name__}; pass a list of messages.")
        first = conversation[0] if isinstance(conversation, list | tuple) else conversation
        is_batched = first is not conversation and (isinstance(first, list | tuple) or hasattr(first, "messages"))
        conversations = []
        for messages in conversation if is_batched else [conversation]:
            conversations.append([])
            for message in getattr(messages, "messages", messages):
                message = _as_dict(message, "message")
                if "role" not in message or "content" not in message:
                    raise ValueError(f"A message needs 'role' and 'content', got the keys {sorted(message)}.")
                content = message["content"]
                if not isinstance(content, str | list | tuple):
                    raise ValueError(
                        f"The content of a message is a {type(content).__name__}; it must be text or a list of parts."
                    )
                message["content"] = self._as_text(content) if isinstance(content, str) else self._parts(content)
                conversations[-1].append(message)
        return conversations, is_batched

    def _parts(self, content: list) -> list[dict]:
        """Message parts, text that follows text joined to it: a literal could else hide in the seam."""
        parts = []
        for part in map(self._part, content):
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] = self._as_text(parts[-1]["text"] + part["text"])
            else:
                parts.append(part)
        return parts

    def _part(self, part: Any) -> dict:
        """One message part in the form that template and loader read."""
        part = {"type": "text", "text": part} if isinstance(part, str) else _as_dict(part, "message part")
        kind = part.get("type")
        if kind == "image_url":  # OpenAI's form
            url = part.get("image_url")
            part = {"type": "image", "url": url.get("url", "") if isinstance(url, dict) else url}
            kind = "image"
        if kind == "text":
            return {"type": "text", "text": self._as_text(part.get("text") or "")}
        if kind not in MODALITIES:
            raise ValueError(f"A message part has the type {kind!r}; known are text, {', '.join(MODALITIES)}.")
        sources = {key: part[key] for key in (kind, *SOURCE_KEYS) if part.get(key) is not None}
        if len(sources) > 1:
            raise ValueError(
                f"A part of type {kind!r} names {len(sources)} sources; give one of {(kind, *SOURCE_KEYS)}."
            )
        source = next(iter(sources.values()), None)
        if "base64" in sources:
            source = from_base64(source)
        elif part.get("sampling_rate") is not None and not isinstance(source, str | Path | bytes | dict | None):
            source = {"array": source, "sampling_rate": part["sampling_rate"]}
        return {"type": self._ear(kind), "source": source}

    def _as_text(self, text: str) -> str:
        """Text in which a literal `<image>` is ordinary text."""
        text = text.replace(LITERAL_MARK, "")
        return self._placeholders.sub(lambda match: f"<{LITERAL_MARK}{match.group()[1:]}", text)

    def _clips(self, conversations: list[list[dict]], load_audio_from_video: bool) -> dict[str, list[list]]:
        """Sources of all parts by row, under the names of [`__call__`]'s arguments; those without any are left out."""
        clips = {modality: [[] for _ in conversations] for modality in MODALITIES}
        for row, messages in enumerate(conversations):
            last_video = None
            for part in chain.from_iterable(m["content"] for m in messages if not isinstance(m["content"], str)):
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


def _without_sources(message: dict) -> dict:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [{k: v for k, v in part.items() if k != "source"} for part in message["content"]]}


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


def remove_literal_marks(tokenizer) -> None:
    """Teaches a fast tokenizer's normaliser to drop [`LITERAL_MARK`]; saved with it, done once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (
        backend.normalizer is not None and backend.normalizer.normalize_str(LITERAL_MARK) in ("", "▁")
    ):
        return
    from tokenizers import normalizers

    rule = normalizers.Replace(LITERAL_MARK, "")
    backend.normalizer = rule if backend.normalizer is None else normalizers.Sequence([rule, backend.normalizer])


__all__ = ["VICUNA_CHAT_TEMPLATE", "ConversationMixin", "remove_literal_marks"]
