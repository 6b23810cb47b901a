"""
Uni-MoE: frozen towers, connectors, and a decoder whose feed-forward layers are sparse mixtures of experts.

`input_ids` with placeholders -> embeddings; each tower's features through its connector -> scattered onto the
placeholders; the decoder's layers -> `lm_head`. The sequence length never changes inside `forward`.
Letters: B batch, T sequence, H hidden, N images, V videos, F frames, P patch tokens, W windows.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn import init
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_uni_moe import (
    CACHE,
    CACHE_NAMES,
    OutputRecorder,
    can_return_tuple,
    named_cache,
    same_permissions,
    torch_compilable_check,
)
from .configuration_uni_moe import MODALITIES, UniMoEConfig, is_in_vllm, is_sparse
from .connectors_uni_moe import (
    TOWERS,
    MediaEncoderMixin,
    QFormerConnector,
    SpeechConnector,
    VisionConnector,
)
from .decoder_uni_moe import QuantizationMixin, adjust_logits, build_decoder
from .expert_kernels_uni_moe import ExpertsRouteMixin
from .experts_uni_moe import UniMoELoraExperts, load_balancing_loss
from .generation_uni_moe import (
    UniMoECausalLMOutputWithPast,
    UniMoEGenerationMixin,
    UniMoEModelOutputWithPast,
    joined,
    mismatch,
    per_position,
    scored_positions,
    warn_of_positions,
)
from .towers_uni_moe import learns, tower_class


class UniMoEPreTrainedModel(ExpertsRouteMixin, QuantizationMixin, PreTrainedModel):
    """Initialisation, saving and loading of Uni-MoE models."""

    config: UniMoEConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _keep_in_fp32_modules_strict = {"mlp.gate.weight"}  # a router rounded to half precision sends words elsewhere
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: initialisation is as in the library's own models, towers and missing weights included."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpeechConnector | QFormerConnector):
            # Not zeros as in the original: the Q-Former has no positions, so equal queries would stay equal for ever.
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, *args, **kwargs) -> nn.Module:
        """As in the library; classes keep the names by which their code is saved and their outputs recorded."""
        model = super().maybe_distribute_model(model, *args, **kwargs)
        keep_names(model)
        return model

    def save_pretrained(self, save_directory: str, *args, state_dict: dict | None = None, **kwargs) -> None:
        """
        As in the library; weights get the permissions of the other files. Towers that have been unloaded are in
        memory meanwhile, so what is saved is whole.
        """
        keep_names(self)  # whoever has sharded it
        with self.base_model.whole() as was_whole:
            if state_dict is not None and not was_whole:  # of a trainer, which looked for weights in modules
                state_dict = {name: state_dict.get(name, tensor) for name, tensor in self.state_dict().items()}
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        same_permissions(save_directory)

    def _experts(self) -> Iterator[UniMoELoraExperts]:
        return (module for module in self.modules() if isinstance(module, UniMoELoraExperts))

    def merge_expert_lora(self) -> None:
        """
        Folds every expert's LoRA into its frozen weights and sets the config accordingly (`expert_lora_rank=0`,
        `shared_expert_base=False`), so that what is saved afterwards is a mixture of plain experts.

        Raises:
            ValueError: the experts hold no LoRA, or are quantised.
        """
        text_config = self.config.text_config
        if not is_sparse(text_config) or text_config.expert_lora_rank == 0:
            raise ValueError(
                f"There is no expert LoRA to merge: {text_config.mlp_layer_types.count('sparse')} sparse layers, "
                f"`expert_lora_rank={text_config.expert_lora_rank}`."
            )
        for experts in self._experts():
            experts.merge_lora()
        self._unmerged_config = (text_config.expert_lora_rank, text_config.shared_expert_base)
        text_config.expert_lora_rank, text_config.shared_expert_base = 0, False

    def unmerge_expert_lora(self) -> None:
        """Undoes [`merge_expert_lora`] in the same process, as [`UniMoELoraExperts.unmerge_lora`] does."""
        if getattr(self, "_unmerged_config", None) is None:
            raise ValueError("Expert LoRA was not merged in this process, so it cannot be unmerged.")
        for experts in self._experts():
            experts.unmerge_lora()
        self.config.text_config.expert_lora_rank, self.config.text_config.shared_expert_base = self._unmerged_config
        self._unmerged_config = None


def keep_names(model: nn.Module) -> None:
    """FSDP2 gives each module that it shards a class of its own, from torch's file: it is called as what it was."""
    for kind in {type(module) for module in model.modules()}:
        names = [base.__name__ for base in kind.__mro__]
        if "FSDPModule" in names[:2]:
            own = kind.__mro__[2]  # of (FSDPName, FSDPModule, Name, ...)
            kind.__name__, kind.__qualname__, kind.__module__ = own.__name__, own.__qualname__, own.__module__


