"""
The files of one model in the original's format, looked at before anything is made of them.

Every key must be used or be on the list of dropped ones, and every part be there and of its shape.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Blip2QFormerConfig

from ..hub.configuration_uni_moe import UniMoEConfig
from ..mixtures.beats_file import beats_config
from ..mixtures.expert_adapters import check_plain_lora
from ..mixtures.loading import load_pickle
from .checkpoints import (
    TensorFiles,
    TensorInfo,
    adapted_weight,
    read_json,
    weight_files,
    write_adapter,
    write_safetensors,
)
from .formats import (
    FINETUNED,
    HINTS,
    ROUTER_LORA,
    Key,
    Part,
    canonical,
    ear_of,
    is_dropped,
    is_foreign,
    is_stack,
    layout_of,
    part_shape,
    qformer_fields,
    query_decoder_fields,
    text_fields,
)


# Written by `lora="keep"`: what the original's files hold and the model does not, for `revert_checkpoint`.
REMAINS = "original.safetensors"
CONFIGS = ("base/config.json", "finetuned/config.json", "finetuned/adapter_config.json")
TOWERS = ("vision", "speech", "audio")


class OriginalFiles:
    """
    The files of one model in the original's format: what they hold, what becomes of it, and its values.

    Args:
        base (`Path`): Folder of the base model.
        finetuned (`Path`, *optional*): Folder of stage 3.
        experts (`Path`, *optional*): Folder of the 8-expert set.

    Raises:
        ValueError: a file is missing or damaged, or the folders are of different kinds.
    """

    def __init__(self, base: Path, finetuned: Path | None, experts: Path | None):
        self.base, self.finetuned = base, finetuned
        self.files = {"base": TensorFiles(weight_files(base))}
        self.adapter_config: dict[str, Any] = {}
        if finetuned is None:
            # What initialised training stands beside the shards, and counts more.
            for role, name in (("projector", "mm_projector.bin"), ("aligner", FINETUNED["aligner"])):
                if (base / name).is_file():
                    self._open(role, base / name)
        else:
            self.adapter_config = read_json(finetuned / "adapter_config.json")
            for role, name in FINETUNED.items():
                file = finetuned / name
                if role == "adapter" and file.with_suffix(".safetensors").is_file():
                    file = file.with_suffix(".safetensors")
                self._open(role, file)
        gates = self.files["gates"].info if "gates" in self.files else None
        self.layout, self.sparse_layers = layout_of(self.files["base"].info, gates)
        if self.layout.eight != (experts is not None):
            raise ValueError(
                "The routers are those of the 8-expert set: give the folder of its mlp_*.bin with --experts."
                if self.layout.eight
                else "--experts is for the 8-expert set, whose routers --finetuned brings; those here are others."
            )
        if experts is not None:
            for part in self.layout.parts_of("model.language_model.layers.0.mlp.experts.down_proj"):
                role = part.key[0]
                if role not in self.files:
                    self._open(role, experts / f"mlp_{role.removeprefix('experts.')}.bin")
            for expert in range(self.layout.num_experts):  # with routers of its own there is a finetuned folder
                self._open(f"expert_lora.{expert}", finetuned / f"{expert}_mlp_experts.bin")
        self.config_file = (base if self.layout.eight or finetuned is None else finetuned) / "config.json"
        self.raw_config = read_json(self.config_file)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base; float32 where it is none that models are saved in."""
        embeddings = self.files["base"].info.get("model.embed_tokens.weight")
        half = (torch.bfloat16, torch.float16)
        return embeddings.dtype if embeddings is not None and embeddings.dtype in half else torch.float32

    def _open(self, role: str, *files: Path, section: str | None = None) -> None:
        self.files[role] = TensorFiles(files, canonical(role), section)

    # --- Configuration

    def config(self, vision: Path, speech: Path | None, audio: Path | None, keep: bool) -> UniMoEConfig:
        """The model's, from what the files hold; opens the towers."""
        aligner = self.files.get("aligner", self.files["base"]).info
        ear = ear_of(aligner)
        if (ear == "speech") != (speech is not None) or (ear == "audio") != (audio is not None):
            kind, wanted = {"speech": ("a query decoder", "--speech-tower"), "audio": ("a Q-Former", "--audio-tower")}[
                ear
            ]
            raise ValueError(f"The connector is {kind}, so this is a model for {ear}: give {wanted}, and only that.")
        fields: dict[str, Any] = {"vision_config": self._vision_config(vision)}
        if ear == "speech":
            whisper = _tower_config(Path(speech), "whisper")
            self._open("speech", *weight_files(speech))
            queries, decoder = query_decoder_fields(aligner, whisper)
            fields |= {"num_speech_query_tokens": queries, "speech_config": {**whisper.to_dict(), **decoder}}
        else:
            content = load_pickle(audio)
            if not isinstance(content.get("cfg"), dict):
                raise ValueError(f"'{audio}' has no entry 'cfg'; give a BEATs checkpoint as published.")
            self._open("audio", Path(audio), section="model")
            queries, qformer = qformer_fields(aligner)
            fields |= {"num_audio_query_tokens": queries, "audio_config": beats_config(content["cfg"], str(audio))}
            fields["audio_connector_config"] = Blip2QFormerConfig(**qformer)

        text = text_fields(self.raw_config, str(self.config_file))
        depth = text["num_hidden_layers"]
        if (last := self.sparse_layers[-1]) >= depth:
            raise ValueError(f"'{self.config_file}' states {depth} layers but layer {last} has a router.")
        text |= {
            "mlp_layer_types": ["sparse" if layer in self.sparse_layers else "dense" for layer in range(depth)],
            "num_experts": self.layout.num_experts,
            "expert_names": self.layout.expert_names(),
            "expert_lora_rank": 0,
        }
        if keep and (key := self._expert_lora()):
            rank, source = self._info(key).shape[0], self.raw_config if self.layout.eight else {}
            text |= {"expert_lora_rank": rank, "expert_lora_alpha": self._scaling(rank, key[0]) * rank}
            text["expert_lora_dropout"] = source.get("lora_dropout", self.adapter_config.get("lora_dropout", 0.0))
        layer, blocks = self.raw_config.get("mm_vision_select_layer", -2), fields["vision_config"]["num_hidden_layers"]
        if not isinstance(layer, int) or not -blocks - 1 <= layer <= blocks:
            raise ValueError(f"'{self.config_file}' reads layer {layer} of a vision tower of {blocks} layers.")
        return UniMoEConfig(
            text_config=text,
            vision_feature_layer=layer,
            vision_feature_select_strategy={"cls_patch": "full"}.get(
                self.raw_config.get("mm_vision_select_feature"), "default"
            ),
            stage=None if self.finetuned is None else "moe",
            **fields,
        )

    def _vision_config(self, folder: Path) -> dict[str, Any]:
        config = _tower_config(folder, "clip_vision_model", "clip")
        self._open("vision", *weight_files(folder))
        return getattr(config, "vision_config", config).to_dict()

    def _expert_lora(self) -> Key | None:
        """Where an expert's first LoRA factor stands, `None` without one."""
        stack = f"model.language_model.layers.{self.sparse_layers[0]}.mlp.experts.down_proj"
        return next((part.lora[0] for part in self.layout.parts_of(stack) if self._has(part.lora[0])), None)

    def _scaling(self, rank: int, role: str) -> float:
        """What products of that file's factors are multiplied by."""
        config, alpha = self.adapter_config, self.adapter_config.get("lora_alpha")
        check_plain_lora(config, f"'{self.finetuned}'", also_refused=("use_rslora",))
        if role.startswith("expert_lora"):
            alpha = self.raw_config.get("lora_alpha", alpha)
        elif config.get("r") != rank:
            raise ValueError(f"adapter_config.json states rank {config.get('r')!r} but factors have rank {rank}.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
            raise ValueError(f"LoRA of rank {rank} and `lora_alpha={alpha!r}` has no scale; both must be positive.")
        return alpha / rank

    # --- What becomes what

    def plan(
        self, targets: Mapping[str, TensorInfo], keep: bool, merge_router: bool
    ) -> tuple[dict[str, list[Part]], dict[str, Part]]:
        """The parts of every tensor of ours, and those of the PEFT adapter, by their names in it."""
        plan, adapter = {}, {}
        for target in targets:
            plan[target] = []
            for part in self.layout.parts_of(target):
                part = part._replace(key=self._standing(part.key))
                is_expert, is_router = is_stack(target), target.endswith(".mlp.gate.weight")
                found = part.lora is not None and any(self._has(key) for key in part.lora)
                if is_router and part.lora is not None and not found:  # a copy stands beside the routers
                    part = part._replace(lora=tuple(("gates", key) for _, key in part.lora))
                    found = any(self._has(key) for key in part.lora)
                if found and keep and not is_expert and not is_router:
                    stem = target.removesuffix(".weight")
                    for side, key in zip("AB", part.lora, strict=True):
                        adapter[f"base_model.model.{stem}.lora_{side}.weight"] = Part(key)
                merged = merge_router if is_router else not keep
                plan[target].append(part if found and merged else part._replace(lora=None))
        return plan, adapter

    def _has(self, key: Key) -> bool:
        return key[0] in self.files and key[1] in self.files[key[0]]

    def _standing(self, key: Key) -> Key:
        """Where the key stands: what has no file of its own is in the base."""
        return key if key[0] in self.files else ("base", key[1])

    def check(
        self, targets: Mapping[str, TensorInfo], plan: Mapping[str, list[Part]], adapter: Mapping[str, Part]
    ) -> dict[str, list[str]]:
        """Every key used or dropped, every part there and of its shape; gives the dropped keys of each role."""
        used: dict[str, set[str]] = defaultdict(set)
        for target, parts in plan.items():
            shape = part_shape(target, targets[target].shape, len(parts))
            for part in parts:
                self._use(used, part.key, target, shape)
                if part.norm is not None:
                    self._use(used, part.norm, target, (1,) * (len(shape) - 1) + shape[-1:])
                if part.lora is not None:
                    rank = self._use(used, part.lora[0], target)[0]
                    self._scaling(rank, part.lora[0][0])
                    self._use(used, part.lora[0], target, (rank, shape[1]))
                    self._use(used, part.lora[1], target, (shape[0], rank))
        for name, part in adapter.items():
            weight = targets[adapted_weight(name)].shape
            rank = self._use(used, part.key, name)[0 if ".lora_A." in name else 1]
            self._scaling(rank, "adapter")
            self._use(used, part.key, name, (rank, weight[1]) if ".lora_A." in name else (weight[0], rank))

        dropped: dict[str, list[str]] = {}
        for role, files in self.files.items():
            # As in the original, what is loaded later counts; a dump during training holds all that was trained.
            order = ("base", "projector", "aligner", "gates")
            later = order[order.index(role) + 1 :] if role in order else ()
            superseded = [other for other in later if other in self.files]
            rest = [key for key in files.info if key not in used[role]]
            dropped[role] = [
                key
                for key in rest
                if is_dropped(role, key, self.layout)
                or any(key in self.files[other] for other in superseded)
                or (role == "adapter" and re.search(ROUTER_LORA, key))
            ]
            if unknown := sorted(set(rest) - set(dropped[role])):
                more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
                raise ValueError(
                    f"'{files.file_of(unknown[0])}' holds '{unknown[0]}'{more}, for which the model has no place; "
                    f"{HINTS[role.split('.')[0]]}"
                )
        self._check_adapter()
        tables = [key for key in dropped.get("audio", ()) if "relative_attention_bias" in key]
        first = "encoder.layers.0.self_attn.relative_attention_bias.weight"
        for key in tables:
            if not torch.equal(self.files["audio"].read(key), self.files["audio"].read(first)):
                raise ValueError(f"'{key}' differs from the first layer's, but BEATs has one table for all layers.")
        return dropped

    def _check_adapter(self) -> None:
        """An adapter that lost tensors, as saving a sharded model can do, would go unnoticed."""
        modules = self.adapter_config.get("target_modules")
        for module in modules if isinstance(modules, list) else ():
            if f"{module}.weight" in self.files["base"] and f"{module}.lora_A.weight" not in self.files["adapter"]:
                raise ValueError(
                    f"adapter_config.json names '{module}' as a target, but "
                    f"'{self.files['adapter'].files[0].name}' has no LoRA for it; save the adapter again."
                )

    def _use(
        self, used: dict[str, set[str]], key: Key, target: str, shape: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        role, name = key
        hint = HINTS[role.split(".")[0]]
        if not self._has(key):
            file = self.files[role].file_of(name) if role in self.files else FINETUNED.get(role, role)
            raise ValueError(f"'{file}' lacks '{name}', of which '{target}' is made; {hint}")
        used[role].add(name)
        found = self.files[role].info[name]
        if shape is None and len(found.shape) != 2:
            raise ValueError(f"'{self.files[role].file_of(name)}' holds '{name}' of shape {found.shape}, no matrix.")
        if shape is not None and found.shape != tuple(shape):
            raise ValueError(
                f"'{self.files[role].file_of(name)}' holds '{name}' of shape {found.shape}, but '{target}' needs "
                f"{tuple(shape)}; {hint}"
            )
        if not found.dtype.is_floating_point:
            raise ValueError(f"'{self.files[role].file_of(name)}' holds '{name}' in {found.dtype}, not as floats.")
        return found.shape

    # --- Reading and writing

    def values(self, parts: Iterable[Part]) -> Iterator[torch.Tensor]:
        """The parts' values, one at a time; with LoRA or a norm in float32."""
        for part in parts:
            value = self._read(part.key)
            if part.lora is not None:
                a, b = (self._read(key).float() for key in part.lora)
                value = torch.addmm(value.float(), b, a, alpha=self._scaling(a.shape[0], part.lora[0][0]))
            if part.norm is not None:
                value = value.float()
                value = value * (self._read(part.norm).float() / value.norm(dim=(0, 1), keepdim=True))
            yield value

    def _info(self, key: Key) -> TensorInfo:
        return self.files[key[0]].info[key[1]]

    def _read(self, key: Key) -> torch.Tensor:
        return self.files[key[0]].read(key[1])

    def write_adapter(self, folder: Path, parts: Mapping[str, Part], dtype: torch.dtype, base_name: str) -> None:
        """An ordinary PEFT adapter with the composite model's names."""
        infos = {name: TensorInfo(self._info(part.key).shape, dtype) for name, part in parts.items()}
        write_adapter(folder, infos, lambda name: self.values([parts[name]]), self.adapter_config, base_name)

    def remains(self, dropped: Mapping[str, list[str]], plan: Mapping[str, list[Part]]) -> dict[str, TensorInfo]:
        """`role/key` -> tensor, of what the model does not hold but is part of it in the original."""
        merged = [key for parts in plan.values() for part in parts if part.lora for key in (part.key, *part.lora)]
        keys = [(role, key) for role, names in dropped.items() for key in names] + merged
        return {
            f"{role}/{key}": self._info((role, key))
            for role, key in keys
            if role not in TOWERS and not is_foreign(role, key, self.layout)
        }

    def write_remains(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        """What [`revert_checkpoint`] needs: these tensors as they are, names of keys and files, dtypes, configs."""
        own = {role: files for role, files in self.files.items() if role not in TOWERS}
        names = {role: {k: raw for k, raw in files.raw_names.items() if k != raw} for role, files in own.items()}
        dtypes = {role: {k: str(info.dtype)[6:] for k, info in files.info.items()} for role, files in own.items()}
        metadata = {
            "eight": json.dumps(self.layout.eight),
            "names": json.dumps(names),
            "dtypes": json.dumps(dtypes),
            "files": json.dumps({role: self._place(role) for role in own}),
        }
        folders = {"base": self.base, "finetuned": self.finetuned}
        for place in CONFIGS:
            source, name = place.split("/")
            if folders[source] is not None and (folders[source] / name).is_file():
                metadata[place] = (folders[source] / name).read_text(encoding="utf-8")
        write_safetensors(
            folder,
            infos,
            lambda name: [self._read(tuple(name.split("/", 1)))],
            name=REMAINS,
            max_shard_size="1TB",
            metadata=metadata,
        )

    def _place(self, role: str) -> str:
        """Folder and name of a role's file in the original's layout."""
        if role == "base":
            return "base/pytorch_model.bin"
        folder = "experts" if role.startswith("experts.") else "base" if self.finetuned is None else "finetuned"
        return f"{folder}/{self.files[role].files[0].with_suffix('.bin').name}"


def _tower_config(folder: Path, *kinds: str) -> Any:
    read_json(folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{folder / 'config.json'}' is not the config of a tower ({error}).") from error
    if config.model_type not in kinds:
        raise ValueError(f"'{folder}' holds a '{config.model_type}' model, but a '{kinds[0]}' is needed.")
    return config


__all__ = ["CONFIGS", "REMAINS", "TOWERS", "OriginalFiles"]
