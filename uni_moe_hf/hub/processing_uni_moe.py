"""
From conversations to tensors: media files are loaded, placeholders expanded, text tokenised, answers marked.

`apply_chat_template` renders one placeholder per clip and hands the clips to `__call__`, which computes the features
and repeats every placeholder as often as its clip has tokens.
"""

import inspect
import re
from collections.abc import Iterator
from itertools import chain
from threading import RLock
from types import SimpleNamespace
from typing import Any


from .configuration_uni_moe import MODALITIES  # isort: skip  a library that is too old is refused there

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils import logging

from .conversations_uni_moe import ConversationMixin
from .media_uni_moe import check_num_frames, is_waveform_with_rate, iter_frames, load_image, load_waveform
from .templates_uni_moe import (
    VICUNA_CHAT_TEMPLATE,
    left_as_it_was,
    remove_literal_marks,
    set_tokenizer_state,
    tokenizer_state,
)


logger = logging.get_logger(__name__)

# Keyword arguments of `__call__`: groups, and what belongs to a group that no library class lists.
GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
OWN_KWARGS = {
    "num_frames": "videos_kwargs",
    "sampling_rate": "audio_kwargs",
    "return_mm_token_type_ids": "text_kwargs",
    "return_text_replacement_offsets": "text_kwargs",  # by servers, which cache what belongs to a clip
    "return_replacements": "text_kwargs",
}

# Pictures longer or larger than this lose what they would lose anyway before they are resized.
MAX_ASPECT, MAX_PADDED_SIDE = 64, 4096


# A call sets padding and truncation in the tokenizer, so threads take turns.
TOKENIZING = RLock()


class Batch(BatchFeature):
    """
    Model inputs. Collators that know nothing of placeholders put labels into it: the placeholders among them become
    -100 at once, so that losses are divided by what is learned.
    """

    placeholder_ids: tuple[int, ...] = ()

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "labels" and hasattr(value, "masked_fill"):
            for token_id in self.placeholder_ids:
                value = value.masked_fill(value == token_id, -100)
        super().__setitem__(name, value)


