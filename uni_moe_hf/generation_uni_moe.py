"""
How `generate` treats media: every clip is encoded once, before the first step, and stays with its row.

The library does this for pictures and videos; here the same holds for all modalities.
Letters: B batch, T sequence, H hidden.
"""

import copy

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import CandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .configuration_uni_moe import MODALITIES


# What `encode_media` takes.
MEDIA_INPUTS = ("pixel_values", "pixel_values_videos", "input_values", "input_values_mask", "input_features")

# Modality -> features of its clips, in `pooler_output` `(clips, tokens, H)`.
EncoderOutputs = dict[str, BaseModelOutputWithPooling]


class UniMoEGenerationMixin(GenerationMixin):
    """`generate` for a model with `encode_media`, a `<modality>_token_id` per modality and `mm_encoder_outputs`."""

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """Media inputs out of `model_kwargs`, their features in."""
        encoded = self.model.encode_media(**{name: model_kwargs.pop(name, None) for name in MEDIA_INPUTS})
        model_kwargs["mm_encoder_outputs"] = joined(model_kwargs.get("mm_encoder_outputs"), encoded)
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor,
        mm_encoder_output: EncoderOutputs,
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> EncoderOutputs:
        """Every row's clips as a block: rows `[r, r, s, s]` need `[a, b, a, b, c, c]` where `a, b` stand in `r`."""
        expanded = {}
        for modality, outputs in mm_encoder_output.items():
            clips = outputs.pooler_output  # (clips, tokens, H)
            tokens = (input_ids == getattr(self.config, f"{modality}_token_id")).sum(dim=1)  # (B,)
            if int(tokens.sum()) != clips.shape[0] * clips.shape[1]:
                raise ValueError(
                    f"{modality.capitalize()} features and {modality} tokens do not match, tokens: "
                    f"{int(tokens.sum())}, features: {clips.shape[0] * clips.shape[1]}; beams and several sequences "
                    "need all clips of the prompt."
                )
            rows = clips.split((tokens // clips.shape[1]).tolist())
            expanded[modality] = _features(torch.cat([row for row in rows for _ in range(expand_size)]))
        return expanded

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: EncoderOutputs | None = None,
        **kwargs,
    ) -> dict:
        """
        As in the library; clips are passed on when their placeholders are, all of them or those behind a filled cache.
        The library passes them in the first step only, in which an assistant model, for one, never is.
        """
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        new_ids = model_inputs.get("input_ids")
        num_new = input_ids.shape[1] if new_ids is None else new_ids.shape[1]
        if not mm_encoder_outputs or (num_new == 1 < input_ids.shape[1]):  # an answer's words are no placeholders
            return model_inputs
        if num_new < input_ids.shape[1]:
            mm_encoder_outputs = self._last(mm_encoder_outputs, input_ids, num_new)
        return {**model_inputs, "mm_encoder_outputs": mm_encoder_outputs}

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs
    ) -> ModelOutput:
        """As in the library, whose chunks would take the clips of a filled cache for those behind it."""
        encoded, mask = model_kwargs.get("mm_encoder_outputs"), model_kwargs.get("attention_mask")
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        is_whole = mask is None or mask.shape[1] == input_ids.shape[1]  # else the ids are the new ones alone
        if encoded and past and is_whole and generation_config.prefill_chunk_size is not None:
            model_kwargs["mm_encoder_outputs"] = self._last(encoded, input_ids, input_ids.shape[1] - past)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _last(self, encoded: EncoderOutputs, input_ids: torch.Tensor, num_tokens: int) -> EncoderOutputs:
        """The features whose placeholders are among the last `num_tokens` of `input_ids` `(B, T)`."""
        is_last = torch.arange(input_ids.shape[1], device=input_ids.device) >= input_ids.shape[1] - num_tokens  # (T,)
        kept = {}
        for modality, outputs in encoded.items():
            is_clip = input_ids == getattr(self.config, f"{modality}_token_id")  # (B, T)
            rows = outputs.pooler_output.flatten(0, 1)  # (tokens of all clips, H)
            if len(rows) == is_clip.sum():  # else only new clips were given, or wrong ones: the forward pass will tell
                rows = rows[is_last.expand_as(is_clip)[is_clip].to(rows.device)]
            if len(rows):
                kept[modality] = _features(rows.unsqueeze(0))
        return kept

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args, encoder_input_ids: torch.Tensor | None = None, **kwargs
    ) -> LogitsProcessorList:
        """As in the library, for placeholders too: they lie behind the scores, or are never said."""
        text_config = self.config.get_text_config()
        if encoder_input_ids is not None:
            is_word = encoder_input_ids < text_config.vocab_size
            encoder_input_ids = encoder_input_ids.where(is_word, text_config.pad_token_id or 0)
        if generation_config.bad_words_ids:
            # What has no score cannot be said: such a rule always holds.
            sayable = [words for words in generation_config.bad_words_ids if words[-1] < text_config.vocab_size]
            generation_config = copy.copy(generation_config)
            generation_config.bad_words_ids = sayable or None
        processors = super()._get_logits_processor(
            generation_config, *args, encoder_input_ids=encoder_input_ids, **kwargs
        )
        # A table that was resized for new words has rows for placeholders as well.
        ids = [getattr(self.config, f"{modality}_token_id") for modality in MODALITIES]
        if scored := [token_id for token_id in ids if token_id < text_config.vocab_size]:
            # Before any other: what keeps the likeliest words must not be left with these alone.
            processors.insert(0, SuppressTokensLogitsProcessor(scored, device=kwargs.get("device")))
        return processors

    def _get_stopping_criteria(self, *args, tokenizer=None, **kwargs) -> StoppingCriteriaList:
        """As in the library, whose stop strings need a tokenizer; `transformers serve` passes the processor."""
        return super()._get_stopping_criteria(*args, tokenizer=getattr(tokenizer, "tokenizer", tokenizer), **kwargs)

    def _get_candidate_generator(
        self, *args, assistant_model: PreTrainedModel | None = None, model_kwargs: dict, **kwargs
    ) -> CandidateGenerator:
        """As in the library; an assistant is given this model's features, so it must have room for them."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError(
                f"The cache already holds {int(cache.get_seq_length())} tokens, and assisted decoding would run the "
                "prompt over them again; leave out `past_key_values`, or the assistant."
            )
        if assistant_model is not None and (encoded := model_kwargs.get("mm_encoder_outputs")):
            width, needed = (m.config.get_text_config().hidden_size for m in (assistant_model, self))
            is_text_only = not hasattr(assistant_model.base_model, "encode_media")
            if is_text_only or width != needed:
                found = "takes text only" if is_text_only else f"has hidden size {width}"
                raise ValueError(
                    f"The prompt holds {', '.join(encoded)} clips and the assistant {found}; use a smaller Uni-MoE of "
                    f"hidden size {needed} as this model's, or `prompt_lookup_num_tokens` in place of an assistant."
                )
        return super()._get_candidate_generator(
            *args, assistant_model=assistant_model, model_kwargs=model_kwargs, **kwargs
        )


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


def _features(pooler_output: torch.Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=pooler_output)


__all__ = ["UniMoEGenerationMixin"]
