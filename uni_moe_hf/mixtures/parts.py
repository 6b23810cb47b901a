"""
The parts that a model is made of: what each is, whether it can be one, and its weights.

What can be known without weights is asked of configs and of empty models, before a weight is read.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperModel,
)
from transformers.utils import logging

from ..hub.configuration_uni_moe import MODALITIES, check_sizes, width_of
from ..hub.decoder_uni_moe import check_decoder
from ..hub.files_uni_moe import cause_of, reason
from ..hub.towers_uni_moe import tower_class
from .beats_file import is_beats_file, read_beats, read_beats_config
from .loading import UNREAD, load_part_config, load_whole


logger = logging.get_logger(__name__)

# Kinds of LLMs with which `benchmarks/bench_families.py` was run in full.
TESTED = frozenset(
    "llama mistral ministral ministral3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text phi3 olmo olmo2 olmo3 granite "
    "glm glm4 exaone4 cohere cohere2 seed_oss helium stablelm ernie4_5 hunyuan_v1_dense".split()
)
PLACEHOLDERS = {modality: f"<{modality}>" for modality in MODALITIES}
# Of weights in files of larger models; halves that are saved alone have none of it.
PREFIXES = {"whisper": r"^(model\.)?encoder\.", "clap_audio_model": r"^audio_model\."}
# Of the config of a larger model, the half that is meant.
HALVES = {"vision_tower": "vision_config", "audio_tower": "audio_config"}
# A speech window is a whole number of seconds, of which each has so many positions.
POSITIONS_PER_SECOND = 50


@dataclass
class Part:
    """
    A part as it was given, and its config.

    Args:
        argument (`str`): Of [`from_pretrained_parts`], for messages.
        given (`str`, `Path` or [`PreTrainedModel`]): A Hub id, folder, file or model.
        kind ([`PreTrainedConfig`]): Its config; of a larger model that of the half that is meant.
    """

    argument: str
    given: Any
    kind: PreTrainedConfig

    @property
    def is_named(self) -> bool:
        """Whether it is yet to be loaded."""
        return is_named(self.given)

    def refuse(self, what: str) -> ValueError:
        """The sentence with which it is refused."""
        return ValueError(f"`{self.argument}` is a '{self.kind.model_type}' model, {what}")


def is_named(part: Any) -> bool:
    """Whether a part is given as a Hub id, folder or file."""
    return isinstance(part, str | Path)


def read_part(argument: str, given: Any) -> Part:
    """
    Args:
        argument (`str`): The part's name.
        given (`str`, `Path` or [`PreTrainedModel`]): The part.

    Returns:
        [`Part`].

    Raises:
        ValueError: it is no model, a Uni-MoE itself, quantised, not all there, or carries an adapter.
    """
    if argument == "audio_tower" and is_named(given) and is_beats_file(given):
        return Part(argument, given, read_beats_config(given))
    kind = load_part_config(given, f"`{argument}`") if is_named(given) else getattr(given, "config", None)
    if not isinstance(kind, PreTrainedConfig):
        raise ValueError(f"`{argument}` is a {type(given).__name__}; give a model, a folder or a Hub id.")
    if kind.model_type == "uni_moe":
        raise ValueError(
            f"`{argument}` is a Uni-MoE already; load it with `from_pretrained`, or give the part itself."
        )
    half = getattr(kind, HALVES.get(argument, ""), None)
    part = Part(argument, given, half if isinstance(half, PreTrainedConfig) else kind)
    if getattr(kind, "quantization_config", None) is not None or getattr(given, "is_quantized", False):
        raise part.refuse("and is quantised; build from unquantised parts and quantise what was saved.")
    check_sizes(part.kind)
    if is_named(given):
        if (Path(given) / "adapter_config.json").is_file():
            raise part.refuse(f"and '{given}' holds an adapter beside it; merge the two, or remove the adapter.")
    elif any(type(module).__module__.startswith("peft.") for module in given.modules()):
        raise part.refuse("and carries an adapter; merge and unload it first.")
    elif any(parameter.is_meta for parameter in given.parameters()):
        raise part.refuse("and is offloaded or empty; load the whole model into memory.")
    return part


def check_finite(part: Part, model: nn.Module) -> None:
    """
    Raises:
        ValueError: a weight is NaN or infinite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.abs().max().isfinite():
            raise part.refuse(f"and its '{name}' holds NaN or infinite values; load or download it again.")


