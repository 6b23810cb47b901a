"""
One arm of the study: the three stages with some of their settings changed, and what came of it.

Stages are those of the recipe (`prepare_stage`, `grow_experts`, `UniMoESFTTrainer`). Rows are read and encoded once,
what arms have in common (connectors, experts) is trained once and kept.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch.nn.functional import pad
from transformers import TrainerCallback, set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import make_data

from uni_moe_hf import (
    FeatureCache,
    UniMoEDataCollator,
    UniMoEForConditionalGeneration,
    UniMoEProcessor,
    UniMoESFTTrainer,
    build_processor,
    encode_rows,
    export_expert,
    from_pretrained_parts,
    grow_experts,
    load_rows,
    prepare_stage,
    sft_config,
    start_routers,
)
from uni_moe_hf.insight.routing_tables import trace_routing
from uni_moe_hf.insight.specialisation import (
    information_of_rows,
    information_of_types,
    knock_out,
)
from uni_moe_hf.training.rows import row_modalities


SINGLE = ("image", "video", "audio", "speech")
MIXED = ("image+speech", "video+speech", "image+audio", "video+audio")
KINDS = (*SINGLE, *MIXED)
# Fewer files than the demo, noise on all of them, one more combination of media.
HARD = make_data.Sizes(
    train_files={"image": 1600, "video": 1000, "audio": 500, "speech": 700},
    question_files=700,
    mixed_rows=dict.fromkeys(MIXED, 1000),
    single_rows=500,
    test_questions=96,
    picture_noise=0.07,
    sound_noise=0.015,
)
SEEN_ROWS = 0.7  # share of the training rows that a seed draws
BATCH = 16
RATES = {"connectors": 2e-3, "experts": 1e-3, "moe": 1.5e-3}
STAGE2 = make_data.EXPERTS  # expert -> its modalities
ROUTER_ROWS = 32  # of each kind


@dataclass(frozen=True)
class Recipe:
    """
    What an arm does. The defaults are the reference: three stages, four experts, the two best for each token.

    Args:
        stage1, stage2, stage3 (`int`): Optimiser steps; stage 2's of each of the three experts. Without stage 1
            connectors are random, and stage 3 trains them whole; without stage 2 experts start as the plain LLM.
        experts (`int`): In the mixture; above 4 the four are repeated.
        top_k (`int`): Experts per token.
        rank (`int`): Of each expert's LoRA; its scale is 1 throughout.
        layers (`str` or `tuple[int]`): Sparse ones.
        shared_base (`bool`): One frozen network for all experts, or one each.
        balancing (`float`): Coefficient of the balancing loss.
        router_start (`str`): Of [`start_routers`]; identical experts give nothing to be informed of and are balanced.
        rare (`str`, *optional*): A modality of stage 3 whose rows are `rare_share` of all, in place of an equal part;
            rows with it and another one are left out.
        rare_share (`float`): Its share.
        without (`tuple[str]`): Kinds of rows that stage 3 does not have.
        shuffled (`bool`): Control: in all stages each row has another row's answer.
    """

    stage1: int = 200
    stage2: int = 80
    stage3: int = 160
    experts: int = 4
    top_k: int = 2
    rank: int = 16
    layers: str | tuple[int, ...] = "even"
    shared_base: bool = True
    balancing: float = 0.0
    router_start: str = "informed"
    rare: str | None = None
    rare_share: float = 0.0
    without: tuple[str, ...] = ()
    shuffled: bool = False

    @property
    def steps(self) -> int:
        """Of all stages together."""
        return self.stage1 + len(STAGE2) * self.stage2 + self.stage3

    def digest(self, *names: str) -> str:
        """Of these fields, or of all."""
        fields = {name: value for name, value in asdict(self).items() if not names or name in names}
        return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def join_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows that were encoded one by one, padded on the right."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name in rows[0]:
        if name not in ("tower_states", "kind"):
            filling = -100 if name == "labels" else 0
            batch[name] = torch.cat([pad(row[name], (0, length - row[name].shape[1]), value=filling) for row in rows])
    states: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        for name, tensor in row.get("tower_states", {}).items():
            states.setdefault(name, []).append(tensor)
    return batch | ({"tower_states": {name: torch.cat(tensors) for name, tensors in states.items()}} if states else {})


@dataclass
class World:
    """
    The data of the study and the parts that a model is made of.

    Args:
        root (`Path`): Holds `parts` and `data`; `encoded` and `shared` are made.
        scale (`float`): Of all numbers of steps; below 1 for a quick look.
    """

    root: Path
    scale: float = 1.0
    _kept: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def steps(self, count: int) -> int:
        return max(2, round(self.scale * count)) if count else 0

    def untrained(self, seed: int) -> tuple[UniMoEForConditionalGeneration, UniMoEProcessor]:
        """Parts joined by random connectors, and their processor."""
        parts = self.root / "parts"
        set_seed(seed)
        model = from_pretrained_parts(
            str(parts / "llm"),
            **{tower: str(parts / tower) for tower in ("vision_tower", "speech_tower", "audio_tower")},
            num_speech_query_tokens=8,
            num_audio_query_tokens=8,
            audio_connector_config={
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
        )
        processor = build_processor(
            model.config,
            str(parts / "llm"),
            image_processor=str(parts / "vision_tower"),
            audio_feature_extractor=str(parts / "audio_tower"),
            chat_template=(parts / "llm/chat_template.jinja").read_text(),
        )
        return model, processor

    def encode(self, name: str) -> list[dict[str, Any]]:
        """The rows of a file as model inputs, with what the frozen towers give for their media."""
        if name in self._kept:
            return self._kept[name]
        target = self.root / "encoded" / f"{name}.pt"
        target.parent.mkdir(exist_ok=True)
        with FileLock(self.root / "encoded/.lock"):
            if not target.is_file():
                model, processor = self.untrained(0)
                collator = UniMoEDataCollator(processor)
                source = load_rows(self.root / "data" / f"{name}.jsonl")
                encode_rows(source, model, collator, FeatureCache(self.root / "features", model, processor, fill=True))
                processor.feature_cache = FeatureCache(self.root / "features", model, processor)
                rows = [{**collator([row]), "kind": "+".join(row_modalities(row)[0])} for row in source]
                torch.save(rows, target.with_suffix(".partial"))
                target.with_suffix(".partial").rename(target)
        self._kept[name] = torch.load(target, weights_only=False)
        return self._kept[name]

    @cached_property
    def processor(self) -> UniMoEProcessor:
        """Of every model of the study."""
        return self.untrained(0)[1]

    def rows(self, name: str, seed: int, shuffled: bool = False) -> list[dict[str, Any]]:
        """The rows that a seed draws, the same for all its arms."""
        rows = self.encode(name)
        generator = np.random.default_rng([seed, len(rows)])
        drawn = [rows[i] for i in generator.permutation(len(rows))[: int(SEEN_ROWS * len(rows))]]
        return shuffle_answers(drawn, generator) if shuffled else drawn


def shuffle_answers(rows: list[dict[str, Any]], generator: np.random.Generator) -> list[dict[str, Any]]:
    """Each row with the answer of another row of its kind."""
    by_kind: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_kind.setdefault(row["kind"], []).append(index)
    made = [dict(row) for row in rows]
    for indices in by_kind.values():
        for index, other in zip(indices, generator.permutation(indices), strict=True):
            is_question, is_answer = rows[index]["labels"] == -100, rows[other]["labels"] != -100  # (1, T) each
            for name in ("input_ids", "labels", "attention_mask"):
                made[index][name] = torch.cat([rows[index][name][is_question], rows[other][name][is_answer]])[None]
    return made


def train(
    world: World,
    model: Any,
    stage: str,
    rows: list[dict[str, Any]],
    steps: int,
    seed: int,
    peft_config: Any,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> UniMoESFTTrainer:
    """A stage through the trainer; nothing of the rows, of which there are enough in memory, is read again."""
    settings = {"per_device_train_batch_size": BATCH, "learning_rate": RATES[stage], "max_steps": steps, "seed": seed}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10**6}
    trainer = UniMoESFTTrainer(
        model=model,
        args=sft_config(stage, folder, gradient_checkpointing=False, **settings, **quiet),
        train_dataset=Dataset.from_dict({"number": range(len(rows))}),
        processing_class=world.processor,
        data_collator=lambda drawn: join_rows([rows[each["number"]] for each in drawn]),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def shared(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is made once, whole or not at all, by whichever process needs it first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
    return folder


def connectors(world: World, recipe: Recipe, seed: int) -> Path:
    """What stage 1 leaves."""

    def make(folder: Path) -> None:
        model, processor = world.untrained(seed)
        if recipe.stage1:
            prepare_stage(model, "connectors")
            rows = world.rows("stage1", seed, recipe.shuffled)
            train(world, model, "connectors", rows, world.steps(recipe.stage1), seed, None, folder)
        for part in (model, processor):
            part.save_pretrained(folder)

    return shared(world.root / "shared" / f"stage1-{recipe.digest('stage1', 'shuffled')}-{seed}", make)


def expert(world: World, recipe: Recipe, seed: int, name: str) -> Path:
    """What stage 2 leaves of an expert."""
    parent = connectors(world, recipe, seed)

    def make(folder: Path) -> None:
        model = UniMoEForConditionalGeneration.from_pretrained(parent)
        set_seed(seed)
        rank = recipe.rank if recipe.shared_base else Recipe.rank
        config = prepare_stage(model, "experts", modalities=STAGE2[name], r=rank, lora_alpha=rank)
        rows = world.rows(f"stage2_{name}", seed, recipe.shuffled)
        trainer = train(world, model, "experts", rows, world.steps(recipe.stage2), seed, config, folder)
        trainer.save_model(str(folder))
        export_expert(str(folder), folder / "expert")

    fields = ("stage1", "stage2", "rank", "shared_base", "shuffled")
    return shared(world.root / "shared" / f"{name}-{recipe.digest(*fields)}-{seed}", make) / "expert"


def mixture(world: World, recipe: Recipe, seed: int) -> UniMoEForConditionalGeneration:
    """What stage 3 begins with."""
    names = ("text", *STAGE2)
    sources: dict[str, Path | None] = {}
    for number in range(recipe.experts):
        name = names[number % len(names)]
        again = f"{number // len(names) + 1}" if number >= len(names) else ""
        has_adapter = recipe.stage2 and name != "text"
        sources[name + again] = expert(world, recipe, seed, name) if has_adapter else None
    model = UniMoEForConditionalGeneration.from_pretrained(connectors(world, recipe, seed))
    set_seed(seed)
    grow_experts(
        model,
        sources,
        shared_base=recipe.shared_base,
        layers=list(recipe.layers) if isinstance(recipe.layers, tuple) else recipe.layers,
        num_experts_per_tok=recipe.top_k,
        lora_rank=recipe.rank,
        lora_alpha=recipe.rank,
        projectors={m: name for name, kinds in STAGE2.items() if sources.get(name) for m in kinds},
    )
    model.config.text_config.router_aux_loss_coef = recipe.balancing
    return model


def stage3_rows(world: World, recipe: Recipe, seed: int) -> list[dict[str, Any]]:
    """Rows of stage 3, as mixed as the recipe says."""
    rows = [row for row in world.rows("stage3", seed, recipe.shuffled) if row["kind"] not in recipe.without]
    if recipe.rare is None:
        return rows
    has_it = [row for row in rows if row["kind"] == recipe.rare]
    others: dict[str, list] = {}
    for row in rows:
        if recipe.rare not in row["kind"].split("+"):
            others.setdefault(row["kind"], []).append(row)
    total = 2 * len(has_it)  # enough for a share of one half
    few = round(recipe.rare_share * total)
    each = (total - few) // len(others)
    return [*has_it[:few], *(row for kind in others.values() for row in kind[:each])]


class AtAQuarter(TrainerCallback):
    """Measures a model when a quarter of the steps are done."""

    def __init__(self, steps: int, measure: Callable[[Any], dict]):
        self.step, self.measure, self.found = max(1, steps // 4), measure, {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.found = self.measure(model)


def measure(world: World, model: Any, with_knock_out: bool) -> dict[str, Any]:
    """Held-out rows: answers, losses, routing; and the losses without each expert."""
    by_kind: dict[str, list] = {}
    for row in world.encode("test"):
        by_kind.setdefault(row["kind"], []).append(row)
    batches = [join_rows(by_kind[kind][at : at + 48]) for kind in KINDS for at in range(0, len(by_kind[kind]), 48)]
    tables = trace_routing(model, batches)
    kinds = np.array(tables.kinds)
    found: dict[str, Any] = {
        "accuracy": {kind: float(tables.is_right[kinds == kind].mean()) for kind in KINDS},
        "loss": {kind: float(tables.losses[kinds == kind].mean()) for kind in KINDS},
    }
    if len(tables.expert_names) > 1:
        load = tables.counts.sum(axis=(0, 2))  # (L, E)
        found["load_over_fair"] = (load / load.mean(axis=1, keepdims=True)).round(4).tolist()
        found["information_types"] = [each.share for each in information_of_types(tables)]
        found["information_rows"] = [each.share for each in information_of_rows(tables)]
    if with_knock_out and len(tables.expert_names) > 1:
        single = [join_rows(by_kind[kind][:48]) for kind in SINGLE]
        rises = knock_out(model, single, trace_routing(model, single))
        found["knock_out"] = {name: {kind: rise.value for kind, rise in of.items()} for name, of in rises.items()}
    return found


def run(world: World, recipe: Recipe, seed: int, in_depth: bool = False) -> dict[str, Any]:
    """
    Args:
        world ([`World`]): Data and parts.
        recipe ([`Recipe`]): The arm.
        seed (`int`): Of everything that is drawn: rows, connectors, LoRA, routers, order.
        in_depth (`bool`): Whether to measure before stage 3 and after a quarter of it too, and without each expert.

    Returns:
        `dict`: figures after stage 3 under "end", and where wanted "start" and "quarter".
    """
    begin = time.time()
    model = mixture(world, recipe, seed)
    rows = stage3_rows(world, recipe, seed)
    if recipe.experts > 1:
        by_kind: dict[str, list] = {}
        for row in rows:
            by_kind.setdefault(row["kind"], []).append(row)
        batches = [
            join_rows(alike[at : min(at + 16, ROUTER_ROWS)])
            for alike in by_kind.values()
            for at in range(0, min(ROUTER_ROWS, len(alike)), 16)
        ]
        knows = "informed" if recipe.stage2 else "balanced"
        start_routers(model, batches, knows if recipe.router_start == "informed" else recipe.router_start)
    found: dict[str, Any] = {"start": measure(world, model, True)} if in_depth else {}
    config = prepare_stage(model, "moe")
    if not recipe.stage1:
        config.modules_to_save = [name.removesuffix(".projector") for name in config.modules_to_save]
    steps = world.steps(recipe.stage3)
    quarter = AtAQuarter(steps, lambda trained: measure(world, trained, False))
    folder = world.root / "work" / f"{recipe.digest()}-{seed}"
    trainer = train(world, model, "moe", rows, steps, seed, config, folder, [quarter] if in_depth else [])
    if in_depth:
        found["quarter"] = quarter.found
    found["end"] = measure(world, trainer.model, in_depth)
    shutil.rmtree(folder, ignore_errors=True)
    return found | {"steps": recipe.steps, "seconds": round(time.time() - begin, 1)}
