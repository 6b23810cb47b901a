"""
From clips to rows in the decoder's embedding space: a tower, which is frozen, then its connector.

Connectors end in a `projector`; speech and sound first gather a window into a fixed number of learned queries.
Letters: N images, V videos, F frames, P patch tokens, W windows, L encoder positions, Q query tokens, D tower width,
H decoder width.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_uni_moe import WhisperDecoder, can_return_tuple, select_hidden_states
from .configuration_uni_moe import MODALITIES, UniMoEConfig, width_of


# What a frozen tower is given together. On a CPU windows go one by one: that is as fast, and some kernels' last digit
# depends on how many there are.
PICTURES_AT_ONCE, WINDOWS_AT_ONCE = 32, 8
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


def idle_connectors(model: nn.Module, used: Iterable[str]) -> torch.Tensor | float:
    """
    Runs the connectors that a batch does not need on one row that counts for nothing. In training on several
    processes, where parameters are sharded, one that leaves out a module which another runs keeps both waiting; and
    where nothing but connectors is trained, a batch of words alone would have no gradient at all.

    Args:
        model (`nn.Module`): With the connectors and `language_model` as attributes.
        used (`Iterable[str]`): Modalities of the batch.

    Returns:
        `torch.Tensor` of shape `()`: 0, of which every trained connector is a part; 0.0 where there is nothing to do.
    """
    if not (model.training and torch.is_grad_enabled()):
        return 0.0
    used = set(used)
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not together and (used or any(p.requires_grad for p in model.language_model.parameters())):
        return 0.0
    busy = {"vision" if modality in ("image", "video") else modality for modality in used}
    total = 0.0
    for name in ("vision", "speech", "audio"):
        connector = getattr(model, f"{name}_connector", None)
        if connector is None or name in busy or not any(p.requires_grad for p in connector.parameters()):
            continue
        parameter = next(connector.parameters())
        # One position of one window: Whisper's decoder cannot be asked about none.
        row = torch.zeros(1, 1, width_of(getattr(model.config, f"{name}_config")))
        total = total + 0.0 * connector(row.to(parameter.device, parameter.dtype)).sum()
    return total


def learns(*parts: nn.Module | torch.Tensor | None) -> bool:
    """Whether any of these modules or tensors takes part in training."""
    return any(
        part.requires_grad if isinstance(part, torch.Tensor) else any(p.requires_grad for p in part.parameters())
        for part in parts
        if part is not None
    )


def graph_if(wanted: bool) -> torch.set_grad_enabled:
    """No graph is kept of what learns nothing, whatever hooks trainers have put into its embeddings."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def run_tower(tower: nn.Module, run: Callable[..., Any], *inputs: torch.Tensor | None) -> Any:
    """
    Runs an encoder on clips. One that is frozen keeps no graph, and is given a few clips at a time, so that memory
    does not grow with their number.

    Args:
        tower (`nn.Module`): The encoder.
        run (`Callable`): From inputs to a `ModelOutput` whose tensors begin with the number of clips.
        inputs (`torch.Tensor` of shape `(clips, ...)`, *optional*): What it is called with.

    Returns:
        What `run` returns, for all clips.
    """
    if torch.is_grad_enabled() and learns(tower, *inputs):
        return run(*inputs)
    count, is_picture = len(inputs[0]), inputs[0].dim() == 4 and len(inputs) == 1
    step = PICTURES_AT_ONCE if is_picture else 1 if inputs[0].device.type == "cpu" else WINDOWS_AT_ONCE
    if torch.compiler.is_compiling():
        step = max(count, 1)
    with torch.no_grad():
        groups = [
            run(*(None if values is None else values[start : start + step] for values in inputs))
            for start in range(0, max(count, 1), step)
        ]
        return _joined(groups)


def _joined(groups: list[Any]) -> Any:
    """Outputs of several groups of clips as those of all, without a graph."""
    first = groups[0]
    if isinstance(first, torch.Tensor):
        return (first if len(groups) == 1 else torch.cat(groups)).detach()
    if isinstance(first, Mapping):
        return type(first)(**{name: _joined([group[name] for group in groups]) for name in first})
    if isinstance(first, tuple):
        return tuple(_joined(list(values)) for values in zip(*groups, strict=True))
    return first


