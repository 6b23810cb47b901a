"""
Chat templates: Vicuna's, what stands before every template so that servers can render it, and where in a rendered
conversation the assistant speaks. And the tokenizer behind them, which calls leave as it was.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from typing import Any

from .compat_uni_moe import render_jinja_template


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

# Servers render a checkpoint's template themselves, without this code. So before every template stands, as a template,
# what [`ConversationMixin.apply_chat_template`] does: a placeholder for each clip, line breaks around it, and special
# tokens in somebody's text become text. [`TemplateMixin.for_servers`] fills in what is in capitals.
MEDIA_TEMPLATE = """\
{#- For servers: media become placeholders, special tokens in somebody's text become text. -#}
{%- macro as_text(text) -%}
    {%- set shown = namespace(text=text | replace(MARK, '')) -%}
    {%- for token, literal in TOKENS -%}
        {%- set shown.text = shown.text | replace(token, literal) -%}
    {%- endfor -%}
    {{- shown.text -}}
{%- endmacro -%}
{%- set read = namespace(messages=[], parts=[], shown=[], text='', role='') -%}
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {%- set goes_on = role == read.role and role in ('user', 'system') -%}
    {%- set read.role = role -%}
    {%- set read.parts = read.parts if goes_on else [] -%}
    {%- set content = [message['content']] if message['content'] is string else (message['content'] or []) -%}
    {%- for part in content -%}
        {%- set kind = 'text' if part is string else part['type'] -%}
        {%- set kind = part['ear'] if kind == 'audio' and part['ear'] else kind -%}
        {%- if kind not in ('text', 'image', 'video', 'audio', 'speech') -%}
            {%- set known = "known are text, image, video, audio and speech" -%}
            {{- raise_exception("A message part has the type or ear '" + kind|string + "'; " + known + ".") -}}
        {%- endif -%}
        {%- set text = part if part is string else (part['text'] or '') -%}
        {%- set last = read.parts[-1] if read.parts else {'type': ''} -%}
        {%- if kind == last['type'] == 'text' -%}
            {%- set text = last['text'] + ('\\n' if goes_on and loop.first else '') + text -%}
            {%- set read.parts = read.parts[:-1] -%}
        {%- endif -%}
        {%- set read.parts = read.parts + [{'type': kind, 'text': text}] -%}
    {%- endfor -%}
    {%- set read.text = '' -%}
    {%- set read.shown = [] -%}
    {%- for part in read.parts -%}
        {%- set text = as_text(part['text']) if part['type'] == 'text' else '<' + part['type'] + '>' -%}
        {%- set read.text = read.text + ('' if loop.first else '\\n') + text -%}
        {%- set part = {'type': 'text', 'text': text} if part['type'] == 'text' else {'type': part['type']} -%}
        {%- set read.shown = read.shown + [part] -%}
    {%- endfor -%}
    {%- set before = read.messages[:-1] if goes_on else read.messages -%}
    {%- set read.messages = before + [dict(message, role=role, content=CONTENT)] -%}
{%- endfor -%}
{%- set messages = read.messages -%}
BEGINNING
{#- What follows reads text. +#}"""


class TemplateMixin:
    """What a processor with a `tokenizer` knows of chat templates."""

    def for_servers(self, template: str) -> str:
        """A template with [`MEDIA_TEMPLATE`] before it, for those who render it without this code."""
        template = for_us(template)
        tokens = [(token, token[0] + LITERAL_MARK + token[1:]) for token in self._special_tokens]
        content = "read.text" if self._takes_text(template) else "read.shown"
        filled = {"MARK": ascii(LITERAL_MARK), "TOKENS": ascii(tokens), "CONTENT": content}
        filled["BEGINNING"] = self._beginning() if leaves_beginning(template) else ""
        before = re.sub("|".join(filled), lambda match: filled[match.group()], MEDIA_TEMPLATE)
        # Blanks before a block at the beginning of a line are no text; here they would be.
        return before + re.sub(r"^[ \t]+(?=\{[%#](?![-+]))", "", template)

    def _beginning(self) -> str:
        """What writes the token that the tokenizer puts before a text, so that the text behind it stays as it is."""
        bos, text = self.tokenizer.bos_token, "A"
        wanted = self.tokenizer(text)["input_ids"]
        for written, template in ((bos, "{{- bos_token -}}"), (f"{bos} ", "{{- bos_token + ' ' -}}")):
            if bos and self.tokenizer(written + text, add_special_tokens=False)["input_ids"] == wanted:
                return template
        return ""

    def _render(self, messages: list[dict], template: str, **settings: Any) -> str:
        """
        A template's text.

        Raises:
            ValueError: it refuses the conversation.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)
        except Exception as error:
            if not type(error).__module__.startswith("jinja2"):
                raise
            raise ValueError(f"The chat template refuses this conversation: {error}") from error

    def _takes_text(self, template: str) -> bool:
        """Whether a template reads messages whose content is text, as nearly all do; some read parts alone."""
        known = self.__dict__.setdefault("_templates_of_text", {})
        for before, after in product(([], ["system"]), ([], ["assistant"])):
            if template in known:
                break
            for content in (SENTINEL, [{"type": "text", "text": SENTINEL}]):
                roles = [*before, "user", *after]
                probe = [{"role": role, "content": content} for role in roles]
                with suppress(ValueError, TypeError):
                    text = self._render(probe, template)
                    if text.count(SENTINEL) >= len(roles) and "'type'" not in text:
                        known[template] = content is SENTINEL
                        break
        return known.get(template, True)

    @property
    def _special_tokens(self) -> list[str]:
        """What the tokenizer reads as one special token, wherever it stands; longer ones first."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        tokens = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return sorted((token for token in tokens if len(token) > 1), key=lambda token: (-len(token), token))

    @property
    def _control_tokens(self) -> re.Pattern:
        """[`_special_tokens`] as a pattern."""
        known = self.__dict__.get("_known_control_tokens")
        if known is None or known[0] != len(self.tokenizer):
            known = (len(self.tokenizer), re.compile("|".join(map(re.escape, self._special_tokens)) or r"(?!)"))
            self._known_control_tokens = known
        return known[1]

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
            question = [{"role": "user", "content": as_content(SENTINEL, words[0])}]
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

        sentinel = as_content(SENTINEL, messages)
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
            question = {"role": "user", "content": as_content("x", messages)}
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


def for_us(template: str) -> str:
    """A template without [`MEDIA_TEMPLATE`], in whatever form it was put there."""
    return re.split(r"\{#- What follows reads text\. (?:-#\}\n?|\+?#\})", template)[-1]


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


def tokenizer_state(tokenizer) -> tuple:
    """What calls change in a tokenizer and saving writes: its sides, and the backend's padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    sides = (getattr(tokenizer, "padding_side", None), getattr(tokenizer, "truncation_side", None))
    return (*sides, backend and backend.padding, backend and backend.truncation)


def set_tokenizer_state(tokenizer, state: tuple) -> None:
    """Undoes what calls have changed since [`tokenizer_state`]."""
    padding_side, truncation_side, padding, truncation = state
    if padding_side is not None:
        tokenizer.padding_side, tokenizer.truncation_side = padding_side, truncation_side
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


@contextmanager
def left_as_it_was(tokenizer) -> Iterator[None]:
    """A call leaves no trace in the tokenizer."""
    state = tokenizer_state(tokenizer)
    try:
        yield
    finally:
        set_tokenizer_state(tokenizer, state)


def leaves_beginning(template: str) -> bool:
    """Whether a template leaves `<s>` to the tokenizer, as Vicuna's does; others write it themselves."""
    return VICUNA_SYSTEM in template


def as_content(text: str, messages: list[dict]) -> str | list[dict]:
    """A text in the form that the template of these messages reads."""
    return [{"type": "text", "text": text}] if isinstance(messages[0]["content"], list) else text


def joined_text(parts: list[dict]) -> str:
    """The text of a message, a placeholder for each clip."""
    pieces = [part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts]
    return "\n".join(pieces)


def reads(template: str, name: str) -> bool:
    """Whether a template speaks of a field or variable."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def learned_spans(messages: list[dict], spans: list[tuple[int, int]], prompt: str) -> list[tuple[int, int]]:
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
        text = joined_text(message["content"])
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


def assistant_masks(spans: list, replaced: list[list[dict]], offsets: Any) -> list[list[int]]:
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


__all__ = ["LITERAL_MARK", "MEDIA_TEMPLATE", "VICUNA_CHAT_TEMPLATE", "TemplateMixin", "remove_literal_marks"]
