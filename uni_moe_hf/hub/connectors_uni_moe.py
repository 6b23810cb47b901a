"""
Connectors: from the features of a frozen tower to rows in the decoder's embedding space.

Each ends in a `projector`; speech and sound first gather a window into a fixed number of learned queries.
Letters: W windows, L encoder positions, Q query tokens, D tower width, H decoder width.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import Blip2QFormerModel
from transformers.activations import ACT2FN

from .compat_uni_moe import WhisperDecoder
from .configuration_uni_moe import UniMoEConfig, width_of


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


__all__ = ["QFormerConnector", "SpeechConnector", "VisionConnector", "idle_connectors"]
