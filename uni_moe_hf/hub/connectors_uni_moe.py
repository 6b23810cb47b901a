"""
From clips to rows in the decoder's embedding space: a tower, which is frozen, then its connector.

Connectors end in a `projector`; speech and sound first gather a window into a fixed number of learned queries.
Letters: N images, V videos, F frames, P patch tokens, W windows, L encoder positions, Q query tokens, D tower width,
H decoder width.
"""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_uni_moe import WhisperDecoder, can_return_tuple, select_hidden_states
from .configuration_uni_moe import MODALITIES, UniMoEConfig, is_in_vllm, width_of
from .towers_uni_moe import by_length, learns, run_tower


# Modality -> the tower that perceives it.
TOWERS = {"image": "vision", "video": "vision", "audio": "audio", "speech": "speech"}


class ProjectorLinear(nn.Linear):
    """A linear layer that takes any precision: what is trained is float32, whatever comes before it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`, in the dtype of the weight."""
        return super().forward(hidden_states.to(self.weight.dtype))


class VisionConnector(nn.Module):
    """
    A two-layer MLP on each patch token.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.1 ("linear projection"); the released
    weights are `mlp2x_gelu`, `*/model/multimodal_projector/builder.py@f5e82dd`.
    """

    def __init__(self, config: UniMoEConfig):
        super().__init__()
        tower, hidden = width_of(config.vision_config), config.text_config.hidden_size
        self.projector = nn.Sequential(
            ProjectorLinear(tower, hidden), ACT2FN[config.projector_hidden_act], nn.Linear(hidden, hidden)
        )

    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(num_images, num_patches, tower_width)`): Patch tokens.

        Returns:
            `torch.Tensor` of shape `(num_images, num_patches, hidden_size)`.
        """
        return self.projector(encoder_hidden_states)


class SpeechConnector(nn.Module):
    """
    A Whisper decoder driven by learned queries instead of text, then a linear projector.

    Queries attend causally to each other and fully to the encoder's output, as in the original. Its size is that of
    the decoder half of `speech_config`.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.1;
    `Uni_MoE_speech/model/audio_aligner@f5e82dd`.
    """

    def __init__(self, config: UniMoEConfig):
        super().__init__()
        # A copy: the decoder must not be told to cache, and the tower's config is saved as it came.
        decoder_config = copy.deepcopy(config.speech_config)
        decoder_config.use_cache = False
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_speech_query_tokens, decoder_config.d_model))
        self.decoder = WhisperDecoder(decoder_config)
        self.decoder.embed_tokens = None  # queries come as embeddings; the table would be dead weight
        self.projector = ProjectorLinear(decoder_config.d_model, config.text_config.hidden_size)

    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(num_windows, positions, d_model)`): Whisper's output.

        Returns:
            `torch.Tensor` of shape `(num_windows, num_speech_query_tokens, hidden_size)`.
        """
        with graph_if(learns(self.decoder, self.query_tokens, encoder_hidden_states)):
            queries = self.query_tokens.expand(encoder_hidden_states.shape[0], -1, -1)  # (W, Q, D)
            encoded = encoder_hidden_states.to(queries.dtype)
            outputs = self.decoder(inputs_embeds=queries, encoder_hidden_states=encoded, use_cache=False)
        return self.projector(outputs.last_hidden_state)


class QFormerConnector(nn.Module):
    """
    A BLIP-2 Q-Former on the tokens of a window, then a linear projector: of sound, and of speech from an encoder that
    came without a decoder.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.1;
    `Uni_MoE_audio/model/audio_aligner@f5e82dd`.
    """

    def __init__(self, config: UniMoEConfig, ear: str = "audio"):
        super().__init__()
        qformer_config, queries = (
            getattr(config, f"{ear}_connector_config"),
            getattr(config, f"num_{ear}_query_tokens"),
        )
        self.query_tokens = nn.Parameter(torch.empty(1, queries, qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel(qformer_config)
        self.projector = ProjectorLinear(qformer_config.hidden_size, config.text_config.hidden_size)

    def forward(self, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(num_windows, positions, tower_width)`): Of the tower.
            mask (`torch.Tensor` of shape `(num_windows, positions)`, *optional*): 1 = to be looked at; all by default.

        Returns:
            `torch.Tensor` of shape `(num_windows, query tokens, hidden_size)`.
        """
        with graph_if(learns(self.qformer, self.query_tokens, encoder_hidden_states)):
            queries = self.query_tokens.expand(encoder_hidden_states.shape[0], -1, -1)  # (W, Q, D)
            outputs = self.qformer(
                query_embeds=queries,
                encoder_hidden_states=encoder_hidden_states.to(queries.dtype),
                encoder_attention_mask=mask,
            )
        return self.projector(outputs.last_hidden_state)


