"""The processor that fits a model: placeholders, pictures, and the front ends of both ears."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
)

from ..hub.configuration_uni_moe import UniMoEConfig
from ..hub.feature_extraction_uni_moe import FRONT_ENDS, UniMoEFeatureExtractor
from ..hub.files_uni_moe import reason
from ..hub.processing_uni_moe import UniMoEProcessor
from ..hub.towers_uni_moe import tower_class
from .loading import loaded
from .parts import PLACEHOLDERS, check_words, count_of, is_named, seconds_of, side_of, states_of_picture


# Towers whose image processor is CLIP's.
CLIP = ("clip_vision_model", "chinese_clip_vision_model")


def build_processor(
    config: UniMoEConfig,
    tokenizer: str | PreTrainedTokenizerBase,
    image_processor=None,
    image_size: int | None = None,
    chunk_length: int = 30,
    audio_feature_extractor=None,
    **settings,
) -> UniMoEProcessor:
    r"""
    Makes the processor that fits a model, and tells the config the placeholders' ids and the tokens of a picture.

    Args:
        config ([`UniMoEConfig`]): Of the model; its four placeholder ids are set to the tokenizer's, its
            `image_seq_length` follows the pictures' size.
        tokenizer (`str` or [`PreTrainedTokenizerBase`]): Of the LLM, or the Hub id or folder it lies in. Gets the four
            placeholder tokens, behind the vocabulary, and a padding token where it has none.
        image_processor (`str` or image processor, *optional*): That of the vision tower, or the Hub id or folder it
            lies in: needed for every tower but CLIP, whose own at the tower's picture size is the default.
        image_size (`int`, *optional*): Side of pictures in pixels, in place of the image processor's, for towers that
            take any: fewer pixels are fewer tokens.
        chunk_length (`int`, *optional*, defaults to 30): Seconds of a window of sound for BEATs, in a model without a
            speech tower; with one its `max_source_positions` decides.
        audio_feature_extractor (`str` or feature extractor, *optional*): That of the encoder of sound, or the Hub id
            or folder it lies in; BEATs has none.
        settings: Further arguments of [`UniMoEProcessor`], for example `video_frames`. The `chat_template` is the
            tokenizer's own where it has one, else Vicuna's.

    Returns:
        [`UniMoEProcessor`].

    Raises:
        ValueError: a placeholder is a word of the LLM's, the speech tower's window is not a whole number of seconds,
            pictures have no fixed size or do not fit the tower, or the encoder of sound needs its feature extractor.
    """
    if is_named(tokenizer):
        tokenizer = loaded(AutoTokenizer.from_pretrained, tokenizer)
    front_end = _front_end(config, audio_feature_extractor)
    pictures = _image_processor(config, image_processor, image_size)
    _add_placeholders(config, tokenizer)
    feature_size = 80
    if config.speech_config is not None:
        chunk_length, feature_size = seconds_of(config.speech_config), config.speech_config.num_mel_bins
    mel_bins = config.audio_config.num_mel_bins if config.audio_config is not None and front_end is None else 128
    if settings.get("chat_template") is None:
        settings["chat_template"] = getattr(tokenizer, "chat_template", None)
    return UniMoEProcessor(
        pictures,
        UniMoEFeatureExtractor(
            feature_size=feature_size,
            chunk_length=chunk_length,
            num_audio_mel_bins=mel_bins,
            audio_front_end=front_end,
            cut_speech_windows=config.cut_speech_windows,
        ),
        tokenizer,
        **{
            "modalities": list(config.modalities),
            "image_seq_length": config.image_seq_length or 576,
            "video_pooling": config.video_pooling,
            "num_speech_query_tokens": config.num_speech_query_tokens,
            "num_audio_query_tokens": config.num_audio_query_tokens,
            **settings,
        },
    )


@torch.no_grad()
def _front_end(config: UniMoEConfig, extractor: Any) -> dict[str, Any] | None:
    """Settings of the feature extractor of sound, which the encoder must understand; `None` for BEATs."""
    if config.audio_config is None or config.audio_config.model_type == "beats":
        is_deaf = config.audio_config is None
        if extractor is not None and (is_deaf or not is_named(extractor) or _has_extractor(extractor)):
            what = "is missing" if is_deaf else "is a 'beats' model, which has its own"
            raise ValueError(f"`audio_feature_extractor` is given, but the encoder of sound {what}; leave it out.")
        return None
    kind = config.audio_config.model_type
    if extractor is None:
        raise ValueError(
            f"The encoder of sound is a '{kind}' model, which hears through its own feature extractor; pass "
            "`audio_feature_extractor`, such as the folder that the encoder came from."
        )
    if is_named(extractor):
        try:
            extractor = AutoFeatureExtractor.from_pretrained(extractor)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"`audio_feature_extractor` '{extractor}' could not be loaded ({reason(error)})."
            ) from error
    if type(extractor).__name__ not in FRONT_ENDS:
        raise ValueError(f"`audio_feature_extractor` is a {type(extractor).__name__}; known are {list(FRONT_ENDS)}.")
    settings = {k: v for k, v in extractor.to_dict().items() if k not in ("processor_class", "auto_map")}
    ears = UniMoEFeatureExtractor(audio_front_end=settings)
    features = ears(audio=np.zeros(ears.samples_of("audio"), np.float32), return_tensors="pt")
    with torch.device("meta"):
        tower = tower_class(config.audio_config, "audio")(copy.deepcopy(config.audio_config))
    try:
        tower(**{name: tensor.to("meta") for name, tensor in features.items()})
    except NotImplementedError:
        pass  # what depends on values is not known without them
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"`audio_feature_extractor` makes features of shape {tuple(features['input_values'].shape)}, which this "
            f"'{kind}' model does not take ({reason(error)}); use the one that it came with."
        ) from error
    return settings


def _has_extractor(checkpoint: str | Path) -> bool:
    """Whether a folder holds a feature extractor; that of a BEATs holds none, and may be named all the same."""
    return (Path(checkpoint) / "preprocessor_config.json").is_file()


def _load_image_processor(name: str) -> Any:
    """One that needs Pillow alone: the class that is named, in its Pillow form, or the same steps by another."""
    try:
        settings, _ = CLIPImageProcessorPil.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{name}' holds no image processor ({reason(error)}); pass `image_processor`.") from error
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind and hasattr(transformers, f"{kind}Pil"):
        return getattr(transformers, f"{kind}Pil").from_dict(settings)
    if not kind:
        try:
            return AutoImageProcessor.from_pretrained(name, backend="pil")
        except (ImportError, OSError, ValueError):
            pass
    if not {"image_mean", "image_std", "size"} <= settings.keys():
        raise ValueError(
            f"The image processor of '{name}' ({kind or 'of no stated kind'}) needs torchvision here; pass one that "
            "needs Pillow alone as `image_processor`."
        )
    settings = {
        key: value
        for key, value in settings.items()
        if value is not None and not key.endswith("_type") and key not in ("processor_class", "auto_map")
    }
    crops = bool(settings.get("do_center_crop"))
    generic = CLIPImageProcessorPil if crops else ViTImageProcessorPil
    return generic.from_dict(settings | {"do_center_crop": crops, "do_convert_rgb": True})


def _image_processor(config: UniMoEConfig, processor: Any, side: int | None) -> Any:
    """The image processor, at another picture size if asked; counts the tokens of its pictures."""
    if is_named(processor):
        processor = _load_image_processor(str(processor))
    if processor is None and config.vision_config is not None and config.vision_config.model_type not in CLIP:
        raise ValueError(
            f"The vision tower is a '{config.vision_config.model_type}' model, which sees through its own image "
            "processor; pass `image_processor`, such as the folder that the tower came from."
        )
    if not (processor is None or (callable(processor) and hasattr(processor, "to_dict"))):
        raise ValueError(f"`image_processor` is a {type(processor).__name__}; give an image processor or its folder.")
    if processor is None:
        tower_side = side_of(config.vision_config) if config.vision_config is not None else 336
        square = {"height": tower_side, "width": tower_side}
        processor = CLIPImageProcessorPil(size={"shortest_edge": tower_side}, crop_size=square)
    if side is not None and config.vision_config is None:
        raise ValueError(f"`image_size={side!r}` is given, but the model has no vision tower; leave it out.")
    if side is not None:
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"`image_size={side!r}` must be a number of pixels.")
        square = {"height": side, "width": side}
        crops = getattr(processor, "do_center_crop", False)
        sizes = {"size": {"shortest_edge": side}, "crop_size": square} if crops else {"size": square}
        processor = type(processor).from_dict({**processor.to_dict(), **sizes})
    if config.vision_config is None:
        return processor
    wide, high = (
        np.asarray(processor(Image.new("RGB", size), return_tensors="np")["pixel_values"]).shape[1:]
        for size in ((96, 64), (64, 96))
    )
    if wide != high or len(wide) != 3 or wide[1] != wide[2]:
        raise ValueError(
            f"{type(processor).__name__} makes pictures of {wide} and {high} of wide and high ones, but they must be "
            "squares of one size; set `image_size`."
        )
    if (found := wide[1]) != side_of(config.vision_config):
        states = states_of_picture(config.vision_config, found)
        count = count_of(states[config.vision_feature_layer])
        prefix = 0 if config.vision_feature_select_strategy == "full" else config.vision_prefix_length
        config.image_seq_length = count - prefix
    return processor


def _add_placeholders(config: UniMoEConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Four special tokens with ids of `vocab_size` or above, and a padding token."""
    vocab_size = config.text_config.vocab_size
    check_words(tokenizer, vocab_size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if any(token not in tokenizer.get_vocab() for token in PLACEHOLDERS.values()):
        # Ids are given out in order, and many vocabularies are smaller than their padded embedding table.
        missing = vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<reserved_{number}>" for number in range(missing)], special_tokens=True)
        tokenizer.add_tokens(list(PLACEHOLDERS.values()), special_tokens=True)
    for modality, token in PLACEHOLDERS.items():
        setattr(config, f"{modality}_token_id", tokenizer.convert_tokens_to_ids(token))
    config.validate_architecture()
    if config.text_config.pad_token_id is None:
        config.text_config.pad_token_id = tokenizer.pad_token_id


__all__ = ["build_processor"]
