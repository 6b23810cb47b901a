"""
What is wrong with a checkpoint: one line for each thing that can go wrong without a word.

Each check returns a [`Check`]; those that need rows, or a model that loads, are left out where there are none.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.answering import answer_losses, on_device
from ..evaluation.statistics import mean_of
from ..hub.configuration_uni_moe import is_sparse
from ..hub.files_uni_moe import sentence_of
from ..mixtures.expert_adapters import expert_names
from ..mixtures.router_starts import sparse_blocks
from ..mixtures.routing import token_types
from ..training.data import UniMoEDataCollator
from ..training.feature_cache import INPUTS
from ..training.row_files import load_rows
from .connectors import sequence_vectors, statistics_of
from .report import chosen_rows
from .routing_tables import RoutingTables, kind_of_row, trace_routing


OK, LOOK, WRONG = "ok", "look", "wrong"
# Median norm of a modality's vectors over that of words, either way. Trained connectors of the demo reach 100.
MAX_RATIO = 1000.0
NO_CHANGE = 1e-4  # nats: less is rounding
MIN_SHARE = 0.05  # of the fair share: an expert below it has collapsed
TESTED = ("5.16.1", "6")  # transformers, from and below


@dataclass(frozen=True)
class Check:
    """
    Args:
        name (`str`): What was looked at.
        state (`str`): "ok", "look" or "wrong".
        text (`str`): What was found, and what to do where it is not ok.
    """

    name: str
    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<7}{self.name:<18}{self.text}"


def examine(
    checkpoint: str, load: Callable[[], tuple[nn.Module, Any]], rows: Any = None, limit: int = 64
) -> list[Check]:
    r"""
    Args:
        checkpoint (`str`): A folder or Hub id.
        load (`Callable`): Gives model and processor of it; what it raises is a finding.
        rows (*optional*): Rows with answers, or their source: checks of what the model does with media.
        limit (`int`, *optional*, defaults to 64): How many of them, from all over the data.

    Returns:
        `list[Check]`, in a fixed order.
    """
    checks = [check_versions(checkpoint)]
    folder = Path(checkpoint)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        merged = folder / "merged"
        remedy = f"look at '{merged}'" if merged.is_dir() else "load its parent and the adapter on it, and merge them"
        return [*checks, Check("weights", WRONG, f"'{checkpoint}' holds an adapter, no model; {remedy}.")]
    if isinstance(rows, str | Path):
        try:
            rows = load_rows(rows)
        except (ValueError, OSError) as error:
            checks.append(Check("rows", WRONG, sentence_of(error)))
            rows = None
    try:
        model, processor = load()
    except Exception as error:  # whatever a damaged folder causes is a finding
        return [*checks, Check("loading", WRONG, sentence_of(error))]
    checks += [check_weights(model), *check_processor(model, processor), check_stop_token(model, processor)]
    if is_sparse(model.config.text_config):
        checks += [check_adapters(model), check_routers(model)]
    if WRONG in {check.state for check in checks}:
        return checks  # what a broken model does with media would only repeat it
    if model.config.modalities:
        checks += check_media(model, processor)
    if rows is not None and WRONG not in {check.state for check in checks}:
        try:
            of_rows = examine_rows(model, processor, rows, limit)
            # Real clips say more of connectors than noise does.
            again = {check.name for check in of_rows}
            checks = [check for check in checks if check.name not in again] + of_rows
        except (ValueError, OSError, RuntimeError) as error:
            checks.append(Check("rows", WRONG, sentence_of(error)))
    return checks


def examine_rows(model: nn.Module, processor: Any, rows: Any, limit: int = 64) -> list[Check]:
    """
    Checks of what a model does with rows that have answers: connectors, experts, and whether each modality is used.

    Args:
        model, processor: That belong together.
        rows: In any form, or a source, as in [`~row_files.load_rows`].
        limit (`int`, *optional*, defaults to 64): How many, from all over the data.

    Returns:
        `list[Check]`.

    Raises:
        ValueError: there are too few rows.
    """
    collator = UniMoEDataCollator(processor)
    chosen = chosen_rows(rows, processor, None, limit)
    readable: dict[str, list[Any]] = {}
    unread = 0
    for row in chosen:
        try:
            batch = collator([row])
        except (ValueError, OSError):
            unread += 1
            continue
        kind = kind_of_row(token_types(model.config, batch["input_ids"])[0].numpy())
        readable.setdefault(kind, []).append(row)
    joined = {
        kind: [collator(alike[start : start + 8]) for start in range(0, len(alike), 8)]
        for kind, alike in readable.items()
    }
    checks = []
    if unread:
        remedy = "`uni-moe data check` says why"
        checks.append(
            Check("rows", LOOK, f"{unread} of {len(chosen)} rows cannot be read or have no answer; {remedy}.")
        )
    if not joined:
        return checks
    everything = [on_device(batch, model) for alike in joined.values() for batch in alike]
    checks += check_connectors(model, everything)
    tables = None
    if is_sparse(model.config.text_config):
        tables = trace_routing(model, everything)
        checks.append(check_experts(tables))
    checks += [check_use(model, joined, modality) for modality in model.config.modalities if _has(joined, modality)]
    return checks


def check_versions(checkpoint: str) -> Check:
    """Which library wrote the checkpoint, and which reads it."""
    here = version("transformers")
    parts = tuple(int(number) for number in re.findall(r"\d+", here)[:3])
    low, high = (tuple(int(n) for n in end.split(".")) for end in TESTED)
    if not low <= parts < high:
        return Check(
            "versions", LOOK, f"transformers {here} is untested; install one from {TESTED[0]} to below {TESTED[1]}."
        )
    written = None
    with suppress(OSError, ValueError, AttributeError):
        written = json.loads((Path(checkpoint) / "config.json").read_text()).get("transformers_version")
    by = f", written by {written}" if written else ""
    return Check("versions", OK, f"transformers {here}, torch {torch.__version__}{by}")


def check_weights(model: nn.Module) -> Check:
    """Numbers that are none, and connectors that are empty."""
    tensors = 0
    for name, tensor in model.state_dict().items():
        tensors += 1
        if not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            return Check(
                "weights",
                WRONG,
                f"{bad:,} of {tensor.numel():,} numbers of `{name}` are NaN or infinite; train or copy it again.",
            )
        if re.search(r"_connector\.projector\.(.*\.)?weight$|mlp\.gate\.weight$", name) and not tensor.any():
            return Check("weights", WRONG, f"`{name}` is all zeros, so nothing comes through; it was never filled.")
    return Check("weights", OK, f"{tensors} tensors, all there and finite")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Quantised tensors that cannot be asked are taken to be."""
    try:
        return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    except NotImplementedError:
        return True