def attempt(part: Part, make: Callable[[], Any], what: str) -> Any:
    """
    Args:
        part ([`Part`]): For messages.
        make (`Callable`): Does something with an empty model.
        what (`str`): What it means if it fails.

    Returns:
        What it returns.

    Raises:
        ValueError: it fails, in whatever way.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            return make()
    except MemoryError:
        raise
    except Exception as error:  # of a library that was told something odd
        raise part.refuse(f"{what} ({reason(cause_of(error))}).") from error


# The LLM


def check_llm(part: Part) -> PreTrainedConfig:
    """
    Args:
        part ([`Part`]): An LLM.

    Returns:
        [`PreTrainedConfig`] of its decoder.

    Raises:
        ValueError: it cannot be the decoder; the message says what is missing.
    """
    kind, llm = part.kind, part.given
    if getattr(kind, "is_encoder_decoder", False):
        raise part.refuse("an encoder with a decoder; give an LLM.")
    made = next(iter(kind.architectures or ()), "") if part.is_named else type(llm).__name__
    with_head = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(kind), None)
    other_head = made.partition("For")[2] not in ("", "CausalLM", "ConditionalGeneration")
    if with_head is None or other_head or not (part.is_named or llm.get_output_embeddings() is not None):
        what = f"a '{kind.model_type}' model" if with_head is None or not made else f"a {made}"
        raise ValueError(f"`language_model` is {what}, which has no head that predicts words; give an LLM.")
    check_decoder(kind.get_text_config())
    empty = llm
    if part.is_named:
        empty = attempt(part, lambda: AutoModelForCausalLM.from_config(copy.deepcopy(kind)), "which cannot be built")
    decoder, head = attempt(part, lambda: (empty.get_decoder(), empty.get_output_embeddings()), "with no decoder")
    if not isinstance(decoder, PreTrainedModel):
        raise part.refuse("whose decoder cannot be told from its head.")
    if any(name.rpartition(".")[2] == "experts" for name, _ in decoder.named_modules()):
        dense = kind.model_type.partition("_moe")[0]
        offer = f", such as a '{dense}'" if dense != kind.model_type and dense in CONFIG_MAPPING else ""
        raise part.refuse(f"a mixture of experts already; give a dense LLM{offer}.")
    check_decoder(decoder.config, decoder)
    if len(decoder.layers) != decoder.config.num_hidden_layers:
        raise part.refuse(
            f"with {len(decoder.layers)} layers, but its config has `num_hidden_layers="
            f"{decoder.config.num_hidden_layers}`; set that to the number of layers."
        )
    if type(head) is not nn.Linear or head.bias is not None:
        raise part.refuse("whose head is no plain linear layer without a bias.")
    if part.is_named:
        try:
            tokenizer = AutoTokenizer.from_pretrained(llm)
        except Exception:  # any other tokenizer may be given to the processor
            tokenizer = None
        if tokenizer is not None:
            check_words(tokenizer, decoder.config.vocab_size)
    if decoder.config.model_type not in TESTED:
        logger.warning(
            f"LLMs of kind '{decoder.config.model_type}' were not tested here; it is taken because its parts are of "
            "the known form, and if words alone give the same logits."
        )
    return decoder.config


def check_words(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """
    Raises:
        ValueError: a placeholder is one of the words that an LLM has an embedding of.
    """
    known = tokenizer.get_vocab()
    inside = {token: known[token] for token in PLACEHOLDERS.values() if known.get(token, vocab_size) < vocab_size}
    if inside:
        raise ValueError(
            f"The tokenizer has {inside} among the LLM's own {vocab_size} words, where placeholders cannot lie; use "
            "an LLM that knows no such words, or rename them in its tokenizer."
        )


def load_llm(part: Part, loading: Mapping[str, Any]) -> PreTrainedModel:
    """The LLM with its weights."""
    llm = load_whole(AutoModelForCausalLM, part.given, **loading) if part.is_named else part.given
    check_finite(part, llm)
    return llm


# Towers


def load_tower(part: Part, loading: Mapping[str, Any]) -> PreTrainedModel:
    """
    Args:
        part ([`Part`]): A vision tower or an encoder of sound, or a larger model that has one.
        loading (`dict`): For `from_pretrained`.

    Returns:
        [`PreTrainedModel`]: the tower with its weights.

    Raises:
        ValueError: weights are missing, or there is no tower in the model.
    """
    kind, given = part.kind, part.given
    may_lack = UNREAD if part.argument == "vision_tower" else ""
    if part.is_named and kind.model_type == "beats" and is_beats_file(given):
        dtype = str(loading.get("dtype", "auto")).removeprefix("torch.")
        tower = read_beats(given)
        tower = tower if dtype == "auto" else tower.to(getattr(torch, dtype))
    elif part.is_named and kind.model_type in PREFIXES:
        mapping, ear = {PREFIXES[kind.model_type]: ""}, part.argument.removesuffix("_tower")
        tower = load_whole(tower_class(kind, ear), given, "", config=kind, key_mapping=mapping, **loading)
    else:
        tower = _half(part, load_whole(AutoModel, given, may_lack, **loading) if part.is_named else given)
    check_finite(part, tower)
    return tower


def _half(part: Part, whole: PreTrainedModel) -> PreTrainedModel:
    """The tower in a larger model, or without the head of a classifier."""
    if part.argument == "vision_tower":
        wanted = MODEL_MAPPING.get(type(part.kind), None)
        kinds = tuple(wanted) if isinstance(wanted, tuple | list) else (wanted,)
    else:
        kinds = tower_class(part.kind, part.argument.removesuffix("_tower")).__mro__
        kinds = tuple(kind for kind in kinds if kind.__module__.startswith("transformers.models.")) or kinds[:1]
    found = [module for module in whole.modules() if type(module) in kinds]
    found += [getattr(whole, name) for name in ("vision_model", "audio_model") if hasattr(whole, name)]
    if not found:
        raise part.refuse(f"and the {type(whole).__name__} holds no model of that kind alone; give the tower itself.")
    return found[0]


def load_speech(part: Part, loading: Mapping[str, Any]) -> tuple[PreTrainedModel, nn.Module | None]:
    """Encoder and, where there is one, decoder of a Whisper model, with their weights."""
    if part.is_named and not has_speech_decoder(part):
        return load_tower(part, loading), None
    whole = load_whole(WhisperModel, part.given, "", **loading) if part.is_named else part.given
    check_finite(part, whole)
    halves = {type(module).__name__: module for module in whole.modules()}
    return halves["WhisperEncoder"], halves.get("WhisperDecoder")


def has_speech_decoder(part: Part) -> bool:
    """Whether a Whisper model brings a decoder; of a folder by what its config says that it holds."""
    if part.is_named:
        return next(iter(part.kind.architectures or ()), "") in ("WhisperModel", "WhisperForConditionalGeneration")
    return any(type(module).__name__ == "WhisperDecoder" for module in part.given.modules())


def check_ear(part: Part) -> None:
    """
    Raises:
        ValueError: it is no encoder of sound or speech that is known here, or hears in no whole seconds.
    """
    ear = part.argument.removesuffix("_tower")
    tower_class(part.kind, ear)
    if part.kind.model_type == "whisper":
        seconds_of(part.kind)
        if not part.is_named and not any(type(m).__name__ == "WhisperEncoder" for m in part.given.modules()):
            raise part.refuse("without an encoder; give the whole model, or its encoder.")


def seconds_of(kind: PreTrainedConfig) -> int:
    """
    Args:
        kind ([`PreTrainedConfig`]): Of a Whisper.

    Returns:
        `int`: seconds of its window.

    Raises:
        ValueError: they are not whole.
    """
    seconds, rest = divmod(kind.max_source_positions, POSITIONS_PER_SECOND)
    if rest:
        raise ValueError(
            f"A Whisper of `max_source_positions={kind.max_source_positions}` hears no whole number of seconds at "
            f"{POSITIONS_PER_SECOND} positions per second; use a multiple of {POSITIONS_PER_SECOND}."
        )
    return seconds


@torch.no_grad()
def patch_settings(part: Part, config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Which hidden state of a vision tower is read, how many tokens it makes of a picture, and how many stand before the
    patches. Asked of empty ones for pictures of two sizes: the patches become four times as many, the others do not.
    """
    kind = part.kind
    side = side_of(kind)
    states, larger = (states_of_picture(kind, each, as_made_for=True) for each in (side, 2 * side))
    is_pyramid = len({count_of(state) for state in states}) > 1
    # By its number from the front: of towers that grow narrower, not all say how many there are.
    layer = config.get("vision_feature_layer", len(states) - 1 if is_pyramid else -2)
    if not isinstance(layer, int) or isinstance(layer, bool) or not -len(states) < layer < len(states) or layer == 0:
        raise ValueError(
            f"`vision_feature_layer={layer!r}` is no layer of a '{kind.model_type}' model of {len(states) - 1}; count "
            f"from 1, or from -1 backwards."
        )
    layer = layer % len(states) if is_pyramid else layer
    count, four_times = count_of(states[layer]), count_of(larger[layer])
    prefix, rest = divmod(4 * count - four_times, 3)
    patch = getattr(kind, "patch_size", None)
    leaves_out = not is_pyramid and isinstance(patch, int) and count - prefix < (side // patch) ** 2
    if rest or leaves_out or not 0 <= prefix < count:
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model that makes {count} tokens of a picture of {side} pixels "
            f"and {four_times} of one of {2 * side}, so which are patches is unknown; use one with square patches."
        )
    width = states[layer].shape[1 if states[layer].dim() == 4 else -1]
    if width != width_of(kind):
        raise ValueError(
            f"`vision_feature_layer={layer}` of a '{kind.model_type}' model is {width} wide, the last "
            f"{width_of(kind)}; use the last."
        )
    if (given := config.get("vision_prefix_length", prefix)) != prefix:
        raise ValueError(
            f"`vision_prefix_length={given}`, but a '{kind.model_type}' model has {prefix} tokens before the patches; "
            "leave it out."
        )
    keeps_all = config.get("vision_feature_select_strategy") == "full"
    return {
        "vision_feature_layer": layer,
        "vision_prefix_length": prefix,
        "image_seq_length": count if keeps_all else count - prefix,
    }


