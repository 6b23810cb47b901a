"""
The published checkpoints as one folder that works alone, and back.

Every file is looked at before anything is written; tensors are then read, joined and written one part at a time. A key
that is neither used nor listed as dropped is an error, and so is a part that is missing or of the wrong shape.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ..hub.configuration_uni_moe import UniMoEConfig, check_mixture
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..hub.templates_uni_moe import VICUNA_CHAT_TEMPLATE
from ..mixtures.processors import build_processor
from ..mixtures.progress import progress_bar
from .checkpoints import (
    TensorFiles,
    TensorInfo,
    adapted_weight,
    check_new,
    check_room,
    new_folder,
    read_json,
    read_metadata,
    split_into_shards,
    weight_files,
    write_safetensors,
)
from .files import CONFIGS, REMAINS, TOWERS, OriginalFiles
from .formats import Layout, is_foreign, is_stack, part_shape
from .model_card import model_card


ADAPTER = "adapter"  # folder within a converted one
PLACE = r"(base|finetuned|experts)/\w+\.bin"  # of a file in the original's layout


class Conversion(NamedTuple):
    """
    What [`convert_checkpoint`] did.

    Args:
        output (`Path`): The folder.
        num_tensors (`int`): In it, the adapter's included.
        dropped (`dict[str, int]`): File -> how many of its tensors the model has no use for.
        processor (`str`): Empty if there is a processor in the folder, else why there is none.
    """

    output: Path
    num_tensors: int
    dropped: dict[str, int]
    processor: str


def convert_checkpoint(
    base: str | Path,
    output: str | Path,
    vision_tower: str | Path,
    speech_tower: str | Path | None = None,
    audio_tower: str | Path | None = None,
    finetuned: str | Path | None = None,
    experts: str | Path | None = None,
    lora: str = "merge",
    router_lora: str = "drop",
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    expert_names: Sequence[str] | None = None,
    command: str | None = None,
    progress: bool = False,
) -> Conversion:
    r"""
    Makes one folder of a checkpoint in the original's format.

    Which variant it is follows from the files: sparse layers and the number of experts from the routers, the ear from
    the connector (a Q-Former hears sound, a query decoder speech), sizes from shapes and `config.json`.

    Args:
        base (`str` or `Path`): Folder of the base model (`Uni-MoE-*-base`), in one file or shards.
        output (`str` or `Path`): New folder; it appears when all is written, or not at all.
        vision_tower (`str` or `Path`): Folder of a CLIP.
        speech_tower, audio_tower (`str` or `Path`, *optional*): Folder of a Whisper or a `BEATs_*.pt`, whichever the
            checkpoint was trained with.
        finetuned (`str` or `Path`, *optional*): Folder of stage 3 (`Uni-MoE-*-e2`, `-v1.5`): adapter, projector,
            connector, routers. Without it the base alone is converted.
        experts (`str` or `Path`, *optional*): Folder of the 8-expert set's `mlp_*.bin`.
        lora (`str`, *optional*, defaults to `"merge"`): `"merge"` adds LoRA to the weights; `"keep"` keeps that of the
            experts in the experts and writes the rest as a PEFT adapter to `output/adapter`.
        router_lora (`str`, *optional*, defaults to `"drop"`): LoRA that the released audio and v1.5 models have on
            their routers by accident: the original's loader loses it; `"merge"` adds it.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; that of the base by default. Sums are made
            in float32 and rounded once.
        tokenizer (`str` or `Path`, *optional*): Folder of the tokenizer; the base's by default.
        expert_names (`Sequence[str]`, *optional*): One for each expert; those of their files in the 8-expert set, else
            none, as the files do not tell.
        command (`str`, *optional*): For the model card.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        [`Conversion`].

    Raises:
        ValueError: a file is missing, damaged or of another model; nothing has been written then.

    Source: load order and quirks of `*/model/all_builder.py@f5e82dd`; the router's LoRA is lost there because the
    routers' own file is loaded after merging. The 8-expert set samples its second expert at random even at inference;
    here it is the second best.
    """
    _check_choice("lora", lora, ("merge", "keep"))
    _check_choice("router_lora", router_lora, ("drop", "merge"))
    _check_choice("dtype", dtype, (None, "float32", "bfloat16", "float16"))
    check_new(output)
    folders = {"base": base, "vision-tower": vision_tower, "speech-tower": speech_tower, "finetuned": finetuned}
    for name, folder in {**folders, "experts": experts, "tokenizer": tokenizer}.items():
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"There is no folder '{folder}' for --{name}; check the path.")
    original = OriginalFiles(Path(base), finetuned and Path(finetuned), experts and Path(experts))
    try:
        config = original.config(Path(vision_tower), speech_tower, audio_tower, keep=lora == "keep")
        if expert_names:
            config.text_config.expert_names = list(expert_names)
            check_mixture(config.text_config)
        config.dtype = getattr(torch, dtype) if dtype else original.dtype
        with torch.device("meta"):
            model = UniMoEForConditionalGeneration(config)
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        # Fields of the wrong type or sign: the library finds them in its own ways.
        raise ValueError(
            f"'{original.config_file}' or the config of a tower describes no model ({type(error).__name__}: {error})."
        ) from error
    targets = {name: TensorInfo(tuple(t.shape), config.dtype) for name, t in model.state_dict().items()}
    plan, adapter = original.plan(targets, keep=lora == "keep", merge_router=router_lora == "merge")
    dropped = original.check(targets, plan, adapter)
    processor, reason = _processor(config, Path(base), tokenizer, Path(vision_tower))
    generation_config = _generation_config(Path(base), config)
    remains = original.remains(dropped, plan) if lora == "keep" else {}

    with new_folder(output) as folder:
        check_room(folder, targets, remains)
        parts = {**folders, "audio-tower": audio_tower, "experts": experts}
        card = model_card(
            config,
            title=Path(output).name,
            summary="[Uni-MoE](https://huggingface.co/papers/2405.11273), converted from the original's files.",
            sources={part: source_name(path) for part, path in parts.items() if path is not None},
            command=command or "uni_moe_hf.convert_checkpoint",
            adapter=bool(adapter),
        )
        # What is small comes first: an error there must not cost the hours that weights take.
        complete_folder(folder, model, generation_config, processor, card)
        if lora == "keep":
            original.write_remains(folder, remains)
        if adapter:
            original.write_adapter(folder / ADAPTER, adapter, config.dtype, str(output))
        title = "Converting" if progress else None
        write_safetensors(folder, targets, lambda name: original.values(plan[name]), progress=title)
    counts = {role: len(keys) for role, keys in dropped.items() if keys}
    return Conversion(Path(output), len(targets) + len(adapter), counts, reason)


def complete_folder(
    folder: Path, model: UniMoEForConditionalGeneration, generation_config: GenerationConfig, processor: Any, card: str
) -> None:
    """
    Everything of a checkpoint but the weights.

    Args:
        folder (`Path`): With the weights.
        model ([`UniMoEForConditionalGeneration`]): On any device, meta too.
        generation_config (`GenerationConfig`): Of it.
        processor ([`UniMoEProcessor`], *optional*): Of it.
        card (`str`): For its Hub page.
    """
    model.config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def source_name(path: str | Path) -> str:
    """
    Args:
        path (`str` or `Path`): A file or folder.

    Returns:
        `str`: its name; of a folder in the Hub's cache the repository's.
    """
    path = Path(path)
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.resolve().name


def _check_choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r} but must be one of {allowed}.")


def _processor(config: UniMoEConfig, base: Path, tokenizer: str | Path | None, vision: Path) -> tuple[Any, str]:
    """The processor, or none and why."""
    folder = base if tokenizer is None else Path(tokenizer)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        if tokenizer is not None:
            raise ValueError(f"'{folder}' holds no tokenizer (tokenizer.json or tokenizer.model); check --tokenizer.")
        return None, f"'{base}' holds no tokenizer, so the processor was not converted; give one with --tokenizer."
    words = _tokenizer(folder)
    rows = config.text_config.vocab_size
    if len(words) > rows:
        raise ValueError(
            f"The tokenizer in '{folder}' has {len(words)} tokens but the model {rows} rows of embeddings, which are "
            "not resized; give the tokenizer that the base was trained with."
        )
    pictures = None
    if (vision / "preprocessor_config.json").is_file():
        pictures = CLIPImageProcessorPil.from_pretrained(vision)
    return build_processor(config, words, image_processor=pictures, chat_template=VICUNA_CHAT_TEMPLATE), ""


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """As the original reads it: every piece of text between two special tokens or clips begins with a space."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        kind, settings = AutoTokenizer, {}
    else:
        # By class: `AutoTokenizer` does not know the original's model type and would leave that space out.
        file = folder / "tokenizer_config.json"
        adds_bos = not file.is_file() or read_json(file).get("add_bos_token", True)
        kind, settings = LlamaTokenizer, {"legacy": True, "add_bos_token": adds_bos}
        if not is_sentencepiece_available() or not is_protobuf_available():
            raise ValueError(
                f"Reading '{folder / 'tokenizer.model'}' needs sentencepiece and protobuf: "
                "`pip install uni-moe-hf[convert]`."
            )
    try:
        return kind.from_pretrained(folder, **settings)
    except Exception as error:  # whatever a damaged file makes of the parsers
        raise ValueError(f"The tokenizer in '{folder}' cannot be read: {error}") from error


