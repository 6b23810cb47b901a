"""
The ears: which encoders of speech and of sound are known, and BEATs, which the library lacks.

An encoder of sound is a model with a `forward` and a `position_mask`, see [`SoundTower`]; to add a kind, write a
subclass of the library's class, name it in `SOUND_TOWERS`, and say in `FRONT_ENDS` of `feature_extraction_uni_moe.py`
how long its windows are.

Letters: W windows, F frames, M mel bins, T tokens, D hidden, A heads.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import init
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat_uni_moe import ASTModel, ClapAudioModel, GradientCheckpointingLayer, WhisperEncoder, can_return_tuple
from .configuration_uni_moe import BeatsConfig, YamnetConfig


# Given together on a GPU. On a CPU clips go one by one: about as fast, and no last digit depends on their number.
PICTURES_AT_ONCE, WINDOWS_AT_ONCE = 32, 8


class SoundTower:
    """
    What an encoder of sound is asked for, besides being a [`PreTrainedModel`] with a `config`.

    `forward(input_values, input_values_mask, **kwargs)` takes the features of whole windows, `(W, ...)` as the kind's
    own feature extractor makes them, and which of their 10 ms are valid, `(W, F)`. It returns a [`BaseModelOutput`]
    whose `last_hidden_state` is `(W, T, D)`, in the order of time.
    """

    def position_mask(self, input_values_mask: torch.Tensor | None, num_positions: int) -> torch.Tensor | None:
        """
        Args:
            input_values_mask (`torch.Tensor` of shape `(W, F)`, *optional*): 1 = valid.
            num_positions (`int`): T.

        Returns:
            `torch.Tensor` of shape `(W, T)`, 1 = what the connector may look at; `None` for everything.
        """
        return None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with an additive `(W, A, T, T)` mask, in the library's calling convention."""
    weights = query @ key.transpose(2, 3) * scaling + attention_mask  # (W, A, T, T)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# BEATs: a Transformer over patches of a log-mel filterbank, with a gated relative position bias.