class UniMoEModel(MediaEncoderMixin, UniMoEPreTrainedModel):
    """Towers, connectors and decoder, without the language modeling head (figure 3 of the paper)."""

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        for tower_config in (config.vision_config, config.speech_config, config.audio_config):
            if tower_config is not None:
                # Frozen, and not run where a batch lacks its modality: FSDP2 must not shard it.
                tower_config.base_model_fsdp_plan = {}
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.vision_connector = VisionConnector(config)
        if config.speech_config is not None:
            self.speech_tower = tower_class(config.speech_config, "speech")(config.speech_config)
            has_decoder = config.speech_connector_config is None
            self.speech_connector = SpeechConnector(config) if has_decoder else QFormerConnector(config, "speech")
        if config.audio_config is not None:
            self.audio_tower = tower_class(config.audio_config, "audio")(config.audio_config)
            self.audio_connector = QFormerConnector(config)
        self.language_model = build_decoder(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> "UniMoEModel":
        """
        As in torch; frozen towers stay as they are in use: some draw at random, or count, what they see. Of layers
        with gradient checkpointing the last keeps its activations: it would compute them again at once.
        """
        super().train(mode)
        self.language_model.layers[-1].gradient_checkpointing = False
        for name in set(TOWERS.values()):
            tower = getattr(self, f"{name}_tower", None)
            if tower is not None and not learns(tower):
                tower.eval()
        return self

    def get_placeholder_masks(
        self, input_ids: torch.Tensor, features: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): With placeholders.
            features (`dict[str, torch.Tensor]`): Modality -> what is to stand there, `(clips, tokens, H)`.

        Returns:
            `dict[str, torch.BoolTensor]`: modality -> `(B, T)`, for all four.

        Raises:
            ValueError: as many placeholders as feature rows are needed; the message gives both counts.
        """
        masks = {modality: input_ids == getattr(self.config, f"{modality}_token_id") for modality in MODALITIES}
        groups = [[modality] for modality in features]
        # Absent ones are checked together: every check waits for the device, in every step of decoding.
        groups += [absent] if (absent := [m for m in MODALITIES if m not in features]) else []
        for group in groups:
            num_tokens = torch.stack([masks[modality] for modality in group]).sum()
            num_features = sum(features[m].shape[0] * features[m].shape[1] for m in group if m in features)
            explain = partial(_explain, {modality: masks[modality] for modality in group}, num_features)
            torch_compilable_check(num_tokens == num_features, explain)
        return masks

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        tower_states: dict[str, torch.Tensor] | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        positions_to_keep: torch.BoolTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> UniMoEModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids with placeholders already expanded by the processor.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 = valid.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Positions for the rotary embedding.
            cache, past_key_values ([`Cache`], *optional*): From earlier steps; two names of one argument, both
                understood on every release of the library.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, H)`, *optional*): In place of `input_ids`, text only.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): All pictures of the
                batch, in reading order; likewise below.
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, frames, 3, height, width)`, *optional*): Videos.
            input_features (`torch.Tensor` of shape `(num_windows, mel_bins, mel_frames)`, *optional*): Speech.
            input_values (`torch.Tensor` of shape `(num_windows, frames, 128)`, *optional*): Sound.
            input_values_mask (`torch.Tensor` of shape `(num_windows, frames)`, *optional*): 1 = valid frame of sound.
            pixel_values_videos_mask (`torch.Tensor` of shape `(num_videos, frames)`, *optional*): 1 = valid, where
                videos have different numbers of frames.
            input_features_mask (`torch.Tensor` of shape `(num_windows, mel_frames)`, *optional*): 1 = valid, where
                windows of speech are cut.
            tower_states (`dict[str, torch.Tensor]`, *optional*): What [`run_towers`] returned, in place of clips.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): 0 text, 1 image, 2 video, 3 audio, 4
                speech. Has no influence on the result: placeholders are found by their ids.
            mm_encoder_outputs (`dict`, *optional*): What [`encode_media`] returned, in place of the media themselves.
            positions_to_keep (`torch.BoolTensor` of shape `(B, T)`, *optional*): Of which `last_hidden_state` is
                returned, `(1, positions, H)` in reading order; all by default.
            use_cache (`bool`, *optional*): Whether to return a cache.

        Returns:
            [`UniMoEModelOutputWithPast`].

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; media without `input_ids` or without a tower;
                media and their encoder outputs together; counts of placeholders and features that differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either `input_ids` or `inputs_embeds`, not both and not neither.")

        given = {"image": (pixel_values,), "video": (pixel_values_videos, pixel_values_videos_mask)}
        given |= {"audio": (input_values, input_values_mask), "speech": (input_features, input_features_mask)}
        encoded, idle = self._encode_media(given, tower_states or {}, mm_encoder_outputs or ())
        features = {m: outputs.pooler_output for m, outputs in joined(mm_encoder_outputs, encoded).items()}
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, features) + idle
        elif features:
            raise ValueError(
                f"Got {', '.join(features)} inputs together with `inputs_embeds`; placeholders are found in "
                "`input_ids`, so pass those."
            )

        cache = named_cache(cache, past_key_values)
        warn_of_positions(self.config.text_config, inputs_embeds.shape[1], cache[CACHE])
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **cache,
            **kwargs,
        )
        outputs = {name: value for name, value in outputs.items() if name != "router_logits" or value}
        if positions_to_keep is not None:
            hidden = outputs["last_hidden_state"]  # of a model that is split over devices on the last one
            outputs["last_hidden_state"] = hidden[positions_to_keep.to(hidden.device)].unsqueeze(0)
        hidden_states = {f"{modality}_hidden_states": tensor for modality, tensor in features.items()}
        return UniMoEModelOutputWithPast(**outputs, **hidden_states)

    def _embed(self, input_ids: torch.Tensor, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(B, T, H)` text embeddings with features in place of the placeholders."""
        # Placeholder ids lie behind the embedding table, so they are looked up as padding and then overwritten. Any
        # other id behind the table fails in the lookup, as it should.
        masks = self.get_placeholder_masks(input_ids, features)
        is_media = torch.stack(list(masks.values())).any(dim=0)  # (B, T)
        text_ids = input_ids.masked_fill(is_media, self.config.text_config.pad_token_id or 0)
        inputs_embeds = self.get_input_embeddings()(text_ids)  # (B, T, H)
        for modality, rows in features.items():
            rows = rows.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = masks[modality].unsqueeze(-1).to(inputs_embeds.device)  # (B, T, 1)
            inputs_embeds = inputs_embeds.masked_scatter(mask, rows)
        return inputs_embeds


def _explain(masks: dict[str, torch.Tensor], num_features: int) -> str:
    """What is wrong with the first modality that has placeholders or features."""
    modality = next(modality for modality, mask in masks.items() if num_features or mask.any())
    return mismatch(modality, int(masks[modality].sum()), num_features)


class UniMoEForConditionalGeneration(UniMoEPreTrainedModel, UniMoEGenerationMixin):
    """
    Uni-MoE with its language modeling head: text, pictures, videos, speech and sound in, text out.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained("checkpoint", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("checkpoint", trust_remote_code=True)
    >>> parts = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]
    >>> chat = [{"role": "user", "content": parts}]
    >>> inputs = processor.apply_chat_template(
    ...     chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    >>> answer = model.generate(**inputs, max_new_tokens=20)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __new__(cls, config: UniMoEConfig | None = None, *args, **kwargs) -> UniMoEPreTrainedModel:
        """vLLM asks `AutoModel` for the model without its head, and brings its own."""
        if config is not None and is_in_vllm(config.text_config):
            return UniMoEModel(config)
        return super().__new__(cls)

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        self.model = UniMoEModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Trainers put a `forward` of their own in place of ours.
        self.register_forward_pre_hook(_with_labels_that_count, with_kwargs=True)
        self.register_forward_hook(_at_every_position, with_kwargs=True)
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UniMoEModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UniMoEModel.get_video_features`]."""
        return self.model.get_video_features(*args, **kwargs)

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UniMoEModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    def get_speech_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`UniMoEModel.get_speech_features`]."""
        return self.model.get_speech_features(*args, **kwargs)

    def _learnable(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels with -100 for placeholders, and for whatever has no score because its id lies behind the table."""
        ids = torch.tensor([getattr(self.config, f"{m}_token_id") for m in MODALITIES], device=labels.device)
        return labels.masked_fill((labels >= self.config.text_config.vocab_size) | torch.isin(labels, ids), -100)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        tower_states: dict[str, torch.Tensor] | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        prompt_clips: Any = None,
        **kwargs,
    ) -> UniMoECausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Target ids, -100 where nothing is learned;
                shifted inside. Placeholders are never learned. In training the head is run only where a label
                follows; `logits` are -inf elsewhere.
            output_router_logits (`bool`, *optional*): Whether to return router logits and the load-balancing loss;
                the config's by default.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): How many last positions, or which, get
                logits; 0 for all.
            prompt_clips (*optional*): What `generate` keeps until placeholders are read; not read here.

        The rest as in [`UniMoEModel.forward`].

        Returns:
            [`UniMoECausalLMOutputWithPast`].
        """
        text_config = self.config.text_config
        if output_router_logits is None:
            output_router_logits = text_config.output_router_logits
        if output_router_logits and OutputRecorder is None:
            raise ValueError(
                f"transformers {transformers.__version__} has no recorder of router logits that this checkpoint's "
                "code knows; leave out `output_router_logits` (and set `router_aux_loss_coef` to 0)."
            )
        scored = shift_labels = None
        if labels is not None:
            labels = self._learnable(labels)  # for who calls `forward` itself
            is_all = isinstance(logits_to_keep, int) and logits_to_keep == 0 and kwargs.get("shift_labels") is None
            if self.training and is_all and not torch.compiler.is_compiling():
                scored, shift_labels = scored_positions(labels)
                kwargs["positions_to_keep"] = scored
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            input_values=input_values,
            input_values_mask=input_values_mask,
            pixel_values_videos_mask=pixel_values_videos_mask,
            input_features_mask=input_features_mask,
            tower_states=tower_states,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            return_dict=True,
            **named_cache(cache, past_key_values),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = adjust_logits(self.lm_head(outputs.last_hidden_state[:, kept]), text_config)

        loss = aux_loss = None
        if labels is not None:
            rows, targets = logits, labels
            if scored is not None:  # moved by one, as loss functions move them back
                rows, targets = F.pad(logits, (0, 0, 0, 1)), F.pad(shift_labels, (1, 0), value=-100)
            loss = self.loss_function(logits=rows, labels=targets, vocab_size=text_config.vocab_size, **kwargs)
        if scored is not None:
            everywhere = logits.new_full((*scored.shape, logits.shape[-1]), -torch.inf)
            logits = everywhere.masked_scatter(scored.unsqueeze(-1).to(logits.device), logits)
        if outputs.router_logits:
            # With a filled cache the mask also covers earlier tokens, whose router logits are not here.
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            mask = None if attention_mask is None else attention_mask[:, -length:]
            aux_loss = load_balancing_loss(outputs.router_logits, text_config.num_experts_per_tok, mask)
            if loss is not None:
                loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device)

        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return UniMoECausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **others)


def _with_labels_that_count(
    model: UniMoEForConditionalGeneration, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """
    Before any `forward`: labels are cleared of what is never learned. TRL's, which scores every position but on GPUs,
    is given those alone that are followed by a label.
    """
    for name in ("labels", "shift_labels"):
        if kwargs.get(name) is not None:
            kwargs[name] = model._learnable(kwargs[name])
    labels = kwargs.get("labels")
    if kwargs.get("fused_lm_head") and labels is not None and kwargs.get("shift_labels") is None:
        kwargs["positions_to_keep"], kwargs["shift_labels"] = scored_positions(labels)
        kwargs["labels"] = None
    return args, kwargs


def _at_every_position(model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
    """After TRL's `forward`: what it says of positions, at all of them."""
    positions = kwargs.get("positions_to_keep") if kwargs.get("fused_lm_head") else None
    return outputs if positions is None else per_position(outputs, positions)


__all__ = ["UniMoEForConditionalGeneration", "UniMoEModel", "UniMoEPreTrainedModel"]
