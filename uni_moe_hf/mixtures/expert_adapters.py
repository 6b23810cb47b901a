"""Experts as PEFT adapters: read and checked, written for the plain LLM, or for the whole stack."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from ..hub.compat_uni_moe import same_permissions
from ..hub.configuration_uni_moe import is_sparse
from ..hub.experts_uni_moe import UniMoEExpertLora
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration


# Beside an exported adapter: the projector that was trained with it.
PROJECTOR_FILE = "projector.safetensors"
CONNECTORS = {"image": "vision", "video": "vision", "audio": "audio", "speech": "speech"}

_LORA_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(gate|up|gate_up|down)_proj\.lora_([AB])\.weight$")
_PROJECTOR_KEY = re.compile(r"(?:^|\.)((vision|speech|audio)_connector\.projector\..+)$")


@dataclass
class ExpertAdapter:
    """
    A stage-2 adapter, read and checked.

    Args:
        name (`str`): For messages.
        scaling (`float`): What its products are multiplied by.
        factors (`dict`): `(layer, "gate" | "up" | "down", "A" | "B")` -> `(rank, in)` or `(out, rank)`.
        projectors (`dict[str, dict]`): `"vision" | "speech" | "audio"` -> the connector's trained tensors.
    """

    name: str
    rank: int
    scaling: float
    factors: dict[tuple[int, str, str], torch.Tensor]
    projectors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def read_expert(
    name: str, folder: str | Path, text_config: PreTrainedConfig, layers: Iterable[int] | None = None
) -> ExpertAdapter:
    """
    Args:
        name (`str`): Of the expert, for messages.
        folder (`str` or `Path`): A PEFT adapter on the MLP projections: a stage-2 checkpoint or an exported one.
        text_config ([`PreTrainedConfig`]): Of the model that it must fit.
        layers (`Iterable[int]`, *optional*): Those that it must have LoRA for; all by default.

    Returns:
        [`ExpertAdapter`].

    Raises:
        ValueError: no adapter there, of another method, with other keys, or for a model of another shape.
    """
    folder = Path(folder)
    peft_config, tensors = _plain_lora(folder, f"Expert '{name}': ")
    if (stage := (peft_config.get("auto_mapping") or {}).get("stage", "experts")) != "experts":
        raise ValueError(f"Expert '{name}': '{folder}' is an adapter of stage '{stage}', not of stage 'experts'.")
    rank, alpha = peft_config["r"], peft_config["lora_alpha"]
    adapter = ExpertAdapter(name, rank, alpha / (rank**0.5 if peft_config.get("use_rslora") else rank), {})

    if (folder / PROJECTOR_FILE).is_file():
        tensors |= _tensors(folder / PROJECTOR_FILE)
    for key, tensor in tensors.items():
        if match := _LORA_KEY.search(key):
            layer, projection, side = match.groups()
            # Of fused weights, gate and up have the first factor in common and halves of the second.
            names = ("gate", "up") if projection == "gate_up" else (projection,)
            parts = tensor.chunk(len(names)) if side == "B" else [tensor] * len(names)
            for each, part in zip(names, parts, strict=True):
                adapter.factors[int(layer), each, side] = part
        elif match := _PROJECTOR_KEY.search(key):
            adapter.projectors.setdefault(match.group(2), {})[match.group(1)] = tensor
        else:
            raise ValueError(f"Expert '{name}': '{folder}' holds '{key}', which is neither MLP LoRA nor a projector.")

    hidden, inner = text_config.hidden_size, text_config.intermediate_size
    sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for layer in range(text_config.num_hidden_layers) if layers is None else layers:
        for projection, (rows, columns) in sizes.items():
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                found = adapter.factors.get((layer, projection, side))
                if found is None or tuple(found.shape) != shape:
                    raise ValueError(
                        f"Expert '{name}' does not fit the model: LoRA {side} of layer {layer} `{projection}_proj` is "
                        f"{'missing' if found is None else tuple(found.shape)}, expected {shape}."
                    )
    if any(layer >= text_config.num_hidden_layers for layer, _, _ in adapter.factors):
        raise ValueError(
            f"Expert '{name}' was trained on more layers than the model's {text_config.num_hidden_layers}."
        )
    return adapter


def export_expert(
    source: str | Path | UniMoEForConditionalGeneration, output_folder: str | Path, name: str | None = None
) -> Path:
    r"""
    Writes an expert as an ordinary PEFT adapter of the plain LLM, with the projector beside it. Of a mixture after
    stage 3 it is the expert alone: attention, which that stage trains too, is not in it.

    Args:
        source (`str`, `Path` or [`UniMoEForConditionalGeneration`]): A stage-2 checkpoint, with the composite model's
            names, or a mixture with a shared base.
        output_folder (`str` or `Path`): Gets `adapter_config.json` and `adapter_model.safetensors`, which
            `PeftModel.from_pretrained(plain_llm, ...)` loads without a missing key, and `projector.safetensors` where
            the source is a checkpoint that trained one.
        name (`str`, *optional*): Of the expert, in a mixture.

    Returns:
        `Path`: the output folder.

    Raises:
        ValueError: the folder holds no adapter, or keys of something else; the mixture has no such expert, or own
            bases, with which an expert is more than its LoRA.
    """
    output_folder = Path(output_folder)
    if isinstance(source, UniMoEForConditionalGeneration):
        lora, projectors, peft_config = *_expert_of(source, name), {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
        text = source.config.text_config
        rank = next(iter(lora.values())).shape[0]  # may be twice the model's, where gate and up are fused
        alpha = text.expert_lora_alpha * (rank // text.expert_lora_rank)
        peft_config |= {"r": rank, "lora_alpha": alpha, "bias": "none"}
        peft_config |= {"lora_dropout": text.expert_lora_dropout, "inference_mode": True}
        sparse = [layer for layer, kind in enumerate(text.mlp_layer_types) if kind == "sparse"]
        if len(sparse) < text.num_hidden_layers:
            peft_config |= {"layers_to_transform": sparse, "layers_pattern": "layers"}
    else:
        lora, projectors, peft_config = _stage_2_tensors(Path(source))
    peft_config |= {
        "target_modules": sorted({key.split(".")[-3] for key in lora}),
        "modules_to_save": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
    }
    _write_adapter(output_folder, lora, peft_config, projectors)
    return output_folder


def _write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    peft_config: dict,
    projectors: dict[str, torch.Tensor] | None = None,
) -> None:
    """The config comes last: without it nobody takes what is half written for an adapter."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; give a folder to write the adapter to.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", PROJECTOR_FILE):
        (folder / name).unlink(missing_ok=True)
    if projectors:
        save_file(projectors, folder / PROJECTOR_FILE, metadata={"format": "pt"})
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=2))
    same_permissions(folder)


