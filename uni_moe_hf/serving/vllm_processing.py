"""
What vLLM does before the model runs: clips of a request become features, placeholders are repeated.

Clips are processed one by one, by the checkpoint's own processor, since vLLM keeps what a clip becomes and uses it
again beside others. Files that come over HTTP are read by it as well, as bytes, so a turned picture or a video is read
as everywhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import (
    ImageProcessorItems,
    MultiModalDataItems,
    MultiModalDataParser,
    ProcessorBatchItems,
    VideoProcessorItems,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)


class Door(NamedTuple):
    """How clips of a modality enter the processor, and what they are when they leave it."""

    argument: str
    features: tuple[str, ...]  # the first has a row for each window or frame


DOORS = {
    "image": Door("images", ("pixel_values",)),
    "video": Door("videos", ("pixel_values_videos",)),
    "audio": Door("audio", ("input_values", "input_values_mask")),
    "speech": Door("speech", ("input_features", "input_features_mask")),
}
EARS = ("audio", "speech")


class _AsSent:
    """Clips whose file came with the request reach the processor as that file."""

    def _unwrap(self, item: Any) -> Any:
        return item  # vLLM reads it back into items, and the file must not be lost

    def get_processor_data(self) -> dict[str, list]:
        return {f"{self.modality}s": [self._for_processor(item) for item in self.data]}

    def _for_processor(self, item: Any) -> Any:
        if isinstance(item, MediaWithBytes):
            return item.original_bytes
        return item[0] if self.modality == "video" and isinstance(item, tuple) else item  # without vLLM's notes


class _Pictures(_AsSent, ImageProcessorItems):
    pass


class _Videos(_AsSent, VideoProcessorItems):
    pass


class _Sounds(_AsSent, ProcessorBatchItems):
    """Waveforms at the rates that they came with: the two ears of a model may hear at different ones."""

    def _for_processor(self, item: Any) -> Any:
        return {"array": item[0], "sampling_rate": int(item[1])} if isinstance(item, tuple) else item


class UniMoEDataParser(MultiModalDataParser):
    """Reads `multi_modal_data` of a request; "speech" is a modality of its own."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {**super()._get_subparsers(), "speech": self._parse_speech_data}

    def _parse_audio_data(self, data: Any) -> ProcessorBatchItems | None:
        return self._sounds(data, "audio")

    def _parse_speech_data(self, data: Any) -> ProcessorBatchItems | None:
        return self._sounds(data, "speech")

    def _sounds(self, data: Any, ear: str) -> ProcessorBatchItems | None:
        if data is None:
            return None
        if self.is_embeddings(data):
            raise ValueError(f"Ready embeddings of {ear} are not taken; send the sound.")
        is_one = isinstance(data, tuple | dict | str | bytes) or getattr(data, "ndim", 2) == 1
        is_one = is_one or (isinstance(data, list) and bool(data) and isinstance(data[0], int | float | np.number))
        return _Sounds([self._sound(clip, ear) for clip in ([data] if is_one else data)], ear)

    def _sound(self, clip: Any, ear: str) -> Any:
        """A waveform, or one with its rate; `None` of a clip that vLLM has kept and a request names."""
        if isinstance(clip, dict) and {"array", "sampling_rate"} <= clip.keys():
            clip = (clip["array"], clip["sampling_rate"])
        samples, rate = clip if isinstance(clip, tuple) and len(clip) == 2 else (clip, None)
        if isinstance(samples, list):
            samples = np.asarray(samples, dtype=np.float32)
        if samples is not None and not isinstance(samples, np.ndarray | torch.Tensor):
            raise ValueError(
                f"{ear.capitalize()} is a {type(samples).__name__}; pass a waveform, or (waveform, sampling rate)."
            )
        if rate is not None and not (isinstance(rate, int | float | np.number) and 0 < rate < np.inf):
            raise ValueError(f"The sampling rate of {ear} is {rate!r}; it must be a number of samples per second.")
        return samples if rate is None else (samples, rate)

    def _parse_image_data(self, data: Any) -> ProcessorBatchItems | None:
        items = super()._parse_image_data(data)
        return _Pictures(items.data) if isinstance(items, ImageProcessorItems) else items

    def _parse_video_data(self, data: Any) -> ProcessorBatchItems | None:
        items = super()._parse_video_data(data)
        return _Videos(items.data, items.metadata) if isinstance(items, VideoProcessorItems) else items