def runs_idle(model: nn.Module, used: Iterable[str]) -> bool:
    """
    Whether connectors that a batch does not need run on a row that counts for nothing: in training on several
    processes, where one that leaves out a module which another runs keeps both waiting; and where nothing but
    connectors is trained, so that a batch of words alone would have no gradient.

    Args:
        model (`nn.Module`): With the connectors and `language_model` as attributes.
        used (`Iterable[str]`): Modalities of the batch.
    """
    if is_partitioned(model.language_model):  # outside training as well
        return True
    if not (model.training and torch.is_grad_enabled()):
        return False
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together or not (used or learns(model.language_model))


def idle_connector(model: nn.Module, name: str) -> torch.Tensor | float:
    """`()`: 0, of which a connector is a part where it is trained; 0.0 where there is nothing to do."""
    connector = getattr(model, f"{name}_connector", None)
    if connector is None or not (learns(connector) or is_partitioned(connector)):
        return 0.0
    parameter = next(connector.parameters())
    # One position of one window: Whisper's decoder cannot be asked about none.
    row = torch.zeros(1, 1, width_of(getattr(model.config, f"{name}_config")))
    return 0.0 * connector(row.to(parameter.device, parameter.dtype)).sum()


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has cut it up, which brings modules together one by one, in all processes at once."""
    return hasattr(next(model.parameters()), "ds_id")


def graph_if(wanted: bool) -> torch.set_grad_enabled:
    """No graph is kept of what learns nothing, whatever hooks trainers have put into its embeddings."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


