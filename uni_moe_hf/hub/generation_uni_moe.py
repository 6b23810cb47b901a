"""
How `generate` treats media: every clip is encoded once, before the first step, and stays with its row. What a forward
pass returns. And `pipeline("any-to-text")`: conversations with any media in, text out.

Letters: B batch, T sequence, H hidden.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    ImageTextToTextPipeline,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    Pipeline,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.utils import logging

from .compat_uni_moe import CACHE, CACHE_NAMES, CHUNKS_GO_ON, SCORES_BEAR_PLACEHOLDERS, cache_of, named_cache
from .configuration_uni_moe import MODALITIES


try:
    # How the base class tells a conversation from a batch.
    from transformers.utils.chat_template_utils import Chat
except ImportError:
    Chat = None


logger = logging.get_logger(__name__)

# Configs of decoders that were given more than they were made for; told once of each, not at every word.
WARNED: set[int] = set()

# What `encode_media` takes.
MEDIA_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_videos_mask",
    "input_values",
    "input_values_mask",
    "input_features",
    "input_features_mask",
    "tower_states",
)

# Modality -> features of its clips, in `pooler_output` `(clips, tokens, H)`.
EncoderOutputs = dict[str, BaseModelOutputWithPooling]


@dataclass
class UniMoEModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    The library's own fields, the cache under the name that the installed release gives it, and:

    Args:
        image_hidden_states, video_hidden_states, audio_hidden_states, speech_hidden_states (`torch.Tensor`):
            Connector outputs, `(clips or windows, tokens, H)`; `None` where there was no input.
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    speech_hidden_states: torch.Tensor | None = None


@dataclass
class UniMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    The library's own fields (`loss` is the next-token loss plus the weighted `aux_loss`), and those of
    [`UniMoEModelOutputWithPast`].
    """

    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None
    audio_hidden_states: torch.Tensor | None = None
    speech_hidden_states: torch.Tensor | None = None