def _generation_config(base: Path, config: UniMoEConfig) -> GenerationConfig:
    text = config.text_config
    if not (base / "generation_config.json").is_file():
        return GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )
    settings = read_json(base / "generation_config.json")
    settings.pop("transformers_version", None)
    if not settings.get("do_sample"):  # LLaVA's file has a temperature all the same, which saving refuses by now
        for name in ("temperature", "top_k", "top_p", "typical_p", "min_p", "epsilon_cutoff", "eta_cutoff"):
            settings.pop(name, None)
    try:
        config = GenerationConfig(**settings)
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{base / 'generation_config.json'}' cannot be used: {error}") from error
    return config


def revert_checkpoint(
    checkpoint: str | Path, output: str | Path, max_shard_size: str = "5GB", progress: bool = False
) -> Path:
    r"""
    Gives a model that was converted with `lora="keep"` back in the original's layout.

    Args:
        checkpoint (`str` or `Path`): The converted folder, with its adapter and `original.safetensors`.
        output (`str` or `Path`): New folder; gets `base`, `finetuned` and, for the 8-expert set, `experts`. Left out
            is what the original reads elsewhere or not at all: towers, also those in the base, and the feed-forward
            layers of the base that the 8-expert set shares with another model.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Of the base's shards. One file at a time is held in
            memory, as pickles must be written whole.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `Path`: `output`. Its values are those of the model, in the original's dtype where that is not the wider one: a
        model converted to a lower precision gives back rounded weights.

    Raises:
        ValueError: the folder was not converted with `lora="keep"`, or has been changed so that it does not fit.
    """
    checkpoint = Path(checkpoint)
    check_new(output)
    if not (checkpoint / REMAINS).is_file():
        raise ValueError(
            f"'{checkpoint}' has no {REMAINS}: only what was converted with --lora keep can go back, merging is final."
        )
    config = UniMoEConfig.from_pretrained(checkpoint)
    ours = TensorFiles(weight_files(checkpoint))
    facts = read_metadata(checkpoint / REMAINS)
    if missing := [fact for fact in ("eight", "files", "names", "dtypes") if fact not in facts]:
        raise ValueError(f"'{checkpoint / REMAINS}' does not state {missing}; convert the model again.")
    layout = Layout(json.loads(facts["eight"]), config.text_config.num_experts)
    places, names, dtypes = (json.loads(facts[fact]) for fact in ("files", "names", "dtypes"))
    if strange := [place for place in places.values() if not re.fullmatch(PLACE, place)]:
        raise ValueError(f"'{checkpoint / REMAINS}' wants to write '{strange[0]}'; it has been tampered with.")
    contents = _original_contents(checkpoint, ours, layout, places)
    for role, keys in dtypes.items():
        wanted = {key for key in keys if not is_foreign(role, key, layout)}
        if unlike := sorted(wanted ^ set(contents[role])):
            state = "is missing in" if unlike[0] in wanted else "is not known to"
            raise ValueError(
                f"'{checkpoint}' is not what was converted: '{unlike[0]}'{' and others' * (len(unlike) > 1)} "
                f"{state} '{places[role]}'; convert the model again."
            )
    with new_folder(output) as folder:
        for role, entries in contents.items():
            title = f"Writing {places[role]}" if progress else None
            size = max_shard_size if role == "base" else "1TB"
            _write_pickle(folder / places[role], entries, names[role], dtypes[role], size, title)
        for place in CONFIGS:
            if place in facts:
                (folder / place).write_text(facts[place], encoding="utf-8")
    return Path(output)