def side_of(kind: PreTrainedConfig) -> int:
    """Side of the pictures that a vision tower was made for, in pixels."""
    side = getattr(kind, "image_size", None)
    side = side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side
    if not isinstance(side, int):
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model, but a backbone for square pictures is needed."
        )
    return side


def count_of(state: torch.Tensor) -> int:
    """Tokens in a hidden state `(1, tokens, width)` or `(1, width, height, width)`."""
    return state.shape[1] if state.dim() == 3 else state.shape[-2] * state.shape[-1]


def states_of_picture(kind: PreTrainedConfig, side: int, as_made_for: bool = False) -> tuple[torch.Tensor, ...]:
    """Hidden states of a picture of so many pixels, without values; of a tower that was made for it, if asked."""
    kind = copy.deepcopy(kind)
    if as_made_for:
        kind.image_size = [side, side] if isinstance(kind.image_size, list | tuple) else side

    def ask() -> tuple[torch.Tensor, ...]:
        picture = torch.zeros(1, 3, side, side)
        states = AutoModel.from_config(kind)(pixel_values=picture, output_hidden_states=True).hidden_states
        if not states or any(state.dim() not in (3, 4) for state in states):
            raise ValueError("it returns no hidden states")
        return states

    what = f"which gives no tokens of a picture of {side} pixels"
    return attempt(Part("vision_tower", None, kind), ask, what)


__all__ = [
    "PLACEHOLDERS",
    "TESTED",
    "Part",
    "attempt",
    "check_ear",
    "check_llm",
    "check_words",
    "count_of",
    "has_speech_decoder",
    "is_named",
    "load_llm",
    "load_speech",
    "load_tower",
    "patch_settings",
    "read_part",
    "seconds_of",
    "side_of",
    "states_of_picture",
]