class PromptClips:
    """
    The clips of a prompt, encoded, and where in it they stand: any part of the prompt can be given its own.

    Args:
        encoded (`dict[str, BaseModelOutputWithPooling]`): Modality -> features, `(clips, tokens, H)` in reading order.
        input_ids (`torch.Tensor` of shape `(B, T)`): The prompt with its placeholders.
        token_ids (`dict[str, int]`): Modality -> its placeholder.
        first (`int`): Position of the first of `input_ids` in the conversation: not 0 where the rest is cached.
        num_cached (`int`): Tokens in the cache. Clips may be those of the whole prompt, or only those behind it.

    Raises:
        ValueError: placeholders and features differ in number.
    """

    def __init__(
        self,
        encoded: EncoderOutputs,
        input_ids: torch.Tensor,
        token_ids: dict[str, int],
        first: int = 0,
        num_cached: int = 0,
    ):
        self.first = first
        self.features: dict[str, torch.Tensor] = {}  # (tokens of all clips, H)
        self.rows: dict[str, torch.Tensor] = {}  # (B, T), which of them stands at a position; -1 where none does
        is_new = torch.arange(first, first + input_ids.shape[1], device=input_ids.device) >= num_cached  # (T,)
        for modality, outputs in encoded.items():
            features = outputs.pooler_output.flatten(0, 1)
            is_clip = input_ids == token_ids[modality]  # (B, T)
            if len(features) != is_clip.sum():
                is_clip = is_clip & is_new
            if len(features) != is_clip.sum():
                raise ValueError(mismatch(modality, int(is_clip.sum()), len(features)))
            rows = is_clip.flatten().cumsum(0).view_as(is_clip) - 1
            self.features[modality], self.rows[modality] = features, rows.masked_fill(~is_clip, -1)

    def at(self, start: int, length: int, batch_size: int) -> EncoderOutputs:
        """
        Args:
            start (`int`): A position of the conversation.
            length (`int`): How many from there on.
            batch_size (`int`): B, or a multiple of it, where each row of the prompt has become several.

        Returns:
            `dict[str, BaseModelOutputWithPooling]`: modality -> what stands there, `(1, tokens, H)`, row by row.
        """
        found = {}
        begin = start - self.first
        for modality, rows in self.rows.items():
            part = rows[:, max(begin, 0) : max(begin + length, 0)]
            part = part.repeat_interleave(batch_size // len(rows), dim=0)
            chosen = part[part >= 0].to(self.features[modality].device)
            if len(chosen):
                pooled = self.features[modality][chosen].unsqueeze(0)
                found[modality] = BaseModelOutputWithPooling(pooler_output=pooled)
        return found


class UniMoEGenerationMixin(GenerationMixin):
    """`generate` for a model with `encode_media`, a `<modality>_token_id` per modality and `mm_encoder_outputs`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable | None = None,
        synced_gpus: bool | None = None,
        assistant_model: PreTrainedModel | None = None,
        streamer: BaseStreamer | None = None,
        *,
        mm_encoder_outputs: EncoderOutputs | None = None,
        prompt_clips: PromptClips | None = None,
        **kwargs,
    ) -> Any:
        r"""
        As in the library, for prompts with clips of any modality.

        Args:
            inputs (`torch.Tensor` of shape `(B, T)`, *optional*): `input_ids`, under its other name.
            generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, synced_gpus,
                assistant_model, streamer (*optional*): As in the library.
            mm_encoder_outputs (`dict`, *optional*): What [`UniMoEModel.encode_media`] returned, in place of media.
            prompt_clips ([`PromptClips`], *optional*): What this method passes on to an assistant.
            kwargs: Model inputs as the processor makes them, settings of generation, `past_key_values` or `cache`.

        Returns:
            As in the library.

        Raises:
            ValueError: placeholders and clips differ in number; media and their encoder outputs together; an assistant
                that cannot take the clips; an assistant, or on older releases chunks, over a filled cache.
        """
        kwargs.pop("clips_to_store", None)  # of a feature cache that a training fills meanwhile
        cache = named_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))[CACHE]
        if cache is not None:
            kwargs[CACHE] = cache
        num_cached = 0 if cache is None else int(cache.get_seq_length())

        def setting(name: str) -> Any:
            """As the library will find it: named here, in the config given, or among the model's defaults."""
            given = (kwargs.get(name), *(getattr(c, name, None) for c in (generation_config, self.generation_config)))
            return next((value for value in given if value is not None), None)

        if num_cached:
            self._check_what_a_filled_cache_bears(num_cached, assistant_model, setting)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            # From embeddings; the forward pass says that media do not go with them.
            if mm_encoder_outputs is not None:
                kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        elif prompt_clips is None:
            media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
            if encoded := joined(mm_encoder_outputs, self.model.encode_media(**media)):
                mask = kwargs.get("attention_mask")
                is_new_alone = mask is not None and mask.shape[1] > input_ids.shape[1]
                token_ids = {modality: getattr(self.config, f"{modality}_token_id") for modality in MODALITIES}
                first = num_cached if is_new_alone else 0
                prompt_clips = PromptClips(encoded, input_ids, token_ids, first, num_cached)
        if prompt_clips is not None:
            if assistant_model is not None:
                self._check_assistant(assistant_model, prompt_clips)
            kwargs["prompt_clips"] = prompt_clips
        if "tokenizer" in kwargs:  # stop strings need it; `transformers serve` passes the processor
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])

        changed, processors = self._settings_without_placeholders(setting, input_ids)
        if generation_config is None:
            kwargs |= changed
        elif changed:  # in one place: the library wants settings either in a config or beside it
            generation_config = copy.deepcopy(generation_config)
            for name, value in changed.items():
                kwargs.pop(name, None)
                setattr(generation_config, name, value)
        return super().generate(
            inputs,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([*processors, *(logits_processor or ())]),
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            streamer=streamer,
            **kwargs,
        )

    def _check_what_a_filled_cache_bears(
        self, num_cached: int, assistant_model: PreTrainedModel | None, setting: Callable
    ) -> None:
        if assistant_model is not None or setting("prompt_lookup_num_tokens") is not None:
            raise ValueError(
                f"The cache already holds {num_cached} tokens, and assisted decoding would run the prompt over them "
                "again; leave out the cache, or the assistant."
            )
        if setting("prefill_chunk_size") is not None and not CHUNKS_GO_ON:
            raise ValueError(
                f"The cache already holds {num_cached} tokens, and this release of transformers would run a prompt "
                "that is read in chunks over them again; leave out `prefill_chunk_size`, or use 5.22 or newer."
            )

    def _check_assistant(self, assistant_model: PreTrainedModel, prompt_clips: PromptClips) -> None:
        """An assistant is given this model's features, so it must have room for them."""
        width, needed = (m.config.get_text_config().hidden_size for m in (assistant_model, self))
        is_text_only = not hasattr(assistant_model.base_model, "encode_media")
        if is_text_only or width != needed:
            found = "takes text only" if is_text_only else f"has hidden size {width}"
            raise ValueError(
                f"The prompt holds {', '.join(prompt_clips.rows)} clips and the assistant {found}; use a smaller "
                f"Uni-MoE of hidden size {needed} as this model's, or `prompt_lookup_num_tokens` in place of an "
                "assistant."
            )

    def _settings_without_placeholders(
        self, setting: Callable, input_ids: torch.Tensor | None
    ) -> tuple[dict[str, Any], list[Any]]:
        """
        Settings that would look up the scores of placeholders, which lie behind the scores, as they have to be; and
        processors in their place. Where a table was resized for new words, placeholders have scores, and are not said.
        """
        text_config, changed, processors = self.config.get_text_config(), {}, []
        ids = [getattr(self.config, f"{modality}_token_id") for modality in MODALITIES]
        if scored := [token_id for token_id in ids if token_id < text_config.vocab_size]:
            changed["suppress_tokens"] = sorted({*scored, *(setting("suppress_tokens") or ())})
        if words := setting("bad_words_ids"):
            # What has no score cannot be said: such a rule always holds.
            sayable = [sequence for sequence in words if sequence[-1] < text_config.vocab_size]
            if len(sayable) < len(words):
                # Nothing left: a rule that never holds, since the library fills in the model's own for `None`.
                changed["bad_words_ids"] = sayable or [[0] * 64]
        if input_ids is not None and (input_ids >= text_config.vocab_size).any():
            # For each beam or sequence a row, as scores have them.
            copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
            is_word = input_ids < text_config.vocab_size
            words = input_ids.where(is_word, text_config.pad_token_id or 0).repeat_interleave(copies, dim=0)
            for name, neutral, kind in (
                ("encoder_repetition_penalty", 1.0, EncoderRepetitionPenaltyLogitsProcessor),
                ("encoder_no_repeat_ngram_size", 0, EncoderNoRepeatNGramLogitsProcessor),
            ):
                if (value := setting(name)) not in (None, neutral):
                    changed[name] = neutral
                    processors.append(kind(value, words))
            for name, neutral, kind in (
                ("repetition_penalty", 1.0, RepetitionPenaltyLogitsProcessor),
                ("no_repeat_ngram_size", 0, NoRepeatNGramLogitsProcessor),
            ):
                if (value := setting(name)) not in (None, neutral) and not SCORES_BEAR_PLACEHOLDERS:
                    changed[name] = neutral
                    processors.append(OverWords(kind(value), text_config.vocab_size, text_config.pad_token_id or 0))
        return changed, processors

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        prompt_clips: PromptClips | None = None,
        **kwargs,
    ) -> dict:
        """
        As in the library; clips are passed on when their placeholders are, in whatever parts the prompt is read.
        """
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        new_ids = model_inputs.get("input_ids")
        if prompt_clips is None or new_ids is None:
            return model_inputs
        batch_size, num_new = new_ids.shape
        if num_new == 1 < input_ids.shape[1]:  # an answer's words are no placeholders
            return model_inputs
        cache = cache_of(model_inputs)
        start = 0 if cache is None else int(cache.get_seq_length())
        if encoded := prompt_clips.at(start, num_new, batch_size):
            model_inputs["mm_encoder_outputs"] = encoded
        return model_inputs