class UniMoEProcessor(ConversationMixin, ProcessorMixin):
    r"""
    Turns conversations with any number and order of pictures, videos, speech and sound clips into model inputs.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): With the special tokens `<image> <video> <audio> <speech>`, see
            `uni_moe_hf.build_processor`.
        image_processor ([`BaseImageProcessor`]): For pictures and frames.
        feature_extractor ([`UniMoEFeatureExtractor`]): For speech and sound.
        chat_template (`str`, *optional*): Jinja template; Vicuna v1.1 by default.
        modalities (`list[str]`, *optional*): What the model has towers for, `config.modalities`; all by default.
        image_seq_length (`int`, *optional*, defaults to 576): Tokens of a picture.
        video_frames (`int`, *optional*, defaults to 8): Frames taken from a video, evenly.
        video_pooling (`str`, *optional*, defaults to `"mean"`): `"mean"` gives a video the tokens of one picture,
            `"none"` those of all its frames.
        image_mode (`str`, *optional*, defaults to `"crop"`): `"crop"` as released, or `"pad"`: pictures are first
            padded to squares in the mean colour.
        num_speech_query_tokens, num_audio_query_tokens (`int`, *optional*, defaults to 50): Tokens of a window.
        default_ear (`str`, *optional*, defaults to `"audio"`): Where plain `audio` parts go in a model with both ears.
        uploads_only (`bool`, *optional*, defaults to `False`): Whether media may only be sent, as data URLs, bytes or
            arrays, and neither paths nor addresses are read: for servers that strangers reach. The environment
            variable `UNI_MOE_UPLOADS_ONLY=1` says the same of every processor.

    Source: the prompt is that of `*/conversation.py@f5e82dd`, the order of tokens that of `llava_arch.py`.

    Example:

    ```python
    >>> parts = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]
    >>> chat = [{"role": "user", "content": parts}]
    >>> inputs = processor.apply_chat_template(
    ...     chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    ```
    """

    # Where features of clips may lie ready, such as a `uni_moe_hf.FeatureCache`; nothing of it is saved.
    feature_cache: Any = None

    def __init__(
        self,
        image_processor,
        feature_extractor,
        tokenizer,
        chat_template: str | None = None,
        modalities: list[str] | None = None,
        image_seq_length: int = 576,
        video_frames: int = 8,
        video_pooling: str = "mean",
        image_mode: str = "crop",
        num_speech_query_tokens: int = 50,
        num_audio_query_tokens: int = 50,
        default_ear: str = "audio",
        uploads_only: bool = False,
    ):
        self.modalities = list(MODALITIES if modalities is None else modalities)
        self.image_seq_length = image_seq_length
        self.video_frames = video_frames
        self.video_pooling = video_pooling
        self.image_mode = image_mode
        self.num_speech_query_tokens = num_speech_query_tokens
        self.num_audio_query_tokens = num_audio_query_tokens
        self.default_ear = default_ear
        self.uploads_only = uploads_only
        check_num_frames(video_frames)
        for name, allowed in (
            ("video_pooling", ("mean", "none")),
            ("image_mode", ("crop", "pad")),
            ("default_ear", ("audio", "speech")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r} but must be one of {allowed}.")
        for modality in MODALITIES:
            token = f"<{modality}>"
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id is None or token_id == tokenizer.unk_token_id:
                raise ValueError(
                    f"The tokenizer has no special token {token}; make the processor with "
                    "`uni_moe_hf.build_processor`, which adds it."
                )
            setattr(self, f"{modality}_token", token)
            setattr(self, f"{modality}_token_id", token_id)
        remove_literal_marks(tokenizer)
        self._tokenizer_as_made = tokenizer_state(tokenizer)
        if hasattr(tokenizer, "legacy"):
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # the library forgets it when saving
        super().__init__(image_processor, feature_extractor, tokenizer)
        named = chat_template if isinstance(chat_template, dict) else {"": chat_template or VICUNA_CHAT_TEMPLATE}
        named = {name: self.for_servers(template) for name, template in named.items()}
        self.chat_template = named if isinstance(chat_template, dict) else named[""]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        speech: Any = None,
        audios: Any = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            images (path, URL, bytes, open file, PIL image, array, or a list of these per batch or per row,
                *optional*): Pictures.
            text (`str` or `list[str]`, *optional*): Prompts with one `<image>`, `<video>`, `<audio>` or `<speech>` per
                clip; clips are taken in reading order.
            videos (path, URL, array `(frames, height, width, 3)`, or a list of these, *optional*): Videos.
            audio (path, URL, waveform, `{"array", "sampling_rate"}`, or a list of these, *optional*): Sound.
            speech (as `audio`, *optional*): Spoken language.
            audios (*optional*): Another name of `audio`.
            kwargs: For tokenizer and image processor (`padding`, `return_tensors`, ...), as they are or in
                `text_kwargs`, `images_kwargs`, `videos_kwargs`, `audio_kwargs`; `return_mm_token_type_ids=True` adds 0
                text, 1 image, 2 video, 3 audio, 4 speech for each token. Rows are padded on the left, as generation
                needs it, unless `padding_side` says otherwise.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` `(B, T)`; `pixel_values` `(num_images, 3, height,
            width)`; `pixel_values_videos` `(num_videos, frames, 3, height, width)`, with `pixel_values_videos_mask`
            `(num_videos, frames)`, 1 = valid, where videos have different numbers of frames; `input_values`
            `(num_windows, frames, 128)` and `input_values_mask`; `input_features` `(num_windows, mel_bins,
            mel_frames)`, with `input_features_mask` `(num_windows, mel_frames)` where windows of speech are cut. With
            a `feature_cache`, `tower_states` in place of clips whose features lie there.

        Raises:
            ValueError: a file cannot be read; placeholders and clips differ in number; the model lacks a tower.
        """
        if audios is not None:
            if audio is not None:
                raise ValueError("Got both `audio` and `audios`, which are two names of one thing; pass one.")
            audio = audios
        clips = {"image": images, "video": videos, "audio": audio, "speech": speech}
        clips = {modality: _listed(value, modality) for modality, value in clips.items() if value is not None}
        if text is None and not clips:
            raise ValueError("Pass `text`, media or both to the processor.")
        prompts = [text] if isinstance(text, str) else text
        if prompts is not None:
            if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError("`text` must be a string or a non-empty list of strings.")
            self._check_counts(prompts, clips)
        prompts, clips = self._to_ears(prompts, clips)
        clips = {modality: list(_flat(rows)) for modality, rows in clips.items()}
        for modality in clips:
            self._check_modality(modality, len(clips[modality]))

        grouped = self._grouped_kwargs(kwargs)
        text_kwargs = grouped["text_kwargs"]
        return_tensors = grouped["common_kwargs"]["return_tensors"]
        return_type_ids = text_kwargs.pop("return_mm_token_type_ids", False)
        is_server = text_kwargs.pop("return_text_replacement_offsets", False)
        return_offsets = text_kwargs.pop("return_replacements", is_server)

        data, num_tokens = self._features(clips, grouped)
        if is_server:
            data = self._by_clip(data, num_tokens)
        if prompts is not None:
            prompts, offsets = self._expand(prompts, num_tokens)
            with TOKENIZING, left_as_it_was(self.tokenizer):
                encoded = self.tokenizer(
                    prompts, return_tensors=return_tensors, **{"padding_side": "left", **text_kwargs}
                )
            self._check_placeholders(prompts, encoded["input_ids"])
            if return_offsets:
                encoded["text_replacement_offsets"] = offsets
            if return_type_ids:
                encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
            data = {**encoded, **data}
        ready = ["text_replacement_offsets", "tower_states", "clips_to_store"]
        batch = Batch(data, tensor_type=return_tensors, skip_tensor_conversion=ready)
        batch.placeholder_ids = tuple(getattr(self, f"{modality}_token_id") for modality in MODALITIES)
        return batch

    def _grouped_kwargs(self, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Keyword arguments of `__call__` by what they are for."""
        grouped = {group: dict(kwargs.get(group) or {}) for group in GROUPS}
        tensors = [grouped[group].pop("return_tensors", None) for group in GROUPS]
        flat = {name: value for name, value in kwargs.items() if name not in GROUPS}
        image_settings, text_settings = self._image_settings, self._text_settings
        for name, value in {**grouped["common_kwargs"], **flat}.items():
            if name == "return_tensors":
                continue
            groups = [OWN_KWARGS[name]] if name in OWN_KWARGS else []
            if not groups and name in image_settings:
                groups = ["images_kwargs", "videos_kwargs"]
            if not groups and name in text_settings:
                groups = ["text_kwargs"]
            if not groups:
                logger.warning_once(f"The processor knows no argument `{name}`, so it is ignored.")
            for group in groups:
                if name in grouped[group]:
                    raise ValueError(f"`{name}` was passed both as it is and in `{group}`; pass it once.")
                grouped[group][name] = value
        # What media become is arrays in any case, and tensors with the rest.
        wanted = (flat.get("return_tensors"), tensors[GROUPS.index("common_kwargs")], tensors[0])
        grouped["common_kwargs"] = {"return_tensors": next((each for each in wanted if each is not None), None)}
        return grouped

    @property
    def _image_settings(self) -> set[str]:
        """What the image processor may be told in a call."""
        return set(getattr(getattr(self.image_processor, "valid_kwargs", None), "__annotations__", ()))

    @property
    def _text_settings(self) -> set[str]:
        """What the tokenizer may be told in a call."""
        names = set(inspect.signature(type(self.tokenizer).__call__).parameters)
        return {name for name in names if not name.startswith("text")} - {"self", "kwargs"}

    @property
    def _call_settings(self) -> set[str]:
        """What [`__call__`] may be told besides text and clips."""
        return self._image_settings | self._text_settings | {*OWN_KWARGS, *GROUPS, "return_tensors"}

    def _check_placeholders(self, prompts: list[str], input_ids: Any) -> None:
        """Cut tokens would leave features without a place."""
        rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        for modality in MODALITIES:
            token, token_id = getattr(self, f"{modality}_token"), getattr(self, f"{modality}_token_id")
            wanted, found = [text.count(token) for text in prompts], [row.count(token_id) for row in rows]
            if wanted != found:
                raise ValueError(
                    f"Truncation cut through media: mismatch of `{modality}` tokens, {wanted} in the text and {found} "
                    "in `input_ids`; raise `max_length`, or leave out `truncation`."
                )

    @property
    def model_input_names(self) -> list[str]:
        """`list[str]`: what [`__call__`] may return, for the modalities that the model takes."""
        names = {
            "image": ["pixel_values"],
            "video": ["pixel_values_videos", "pixel_values_videos_mask"],
            "audio": ["input_values", "input_values_mask"],
            "speech": ["input_features", "input_features_mask"],
        }
        return [*self.tokenizer.model_input_names, *chain.from_iterable(names[m] for m in self.modalities)]

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        """
        As in the library; the tokenizer is saved as the processor was made with it, whatever calls, collators or
        trainers have set since.
        """
        state = tokenizer_state(self.tokenizer)
        set_tokenizer_state(self.tokenizer, self._tokenizer_as_made)
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            set_tokenizer_state(self.tokenizer, state)
            self.__dict__.pop("auto_map", None)  # the library leaves it behind

    # ---- what vLLM's Transformers back end asks ----

    @property
    def video_processor(self) -> SimpleNamespace:
        """What takes videos: the image processor, frame by frame."""
        pictures = self.image_processor
        about = {"size": getattr(pictures, "size", None), "valid_kwargs": getattr(pictures, "valid_kwargs", None)}
        return SimpleNamespace(model_input_names=["pixel_values_videos"], do_sample_frames=False, **about)

    @property
    def audio_processor(self) -> Any:
        """What takes `audio`: the feature extractor, or `None` where no tower for sound hears it."""
        return self.feature_extractor if "audio" in self.modalities and self._ear("audio") == "audio" else None

    def _by_clip(self, data: dict[str, Any], num_tokens: dict[str, list[int]]) -> dict[str, Any]:
        """Windows of sound by clip, `(clips, windows, ...)`; shorter clips are filled up, vLLM looks at each alone."""
        if "pixel_values_videos_mask" in data:
            raise ValueError(
                "vLLM alone takes videos with the same number of frames in one request; install uni-moe-hf beside it, "
                "whose plug-in takes all."
            )
        counts = [number // self.num_audio_query_tokens for number in num_tokens.get("audio", ())]
        for name in {"input_values", "input_values_mask"} & data.keys() if counts else ():
            clips = np.split(data[name], np.cumsum(counts)[:-1])
            data[name] = np.stack([np.resize(clip, (max(counts), *clip.shape[1:])) for clip in clips])
        return data

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list | None = None,
        video_sizes: list | None = None,
        audio_lengths: list[int] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """How many tokens pictures, videos and clips of these sizes (in samples) become; inference servers ask it."""
        data = {}
        if image_sizes is not None:
            data |= {"num_image_tokens": [self.image_seq_length] * len(image_sizes)}
            data |= {"num_image_patches": [1] * len(image_sizes)}
        if video_sizes is not None:
            data["num_video_tokens"] = [self._num_video_tokens(self.video_frames)] * len(video_sizes)
        if audio_lengths is not None:
            per_window = getattr(self, f"num_{self._ear('audio')}_query_tokens")
            windows = [self.feature_extractor.num_windows(length, self._ear("audio")) for length in audio_lengths]
            data["num_audio_tokens"] = [count * per_window for count in windows]
        return MultiModalData(**data)

    # ---- media -> features ----

    def _features(self, clips: dict[str, list], kwargs: dict[str, dict]) -> tuple[dict, dict[str, list[int]]]:
        """Model inputs of all clips, and how many tokens each clip stands for."""
        data, units = {}, {}  # units: windows of a sound, frames of a video
        keys = {}
        if self.feature_cache is not None:
            for modality in [modality for modality in clips if clips[modality]]:
                found = self.feature_cache.find(self, modality, clips[modality], kwargs)
                if found.states is None:  # read once more; to be stored, where keys are given, by who has the towers
                    keys |= {modality: found.keys} if found.keys else {}
                else:
                    data["tower_states"] = data.get("tower_states", {}) | found.states
                    units[modality] = found.units
            clips = {modality: sources for modality, sources in clips.items() if modality not in units}
        image_kwargs = {**kwargs["images_kwargs"], "return_tensors": "np"}
        if clips.get("image"):
            images = (self._framed(load_image(image, self.uploads_only)) for image in clips["image"])
            data["pixel_values"] = self._pixels(images, image_kwargs)
            units["image"] = [1] * len(clips["image"])
        if clips.get("video"):
            video_kwargs = {**image_kwargs, **kwargs["videos_kwargs"], "return_tensors": "np"}
            num_frames = video_kwargs.pop("num_frames", None)
            num_frames = self.video_frames if num_frames is None else check_num_frames(num_frames)
            for name in video_kwargs.keys() - self._image_settings - {"return_tensors"}:
                logger.warning_once(f"The processor knows no setting `{name}` of videos, so it is ignored.")
                del video_kwargs[name]
            videos = [
                self._pixels(map(self._framed, iter_frames(video, num_frames, self.uploads_only)), video_kwargs)
                for video in clips["video"]
            ]
            counts = np.array([len(frames) for frames in videos])
            data["pixel_values_videos"] = np.zeros((len(videos), counts.max(), *videos[0].shape[1:]), np.float32)
            for frames, row in zip(videos, data["pixel_values_videos"], strict=True):
                row[: len(frames)] = frames
            if counts.min() < counts.max():
                data["pixel_values_videos_mask"] = (np.arange(counts.max()) < counts[:, None]).astype(np.int64)
            units["video"] = counts.tolist()
        for modality in ("audio", "speech"):
            if clips.get(modality):
                rate = self.feature_extractor.rate_of(modality)
                given = kwargs["audio_kwargs"].get("sampling_rate") or rate
                waveforms = [load_waveform(clip, rate, self.uploads_only) for clip in clips[modality]]
                data |= self.feature_extractor(**{modality: waveforms}, sampling_rate=given)
                units[modality] = [self.feature_extractor.num_windows(len(wave), modality) for wave in waveforms]
        if keys:
            data["clips_to_store"] = {m: list(zip(keys[m], units[m], strict=True)) for m in keys}
        per_unit = {"image": self.image_seq_length, "audio": self.num_audio_query_tokens}
        per_unit |= {"speech": self.num_speech_query_tokens}
        num_tokens = {
            modality: [self._num_video_tokens(n) if modality == "video" else n * per_unit[modality] for n in counts]
            for modality, counts in units.items()
        }
        return data, num_tokens

    def _num_video_tokens(self, num_frames: int) -> int:
        return self.image_seq_length * (num_frames if self.video_pooling == "none" else 1)

    def _framed(self, image):
        """A picture ready for the image processor: with `image_mode="pad"`, centred on a square of the mean colour."""
        short, side = sorted(image.size)
        if self.image_mode == "crop":
            if side <= MAX_ASPECT * short:
                return image
            # The image processor enlarges the short side and then crops the centre: spare it the far ends.
            half_width, half_height = (min(length, MAX_ASPECT * short) / 2 for length in image.size)
            x, y = image.width / 2, image.height / 2
            return image.crop(tuple(map(int, (x - half_width, y - half_height, x + half_width, y + half_height))))
        if side > MAX_PADDED_SIDE:
            image = image.resize([max(1, round(length * MAX_PADDED_SIDE / side)) for length in image.size])
            side = MAX_PADDED_SIDE
        if image.width == image.height:
            return image
        from PIL import Image

        colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
        canvas = Image.new(image.mode, (side, side), colour)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def _pixels(self, images: Iterator, kwargs: dict) -> np.ndarray:
        """`(num_images, 3, height, width)`; one large picture or frame is in memory at a time."""
        pixels = np.concatenate([self._pixels_of(image, kwargs) for image in images])
        if not np.isfinite(pixels).all():
            raise ValueError("Pictures become NaN or infinite; look at `image_mean` and `image_std` of the processor.")
        return pixels

    def _pixels_of(self, image: Any, kwargs: dict) -> np.ndarray:
        """
        `(1, 3, height, width)` as the image processor gives it.

        CLIP's usual way passes over every pixel six times; here resizing and one affine map give the same.
        """
        processor = self.image_processor
        steps = ("resize", "center_crop", "rescale", "normalize", "convert_rgb")
        usual = (
            type(processor).__name__ == "CLIPImageProcessorPil"
            and set(kwargs) == {"return_tensors"}
            and all(getattr(processor, f"do_{step}") for step in steps)
            and processor.size.shortest_edge is not None
            and processor.size.longest_edge is None
            and max(processor.crop_size.height, processor.crop_size.width) <= processor.size.shortest_edge
        )
        if not usual:
            return np.asarray(processor([image], **kwargs)["pixel_values"])
        height, width, side = processor.crop_size.height, processor.crop_size.width, processor.size.shortest_edge
        mean, std = (np.asarray(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        scale, shift = (processor.rescale_factor / std).astype(np.float32), (-mean / std).astype(np.float32)
        long_side = int(side * max(image.size) / min(image.size))
        new_width, new_height = (side, long_side) if image.width <= image.height else (long_side, side)
        left, top = (new_width - width) // 2, (new_height - height) // 2
        centre = image.resize((new_width, new_height), processor.resample)
        centre = np.asarray(centre.crop((left, top, left + width, top + height)))
        return (centre.transpose(2, 0, 1) * scale + shift)[None]

    def _check_modality(self, modality: str, count: int) -> None:
        if modality not in self.modalities:
            raise ValueError(
                f"Got {count} {modality} clip{'s' * (count != 1)} but this model has no tower for {modality} (it "
                f"takes text{''.join(', ' + name for name in self.modalities)}); remove them or load another model."
            )

    # ---- placeholders ----

    @property
    def all_special_multimodal_tokens(self) -> list[str]:
        """`list[str]`: the four placeholders."""
        return [getattr(self, f"{modality}_token") for modality in MODALITIES]

    @property
    def _placeholders(self) -> re.Pattern:
        return re.compile("|".join(f"(?P<{modality}>{re.escape(f'<{modality}>')})" for modality in MODALITIES))

    def _ear(self, modality: str) -> str:
        """Which tower hears a clip: plain `audio` goes to the only ear, or to `default_ear` when there are two."""
        if modality != "audio":
            return modality
        ears = [ear for ear in ("audio", "speech") if ear in self.modalities]
        if len(ears) == 2:
            return self.default_ear
        if ears == ["speech"]:
            logger.warning_once(
                "This model has no tower for sound, so plain `audio` parts are heard by its speech tower; "
                "use `speech` parts to say so."
            )
            return "speech"
        return modality

    def _to_ears(self, prompts: list[str] | None, clips: dict[str, list]) -> tuple[list[str] | None, dict[str, list]]:
        """Moves `<audio>` placeholders and their clips over to `<speech>` where that is the ear that hears them."""
        if "audio" not in clips or self._ear("audio") == "audio":
            return prompts, clips
        queues = {modality: _flat(clips.get(modality, [])) for modality in ("audio", "speech")}
        if prompts is None:
            speech = [*queues["audio"], *queues["speech"]]
        else:
            order = (match.lastgroup for prompt in prompts for match in self._placeholders.finditer(prompt))
            speech = [next(queues[modality]) for modality in order if modality in queues]
            prompts = [prompt.replace("<audio>", "<speech>") for prompt in prompts]
        others = {modality: rows for modality, rows in clips.items() if modality not in queues}
        return prompts, {**others, "speech": speech}

    def _check_counts(self, prompts: list[str], clips: dict[str, list]) -> None:
        """One clip per placeholder, in every row where clips come by row, else in all."""
        for modality in MODALITIES:
            found = [prompt.count(f"<{modality}>") for prompt in prompts]
            rows = clips.get(modality, [])
            nested = len(rows) == len(prompts) and all(isinstance(row, list) for row in rows)
            given = [len(row) for row in rows] if nested else [sum(1 for _ in _flat(rows))]
            found = found if nested else [sum(found)]
            for row, (wanted, passed) in enumerate(zip(found, given, strict=True)):
                if wanted != passed:
                    where = f" of row {row}" if nested else ""
                    raise ValueError(
                        f"Found {wanted} `<{modality}>` placeholder{'s' * (wanted != 1)} in the text{where} but "
                        f"{passed} {modality} clip{'s' * (passed != 1)}; pass one clip per placeholder."
                    )

    def _expand(self, prompts: list[str], num_tokens: dict[str, list[int]]) -> tuple[list[str], list[list[dict]]]:
        """Repeats every placeholder, and tells where, in the form in which the library corrects assistant masks."""
        counts = {modality: iter(numbers) for modality, numbers in num_tokens.items()}
        expanded, offsets = [], []
        for prompt in prompts:
            pieces, replaced, last, gained = [], [], 0, 0
            for match in self._placeholders.finditer(prompt):
                start, end = match.span()
                replacement = match.group() * next(counts[match.lastgroup])
                new_span = (start + gained, start + gained + len(replacement))
                replaced.append(
                    {
                        "type": match.lastgroup,
                        "span": (start, end),
                        "new_span": new_span,
                        "text": match.group(),
                        "replacement": replacement,
                    }
                )
                pieces += [prompt[last:start], replacement]
                gained += len(replacement) - (end - start)
                last = end
            expanded.append("".join([*pieces, prompt[last:]]))
            offsets.append(replaced)
        return expanded, offsets

    def create_mm_token_type_ids(self, input_ids: Any) -> list[list[int]]:
        """0 text, 1 image, 2 video, 3 audio, 4 speech for each of `input_ids` `(B, T)`."""
        types = {getattr(self, f"{modality}_token_id"): number for number, modality in enumerate(MODALITIES, start=1)}
        rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        return [[types.get(token, 0) for token in row] for row in rows]


def _listed(value: Any, modality: str) -> list:
    """One clip, a list of clips, or a list of rows of clips, as a list."""
    if not isinstance(value, list | tuple) or (modality in ("audio", "speech") and is_waveform_with_rate(value)):
        return [value]
    if modality in ("audio", "speech") and value and all(isinstance(item, int | float) for item in value):
        return [np.asarray(value, dtype=np.float32)]  # one waveform as a plain list
    is_clip = is_waveform_with_rate if modality in ("audio", "speech") else (lambda row: False)
    return [list(row) if isinstance(row, tuple) and not is_clip(row) else row for row in value]


def _flat(rows: list) -> Iterator[Any]:
    """Clips of a list that may be nested by row."""
    for row in rows:
        if isinstance(row, list):
            yield from row
        else:
            yield row


__all__ = ["UniMoEProcessor"]