def check_processor(model: nn.Module, processor: Any) -> list[Check]:
    """Whether model and processor mean the same tokens, media and chat."""
    config, tokenizer = model.config, processor.tokenizer
    if [*processor.modalities] != [*config.modalities]:
        text = (
            f"the processor is for {', '.join(processor.modalities)}, the model for {', '.join(config.modalities)}; "
            "save "
            "the model's own processor beside it."
        )
        return [Check("processor", WRONG, text)]
    for modality in config.modalities:
        own, its = getattr(config, f"{modality}_token_id"), tokenizer.convert_tokens_to_ids(f"<{modality}>")
        if own != its:
            text = f"<{modality}> is token {its} in the tokenizer and {own} in the model; save both from one build."
            return [Check("processor", WRONG, text)]
    words = model.get_input_embeddings().num_embeddings
    highest = max((i for i in tokenizer.get_vocab().values() if i < config.text_config.vocab_size), default=0)
    if highest >= words:
        return [
            Check(
                "processor",
                WRONG,
                f"the tokenizer has {highest + 1} words, the model {words}; they do not belong together.",
            )
        ]
    checks = [Check("processor", OK, f"takes {', '.join(('text', *config.modalities))}; placeholders agree")]
    if not processor.chat_template:
        return [
            *checks,
            Check("chat template", WRONG, "there is none, so chats cannot be asked; save one with the processor."),
        ]
    lost = []
    for modality in config.modalities:
        chat = [{"role": "user", "content": [{"type": modality, "path": "clip"}, {"type": "text", "text": "What?"}]}]
        try:
            rendered = _rendered(processor, chat, True)
        except Exception as error:
            text = f"it cannot render a {modality} ({sentence_of(error)}); save one that can."
            return [*checks, Check("chat template", WRONG, text)]
        if f"<{modality}>" not in rendered:
            lost.append(modality)
    if lost:
        text = f"it writes no placeholder for {', '.join(lost)}, so the model never sees it; use the model's own."
        return [*checks, Check("chat template", WRONG, text)]
    return [*checks, Check("chat template", OK, "renders text and every medium")]