class OverWords(LogitsProcessor):
    """A processor that sees `filler` in place of ids that have no score."""

    def __init__(self, processor: LogitsProcessor, vocab_size: int, filler: int):
        self.processor, self.vocab_size, self.filler = processor, vocab_size, filler

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`(B, T)` and `(B, vocab_size)` to `(B, vocab_size)`."""
        return self.processor(input_ids.where(input_ids < self.vocab_size, self.filler), scores)


def joined(given: EncoderOutputs | None, encoded: EncoderOutputs) -> EncoderOutputs:
    """
    Encoder outputs that were given and those that were made.

    Raises:
        ValueError: a modality is in both.
    """
    if both := (given or {}).keys() & encoded.keys():
        raise ValueError(
            f"Got {', '.join(sorted(both))} inputs as well as their `mm_encoder_outputs`; pass one of the two."
        )
    return {**(given or {}), **encoded}


def scored_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        labels (`torch.Tensor` of shape `(B, T)`): -100 where nothing is learned.

    Returns:
        `tuple`: positions that are followed by a label, `(B, T)`, and these labels, `(1, positions)`. Where there are
        none, the first position, with -100.
    """
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    if not positions.any():
        positions[0, 0] = True
        return positions, labels.new_full((1, 1), -100)
    return positions, labels[:, 1:][positions[:, :-1]].unsqueeze(0)