class MediaEncoderMixin:
    """
    `get_<modality>_features`, for a model with towers and connectors: clips to rows of the decoder.

    What a tower gives for the clips of a modality are their *states*. They can be passed to the model in place of the
    clips, as `tower_states`: a tower that is frozen gives the same at every step, so its states may be kept.
    """

    # The file that holds the towers' weights, and the towers, while these are not in memory.
    unloaded: tuple[str, list[dict[str, nn.Module]]] | None = None

    def _require(self, modality: str, argument: str) -> None:
        if modality not in self.config.modalities:
            raise ValueError(
                f"`{argument}` were passed but this model has no tower for {modality} (it takes text"
                f"{''.join(', ' + name for name in self.config.modalities)}); remove them or load another model."
            )

    def _tower(self, modality: str, argument: str) -> nn.Module:
        self._require(modality, argument)
        tower = getattr(self, f"{TOWERS[modality]}_tower")
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
        outputs, states, mask = self._speech_states(input_features, input_features_mask, **kwargs)
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
        outputs, states, mask = self._audio_states(input_values, input_values_mask, **kwargs)
        return BaseModelOutputWithPooling(**outputs, pooler_output=self._connected("audio", states, mask))

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
        encoded = {
            modality: getattr(self, f"get_{modality}_features")(*inputs, return_dict=True)
            for modality, inputs in given.items()
            if inputs[0] is not None
        }
        for modality in MODALITIES:
            if (states := (tower_states or {}).get(modality)) is None:
                continue
            self._require(modality, f"tower_states['{modality}']")
            if modality in encoded:
                raise ValueError(f"Got {modality} inputs as well as their `tower_states`; pass one of the two.")
            mask = tower_states.get(f"{modality}_mask")
            if self.device.type != "meta":  # a `dict` among a model's inputs is not moved by everybody
                states, mask = states.to(self.device), None if mask is None else mask.to(self.device)
            pooled = self._connected(modality, states, mask)
            encoded[modality] = BaseModelOutputWithPooling(pooler_output=pooled)
        return encoded

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

    def unload_towers(self, file: str) -> None:
        """
        Moves the towers from memory to a file, for training on `tower_states`. Saving the model brings them back for
        as long as it takes.

        Args:
            file (`str`): Where their weights go; where it exists, it holds them already.
        """
        names = [f"{name}_tower" for name in dict.fromkeys(TOWERS.values())]
        towers = {name: tower for name in names if (tower := getattr(self, name, None)) is not None}
        if trained := [name for name, tower in towers.items() if learns(tower)]:
            raise ValueError(f"{', '.join(trained)}: is trained, so its features change and it must stay in memory.")
        if not os.path.exists(file):
            torch.save({name: tower.state_dict() for name, tower in towers.items()}, f"{file}.partial")
            os.replace(f"{file}.partial", file)
        for name, tower in towers.items():
            for module in tower.modules():
                for key, parameter in [*module.named_parameters(recurse=False)]:
                    setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
            setattr(self, name, None)
        self.unloaded = file, [towers]  # in a list, so that they are no modules of this one

    def load_towers(self) -> None:
        """Brings unloaded towers back."""
        if self.unloaded is None:
            return
        file, [towers] = self.unloaded
        weights = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        for name, tower in towers.items():
            tower.load_state_dict(weights[name], assign=True)
            setattr(self, name, tower.to(self.device))
        self.unloaded = None

    @select_hidden_states("layer")
    def _run_vision_tower(self, pixel_values: torch.Tensor, layer: int, **kwargs) -> BaseModelOutputWithPooling:
        return self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)

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
            return self._run_vision_tower(pixel_values, layer=layer, **kwargs)

        outputs = run_tower(tower, run, pixel_values)
        states = outputs.hidden_states[layer]  # (N, prefix + P, D)
        if states.dim() == 4:  # a map, of towers that are no Transformers
            states = states.flatten(2).transpose(1, 2)
        return outputs, states[:, self.config.vision_prefix_length :] if strategy == "default" else states

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


def by_length(run: Callable[[torch.Tensor, int], torch.Tensor], windows: torch.Tensor, mask: torch.Tensor):
    """
    Runs windows of equal length together: one's numbers must not depend on how long the others are.

    Args:
        run (`Callable`): From windows and their length to `(windows, positions, width)`.
        windows (`torch.Tensor` of shape `(W, ...)`): All of them.
        mask (`torch.Tensor` of shape `(W, L)`): 1 = valid.

    Returns:
        `torch.Tensor` of shape `(W, positions, width)`: zeros behind what is shorter.
    """
    lengths, found = mask.sum(dim=1), {}
    for length in sorted(set(lengths.tolist())):
        chosen = (lengths == length).nonzero().flatten()
        found[length] = chosen, run(windows[chosen], int(length))
    longest = max(rows.shape[1] for _, rows in found.values())
    whole = [nn.functional.pad(rows, (0, 0, 0, longest - rows.shape[1])) for _, rows in found.values()]
    order = torch.cat([chosen for chosen, _ in found.values()]).argsort()
    return torch.cat(whole)[order]


__all__ = ["MediaEncoderMixin", "QFormerConnector", "SpeechConnector", "VisionConnector", "idle_connectors"]
