"""
From conversations to tensors: media files are loaded, placeholders expanded, text tokenised, answers marked.

`apply_chat_template` renders one placeholder per clip and hands the clips to `__call__`, which computes the features
and repeats every placeholder as often as its clip has tokens.
"""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils import logging

from .configuration_uni_moe import MODALITIES
from .media_uni_moe import from_base64, load_frames, load_image, load_waveform


logger = logging.get_logger(__name__)

# What `__call__` names the clips of each modality, as the library does.
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "speech": "speech"}
# Where a message part may keep its clip, besides a key of its type's own name.
SOURCE_KEYS = ("url", "path", "base64", "bytes")

# Pictures longer or larger than this lose what they would lose anyway before they are resized.
MAX_ASPECT, MAX_PADDED_SIDE = 64, 4096

# A private-use character that the tokenizer's normaliser removes. Inside "<image>" it hides the placeholder from every
# search for it, so that the word can be written in a conversation as ordinary text.
LITERAL_MARK = "\uf8ee"

# Vicuna v1.1 as `*/conversation.py@f5e82dd` renders it: `{system} USER: {question} ASSISTANT: {answer}</s>`.
# Media and neighbouring parts are separated by a line break, as in the original's prompts ("<image>\n{question}").
VICUNA_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- set after_text = not loop.first and content[loop.index0 - 1]['type'] == 'text' -%}
            {%- if not loop.first and not (after_text and part['type'] == 'text') -%}{{ '\\n' }}{%- endif -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '<' + part['type'] + '>' }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {{- render(messages[0]['content']) + ' ' -}}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {{- "A chat between a curious user and an artificial intelligence assistant. " -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {%- set order = "Roles must alternate user, assistant, user, ... after an optional system message" -%}
        {{- raise_exception(order + ", but message " + loop.index|string + " is by '" + message['role'] + "'.") -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + render(message['content']) -}}
    {%- else -%}
        {{- ' ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + render(message['content']) + eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""


class UniMoEProcessor(ProcessorMixin):
    r"""
    Turns conversations with any number and order of pictures, videos, speech and sound clips into model inputs.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): With the special tokens `<image> <video> <audio> <speech>`, see
            [`~composition.build_processor`].
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
    ):
        self.modalities = list(MODALITIES if modalities is None else modalities)
        self.image_seq_length = image_seq_length
        self.video_frames = video_frames
        self.video_pooling = video_pooling
        self.image_mode = image_mode
        self.num_speech_query_tokens = num_speech_query_tokens
        self.num_audio_query_tokens = num_audio_query_tokens
        self.default_ear = default_ear
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
                    "`uni_moe_hf.composition.build_processor`, which adds it."
                )
            setattr(self, f"{modality}_token", token)
            setattr(self, f"{modality}_token_id", token_id)
        _remove_literal_marks(tokenizer)
        if hasattr(tokenizer, "legacy"):
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # the library forgets it when saving
        super().__init__(
            image_processor, feature_extractor, tokenizer, chat_template=chat_template or VICUNA_CHAT_TEMPLATE
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        speech: Any = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            images (path, URL, PIL image, array, or a list of these per batch or per row, *optional*): Pictures.
            text (`str` or `list[str]`, *optional*): Prompts with one `<image>`, `<video>`, `<audio>` or `<speech>` per
                clip; clips are taken in reading order.
            videos (path, URL, array `(frames, height, width, 3)`, or a list of these, *optional*): Videos.
            audio (path, URL, waveform, `{"array", "sampling_rate"}`, or a list of these, *optional*): Sound.
            speech (as `audio`, *optional*): Spoken language.
            kwargs: For tokenizer and image processor (`padding`, `return_tensors`, ...), sorted by the library;
                `return_mm_token_type_ids=True` adds 0 text, 1 image, 2 video, 3 audio, 4 speech for each token.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` `(B, T)`; `pixel_values` `(num_images, 3, height,
            width)`; `pixel_values_videos` `(num_videos, frames, 3, height, width)`; `input_values` `(num_windows,
            frames, 128)` and `input_values_mask`; `input_features` `(num_windows, mel_bins, mel_frames)`.

        Raises:
            ValueError: a file cannot be read; placeholders and clips differ in number; the model lacks a tower.
        """
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

        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        return_tensors = text_kwargs.get("return_tensors")
        return_type_ids = text_kwargs.pop("return_mm_token_type_ids", merged["return_mm_token_type_ids"])
        return_offsets = text_kwargs.pop("return_text_replacement_offsets", merged["return_text_replacement_offsets"])

        data, num_tokens = self._features(clips, merged)
        if prompts is not None:
            prompts, offsets = self._expand(prompts, num_tokens)
            encoded = self.tokenizer(prompts, **text_kwargs)
            self._check_special_mm_tokens(prompts, encoded, modalities=list(MODALITIES))
            if return_offsets:
                encoded["text_replacement_offsets"] = offsets
            if return_type_ids:
                encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
            data = {**encoded, **data}
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    @property
    def model_input_names(self) -> list[str]:
        """`list[str]`: what [`__call__`] may return, for the modalities that the model takes."""
        names = {
            "image": ["pixel_values"],
            "video": ["pixel_values_videos"],
            "audio": ["input_values", "input_values_mask"],
            "speech": ["input_features"],
        }
        return [*self.tokenizer.model_input_names, *chain.from_iterable(names[m] for m in self.modalities)]

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        """As in the library, which leaves an `auto_map` behind on the saved object."""
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__dict__.pop("auto_map", None)

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
            windows = [self.feature_extractor.num_windows(range(length)) for length in audio_lengths]
            data["num_audio_tokens"] = [count * per_window for count in windows]
        return MultiModalData(**data)

    # ---- media -> features ----

    def _features(self, clips: dict[str, list], kwargs: dict[str, dict]) -> tuple[dict, dict[str, list[int]]]:
        """Model inputs of all clips, and how many tokens each clip stands for."""
        data, num_tokens = {}, {}
        image_kwargs = {**kwargs["images_kwargs"], "return_tensors": "np"}
        rate = self.feature_extractor.sampling_rate
        if clips.get("image"):
            images = [self._framed(load_image(image)) for image in clips["image"]]
            data["pixel_values"] = self._pixels(images, image_kwargs)
            num_tokens["image"] = [self.image_seq_length] * len(images)
        if clips.get("video"):
            video_kwargs = {**image_kwargs, **kwargs["videos_kwargs"], "return_tensors": "np"}
            num_frames = video_kwargs.pop("num_frames", None) or self.video_frames
            known = self.image_processor.valid_kwargs.__annotations__
            video_kwargs = {name: value for name, value in video_kwargs.items() if name in known}
            videos = [load_frames(video, num_frames) for video in clips["video"]]
            frames = [self._framed(frame) for frame in chain.from_iterable(videos)]
            pixel_values = self._pixels(frames, video_kwargs)
            data["pixel_values_videos"] = pixel_values.reshape(len(videos), num_frames, *pixel_values.shape[1:])
            num_tokens["video"] = [self._num_video_tokens(num_frames)] * len(videos)
        for modality, per_window in (("audio", self.num_audio_query_tokens), ("speech", self.num_speech_query_tokens)):
            if clips.get(modality):
                given = kwargs["audio_kwargs"].get("sampling_rate") or rate
                waveforms = [load_waveform(clip, rate) for clip in clips[modality]]
                data |= self.feature_extractor(**{modality: waveforms}, sampling_rate=given)
                num_tokens[modality] = [self.feature_extractor.num_windows(wave) * per_window for wave in waveforms]
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

    def _pixels(self, images: list, kwargs: dict) -> np.ndarray:
        """
        `(num_images, 3, height, width)` as the image processor gives them.

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
            return np.asarray(processor(images, **kwargs)["pixel_values"])
        height, width, side = processor.crop_size.height, processor.crop_size.width, processor.size.shortest_edge
        mean, std = (np.asarray(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        scale, shift = (processor.rescale_factor / std).astype(np.float32), (-mean / std).astype(np.float32)
        pixels = np.empty((len(images), 3, height, width), dtype=np.float32)
        for image, out in zip(images, pixels, strict=True):
            long_side = int(side * max(image.size) / min(image.size))
            new_width, new_height = (side, long_side) if image.width <= image.height else (long_side, side)
            left, top = (new_width - width) // 2, (new_height - height) // 2
            centre = image.resize((new_width, new_height), processor.resample)
            centre = np.asarray(centre.crop((left, top, left + width, top + height)))
            np.multiply(centre.transpose(2, 0, 1), scale, out=out)
            out += shift
        return pixels

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

    # ---- conversations ----

    def _normalize_conversations(self, conversation: list) -> tuple[list[list[dict]], bool]:
        """As in the parent; parts are checked, sent to their ear, and cleared of literal placeholders."""
        if not conversation:
            raise ValueError("The conversation is empty; pass at least one message.")
        conversations, is_batched = super()._normalize_conversations(conversation)
        for messages in conversations:
            for message in messages:
                if "role" not in message or "content" not in message:
                    raise ValueError(f"A message needs 'role' and 'content', got the keys {sorted(message)}.")
                content = message["content"]
                message["content"] = self._as_text(content) if isinstance(content, str) else self._parts(content)
        return conversations, is_batched

    def _parts(self, content: list) -> list[dict]:
        """Message parts, text that follows text joined to it: a literal could else hide in the seam."""
        parts = []
        for part in map(self._part, content):
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] = self._as_text(parts[-1]["text"] + part["text"])
            else:
                parts.append(part)
        return parts

    def _part(self, part: dict | str) -> dict:
        """One message part in the form that template and loader read."""
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise ValueError(
                f"A message part is a {type(part).__name__}; it must be a dict with a 'type', or a string."
            )
        kind = part.get("type")
        if kind == "text":
            return {"type": "text", "text": self._as_text(part.get("text") or "")}
        if kind not in MODALITIES:
            raise ValueError(f"A message part has the type {kind!r}; known are text, {', '.join(MODALITIES)}.")
        sources = {key: part[key] for key in (kind, *SOURCE_KEYS) if part.get(key) is not None}
        if len(sources) > 1:
            raise ValueError(
                f"A part of type {kind!r} names {len(sources)} sources; give one of {(kind, *SOURCE_KEYS)}."
            )
        source = next(iter(sources.values()), None)
        if "base64" in sources:
            source = from_base64(source)
        elif part.get("sampling_rate") is not None and not isinstance(source, str | Path | bytes | dict | None):
            source = {"array": source, "sampling_rate": part["sampling_rate"]}
        return {"type": self._ear(kind), "source": source}

    def _as_text(self, text: str) -> str:
        """Text in which a literal `<image>` is ordinary text."""
        text = text.replace(LITERAL_MARK, "")
        return self._placeholders.sub(lambda match: f"<{LITERAL_MARK}{match.group()[1:]}", text)

    def _multimodal_inputs_from_conversations(
        self, conversations: list[list[dict]], audio_loading_params: dict, load_audio_from_video: bool = False
    ) -> tuple[list, list, list, dict]:
        """Sources of all parts, by row: images, videos, audio, and speech as an additional input."""
        clips = {modality: [[] for _ in conversations] for modality in MODALITIES}
        for row, messages in enumerate(conversations):
            last_video = None
            for part in chain.from_iterable(m["content"] for m in messages if not isinstance(m["content"], str)):
                kind, source = part["type"], part.get("source")
                if kind == "text":
                    continue
                if source is None and load_audio_from_video and kind in ("audio", "speech"):
                    source = last_video  # an empty sound part behind a video asks for its sound track
                if source is None:
                    raise ValueError(
                        f"A part of type {kind!r} has no source; give one of {(kind, *SOURCE_KEYS)}, for example "
                        f"{{'type': '{kind}', 'path': 'file'}}."
                    )
                last_video = source if kind == "video" else last_video
                clips[kind][row].append(source)
        given = {kind: rows if any(rows) else None for kind, rows in clips.items()}
        # The base class asks for the clips of images and videos by row and drops them when all rows are empty.
        return (
            clips["image"],
            clips["video"],
            given["audio"] or [],
            {"speech": given["speech"]} if given["speech"] else {},
        )


def _remove_literal_marks(tokenizer) -> None:
    """Teaches a fast tokenizer's normaliser to drop [`LITERAL_MARK`]; saved with it, done once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (
        backend.normalizer is not None and backend.normalizer.normalize_str(LITERAL_MARK) in ("", "▁")
    ):
        return
    from tokenizers import normalizers

    rule = normalizers.Replace(LITERAL_MARK, "")
    backend.normalizer = rule if backend.normalizer is None else normalizers.Sequence([rule, backend.normalizer])


def _listed(value: Any, modality: str) -> list:
    """One clip, a list of clips, or a list of rows of clips, as a list."""
    if not isinstance(value, list | tuple):
        return [value]
    if modality in ("audio", "speech") and value and all(isinstance(item, int | float) for item in value):
        return [np.asarray(value, dtype=np.float32)]  # one waveform as a plain list
    return [list(row) if isinstance(row, tuple) else row for row in value]


def _flat(rows: list) -> Iterator[Any]:
    """Clips of a list that may be nested by row."""
    for row in rows:
        if isinstance(row, list):
            yield from row
        else:
            yield row


__all__ = ["UniMoEProcessor"]