def _plain_lora(folder: Path, who: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of an adapter that is nothing but `W + s B A`, the same for all layers."""
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{who}'{folder}' holds no {file.name}; give the folder of a PEFT adapter.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{who}'{config_file}' cannot be read: {error}") from error
    check_plain_lora(config, f"{who}'{folder}'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (is_positive(rank) and rank == int(rank) and is_positive(alpha)):
        raise ValueError(f"{who}'{config_file}' needs `r` and `lora_alpha` above 0, got {rank!r} and {alpha!r}.")
    tensors = _tensors(weights_file, who)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{who}'{weights_file}' holds NaN or infinite values in '{name}'; train it again.")
    return config, tensors


def is_positive(number: Any) -> bool:
    """Whether something read from a file is a finite number above 0."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf


def check_plain_lora(config: Mapping[str, Any], where: str, also_refused: tuple[str, ...] = ()) -> None:
    """
    Args:
        config (`dict`): What `adapter_config.json` holds.
        where (`str`): Whose it is, for the message.
        also_refused (`tuple[str]`, *optional*): Further fields that must not be set.

    Raises:
        ValueError: the adapter is more than `W + s B A`, the same for all layers, on the base that it was given.
    """
    refused = ("use_dora", "rank_pattern", "alpha_pattern", "alora_invocation_tokens", *also_refused)
    unsupported = [name for name in refused if config.get(name)]
    # These start from another base than the one they were given.
    if isinstance(how := config.get("init_lora_weights"), str) and how not in ("gaussian", "orthogonal", "eva"):
        unsupported.append(f"init_lora_weights={how!r}")
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']!r}")
    if config.get("peft_type") != "LORA" or unsupported:
        raise ValueError(
            f"{where} is an adapter of type {config.get('peft_type')}"
            f"{' with ' + ', '.join(unsupported) if unsupported else ''}; only plain LoRA is understood."
        )


def _tensors(file: Path, who: str = "") -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{who}'{file}' cannot be read: {error}") from error


def _stage_2_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """LoRA by the plain LLM's names, projectors by ours, and the adapter's config."""
    peft_config, tensors = _plain_lora(folder, "")
    lora, projectors = {}, {}
    for key, tensor in tensors.items():
        if match := _LORA_KEY.search(key):
            lora[f"base_model.model.model.{key[match.start() :].lstrip('.')}"] = tensor
        elif match := _PROJECTOR_KEY.search(key):
            projectors[match.group(1)] = tensor
        else:
            raise ValueError(f"'{folder}' holds '{key}', which is neither MLP LoRA nor a projector.")
    return lora, projectors, peft_config


def _expert_of(model: UniMoEForConditionalGeneration, name: str | None) -> tuple[dict[str, torch.Tensor], dict]:
    """LoRA of one expert of a mixture, by the plain LLM's names."""
    text = model.config.text_config
    names = expert_names(text)
    if not is_sparse(text) or name not in names:
        raise ValueError(f"There is no expert {name!r}; the model has {names if is_sparse(text) else 'none'}.")
    if not text.shared_expert_base or not text.expert_lora_rank:
        raise ValueError(
            f"Expert '{name}' has a base of its own, so its LoRA alone is not the expert; only experts with a shared "
            "base become adapters of the plain LLM. `export_expert_stack` writes the LoRA of all of them."
        )
    index, layers = names.index(name), {}
    for layer, module in enumerate(model.model.language_model.layers):
        if text.mlp_layer_types[layer] == "sparse":
            factors = lora_factors(module.mlp.experts.lora)
            layers[layer] = {p: (a[index].detach().cpu(), b[index].detach().cpu()) for p, a, b in factors}
            is_fused = module.mlp.experts.has_fused_base
    if is_fused:
        layers = _fused(layers)
    tensors = {}
    for layer, pairs in layers.items():
        for projection, pair in pairs.items():
            stem = f"base_model.model.model.layers.{layer}.mlp.{projection}_proj"
            tensors |= {f"{stem}.lora_{side}.weight": each.clone() for side, each in zip("AB", pair, strict=True)}
    return tensors, {}


def _fused(layers: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> dict[int, dict[str, tuple]]:
    """
    LoRA of gate and up as LoRA of the two fused: at the same rank where they have their first factor in common, as
    adapters of the plain LLM have; else at twice the rank, as one product whose second factor is block diagonal.
    """
    in_common = all(torch.equal(pairs["gate"][0], pairs["up"][0]) for pairs in layers.values())
    fused = {}
    for layer, pairs in layers.items():
        (gate_a, gate_b), (up_a, up_b), (down_a, down_b) = pairs["gate"], pairs["up"], pairs["down"]
        if in_common:
            fused[layer] = {"gate_up": (gate_a, torch.cat([gate_b, up_b])), "down": (down_a, down_b)}
            continue
        wider = (torch.cat([down_a, torch.zeros_like(down_a)]), torch.cat([down_b, torch.zeros_like(down_b)], dim=1))
        fused[layer] = {"gate_up": (torch.cat([gate_a, up_a]), torch.block_diag(gate_b, up_b)), "down": wider}
    return fused


def export_expert_stack(model: UniMoEForConditionalGeneration, output_folder: str | Path) -> Path:
    r"""
    Writes the LoRA of all experts as one PEFT adapter on the expert stacks (`LoraConfig(target_parameters=...)`).

    It fits the same model with plain experts: `expert_lora_rank=0` and the same bases.

    Args:
        model ([`UniMoEForConditionalGeneration`]): A mixture with own bases and expert LoRA.
        output_folder (`str` or `Path`): Gets `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        `Path`: the output folder.

    Raises:
        ValueError: the experts share their base, so there is no stack, or have no LoRA.
    """
    text, output_folder = model.config.text_config, Path(output_folder)
    if not is_sparse(text) or text.shared_expert_base or not text.expert_lora_rank:
        raise ValueError(
            "Only experts with bases of their own and LoRA form stacks that PEFT can adapt; this model has "
            f"`shared_expert_base={text.shared_expert_base}`, `expert_lora_rank={text.expert_lora_rank}`."
        )
    rank, tensors = text.expert_lora_rank, {}
    for layer, module in enumerate(model.model.language_model.layers):
        if text.mlp_layer_types[layer] != "sparse":
            continue
        # PEFT knows no gate and up in one stack: one product of twice the rank, whose second factor is block diagonal.
        a, (gate_b, up_b) = module.mlp.experts.lora.gate_up_a, module.mlp.experts.lora.gate_up_b.chunk(2, dim=1)
        gate_up_b = torch.cat(
            [torch.cat([gate_b, torch.zeros_like(gate_b)], 2), torch.cat([torch.zeros_like(up_b), up_b], 2)], 1
        )
        stem = f"base_model.model.model.language_model.layers.{layer}.mlp.experts"
        down = (module.mlp.experts.lora.down_a, module.mlp.experts.lora.down_b)
        # PEFT wraps the second parameter of a module around the first.
        for prefix, (first, second) in ((f"{stem}.base_layer", (a, gate_up_b)), (stem, down)):
            tensors[f"{prefix}.lora_A.weight"] = first.detach().flatten(0, 1).cpu().contiguous()
            tensors[f"{prefix}.lora_B.weight"] = second.detach().permute(1, 2, 0).flatten(1).cpu().contiguous()
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": text.expert_lora_alpha,
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"mlp.experts.gate_up_proj": 2 * rank},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 2 * text.expert_lora_alpha},
        "bias": "none",
        "inference_mode": True,
    }
    _write_adapter(output_folder, tensors, peft_config)
    return output_folder