def per_position(outputs: Any, positions: torch.Tensor) -> Any:
    """
    Args:
        outputs (`ModelOutput`): Of TRL's head, for [`scored_positions`]: fields `(1, positions)`.
        positions (`torch.Tensor` of shape `(B, T)`): These.

    Returns:
        The same with fields `(B, T - 1)`, zero elsewhere, as it gives them for all positions.
    """
    shape = (1, int(positions.sum()))
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            outputs[name] = value.new_zeros(positions.shape).masked_scatter(positions.to(value.device), value)[:, :-1]
    return outputs


def warn_of_positions(text_config: Any, num_new: int, cache: Any) -> None:
    """Of a conversation that is longer than any that the decoder has seen, once."""
    if torch.compiler.is_compiling() or (limit := getattr(text_config, "max_position_embeddings", None)) is None:
        return
    cached = 0 if cache is None or not hasattr(cache, "get_seq_length") else cache.get_seq_length()
    if isinstance(cached, int) and num_new + cached > limit and id(text_config) not in WARNED:
        WARNED.add(id(text_config))
        logger.warning(
            f"The conversation has {num_new + cached} tokens, media included, and the decoder was made for {limit} "
            "positions (`max_position_embeddings`); what follows may be nonsense."
        )


def mismatch(modality: str, num_tokens: int, num_features: int) -> str:
    """What is wrong where placeholders and features differ in number."""
    return (
        f"{modality.capitalize()} features and {modality} tokens do not match, tokens: {num_tokens}, features: "
        f"{num_features}; use the model's processor, which expands one placeholder per clip."
    )


# `pipeline("any-to-text")`