def _rendered(processor: Any, chat: list[dict], opened: bool) -> str:
    """Text of a chat; media are not opened."""
    return processor.apply_chat_template(chat, add_generation_prompt=opened, tokenize=False)


def check_stop_token(model: nn.Module, processor: Any) -> Check:
    """Whether generation ends where the template ends an answer."""
    name = "stop token"
    if not processor.chat_template:
        return Check(name, LOOK, "without a chat template it cannot be known where answers end.")
    ask = [{"role": "user", "content": "What?"}]
    told = [*ask, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = _rendered(processor, told, False)
    except Exception as error:
        return Check(name, LOOK, f"the chat template cannot render an answer ({sentence_of(error)}).")
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not ends:
        return Check(
            name, WRONG, "the generation config has no `eos_token_id`, so answers run on; set it to the tokenizer's."
        )
    if "ANSWER" not in text:
        return Check(name, WRONG, "the chat template leaves out what the assistant says, so nothing is learned of it.")
    rest = text[text.rindex("ANSWER") + len("ANSWER") :]
    ids = processor.tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"]
    stops = [processor.tokenizer.decode([end]) for end in ends]
    if not ids:
        return Check(
            name,
            WRONG,
            "the chat template writes nothing after an answer, so its end is never learned; add the stop token.",
        )
    if ids[0] not in ends:
        after = processor.tokenizer.decode([ids[0]])
        text = (
            f"the chat template ends answers with {after!r} (token {ids[0]}), generation stops at "
            f"{', '.join(map(repr, stops))} ({', '.join(map(str, ends))}); add {ids[0]} to the generation config."
        )
        return Check(name, WRONG, text)
    return Check(name, OK, f"{processor.tokenizer.decode([ids[0]])!r}, in template and generation alike")


def check_adapters(model: nn.Module) -> Check:
    """Whether experts differ: LoRA that was never applied leaves copies of one network."""
    config = model.config.text_config
    names = expert_names(config)
    if len(names) == 1:
        return Check("adapters", OK, "one expert")
    blocks = [block for _, block in sparse_blocks(model)]
    loras = [block.experts.lora for block in blocks if block.experts.lora is not None]
    if (
        model.config.stage == "moe"
        and loras
        and not any(b.any() for lora in loras for b in (lora.gate_up_b, lora.down_b))
    ):
        text = "the experts' LoRA adds nothing, though stage 3 trains it; load its adapter on its parent and merge it."
        return Check("adapters", WRONG, text)
    same: set[tuple[int, int]] | None = None
    for block in blocks:
        experts = block.experts
        stacks = []
        if experts.lora is not None:
            with torch.no_grad():
                lora = experts.lora(None)
                # What an expert adds is B A: a zero B is no change, whatever A is.
                stacks += [lora.gate_up_b, lora.down_b]
                stacks += [lora.gate_up_a * lora.gate_up_b.flatten(1).any(dim=1)[:, None, None]]
                stacks += [lora.down_a * lora.down_b.flatten(1).any(dim=1)[:, None, None]]
        if not experts.shared_base:
            stacks += [experts.gate_up_proj, experts.down_proj]
        pairs = {
            (i, j)
            for i in range(len(names))
            for j in range(i + 1, len(names))
            if all(torch.equal(stack[i], stack[j]) for stack in stacks)
        }
        same = pairs if same is None else same & pairs
        if not same:
            return Check("adapters", OK, f"{len(names)} experts, no two alike")
    if len(same or ()) == len(names) * (len(names) - 1) // 2:
        text = f"all {len(names)} experts are the same network: no adapter was applied; grow them from adapters."
        return Check("adapters", WRONG, text)
    listed = ", ".join(f"{names[i]} and {names[j]}" for i, j in sorted(same)[:3])
    return Check("adapters", LOOK, f"{listed} are the same network; fine before training, a lost adapter after it.")


def check_routers(model: nn.Module) -> Check:
    """Whether routers still are what they were initialised with, up to a shift of all rows along one direction."""
    config = model.config.text_config
    if config.num_experts <= 2:
        return Check("routers", OK, f"of {config.num_experts}, too few to tell trained ones from fresh ones")
    fresh, layers = [], 0
    for number, block in sparse_blocks(model):
        layers += 1
        weight = block.gate.weight.detach().float()
        experts, width = weight.shape
        if (weight - weight[0]).abs().max() == 0:
            return Check(
                "routers",
                WRONG,
                f"all rows of the router in layer {number} are equal, so its choice is blind; train it.",
            )
        # Singular values of a random matrix lie in a band. What all rows share never changes a choice and is not
        # trained; evening loads adds one direction, which the largest value takes; nothing is left of the last.
        values = torch.linalg.svdvals(weight - weight.mean(dim=0))[1:-1] / config.initializer_range
        low, high = math.sqrt(width) - math.sqrt(experts), math.sqrt(width) + math.sqrt(experts)
        if 0.9 * low <= values.min() and values.max() <= 1.1 * high:
            fresh.append(number)
    if len(fresh) == layers:
        text = "they are as they were initialised and know nothing of their experts; train them (stage 3)."
        return Check("routers", LOOK if model.config.stage != "moe" else WRONG, text)
    return Check("routers", OK, f"trained in {layers - len(fresh)} of {layers} layers")


def _synthetic(modality: str) -> Any:
    """A clip of noise."""
    generator = np.random.default_rng(0)
    if modality in ("audio", "speech"):
        return generator.normal(0, 0.1, 16000).astype(np.float32)
    shape = (48, 48, 3) if modality == "image" else (8, 48, 48, 3)
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    if modality == "video":
        return pixels
    from PIL import Image

    return Image.fromarray(pixels)


@torch.no_grad()
def check_media(model: nn.Module, processor: Any) -> list[Check]:
    """Placeholders, counts and scale: a clip of noise of each modality through processor and model."""
    counts, batches = [], []
    for modality in model.config.modalities:
        part = {"type": modality, modality: _synthetic(modality)}
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        try:
            inputs = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            batches.append(on_device(dict(inputs), model))
            logits = model(**batches[-1], logits_to_keep=1).logits
        except (ValueError, RuntimeError, KeyError, IndexError, OSError) as error:
            return [Check("media", WRONG, f"a {modality} clip does not get through: {sentence_of(error)}")]
        if not torch.isfinite(logits).all():
            text = f"a {modality} clip gives logits that are no numbers; look at its tower and connector."
            return [Check("media", WRONG, text)]
        held = int((inputs["input_ids"] == getattr(model.config, f"{modality}_token_id")).sum())
        counts.append(f"{modality} {held}")
    text = f"placeholders and features agree (tokens of a clip: {', '.join(counts)})"
    return [Check("media", OK, text), *check_connectors(model, batches)]


def check_connectors(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Norms of what connectors give beside those of words."""
    vectors: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        with suppress(ValueError):  # text alone
            for kind, found in sequence_vectors(model, batch).items():
                vectors.setdefault(kind, []).append(found)
    if not vectors:
        return []
    report = statistics_of({kind: torch.cat(found) for kind, found in vectors.items()}, MAX_RATIO)
    listed = ", ".join(f"{modality} {ratio:.3g}" for modality, ratio in report.ratios.items())
    if report.off_scale:
        name = report.off_scale[0]
        text = (
            f"vectors of {name} are {report.ratios[name]:.3g} times as long as words', which drowns one or the "
            "other; train "
            "its connector (stage 1)."
        )
        return [Check("connectors", WRONG, text)]
    return [Check("connectors", OK, f"median norm over that of words: {listed}")]


def check_experts(tables: RoutingTables) -> Check:
    """Experts without tokens, and experts that take nearly all."""
    load = tables.counts.sum(axis=(0, 2)).astype(float)  # (L, E)
    over = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
    experts, top_k = load.shape[1], tables.num_experts_per_tok
    if experts == top_k:
        return Check("experts", OK, "every token goes to all of them")
    idle = [(y, x) for y, x in zip(*np.where(over < MIN_SHARE), strict=True)]
    if idle:
        layer, expert = idle[0]
        text = (
            f"{len(idle)} of {load.size} get less than {MIN_SHARE:.0%} of their share, {tables.expert_names[expert]} "
            "in layer "
            f"{tables.layers[layer]} for one; start routers balanced or informed, or set `router_aux_loss_coef`."
        )
        return Check("experts", WRONG if (load == 0).any() else LOOK, text)
    tokens = sum(tables.num_tokens.values())
    return Check(
        "experts", OK, f"loads from {over.min():.2f} to {over.max():.2f} of the fair share ({tokens:,} tokens)"
    )


def check_use(model: nn.Module, batches: Mapping[str, list[dict[str, Any]]], modality: str) -> Check:
    """Whether answers are likelier with the right clips than with another row's, or with blank ones."""
    found: dict[str, list[float]] = {"own": [], "other": [], "blank": [], "right": []}
    for kind, alike in batches.items():
        if modality not in kind.split("+"):
            continue
        for batch in alike:
            clips = {name: batch[name] for name in INPUTS[modality] if torch.is_tensor(batch.get(name))}
            rolled = {name: value.roll(1, 0) for name, value in clips.items()}
            blank = {n: v if n.endswith("_mask") else torch.zeros_like(v) for n, v in clips.items()}
            own, is_right = answer_losses(model, on_device(batch, model))
            other = answer_losses(model, on_device(batch | rolled, model))[0]
            if all(torch.equal(rolled[name], clips[name]) for name in clips):
                other = [math.nan] * len(own)  # the same clip everywhere
            found["own"] += own
            found["other"] += other
            found["blank"] += answer_losses(model, on_device(batch | blank, model))[0]
            found["right"] += is_right
    own, other, blank = (np.array(found[name]) for name in ("own", "other", "blank"))
    compared = ~np.isnan(other)
    told = f"loss {own.mean():.3f} with its own"
    told += f", {other[compared].mean():.3f} with another row's" if compared.any() else ""
    told += f", {blank.mean():.3f} blank; {np.mean(found['right']):.0%} right, {len(own)} rows"
    reach = max(np.abs(blank - own).max(), np.abs(other - own)[compared].max(initial=0.0))
    if reach < NO_CHANGE:
        return Check(
            modality, WRONG, f"not used at all: no answer changes with the clip ({told}); look at its connector."
        )
    rises = [mean_of(each, unit="").figure() for each in ((other - own)[compared], blank - own) if len(each)]
    if rises[0].low <= 0 and not (rises[-1].low > 0 and not compared.any()):
        text = f"no use of it can be told ({told}); give more rows, or train its connector and expert."
        return Check(modality, LOOK, text)
    return Check(modality, OK, told)


def _has(batches: Mapping[str, Any], modality: str) -> bool:
    return any(modality in kind.split("+") for kind in batches)


__all__ = ["Check", "examine", "examine_rows"]