class UniMoEProcessingInfo(BaseProcessingInfo):
    """What vLLM must know of a model before it reads a request."""

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """`tuple[str]`: what the model has towers for."""
        return tuple(self.get_hf_processor().modalities)

    @cached_property
    def plain_ear(self) -> str | None:
        """`str` or `None`: the ear that hears what is called "audio"; `None` of a model without ears."""
        return self.get_hf_processor()._ear("audio") if set(EARS) & set(self.modalities) else None

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of clips of each modality; "audio" too where only speech is heard."""
        return dict.fromkeys([*self.modalities, *(["audio"] if self.plain_ear else [])])

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """`mm_processor_kwargs` of a request."""
        return {"text_kwargs": set(), "images_kwargs": set(), "videos_kwargs": {"num_frames"}, "audio_kwargs": set()}

    def get_data_parser(self) -> MultiModalDataParser:
        """[`UniMoEDataParser`]."""
        return UniMoEDataParser(expected_hidden_size=self._get_expected_hidden_size())

    def tokens_per_window(self, ear: str) -> int:
        """`int`: tokens of a window that an ear hears."""
        return getattr(self.get_hf_processor(), f"num_{ear}_query_tokens")

    def max_windows(self, ear: str) -> int:
        """`int`: windows of the longest clip that the feature extractor takes, or that fits into a prompt."""
        fitting = max(1, (self.ctx.model_config.max_model_len - 1) // self.tokens_per_window(ear))
        return min(fitting, getattr(self.get_hf_processor().feature_extractor, f"max_{ear}_windows", None) or fitting)

    def num_tokens(self, modality: str, features: torch.Tensor | None = None) -> int:
        """
        Args:
            modality (`str`): One of [`DOORS`].
            features (`torch.Tensor`, *optional*): The first of a clip's features; the longest clip is meant without.

        Returns:
            `int`: tokens that it becomes.
        """
        processor = self.get_hf_processor()
        if modality == "image":
            return processor.image_seq_length
        if modality == "video":
            return processor._num_video_tokens(processor.video_frames if features is None else len(features))
        windows = self.max_windows(modality) if features is None else len(features)
        return windows * self.tokens_per_window(modality)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Tokens of the longest clip of each modality."""
        return {modality: self.num_tokens(modality) for modality in self.modalities}


class UniMoEDummyInputsBuilder(BaseDummyInputsBuilder[UniMoEProcessingInfo]):
    """The longest clips, by which vLLM measures how much memory is left for its cache."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A placeholder for each clip."""
        return "".join(f"<{modality}>" * count for modality, count in self._counts(mm_counts).items())

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Grey pictures and silence."""
        processor, side = self.info.get_hf_processor(), 32
        data = {}
        for modality, count in self._counts(mm_counts).items():
            if not count:
                continue
            if modality == "image":
                data[modality] = self._get_dummy_images(width=side, height=side, num_images=count)
            elif modality == "video":
                frames = processor.video_frames
                data[modality] = self._get_dummy_videos(width=side, height=side, num_frames=frames, num_videos=count)
            else:
                length = self.info.max_windows(modality) * processor.feature_extractor.samples_of(modality)
                data[modality] = self._get_dummy_audios(length=length, num_audios=count)
        return data

    def _counts(self, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Clips of each modality that the model has; what is called "audio" goes to the ear that hears it."""
        counts = {modality: mm_counts.get(modality, 0) for modality in self.info.modalities}
        if mm_counts.get("audio") and "audio" not in counts:
            counts["speech"] = max(counts["speech"], mm_counts["audio"])
        return counts