class AnyToTextPipeline(ImageTextToTextPipeline):
    r"""
    Answers conversations that hold text, pictures, videos, speech and sound. Arguments and results follow
    `image-text-to-text`.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("any-to-text", model="checkpoint", trust_remote_code=True)
    >>> parts = [{"type": "audio", "path": "bell.wav"}, {"type": "text", "text": "What is it?"}]
    >>> chat = [{"role": "user", "content": parts}]
    >>> pipe(chat, max_new_tokens=20, return_full_text=False)[0]["generated_text"]
    ```
    """

    def __init__(self, *args, **kwargs):
        self.default_batch_size = kwargs.get("batch_size") or 1
        # Past ImageTextToTextPipeline: it looks the model up in a list that only holds the library's own.
        Pipeline.__init__(self, *args, **kwargs)

    def __call__(
        self,
        text: str | list | None = None,
        images: Any = None,
        videos: Any = None,
        audio: Any = None,
        speech: Any = None,
        **kwargs,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        r"""
        Args:
            text (`list[dict]`, a list of those, `str` or `list[str]`):
                A conversation or several, media inside their parts as `{"type": "image" | "video" | "audio" |
                "speech", "path" | "url" | <type>: ...}`; or raw prompts with one placeholder per clip.
            images, videos, audio, speech (*optional*):
                Media of raw prompts, in reading order: paths, URLs, arrays or PIL images.
            max_new_tokens (`int`, *optional*, defaults to 256): Longest answer.
            return_full_text (`bool`, *optional*, defaults to `True`): Whether results repeat the conversation.
            generate_kwargs (`dict`, *optional*): For `generate`, for example a `streamer`.

        Returns:
            `list[dict]` with `input_text` and `generated_text`; a list of such lists for several conversations.

        Raises:
            ValueError: no input at all, or media beside a conversation.
        """
        media = {"images": images, "videos": videos, "audio": audio, "speech": speech}
        media = {name: clips for name, clips in media.items() if clips is not None}
        if text is None or (isinstance(text, list) and not text):
            beside = f" Got {', '.join(media)} beside no text; media need one placeholder each." if media else ""
            raise ValueError(f"Pass a conversation or a prompt as `text`; it is missing or empty.{beside}")
        is_raw = isinstance(text, str) or isinstance(text[0], str)
        if media and not is_raw:
            raise ValueError(
                f"Got {', '.join(media)} beside a conversation; put media into the conversation's parts, or pass a "
                "raw prompt with one placeholder per clip as `text`."
            )
        if media:
            return Pipeline.__call__(self, {"text": text, **media}, **kwargs)

        batch_size = kwargs.get("batch_size") or self.default_batch_size
        if is_raw or isinstance(text[0], dict) or batch_size == 1:
            return super().__call__(text=text, **kwargs)
        wanted = {**self.model.generation_config.to_dict(), **(kwargs.get("generate_kwargs") or {}), **kwargs}
        if Chat is None or (wanted.get("num_return_sequences") or 1) > 1:
            # Before 5.23 the base class mixes up the several answers of several conversations.
            return super().__call__(text=text, **{**kwargs, "batch_size": 1})
        # The base class can only join samples that hold the same kinds of media, so batches are made here.
        results, kwargs = [], {**kwargs, "batch_size": 1}
        for start in range(0, len(text), batch_size):
            chats = [Chat(chat) for chat in text[start : start + batch_size]]
            records = Pipeline.__call__(self, {"chats": chats}, **kwargs)
            per_chat = len(records) // len(chats)
            results += [records[first : first + per_chat] for first in range(0, len(records), per_chat)]
        return results

    def preprocess(self, inputs: Any = None, **processing_kwargs) -> dict[str, Any]:
        """Single conversations as in the parent; batches of them, and prompts with media, go to the processor here."""
        if not isinstance(inputs, dict):
            return super().preprocess(inputs, **processing_kwargs)
        processor_kwargs = processing_kwargs.pop("processor_kwargs", None) or {}
        if "chats" not in inputs:
            kwargs = {"padding": isinstance(inputs["text"], list), **processing_kwargs, **processor_kwargs}
            model_inputs = self.processor(**inputs, return_tensors="pt", **kwargs).to(dtype=self.dtype)
            model_inputs["text"] = inputs["text"]
            return model_inputs
        processing_kwargs.pop("timeout", None)
        model_inputs = self.processor.apply_chat_template(
            [chat.messages for chat in inputs["chats"]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not processing_kwargs.get("continue_final_message"),
            processor_kwargs={"padding": True, "padding_side": "left", **processor_kwargs},
            **processing_kwargs,
        ).to(dtype=self.dtype)
        model_inputs["text"] = inputs["chats"]
        return model_inputs

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves model and processor; the folder works alone, in a process without this package."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["AnyToTextPipeline", "PromptClips", "UniMoEGenerationMixin"]