class BeatsAttention(nn.Module):
    """Self-attention whose shared relative position bias is scaled by a gate, per query and head."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.grep_linear = nn.Linear(self.head_dim, 8)
        self.grep_a = nn.Parameter(torch.empty(1, self.num_heads, 1, 1))

    def forward(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor, padding_bias: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(W, T, D)`): Tokens.
            position_bias (`torch.Tensor` of shape `(1, A, T, T)`): Ungated bias, shared by all layers.
            padding_bias (`torch.Tensor` of shape `(W, 1, 1, T)`): 0 for tokens to attend to, very negative otherwise.

        Returns:
            `tuple(torch.Tensor)`: output `(W, T, D)` and, where the attention function gives them, the weights.
        """
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (W, A, T, D / A)
        gates = self.grep_linear(query).unflatten(-1, (2, 4)).sum(dim=-1).sigmoid()  # (W, A, T, 2)
        update, reset = gates.chunk(2, dim=-1)  # (W, A, T, 1)
        bias = (update * (reset * self.grep_a - 1.0) + 2.0) * position_bias + padding_bias  # (W, A, T, T)

        # Whatever the decoder's kernel is, torch's own: others cannot add a bias of its own to every head.
        kernel = "eager" if self.config._attn_implementation == "eager" else "sdpa"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(self, query, key, value, bias, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class BeatsLayer(GradientCheckpointingLayer):
    """A post-norm Transformer layer with DeepNorm's scaled residuals."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = BeatsAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(
        self, hidden_states: torch.Tensor, position_bias: torch.Tensor, padding_bias: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(W, T, D)` to `(W, T, D)` and attention weights; see [`BeatsAttention.forward`]."""
        attended, weights = self.self_attn(hidden_states, position_bias, padding_bias, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states * self.residual_scale + self.dropout(attended))
        inner = self.activation_dropout(self.activation_fn(self.fc1(hidden_states)))
        hidden_states = self.final_layer_norm(hidden_states * self.residual_scale + self.dropout(self.fc2(inner)))
        return hidden_states, weights


class BeatsPositionalConv(nn.Conv1d):
    """The convolution that tells tokens where they are."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(W, D, T)` to `(W, D, T)`."""
        # A tap of zeros makes an even kernel odd: as many outputs as inputs, and right ones. On CPUs with AMX, torch
        # 2.13 computes narrow groups with an even kernel wrongly in bfloat16.
        weight = F.pad(self.weight, (0, 1 - self.kernel_size[0] % 2))
        return F.conv1d(hidden_states, weight, self.bias, padding=self.padding, groups=self.groups)


class BeatsEncoder(nn.Module):
    """Convolutional position embedding, then the layers."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.config = config
        kernel = config.num_conv_pos_embeddings
        # The published file keeps this kernel as weight norm's two factors; here it is one tensor, the product.
        self.pos_conv = BeatsPositionalConv(
            config.hidden_size,
            config.hidden_size,
            kernel_size=kernel,
            padding=kernel // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_attention_heads)
        self.layers = nn.ModuleList([BeatsLayer(config) for _ in range(config.num_hidden_layers)])

    def relative_buckets(self, length: int, device: torch.device) -> torch.Tensor:
        """`(length, length)` bucket of every query (row) and key (column), `int64` in `[0, num_buckets)`."""
        positions = torch.arange(length, device=device)
        distance = positions[None, :] - positions[:, None]  # key - query
        half = self.config.num_buckets // 2
        exact = half // 2
        magnitude = distance.abs()
        growth = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(self.config.max_bucket_distance / exact)
        far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(magnitude < exact, magnitude, far) + half * (distance > 0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> BaseModelOutput:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(W, T, D)`): Projected patches.
            padding_mask (`torch.Tensor` of shape `(W, T)`, *optional*): `True` for tokens to ignore.
            output_hidden_states, output_attentions (`bool`, *optional*, defaults to `False`): Whether to return what
                goes into the layers, and what comes out of the last; and their attention weights.

        Returns:
            [`BaseModelOutput`] with `last_hidden_state` `(W, T, D)`.
        """
        num_windows, length, _ = hidden_states.shape
        padding_bias = hidden_states.new_zeros(num_windows, 1, 1, length)
        if padding_mask is not None:
            hidden_states = hidden_states.masked_fill(padding_mask.unsqueeze(-1), 0.0)
            lowest = torch.finfo(hidden_states.dtype).min
            padding_bias = padding_bias.masked_fill(padding_mask[:, None, None, :], lowest)

        positions = self.pos_conv(hidden_states.transpose(1, 2))
        hidden_states = self.layer_norm(hidden_states + F.gelu(positions.transpose(1, 2)))
        hidden_states = self.dropout(hidden_states)

        buckets = self.relative_buckets(length, hidden_states.device)
        position_bias = self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)  # (1, A, T, T)
        states, attentions = [hidden_states], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, position_bias, padding_bias, **kwargs)
            if output_hidden_states:
                states.append(hidden_states)
            if output_attentions and weights is not None:
                attentions.append(weights)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class BeatsModel(SoundTower, PreTrainedModel):
    """
    The BEATs audio encoder. Its connector looks at padding too, as in the original.

    Source: BEATs (https://huggingface.co/papers/2212.09058), section 2; the gate is WavLM's
    (https://huggingface.co/papers/2110.13900), section 3.1; `Uni_MoE_audio/model/audio_encoder@f5e82dd` for what of
    it Uni-MoE uses: the self-supervised encoder without a classifier.
    """

    config: BeatsConfig
    base_model_prefix = "beats"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["BeatsLayer"]
    # All kernels may be named; each means torch's own, see `BeatsAttention`.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: BeatsConfig):
        super().__init__(config)
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.patch_embedding_size, kernel_size=patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(config.patch_embedding_size, eps=config.layer_norm_eps)
        self.post_extract_proj = nn.Linear(config.patch_embedding_size, config.hidden_size)
        self.encoder = BeatsEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BeatsAttention):
            init.ones_(module.grep_a)
        elif isinstance(module, BeatsPositionalConv):
            std = math.sqrt(4 / (self.config.num_conv_pos_embeddings * self.config.hidden_size))
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)

    def token_padding_mask(self, frame_mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """
        Which patch tokens are padding, in BEATs' own approximation: token i stands for the i-th run of frames.

        Args:
            frame_mask (`torch.Tensor` of shape `(num_windows, frames)`): 1 = valid.
            num_tokens (`int`): Patch tokens of a window.

        Returns:
            `torch.BoolTensor` of shape `(num_windows, num_tokens)`: `True` where every frame of the run is padding.
        """
        run = frame_mask.shape[1] // num_tokens
        if run == 0:  # fewer frames than tokens: patches cover 16 frames each, so stretch the mask instead
            index = torch.arange(num_tokens, device=frame_mask.device) * frame_mask.shape[1] // num_tokens
            return frame_mask[:, index] == 0
        return (frame_mask[:, : run * num_tokens].unflatten(1, (num_tokens, run)) == 0).all(dim=-1)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        input_values_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(num_windows, frames, num_mel_bins)`):
                Normalised log-mel filterbank, one frame per 10 ms, see [`UniMoEFeatureExtractor`].
            input_values_mask (`torch.Tensor` of shape `(num_windows, frames)`, *optional*):
                1 = valid, 0 = padding (BEATs' own polarity is the opposite).
            output_hidden_states, output_attentions (`bool`, *optional*): As in the library; the config's by default.
                Attention weights need `attn_implementation="eager"`.

        Returns:
            [`BaseModelOutput`] with `last_hidden_state` `(num_windows, frames // 16 * num_mel_bins // 16,
            hidden_size)`, time-major.

        Raises:
            ValueError: `input_values` has another number of mel bins, or fewer frames than one patch.
        """
        patch = self.config.patch_size
        if input_values.shape[-1] != self.config.num_mel_bins or input_values.shape[1] < patch:
            raise ValueError(
                f"`input_values` has shape {tuple(input_values.shape)}, but this BEATs expects "
                f"(num_windows, frames >= {patch}, {self.config.num_mel_bins}); use the model's own processor."
            )
        input_values = input_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(input_values.unsqueeze(1)).flatten(2).transpose(1, 2)  # (W, T, patch width)
        hidden_states = self.post_extract_proj(self.layer_norm(patches))  # (W, T, D)
        padding_mask = None
        if input_values_mask is not None:
            padding_mask = self.token_padding_mask(input_values_mask, hidden_states.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return self.encoder(hidden_states, padding_mask, output_hidden_states, output_attentions, **kwargs)


def frames_to_positions(frame_mask: torch.Tensor, num_positions: int) -> torch.Tensor:
    """`(W, F)` to `(W, T)`: a position is valid if any of the frames that it stands for is."""
    return F.adaptive_max_pool1d(frame_mask[:, None].float(), num_positions)[:, 0].to(frame_mask.dtype)


class AstTower(SoundTower, ASTModel):
    """The Audio Spectrogram Transformer, whose patches are put in the order of time, low frequencies first."""

    def forward(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """`(W, F, M)` to `(W, columns * rows, D)`, without the two tokens before the patches."""
        outputs = super().forward(input_values.to(self.dtype), **{**kwargs, "return_dict": True})
        patches = outputs.last_hidden_state[:, 2:].unflatten(1, (self._num_rows, -1))  # (W, rows, columns, D)
        return BaseModelOutput(patches.transpose(1, 2).flatten(1, 2), outputs.hidden_states, outputs.attentions)

    def position_mask(self, input_values_mask: torch.Tensor | None, num_positions: int) -> torch.Tensor | None:
        """Columns of nothing but padding are left out."""
        if input_values_mask is None:
            return None
        columns = frames_to_positions(input_values_mask, num_positions // self._num_rows)
        return columns.repeat_interleave(self._num_rows, dim=1)

    @property
    def _num_rows(self) -> int:
        return (self.config.num_mel_bins - self.config.patch_size) // self.config.frequency_stride + 1


class ClapTower(SoundTower, ClapAudioModel):
    """CLAP's audio half. Short clips are repeated until the window is full, so nothing in it is padding."""

    # All kernels may be named; its attention is plain in any case.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def forward(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """`(W, 1 or 4, F, M)` to `(W, steps * bands, D)`. Its other hidden states are maps, and are left out."""
        # No window is longer than the encoder hears at once; the extractor says so of one at random.
        is_longer = torch.zeros(len(input_values), 1, dtype=torch.bool, device=input_values.device)
        outputs = super().forward(input_values.to(self.dtype), is_longer=is_longer, return_dict=True)
        return BaseModelOutput(outputs.last_hidden_state.permute(0, 3, 2, 1).flatten(1, 2))


class WhisperSpeechTower(WhisperEncoder):
    """A Whisper encoder that also takes windows shorter than the one it was trained on, and pads nothing."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: it is initialised as the library's own."""
        return False

    def forward(self, input_features: torch.Tensor, **kwargs) -> BaseModelOutput:
        """`(W, M, F)` to `(W, F / 2, D)`; of short windows the last hidden state alone."""
        num_positions = input_features.shape[-1] // 2
        if num_positions >= self.config.max_source_positions:
            return super().forward(input_features, **{**kwargs, "return_dict": True})
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2)
        hidden_states = hidden_states + self.embed_positions.weight[:num_positions]
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None)
        return BaseModelOutput(self.layer_norm(hidden_states))


class WhisperTower(SoundTower, WhisperEncoder):
    """A Whisper encoder that listens to sound."""

    def forward(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """`(W, M, F)` to `(W, F / 2, D)`."""
        return super().forward(input_values.to(self.dtype), **{**kwargs, "return_dict": True})

    def position_mask(self, input_values_mask: torch.Tensor | None, num_positions: int) -> torch.Tensor | None:
        """Two frames are a position."""
        return None if input_values_mask is None else frames_to_positions(input_values_mask, num_positions)


class YamnetModel(SoundTower, PreTrainedModel):
    """
    YAMNet without its classifier: 3.2 M parameters, for machines on which no other encoder fits.

    Each patch of frames gives a map, whose positions follow each other in time, low frequencies first.

    Source: MobileNets (https://huggingface.co/papers/1704.04861), table 1.
    """

    config: YamnetConfig
    base_model_prefix = "yamnet"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    _input_embed_layer = "stem"
    # It has no attention, so whatever kernel is named is right.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    halving = (2, 4, 6, 12)  # blocks, counted from 1, that halve the map

    def __init__(self, config: YamnetConfig):
        super().__init__(config)
        self.stem = nn.Conv2d(1, self.widths[0], 3, 2)
        pairs = list(zip(self.widths, self.widths[1:], strict=False))
        strides = [2 if number in self.halving else 1 for number in range(1, len(pairs) + 1)]
        self.depthwise = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, groups=width) for (width, _), stride in zip(pairs, strides, strict=True)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(width, wider, 1) for width, wider in pairs)
        self.post_init()

    def forward(
        self, input_values: torch.Tensor, input_values_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """`(W, F, M)` log-mel to `(W, patches * 6, D)`."""
        patches = input_values.to(self.dtype).unfold(
            1, self.config.patch_frames, self.config.patch_hop
        )  # (W, P, M, f)
        maps = patches.flatten(0, 1).transpose(1, 2)[:, None]  # (W * P, 1, f, M)
        maps = F.relu6(self._padded(self.stem, maps))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            maps = F.relu6(pointwise(F.relu6(self._padded(depthwise, maps))))
        tokens = maps.flatten(2).transpose(1, 2)  # (W * P, 6, D)
        return BaseModelOutput(tokens.unflatten(0, (len(input_values), -1)).flatten(1, 2))

    @staticmethod
    def _padded(layer: nn.Conv2d, maps: torch.Tensor) -> torch.Tensor:
        """A convolution padded as TensorFlow does it: as little as a map of half the size needs, more of it behind."""
        stride, size = layer.stride[0], layer.kernel_size[0]
        needed = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in maps.shape[-2:]]
        high, wide = ((each // 2, each - each // 2) for each in needed)
        return layer(F.pad(maps, (*wide, *high)))

    def position_mask(self, input_values_mask: torch.Tensor | None, num_positions: int) -> torch.Tensor | None:
        """Patches of nothing but padding are left out."""
        if input_values_mask is None:
            return None
        patches = input_values_mask.unfold(1, self.config.patch_frames, self.config.patch_hop).amax(dim=-1)  # (W, P)
        return patches.repeat_interleave(num_positions // patches.shape[1], dim=1)


# Running them


def learns(*parts: nn.Module | torch.Tensor | None) -> bool:
    """Whether any of these modules or tensors takes part in training."""
    return any(
        part.requires_grad if isinstance(part, torch.Tensor) else any(p.requires_grad for p in part.parameters())
        for part in parts
        if part is not None
    )


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
    step = 1 if inputs[0].device.type == "cpu" else PICTURES_AT_ONCE if is_picture else WINDOWS_AT_ONCE
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
    whole = [F.pad(rows, (0, 0, 0, longest - rows.shape[1])) for _, rows in found.values()]
    order = torch.cat([chosen for chosen, _ in found.values()]).argsort()
    return torch.cat(whole)[order]


# `model_type` -> class.
SOUND_TOWERS = {
    "beats": BeatsModel,
    "audio-spectrogram-transformer": AstTower,
    "clap_audio_model": ClapTower,
    "whisper": WhisperTower,
    "yamnet": YamnetModel,
}
SPEECH_TOWERS = {"whisper": WhisperSpeechTower}


def tower_class(config: PreTrainedConfig, ear: str) -> type[PreTrainedModel]:
    """
    Args:
        config ([`PreTrainedConfig`]): Of an encoder.
        ear (`str`): What it shall hear, "audio" or "speech".

    Returns:
        `type`: the class of its model.

    Raises:
        ValueError: its kind is not known.
    """
    known = {"audio": SOUND_TOWERS, "speech": SPEECH_TOWERS}[ear]
    if config.model_type not in known:
        raise ValueError(
            f"A '{config.model_type}' model is no encoder of {'sound' if ear == 'audio' else ear} that is known here; "
            f"use one of {', '.join(known)}."
        )
    return known[config.model_type]


__all__ = [
    "SOUND_TOWERS",
    "SPEECH_TOWERS",
    "AstTower",
    "BeatsModel",
    "ClapTower",
    "SoundTower",
    "WhisperSpeechTower",
    "WhisperTower",
    "YamnetModel",
    "by_length",
    "learns",
    "run_tower",
    "tower_class",
]