class UniMoEMultiModalProcessor(BaseMultiModalProcessor[UniMoEProcessingInfo]):
    """From a request's clips and token ids to features and repeated placeholders."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """
        As in vLLM, once every sound is at the ear that its placeholder names.

        Raises:
            ValueError: clips and placeholders differ in number.
        """
        inputs = self._to_ears(inputs)
        if spoken := (inputs.mm_uuid_items or {}).get("speech"):
            # By its name vLLM knows a clip again; one that both ears hear becomes two things.
            named = {"speech": [name and f"speech {name}" for name in spoken]}
            inputs = replace(inputs, mm_uuid_items={**inputs.mm_uuid_items, **named})
        processor, items = self.info.get_hf_processor(), inputs.mm_data_items
        named, clips = "", {}
        for modality in self.info.modalities:
            named += f"<{modality}>" * list(inputs.prompt).count(getattr(processor, f"{modality}_token_id"))
            clips[modality] = [None] * items.get_count(modality, strict=False)
        processor._check_counts([named], clips)
        return super().apply(inputs, timing_ctx)

    def _to_ears(self, inputs: Any) -> Any:
        """
        Clients can say "audio" only. Where the prompt has `<speech>` in its place (a part with `"ear": "speech"`), the
        clip goes to that ear, and plain `<audio>` to the one that hears it.
        """
        processor, items = self.info.get_hf_processor(), inputs.mm_data_items
        ids = {ear: getattr(processor, f"{ear}_token_id") for ear in EARS}
        prompt = list(inputs.prompt)
        if self.info.plain_ear == "speech":
            prompt = [ids["speech"] if token == ids["audio"] else token for token in prompt]
        named = {token_id: ear for ear, token_id in ids.items()}
        order = [named[token] for token in prompt if token in named]
        if "audio" not in items or "speech" in items or len(order) != len(items["audio"]):
            return replace(inputs, prompt=prompt)  # both ears are named, or the count is wrong
        uuids = dict(inputs.mm_uuid_items or {})
        clips, clip_uuids = items["audio"].data, uuids.pop("audio", None) or [None] * len(order)
        moved = MultiModalDataItems({name: others for name, others in items.items() if name != "audio"})
        for ear in dict.fromkeys(order):
            indices = [index for index, name in enumerate(order) if name == ear]
            moved[ear] = _Sounds([clips[index] for index in indices], ear)
            uuids[ear] = [clip_uuids[index] for index in indices]
        return replace(inputs, prompt=prompt, mm_data_items=moved, mm_uuid_items=uuids or None)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor, features = self.info.get_hf_processor(), {}
        kwargs = {name: value for name, value in hf_kwargs.items() if name != "truncation"}  # there is no text
        chosen = {*kwargs, *kwargs.get("videos_kwargs", {})} - {"videos_kwargs"}
        if foreign := chosen - {"num_frames"}:  # other sizes would end in the towers, and the engine with them
            raise ValueError(f"`mm_processor_kwargs` holds {sorted(foreign)}; only `num_frames` may be chosen.")
        for modality, door in DOORS.items():
            clips = hf_data.get(f"{modality}s", hf_data.get(modality))  # vLLM renames "audios"
            for clip in clips if clips is not None else ():
                try:
                    made = self.info.ctx.call_hf_processor(processor, {door.argument: [clip]}, kwargs)
                except ValueError as error:
                    raise (error.__cause__ or error) from None  # the processor's sentence, not vLLM's list of the data
                for name in door.features:
                    if name in made:
                        value = made[name][0] if modality in ("image", "video") else made[name]
                        features.setdefault(name, []).append(value)
        return BatchFeature(features)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            name: MultiModalFieldConfig.batched(modality)
            for modality, door in DOORS.items()
            for name in door.features
            if name in hf_inputs
        }

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor, updates = self.info.get_hf_processor(), []
        for modality, items in out_mm_kwargs.items():
            token_id = getattr(processor, f"{modality}_token_id")

            def repeated(index: int, modality=modality, items=items, token_id=token_id) -> list[int]:
                features = items[index][DOORS[modality].features[0]].data
                return [token_id] * self.info.num_tokens(modality, features)

            updates.append(PromptReplacement(modality=modality, target=[token_id], replacement=repeated))
        return updates
