"""One model with both ears out of two that share their LLM: one that hears sound and one that hears speech."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..hub.configuration_uni_moe import UniMoEConfig, is_sparse
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..hub.processing_uni_moe import UniMoEProcessor
from ..mixtures.expert_adapters import expert_names
from ..mixtures.processors import build_processor
from .checkpoints import (
    TensorFiles,
    TensorInfo,
    adapted_weight,
    check_new,
    check_room,
    new_folder,
    read_json,
    weight_files,
    write_adapter,
    write_safetensors,
)
from .conversion import ADAPTER, complete_folder, source_name
from .formats import is_stack
from .model_card import model_card


EARS = ("audio", "speech")
# Of the decoder, what may differ between the two models: it is made anew.
_EXPERT_FIELDS = ("mlp_layer_types", "num_experts", "expert_names", "num_experts_per_tok")
# Of the way from a picture to the LLM.
_VISION_FIELDS = ("vision_feature_layer", "vision_feature_select_strategy", "image_seq_length", "video_pooling")
_VISION_FIELDS += ("projector_hidden_act",)


class _Side:
    """One of the two models."""

    def __init__(self, ear: str, folder: Path):
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"'{folder}' holds no config.json; give the folder of a converted model.")
        self.config = UniMoEConfig.from_pretrained(folder)
        ears = [modality for modality in self.config.modalities if modality in EARS]
        if ears != [ear] or not is_sparse(self.config.text_config):
            raise ValueError(
                f"'{folder}' is a {'sparse' if is_sparse(self.config.text_config) else 'dense'} model with ears for "
                f"{ears}, but a sparse one for {ear} alone is needed."
            )
        self.files = TensorFiles(weight_files(folder))
        with torch.device("meta"):
            wanted = UniMoEForConditionalGeneration(self.config).state_dict()
        for name in sorted(wanted.keys() ^ self.files.info.keys()):
            state = "lacks" if name in wanted else "holds the unknown"
            raise ValueError(f"'{folder}' {state} '{name}'; convert the model again.")
        adapter = folder / ADAPTER / "adapter_model.safetensors"
        self.adapter = TensorFiles([adapter]) if adapter.is_file() else None

    def expert(self, name: str, shape: tuple[int, ...], index: int) -> Iterator[torch.Tensor]:
        """
        What one expert contributes to a stack, or to a router. Where this model's layer is dense, its feed-forward
        network is what each of its experts is there, with the adapter's LoRA on it; every token scores it 0.
        """
        if name in self.files:
            yield self.files.read_rows(name, index, index + 1)
            return
        if not is_stack(name):
            yield torch.zeros(shape[1:])
            return
        mlp, tensor = re.fullmatch(r"(.+\.mlp)\.experts\.(.+)", name).groups()
        projections = ("gate", "up") if "gate_up" in tensor else ("down",)
        if tensor in ("gate_up_proj", "down_proj"):
            yield from (self.files.read(f"{mlp}.{projection}_proj.weight") for projection in projections)
            return
        keys = [f"base_model.model.{mlp}.{each}_proj.lora_{tensor[-1].upper()}.weight" for each in projections]
        if self.adapter is not None and all(key in self.adapter for key in keys):
            yield from (self.adapter.read(key) for key in keys)
        elif tensor.endswith("_a"):  # untrained LoRA: A random within 1 / sqrt(fan in), B zero
            yield torch.empty(shape[1:]).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5)
        else:
            yield torch.zeros(shape[1:])


def merge_modalities(
    audio_model: str | Path,
    speech_model: str | Path,
    output: str | Path,
    experts: Sequence[str] | None = None,
    prefer: str | None = None,
    num_experts_per_tok: int | None = None,
    command: str | None = None,
    progress: bool = False,
) -> Path:
    r"""
    Joins a model for sound and a model for speech into one with both towers, both connectors and chosen experts.

    What the two share (embeddings, attention, norms, head, vision) must be equal, bit for bit: convert both with
    `lora="keep"`, so that the LLM is still the common base. Routers are put together row by row; rows of two routers
    have never been compared, so the result is where stage 3 begins rather than where it ends. A layer is sparse if it
    is so in either model.

    Args:
        audio_model, speech_model (`str` or `Path`): Folders of models of ours, as [`convert_checkpoint`] makes them.
        output (`str` or `Path`): New folder; it appears when all is written, or not at all.
        experts (`Sequence[str]`, *optional*): `"audio:NAME"` and `"speech:NAME"` in the order wanted; experts without
            names are called by number. All of both by default, the audio model's first.
        prefer (`str`, *optional*): `"audio"` or `"speech"`: whose vision connector and adapter to take where they
            differ, as both models trained theirs; an error without it.
        num_experts_per_tok (`int`, *optional*): That of the audio model by default.
        command (`str`, *optional*): For the model card.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: an expert is unknown, or parts that should be shared differ (with figures); nothing has been
            written then.
    """
    check_new(output)
    if prefer not in (None, *EARS):
        raise ValueError(f"`prefer` is {prefer!r} but must be one of {EARS}.")
    sides = {"audio": _Side("audio", Path(audio_model)), "speech": _Side("speech", Path(speech_model))}
    chosen = _chosen(sides, experts)
    config = _joined_config(sides, chosen, num_experts_per_tok)
    with torch.device("meta"):
        model = UniMoEForConditionalGeneration(config)
    targets = {name: TensorInfo(tuple(t.shape), config.dtype) for name, t in model.state_dict().items()}

    shared = [name for name in targets if not _is_own(name)]
    connector = [name for name in shared if ".vision_connector." in name]
    rest = [name for name in shared if name not in connector]
    files = {ear: side.files for ear, side in sides.items()}
    _check_equal(
        sides, files, rest, None, "both must come from one LLM and one vision tower, converted with --lora keep"
    )
    _check_equal(sides, files, connector, prefer, "say whose vision connector to take with --prefer")
    adapters = {ear: side.adapter for ear, side in sides.items() if side.adapter is not None}
    if len(adapters) == 1:
        raise ValueError(f"Only the {next(iter(adapters))} model has an adapter; convert both with the same --lora.")
    # LoRA of a feed-forward network that has become an expert has become that expert's.
    kept = sorted({name for files in adapters.values() for name in files.info if adapted_weight(name) in targets})
    if adapters:
        _check_equal(sides, adapters, kept, prefer, "say whose adapter to take with --prefer")
    processor = _processor(config, sides)

    def values(name: str) -> Iterator[torch.Tensor]:
        if is_stack(name) or name.endswith(".mlp.gate.weight"):
            for ear, index in chosen:
                yield from sides[ear].expert(name, targets[name].shape, index)
        else:
            yield sides[_ear_of(name) or prefer or "audio"].files.read(name)

    preferred = sides[prefer or "audio"].folder
    generation_config = GenerationConfig.from_pretrained(preferred)
    with new_folder(output) as folder:
        check_room(folder, targets)
        card = model_card(
            config,
            title=Path(output).name,
            summary="[Uni-MoE](https://huggingface.co/papers/2405.11273) with both ears, put together from a model "
            "for sound and one for speech. Its routers are rows of both, yet to be trained together (stage 3).",
            sources={f"{ear} model": source_name(side.folder) for ear, side in sides.items()},
            command=command or "uni_moe_hf.merge_modalities",
            adapter=bool(adapters),
        )
        complete_folder(folder, model, generation_config, processor, card)
        if adapters:
            adapter = adapters[prefer or "audio"]
            write_adapter(
                folder / ADAPTER,
                {name: adapter.info[name] for name in kept},
                lambda name: [adapter.read(name)],
                read_json(preferred / ADAPTER / "adapter_config.json"),
                str(output),
            )
        write_safetensors(folder, targets, values, progress="Merging" if progress else None)
    return Path(output)


def _ear_of(name: str) -> str | None:
    return next((ear for ear in EARS if name.startswith((f"model.{ear}_tower.", f"model.{ear}_connector."))), None)


def _is_own(name: str) -> bool:
    """What only one of the models has, or each has in its own way."""
    return _ear_of(name) is not None or is_stack(name) or name.endswith(".mlp.gate.weight")


def _chosen(sides: Mapping[str, _Side], experts: Sequence[str] | None) -> list[tuple[str, int]]:
    """Ear and index of every expert of the new model."""
    known = {
        f"{ear}:{name}": (ear, i)
        for ear, side in sides.items()
        for i, name in enumerate(expert_names(side.config.text_config))
    }
    wanted = list(known) if experts is None else list(experts)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"There are no experts {unknown}; the two models have {list(known)}.")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"Experts {wanted} are none, or name one twice; choose among {list(known)}.")
    return [known[name] for name in wanted]


def _joined_config(
    sides: Mapping[str, _Side], chosen: list[tuple[str, int]], num_experts_per_tok: int | None
) -> UniMoEConfig:
    texts = {ear: side.config.text_config.to_dict() for ear, side in sides.items()}
    texts["audio"]["dtype"], texts["speech"]["dtype"] = (str(side.config.dtype) for side in sides.values())
    for field in _VISION_FIELDS:
        audio, speech = (getattr(side.config, field) for side in sides.values())
        if audio != speech:
            raise ValueError(f"`{field}` is {audio} in the audio model, {speech} in the speech model; it must be one.")
    differing = {
        field: (texts["audio"].get(field), texts["speech"].get(field))
        for field in sorted({*texts["audio"], *texts["speech"]} - {*_EXPERT_FIELDS})
        if texts["audio"].get(field) != texts["speech"].get(field)
    }
    if differing:
        field, (audio, speech) = next(iter(differing.items()))
        raise ValueError(
            f"The decoders differ in {len(differing)} of their settings, first in `{field}`: {audio} in the audio "
            f"model, {speech} in the speech model; both must come from one LLM, with the same --lora and --dtype."
        )
    names = [expert_names(sides[ear].config.text_config)[index] for ear, index in chosen]
    unique = [
        name if names.count(name) == 1 and not name.isdigit() else f"{ear}_{name}"
        for name, (ear, _) in zip(names, chosen, strict=True)
    ]
    audio, speech = sides["audio"].config, sides["speech"].config
    layers = zip(texts["audio"]["mlp_layer_types"], texts["speech"]["mlp_layer_types"], strict=True)
    text = texts["audio"] | {
        "mlp_layer_types": ["sparse" if "sparse" in kinds else "dense" for kinds in layers],
        "num_experts": len(chosen),
        "expert_names": unique,
        "num_experts_per_tok": num_experts_per_tok or texts["audio"]["num_experts_per_tok"],
    }
    del text["dtype"]
    fields = audio.to_dict() | {
        "text_config": text,
        "speech_config": speech.speech_config.to_dict(),
        "num_speech_query_tokens": speech.num_speech_query_tokens,
        "cut_speech_windows": speech.cut_speech_windows,
        "dtype": audio.dtype,
    }
    del fields["model_type"]
    return UniMoEConfig(**fields)


def _check_equal(
    sides: Mapping[str, _Side], files: Mapping[str, TensorFiles], names: list[str], prefer: str | None, remedy: str
) -> None:
    """Tensors of both models must be there and alike, and equal unless it is said whose to take."""
    differing: dict[str, float] = {}
    for name in names:
        if missing := [ear for ear in EARS if name not in files[ear]]:
            raise ValueError(f"'{sides[missing[0]].folder}' has no '{name}'; the two models are not of one kind.")
        if (one := files["audio"].info[name].shape) != (other := files["speech"].info[name].shape):
            raise ValueError(f"'{name}' is {one} in the audio model, {other} in the speech model.")
        if prefer:
            continue
        audio, speech = (files[ear].read(name) for ear in EARS)
        if not torch.equal(audio, speech):
            differing[name] = (audio.float() - speech.float()).abs().max().item()
    if differing:
        worst = max(differing, key=differing.get)
        raise ValueError(
            f"{len(differing)} of {len(names)} tensors that the models should share differ, '{worst}' by up to "
            f"{differing[worst]:.3g}; {remedy}."
        )


def _processor(config: UniMoEConfig, sides: Mapping[str, _Side]) -> UniMoEProcessor | None:
    """That of the audio model with the other ear added; none where one of the two has none."""
    if not all((side.folder / "processor_config.json").is_file() for side in sides.values()):
        return None
    audio, speech = (UniMoEProcessor.from_pretrained(sides[ear].folder) for ear in EARS)
    if audio.tokenizer.get_vocab() != speech.tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizers differ: {len(audio.tokenizer)} tokens in '{sides['audio'].folder}', "
            f"{len(speech.tokenizer)} in '{sides['speech'].folder}', or other words; both must be the LLM's."
        )
    settings = {"video_frames": audio.video_frames, "image_mode": audio.image_mode}
    settings["chat_template"] = audio.chat_template
    return build_processor(config, audio.tokenizer, image_processor=audio.image_processor, **settings)


__all__ = ["merge_modalities"]