class _Slice(NamedTuple):
    """Part `index` of `count` equal ones of a tensor of ours, or of a stack of experts'."""

    files: TensorFiles
    name: str
    index: int = 0
    count: int = 1

    def info(self) -> TensorInfo:
        tensor = self.files.info[self.name]
        return tensor._replace(shape=part_shape(self.name, tensor.shape, self.count))

    def read(self) -> torch.Tensor:
        if not is_stack(self.name):
            return self.files.read(self.name)
        per_expert = self.count // self.files.info[self.name].shape[0]
        expert, row = divmod(self.index, per_expert)
        return self.files.read_rows(self.name, expert, expert + 1)[0].chunk(per_expert)[row]


def _original_contents(
    checkpoint: Path, ours: TensorFiles, layout: Layout, places: Mapping[str, str]
) -> dict[str, dict[str, _Slice]]:
    """Role -> key -> where its value stands in a converted folder."""
    contents: dict[str, dict[str, _Slice]] = {role: {} for role in places}
    for target in ours.info:
        parts = layout.parts_of(target)
        for index, part in enumerate(parts):
            if part.key[0] in TOWERS:
                continue
            role = part.key[0] if part.key[0] in contents else "base"
            here = _Slice(ours, target, index, len(parts))
            earlier = contents[role].setdefault(part.key[1], here)
            if earlier is not here and not torch.equal(earlier.read(), here.read()):
                raise ValueError(
                    f"'{earlier.name}' holds two experts that are one tensor in the original, '{part.key[1]}' of "
                    f"{places[role]}, but have come to differ."
                )
    file = checkpoint / ADAPTER / "adapter_model.safetensors"
    if file.is_file():
        adapter = TensorFiles([file])
        for name in adapter.info:
            (part,) = layout.parts_of(adapted_weight(name))
            contents["adapter"][part.lora[".lora_B." in name][1]] = _Slice(adapter, name)
    remains = TensorFiles([checkpoint / REMAINS])
    for name in remains.info:
        role, key = name.split("/", 1)
        contents[role][key] = _Slice(remains, name)
    return contents


def _write_pickle(
    file: Path,
    entries: Mapping[str, _Slice],
    raw_names: Mapping[str, str],
    dtypes: Mapping[str, str],
    max_shard_size: str,
    title: str | None,
) -> None:
    """`torch.save` under the original's names, in shards where one file would be too large."""
    file.parent.mkdir(exist_ok=True)
    shards = split_into_shards(file, {key: entry.info() for key, entry in entries.items()}, max_shard_size)

    def value(key: str) -> torch.Tensor:
        tensor = entries[key].read().clone()  # what is saved of a view is the whole that it looks at
        dtype = getattr(torch, dtypes[key])
        return tensor.to(dtype) if dtype.itemsize <= tensor.dtype.itemsize else tensor

    order = {key: number for number, key in enumerate(dtypes)}  # the original's trainer reads the first as queries
    for name, keys in progress_bar(shards.items(), desc=title, shown=title is not None):
        keys = sorted(keys, key=order.__getitem__)
        torch.save({raw_names.get(key, key): value(key) for key in keys}, file.with_name(name))


__all__ = ["Conversion", "convert_checkpoint", "revert_checkpoint"]