class MediaEncoderMixin:
    """
    `get_<modality>_features`, for a model with towers and connectors: clips to rows of the decoder.

    What a tower gives for the clips of a modality are their *states*. They can be passed to the model in place of the
    clips, as `tower_states`: a tower that is frozen gives the same at every step, so its states may be kept.
    """

    # While towers are no modules: the file with their weights, if they are not in memory, and the towers.
    unloaded: tuple[str | None, list[dict[str, nn.Module]]] | None = None

    def _require(self, modality: str, argument: str) -> None:
        if modality not in self.config.modalities:
            raise ValueError(
                f"`{argument}` were passed but this model has no tower for {modality} (it takes text"
                f"{''.join(', ' + name for name in self.config.modalities)}); remove them or load another model."
            )

    def _tower(self, modality: str, argument: str) -> nn.Module:
        self._require(modality, argument)
        name = f"{TOWERS[modality]}_tower"
        tower = getattr(self, name)
        if tower is None and self.unloaded is not None and self.unloaded[0] is None:
            tower = self.unloaded[1][0][name]
        if tower is None:
            raise ValueError(
                f"`{argument}` were passed, but the {TOWERS[modality]} tower of this model is not in memory; pass "
                "`tower_states` from a feature cache, or bring the towers back with `load_towers()`."
            )
        return tower

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`): Normalised pictures.
            vision_feature_layer, vision_feature_select_strategy (*optional*): Override the config's.

        Returns:
            [`BaseModelOutputWithPooling`] of the tower; `pooler_output` `(num_images, image_seq_length, hidden_size)`
            is what stands for each picture in the sequence.

        Raises:
            ValueError: the model has no vision tower.
        """
        outputs, states = self._picture_states(
            self._tower("image", "pixel_values"),
            pixel_values,
            vision_feature_layer,
            vision_feature_select_strategy,
            **kwargs,
        )
        outputs.pooler_output = self._connected("image", states)
        return outputs

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, pixel_values_videos_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values_videos (`torch.Tensor` of shape `(num_videos, frames, 3, height, width)`): Normalised frames.
            pixel_values_videos_mask (`torch.Tensor` of shape `(num_videos, frames)`, *optional*): 1 = valid, where
                videos have different numbers of frames.

        Returns:
            [`BaseModelOutputWithPooling`] of the tower, frames of all videos in one row; `pooler_output`
            `(num_videos, tokens, hidden_size)`, where tokens are those of one picture with `video_pooling="mean"`
            (frames are averaged *after* the projector, as in the original) and of all frames with `"none"`; with a
            mask and `"none"` the tokens of all videos follow each other, `(1, tokens, hidden_size)`.

        Raises:
            ValueError: the model has no vision tower.
        """
        tower = self._tower("video", "pixel_values_videos")
        if pixel_values_videos.dim() != 5:
            raise ValueError(
                f"`pixel_values_videos` has shape {tuple(pixel_values_videos.shape)}, expected (num_videos, frames, "
                "3, height, width); pictures go into `pixel_values`."
            )
        outputs, states = self._picture_states(tower, pixel_values_videos.flatten(0, 1), **kwargs)
        states = states.unflatten(0, pixel_values_videos.shape[:2])
        outputs.pooler_output = self._connected("video", states, pixel_values_videos_mask)
        return outputs

    @can_return_tuple
    def get_speech_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_features (`torch.Tensor` of shape `(num_windows, mel_bins, mel_frames)`): Whisper's log-mel.
            input_features_mask (`torch.Tensor` of shape `(num_windows, mel_frames)`, *optional*): 1 = valid, where
                windows are cut to whole seconds (`cut_speech_windows`); what follows is not heard.

        Returns:
            [`BaseModelOutputWithPooling`] of the tower; `pooler_output` `(num_windows, num_speech_query_tokens,
            hidden_size)`.

        Raises:
            ValueError: the model has no speech tower.
        """
        given = self._windows(input_features, input_features_mask)
        outputs, states, mask = self._speech_states(*given, **kwargs)
        return BaseModelOutputWithPooling(**outputs, pooler_output=self._connected("speech", states, mask))

    @can_return_tuple
    def get_audio_features(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(num_windows, ...)`): As the encoder's own feature extractor makes
                them: of BEATs and AST `(num_windows, frames, mel_bins)`.
            input_values_mask (`torch.Tensor` of shape `(num_windows, frames)`, *optional*): 1 = valid.

        Returns:
            [`BaseModelOutputWithPooling`] of the tower; `pooler_output` `(num_windows, num_audio_query_tokens,
            hidden_size)`.

        Raises:
            ValueError: the model has no audio tower.
        """
        outputs, states, mask = self._audio_states(*self._windows(input_values, input_values_mask), **kwargs)
        return BaseModelOutputWithPooling(**outputs, pooler_output=self._connected("audio", states, mask))

    def _windows(self, *tensors: torch.Tensor | list[torch.Tensor] | None) -> list[torch.Tensor | None]:
        """Windows of all clips in one row. vLLM keeps them by clip, `(clips, windows, ...)` or a list of clips."""
        if not is_in_vllm(self.config.text_config):
            return list(tensors)
        return [None if clips is None else torch.cat(list(clips)) for clips in tensors]

    def encode_media(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        tower_states: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """
        Args:
            pixel_values, pixel_values_videos, input_values, input_values_mask, input_features,
                pixel_values_videos_mask, input_features_mask, tower_states: As in [`UniMoEModel.forward`].

        Returns:
            `dict`: modality -> what `get_<modality>_features` returns, for those given; a `mm_encoder_outputs`. Of
            `tower_states` it is `pooler_output` alone.

        Raises:
            ValueError: a modality is given both as clips and as states.
        """
        given = {"image": (pixel_values,), "video": (pixel_values_videos, pixel_values_videos_mask)}
        given |= {"audio": (input_values, input_values_mask), "speech": (input_features, input_features_mask)}
        return self._encode_media(given, tower_states or {})[0]

    def _encode_media(
        self, given: dict[str, tuple], tower_states: dict[str, torch.Tensor], encoded: Iterable[str] = ()
    ) -> tuple[dict[str, BaseModelOutputWithPooling], torch.Tensor | float]:
        """
        As [`encode_media`], and a 0 of which idle connectors are a part. All run in one order, whatever a batch holds:
        DeepSpeed adds up gradients of several processes in the order in which they come.

        Args:
            given (`dict[str, tuple]`): Modality -> inputs of `get_<modality>_features`.
            tower_states (`dict[str, torch.Tensor]`): As in [`encode_media`].
            encoded (`Iterable[str]`): Modalities that came encoded.
        """
        used = {*encoded, *tower_states, *(modality for modality, inputs in given.items() if inputs[0] is not None)}
        idle, made, is_idle_run = 0.0, {}, runs_idle(self, used)
        for modality in MODALITIES:
            states, inputs = tower_states.get(modality), given[modality]
            if inputs[0] is not None and states is not None:
                raise ValueError(f"Got {modality} inputs as well as their `tower_states`; pass one of the two.")
            if inputs[0] is not None:
                made[modality] = getattr(self, f"get_{modality}_features")(*inputs, return_dict=True)
            elif states is not None:
                self._require(modality, f"tower_states['{modality}']")
                mask = tower_states.get(f"{modality}_mask")
                if self.device.type != "meta":  # a `dict` among a model's inputs is not moved by everybody
                    states, mask = states.to(self.device), None if mask is None else mask.to(self.device)
                pooled = self._connected(modality, states, mask)
                made[modality] = BaseModelOutputWithPooling(pooler_output=pooled)
            elif is_idle_run and modality not in used:
                idle = idle + idle_connector(self, TOWERS[modality])
        return made, idle

    @torch.no_grad()
    def run_towers(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pixel_values_videos_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values, pixel_values_videos, input_values, input_values_mask, input_features, input_features_mask,
                pixel_values_videos_mask: As in [`UniMoEModel.forward`].

        Returns:
            `dict[str, torch.Tensor]`: a `tower_states`, what the connectors would be given: "image" `(num_images, P,
            D)`, "video" `(num_videos, frames, P, D)`, "audio" and "speech" `(num_windows, L, D)`; under
            "<modality>_mask" which frames or positions are valid, where not all are.
        """
        states: dict[str, torch.Tensor | None] = {}
        if pixel_values is not None:
            _, states["image"] = self._picture_states(self._tower("image", "pixel_values"), pixel_values)
        if pixel_values_videos is not None:
            tower = self._tower("video", "pixel_values_videos")
            _, frames = self._picture_states(tower, pixel_values_videos.flatten(0, 1))
            states["video"] = frames.unflatten(0, pixel_values_videos.shape[:2])
            states["video_mask"] = pixel_values_videos_mask
        if input_values is not None:
            _, states["audio"], states["audio_mask"] = self._audio_states(input_values, input_values_mask)
        if input_features is not None:
            _, states["speech"], states["speech_mask"] = self._speech_states(input_features, input_features_mask)
        return {name: tensor for name, tensor in states.items() if tensor is not None}

    def unload_towers(self, file: str | None) -> None:
        """
        Takes the towers out of the model's modules. [`whole`], and so saving, puts them back for as long as it takes.

        Args:
            file (`str`, *optional*): Where their weights go, for training on `tower_states` without them in memory;
                replaced where it exists. With `None` they stay in memory and run as before, but nobody who walks
                through the modules meets them: ZeRO-3 would cut them up, and wait in them for processes whose batches
                do not need them.

        Raises:
            ValueError: a tower is trained, or they have been unloaded.
            OSError: the file cannot be written.
        """
        if self.unloaded is not None:
            raise ValueError("The towers have been unloaded already; `load_towers()` brings them back.")
        self._unload(file, is_written=False)

    def _unload(self, file: str | None, is_written: bool) -> None:
        names = [f"{name}_tower" for name in dict.fromkeys(TOWERS.values())]
        towers = {name: tower for name in names if (tower := getattr(self, name, None)) is not None}
        if trained := [name for name, tower in towers.items() if learns(tower)]:
            raise ValueError(
                f"{', '.join(trained)}: is trained, so it must stay; freeze it, or leave it among the modules."
            )
        if file is not None and not is_written:
            file = os.path.abspath(file)
            try:
                torch.save({name: tower.state_dict() for name, tower in towers.items()}, f"{file}.partial")
                os.replace(f"{file}.partial", file)
            except (OSError, RuntimeError) as error:
                raise OSError(
                    f"The towers could not be written to '{file}' ({error}); they stay in memory."
                ) from error
        for name, tower in towers.items():
            for module in tower.modules() if file is not None else ():
                for key, parameter in [*module.named_parameters(recurse=False)]:
                    setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
            setattr(self, name, None)
        self.unloaded = file, [towers]  # in a list, so that they are no modules of this one

    def load_towers(self) -> None:
        """Brings unloaded towers back."""
        if self.unloaded is None:
            return
        file, [towers] = self.unloaded
        try:
            weights = {} if file is None else torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch's, pickle's or the system's, in many words
            raise OSError(
                f"The towers' weights in '{file}' cannot be read ({type(error).__name__}); put it back, and save "
                "again."
            ) from error
        for name, tower in towers.items():
            if file is not None:
                tower.load_state_dict(weights[name], assign=True)
                tower.to(self.device)
            setattr(self, name, tower)
        self.unloaded = None

    @contextmanager
    def whole(self) -> Iterator[bool]:
        """While it is entered, towers are modules of the model and in memory. Gives whether they were before."""
        unloaded = self.unloaded
        self.load_towers()
        try:
            yield unloaded is None
        finally:
            if unloaded is not None:
                self._unload(unloaded[0], is_written=True)

    @select_hidden_states("layer")
    def _run_vision_tower(
        self, tower: nn.Module, pixel_values: torch.Tensor, layer: int, **kwargs
    ) -> BaseModelOutputWithPooling:
        return tower(pixel_values.to(tower.dtype), return_dict=True, **kwargs)

    def _picture_states(
        self,
        tower: nn.Module,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """The tower's outputs, and of the layer that is read `(N, P, D)`."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"`vision_feature_select_strategy={strategy!r}` must be 'default' or 'full'.")

        def run(pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
            return self._run_vision_tower(tower, pixel_values, layer=layer, **kwargs)

        outputs = run_tower(tower, run, pixel_values)
        states = outputs.hidden_states[layer]  # (N, prefix + P, D)
        if states.dim() == 4:  # a map, of towers that are no Transformers
            states = states.flatten(2).transpose(1, 2)
        states = states[:, self.config.vision_prefix_length :] if strategy == "default" else states
        return outputs, states.contiguous()  # the last digit of a product depends on how its factors lie

    def _audio_states(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None, **kwargs
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """The tower's outputs, `(W, L, D)` and which positions hold sound, `(W, L)`."""
        tower = self._tower("audio", "input_values")

        def run(input_values: torch.Tensor, input_values_mask: torch.Tensor | None) -> Any:
            return tower(input_values, input_values_mask, return_dict=True, **kwargs)

        outputs = run_tower(tower, run, input_values, input_values_mask)
        states = outputs.last_hidden_state
        return outputs, states, tower.position_mask(input_values_mask, states.shape[1])

    def _speech_states(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None, **kwargs
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """
        The tower's outputs, `(W, L, D)` and how far each window goes, `(W, L)`; of windows of several lengths the
        outputs are the states alone.
        """
        tower = self._tower("speech", "input_features")

        def run(input_features: torch.Tensor) -> Any:
            return tower(input_features.to(tower.dtype), return_dict=True, **kwargs)

        if input_features_mask is None:
            outputs = run_tower(tower, run, input_features)
            return outputs, outputs.last_hidden_state, None
        mask = input_features_mask[:, ::2]  # two frames are a position

        def run_cut(features: torch.Tensor, length: int) -> torch.Tensor:
            return run_tower(tower, run, features[..., : 2 * length]).last_hidden_state

        states = by_length(run_cut, input_features, mask)
        return {"last_hidden_state": states}, states, mask

    def _connected(self, modality: str, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`(clips or windows, tokens, H)` of what the tower gives for a modality's clips."""
        connector = getattr(self, f"{TOWERS[modality]}_connector")
        if modality == "audio":
            return connector(states, mask)
        if modality == "speech":
            return connector(states) if mask is None else by_length(lambda s, n: connector(s[:, :n]), states, mask)
        rows = connector(states)
        if modality == "image":
            return rows
        is_mean = self.config.video_pooling == "mean"  # of (V, F, P, H)
        if mask is None:
            return rows.mean(dim=1) if is_mean else rows.flatten(1, 2)
        if is_mean:
            mask = mask.to(rows)[..., None, None]  # (V, F, 1, 1)
            return (rows * mask).sum(dim=1) / mask.sum(dim=1)
        return rows[mask.bool()].flatten(0, 1).unsqueeze(0)


__all__ = ["MediaEncoderMixin", "QFormerConnector", "SpeechConnector", "VisionConnector"]