def expert_names(text_config: PreTrainedConfig) -> list[str]:
    """Names of a model's experts; their numbers where they have none."""
    return list(text_config.expert_names or map(str, range(text_config.num_experts)))


def lora_factors(lora: UniMoEExpertLora) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of all experts of a layer: projection, A `(E, R, in)` and B `(E, out, R)`, as views."""
    (gate_a, up_a), (gate_b, up_b) = lora.gate_up_a.chunk(2, dim=1), lora.gate_up_b.chunk(2, dim=1)
    yield "gate", gate_a, gate_b
    yield "up", up_a, up_b
    yield "down", lora.down_a, lora.down_b


def check_is_ours(model: Any) -> None:
    """
    Args:
        model (`Any`): To be changed in place.

    Raises:
        ValueError: it is no Uni-MoE of this package, but wrapped by PEFT, or made by the code of a checkpoint.
    """
    if isinstance(model, UniMoEForConditionalGeneration):
        return
    if type(model).__name__ == UniMoEForConditionalGeneration.__name__:
        raise ValueError(
            "This model runs the code that came with its checkpoint; load it with "
            "`uni_moe_hf.UniMoEForConditionalGeneration.from_pretrained` to change its experts."
        )
    raise ValueError(f"A {type(model).__name__} cannot be changed; merge or unload its adapter first.")


def choose_projectors(
    model: UniMoEForConditionalGeneration, adapters: list[ExpertAdapter], choices: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """
    Args:
        model ([`UniMoEForConditionalGeneration`]): That they must fit.
        adapters (`list[ExpertAdapter]`): Of all experts.
        choices (`dict[str, str]`): Modality -> the expert whose projector to keep.

    Returns:
        `dict[str, torch.Tensor]`: the projectors' tensors, by their names in `model.model`.

    Raises:
        ValueError: experts disagree and there is no choice, or a projector does not fit.
    """
    for modality, name in choices.items():
        if modality not in CONNECTORS or name not in {adapter.name for adapter in adapters}:
            raise ValueError(
                f"`projectors` maps {modality!r} to {name!r}; keys are of {list(CONNECTORS)}, values of the experts "
                f"with an adapter, {[adapter.name for adapter in adapters]}."
            )
        connector = CONNECTORS[modality]
        if connector not in next(adapter for adapter in adapters if adapter.name == name).projectors:
            raise ValueError(
                f"`projectors` maps {modality!r} to '{name}', whose adapter trained none for {connector}."
            )
        if others := {choices[m] for m in choices if CONNECTORS[m] == connector} - {name}:
            raise ValueError(f"`projectors` maps {connector} to both '{name}' and '{others.pop()}'; give one of them.")
    choices = {CONNECTORS[modality]: name for modality, name in choices.items()}
    own = model.model.state_dict()
    chosen = {}
    for connector in ("vision", "audio", "speech"):
        bringing = [adapter for adapter in adapters if connector in adapter.projectors]
        if connector in choices:
            bringing = [adapter for adapter in bringing if adapter.name == choices[connector]]
        for adapter in bringing:
            tensors = adapter.projectors[connector]
            for key, tensor in tensors.items():
                if key not in own or own[key].shape != tensor.shape:
                    raise ValueError(
                        f"Expert '{adapter.name}' brings '{key}' of shape {tuple(tensor.shape)}, the model "
                        f"{'has none' if key not in own else 'has ' + str(tuple(own[key].shape))}."
                    )
                tensor = tensor.to(own[key].dtype)
                if key in chosen and not torch.equal(chosen[key], tensor):
                    names = [adapter.name for adapter in bringing]
                    raise ValueError(
                        f"Experts {names} bring different projectors for {connector}; say which to keep, for example "
                        f"`projectors={{'{'image' if connector == 'vision' else connector}': '{names[0]}'}}`."
                    )
                chosen[key] = tensor
    return chosen


__all__ = [
    "CONNECTORS",
    "ExpertAdapter",
    "check_is_ours",
    "choose_projectors",
    "expert_names",
    "export_expert",
    "export_expert_stack",
    "lora_factors",
    "read_expert",
]
