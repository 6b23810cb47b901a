"""
The report of a mixture: routing, specialisation and connectors, as numbers, figures and one page.

Letters: L sparse layers, M token types, E experts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.answering import on_device
from ..evaluation.predictions import write_whole
from ..hub.configuration_uni_moe import MODALITIES, is_sparse
from ..mixtures.evaluating import evaluating
from ..mixtures.expert_adapters import expert_names
from ..mixtures.progress import progress_bar
from ..mixtures.routing import TOKEN_TYPES
from ..training.data import NO_ROW, UniMoEDataCollator
from ..training.row_files import load_rows, spread_over
from ..training.rows import row_modalities
from . import figures
from .connectors import ConnectorReport, nearest_words, root_of, sequence_vectors, statistics_of
from .examples import Example, example_of
from .report_page import page
from .routing_tables import RoutingTables, trace_routing
from .specialisation import FEW_ROWS, information_of_rows, information_of_types, knock_out


Batch = dict[str, Any]


@dataclass
class Side:
    """What was found of one model."""

    name: str
    rows: int = 0
    tables: RoutingTables | None = None
    knock_out: dict[str, dict[str, dict]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # "text" or modality -> norms
    connectors: ConnectorReport | None = None
    words: dict[str, list[tuple[str, float]]] = field(default_factory=dict)


@dataclass
class MixtureReport:
    r"""
    What [`routing_report`] found.

    Args:
        data (`dict`): All numbers, ready for JSON.
        notes (`list[str]`): What could not be measured, and why; a sentence each.
        sides (`list[Side]`): The model, and the other one that it is compared with.
        examples (`list[Example]`): A few rows with the expert of each token.
    """

    data: dict[str, Any]
    notes: list[str]
    sides: list[Side]
    examples: list[Example]

    def to_dict(self) -> dict[str, Any]:
        """`dict` of plain numbers and names, ready for JSON."""
        return self.data

    def figures(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, matplotlib.figure.Figure]`: by name, in the order of the page.

        Raises:
            ImportError: matplotlib is not installed.
        """
        drawn: dict[str, Any] = {}
        titled = [("", self.sides[0], self.data)]
        titled += [("-other", side, self.data["compared_with"]) for side in self.sides[1:]]
        for suffix, side, data in titled:
            drawn |= {f"{name}{suffix}": figure for name, figure in _routing_figures(side, data).items()}
        if "compared_with" in self.data and self.data["compared_with"].get("layers") == self.data.get("layers", 0):
            drawn["compared"] = _compared_lines(self.data)
        panels = {figures.short(side.name, 40): side.vectors for side in self.sides if side.vectors}
        if panels:
            drawn["connectors"] = figures.distributions(panels, f"{self.data['rows']} rows")
        for number, example in enumerate(self.examples, start=1):
            for kind, figure in example.figures().items():
                drawn[f"example-{number}-{kind}"] = figure
        return drawn

    def save(self, folder: str | Path) -> Path:
        r"""
        Args:
            folder (`str` or `Path`): Made if missing. Gets `report.json`, `report.html`, which needs no other file,
                and `figures/*.png` and `*.svg`.

        Returns:
            `Path` of the page.

        Raises:
            OSError: it cannot be written to.
            ImportError: matplotlib is not installed.
        """
        folder = Path(folder)
        drawn = self.figures()
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        pictures = {}
        for name, figure in drawn.items():
            pictures[name] = figures.svg(figure)
            write_whole(folder / "figures" / f"{name}.svg", pictures[name])
            figures.write_png(figure, folder / "figures" / f"{name}.png")
        write_whole(folder / "report.json", json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        write_whole(folder / "report.html", page(self.data, self.notes, pictures, self.examples))
        return folder / "report.html"


def routing_report(
    model: nn.Module,
    processor: Any,
    rows: Any,
    compare: nn.Module | None = None,
    modalities: Sequence[str] | None = None,
    without: Sequence[str] | None = None,
    limit: int | None = 256,
    batch_size: int = 8,
    num_examples: int = 6,
    names: Sequence[str] = ("model", "other"),
) -> MixtureReport:
    r"""
    Looks at what a mixture does with rows: where routers send the tokens of each modality, how much that tells of the
    modality, what is lost without each expert, and how connectors' outputs lie among the words.

    Args:
        model (`nn.Module`): A Uni-MoE, bare or inside PEFT, quantised or not; of a dense one connectors alone.
        processor ([`UniMoEProcessor`]): Of the model.
        rows: In any form, or a source, as in [`~row_files.load_rows`]. Rows with answers also give knock-outs.
        compare (`nn.Module`, *optional*): The same before a stage, for the same rows; its processor is taken to be
            the same.
        modalities (`Sequence[str]`, *optional*): Only rows with at least one of these, or "text" for rows without
            media.
        without (`Sequence[str]`, *optional*): Experts to take out; all by default, none for `[]`.
        limit (`int`, *optional*, defaults to 256): Rows, spread over the data; `None` for all.
        batch_size (`int`, *optional*, defaults to 8): Rows at once.
        num_examples (`int`, *optional*, defaults to 6): Rows whose tokens are shown one by one.
        names (`Sequence[str]`, *optional*): Of the two models, for figures.

    Returns:
        [`MixtureReport`]; `save(folder)` writes it.

    Raises:
        ValueError: the model has no Uni-MoE inside, or is dense and has no connectors; no row has a modality that is
            asked for; there are fewer than 8 rows; or there is no such expert.

    Example:

    ```python
    >>> from uni_moe_hf import routing_report

    >>> routing_report(model, processor, "data/test.jsonl").save("outputs/report")
    ```
    """
    chosen = chosen_rows(rows, processor, modalities, limit, FEW_ROWS)
    notes: list[str] = []
    collator = UniMoEDataCollator(processor, skip_bad_rows=True, describe_rows=True, needs_answers=False)
    sides = [_look(model, processor, collator, chosen, batch_size, without, names[0], notes)]
    if compare is not None:
        try:
            sides.append(_look(compare, processor, collator, chosen, batch_size, without, names[1], notes))
        except ValueError as error:
            raise ValueError(f"'{names[1]}' cannot be compared on the rows of '{names[0]}': {error}") from error
    skipped = Counter(collator.skipped)
    if skipped:
        times = 1 if compare is None else 2
        count = sum(skipped.values()) // times
        notes.append(f"{count} of {len(chosen)} rows could not be read; `uni-moe data check` says which, and why.")
    examples = []
    if sides[0].tables is not None:
        for row in _one_of_each(chosen, processor, num_examples):
            with suppress(ValueError, OSError):  # counted above
                examples.append(example_of(model, processor, row))
    data = _data(sides, notes)
    return MixtureReport(data, list(dict.fromkeys(notes)), sides, examples)


def chosen_rows(
    rows: Any, processor: Any, modalities: Sequence[str] | None, limit: int | None, at_least: int = 1
) -> list[Any]:
    """Rows with the modalities asked for, from all over the data, those of a kind together."""
    if limit is not None and limit < at_least:
        raise ValueError(f"`limit` is {limit}, and intervals need {at_least} rows or more; raise it.")
    if isinstance(rows, str | Path):
        rows = load_rows(rows)
    modalities = [modalities] if isinstance(modalities, str) else modalities
    known: list[tuple[tuple[str, ...], Any]] = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} is {row!r}; rows are dictionaries, as training takes them.")
        kinds: tuple[str, ...] = ("unreadable",)
        with suppress(Exception):  # whatever it is, the collator says why
            kinds = tuple(dict.fromkeys(map(processor._ear, row_modalities(row)[0])))
        known.append((kinds, row))
    if modalities:
        allowed = ("text", *MODALITIES)
        if unknown := [name for name in modalities if name not in allowed]:
            raise ValueError(f"{', '.join(unknown)}: no modality; there are {', '.join(allowed)}.")
        found = Counter(kind for kinds, _ in known for kind in kinds or ("text",))
        if missing := [name for name in modalities if not found[name]]:
            raise ValueError(
                f"No row of {len(known)} holds {' or '.join(missing)}; they hold {', '.join(found) or 'nothing'}."
            )
        known = [(kinds, row) for kinds, row in known if set(kinds or ("text",)) & set(modalities)]
    if limit is not None:
        known = [known[index] for index in spread_over(len(known), limit)]
    if len(known) < at_least:
        raise ValueError(f"There are {len(known)} rows, and intervals need {at_least} or more; give more rows.")
    return [row for _, row in sorted(known, key=lambda pair: pair[0])]


def _one_of_each(rows: list[Any], processor: Any, count: int) -> list[Any]:
    """The first rows of each kind in turn."""
    by_kind: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        with suppress(Exception):
            by_kind.setdefault(tuple(map(processor._ear, row_modalities(row)[0])), []).append(row)
    in_turn = [alike[place] for place in range(count) for alike in by_kind.values() if place < len(alike)]
    return in_turn[:count]


@torch.no_grad()
def _look(
    model: nn.Module,
    processor: Any,
    collator: UniMoEDataCollator,
    rows: list[Any],
    batch_size: int,
    without: Sequence[str] | None,
    name: str,
    notes: list[str],
) -> Side:
    """Reads the rows once, runs towers and connectors once, and the decoder as often as it takes."""
    root = root_of(model)
    config = root.config.get_text_config()
    sparse = is_sparse(config)
    if not sparse and not root.config.modalities:
        raise ValueError("This model is dense and has no connectors, so there is nothing to report.")
    if sparse and without:
        named = expert_names(config)
        if unknown := [each for each in without if each not in named]:
            raise ValueError(f"There is no expert '{unknown[0]}'; the model has {', '.join(named)}.")
    side = Side(name)
    with evaluating(model):
        batches: list[Batch] = []
        answered: list[np.ndarray] = []
        vectors: dict[str, list[torch.Tensor]] = {}
        for batch in _read(collator, rows, batch_size):
            batch = _without_media(root, on_device(batch, model))
            if "mm_encoder_outputs" in batch:
                for kind, found in sequence_vectors(model, batch, batch["mm_encoder_outputs"]).items():
                    vectors.setdefault(kind, []).append(found.cpu())
            batches.append(batch)
            side.rows += len(batch["input_ids"])
            answered.append((batch["labels"] != -100).any(dim=1).cpu().numpy())
        if not batches:
            raise ValueError(f"None of {len(rows)} rows could be read: {dict(collator.skipped)}.")
        if vectors:
            joined = {kind: torch.cat(found) for kind, found in vectors.items()}
            side.vectors = {kind: found.norm(dim=-1).numpy() for kind, found in joined.items()}
            side.connectors = statistics_of(joined)
            side.words = nearest_words(model, processor.tokenizer, joined)
        if not sparse:
            notes.append(f"{name} is dense, so there is no routing to look at; its connectors are shown alone.")
            return side
        side.tables = trace_routing(model, batches)
        if len(side.tables.kinds) < FEW_ROWS:
            raise ValueError(f"{len(side.tables.kinds)} rows could be read, and intervals need {FEW_ROWS} or more.")
        experts = side.tables.expert_names if without is None else without
        has_answer = np.concatenate(answered)
        if not np.isfinite(side.tables.losses[has_answer]).all():
            raise ValueError(f"The loss of {name} on these rows is no number; `uni-moe doctor` looks for the cause.")
        if not has_answer.any():
            notes.append("No row has an answer, so there is no loss, and no expert was taken out.")
        elif len(side.tables.expert_names) == 1:
            notes.append("There is one expert, so none can be taken out.")
        elif experts:
            rises = knock_out(model, batches, side.tables, experts)
            side.knock_out = {e: {k: f.to_dict() for k, f in kinds.items()} for e, kinds in rises.items()}
    return side


def _read(collator: UniMoEDataCollator, rows: list[Any], batch_size: int) -> Iterable[Batch]:
    for start in progress_bar(range(0, len(rows), batch_size), desc="reading rows", unit="batch"):
        batch = collator(rows[start : start + batch_size])
        described = batch.pop("rows")
        batch.pop("num_skipped")
        if not described[0].startswith(NO_ROW):
            yield batch


def _without_media(root: nn.Module, batch: Batch) -> Batch:
    """A batch with what connectors gave in place of clips, which take more room and time."""
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
    media = {name: value for name, value in batch.items() if name not in (*text, "mm_token_type_ids")}
    return text | ({"mm_encoder_outputs": root.encode_media(**media)} if media else {})


def _data(sides: list[Side], notes: list[str]) -> dict[str, Any]:
    """All numbers."""
    first = sides[0]
    data: dict[str, Any] = {"model": first.name, "notes": list(dict.fromkeys(notes))}
    described = [_described(side) for side in sides]
    data |= described[0]
    if len(sides) > 1:
        data["compared_with"] = {"model": sides[1].name, **described[1]}
        if all(side.tables is not None for side in sides):
            ours, others = sides[0].tables, sides[1].tables
            if ours.heaviest.shape == others.heaviest.shape and ours.expert_names == others.expert_names:
                data["same_choice"] = (ours.heaviest == others.heaviest).mean(axis=1).round(4).tolist()
    return data


def _described(side: Side) -> dict[str, Any]:
    data: dict[str, Any] = {"rows": side.rows}
    tables = side.tables
    if side.connectors is not None:
        data["connectors"] = side.connectors.to_dict() | {"nearest_words": side.words}
    if tables is None:
        return data
    total = tables.counts.sum(axis=0)  # (L, M, E)
    data |= {
        "rows": len(tables.kinds),
        "kinds": dict(Counter(tables.kinds)),
        "tokens": tables.num_tokens,
        "experts": list(tables.expert_names),
        "layers": list(tables.layers),
        "num_experts_per_tok": tables.num_experts_per_tok,
        "utilisation": {
            "by choice": _rounded(utilisation(tables.counts, tables.present)),
            "by router weight": _rounded(utilisation(tables.weights, tables.present)),
        },
        "spread": {
            TOKEN_TYPES[m]: dict(zip(tables.expert_names, _shares(total[:, m].sum(axis=0)), strict=True))
            for m in tables.present
        },
        "made_of": {
            expert: dict(zip(tables.num_tokens, _shares(total[:, tables.present, number].sum(axis=0)), strict=True))
            for number, expert in enumerate(tables.expert_names)
        },
        "paths": [
            {"experts": [tables.expert_names[expert] for expert in path], "tokens": by_type}
            for path, by_type in tables.paths()
        ],
        "together": tables.together.sum(axis=0).tolist(),
        "per_layer": {
            "by choice": per_layer(tables.counts),
            "by router weight": per_layer(tables.weights),
        },
        "information": {
            "of token types": [each.to_dict() for each in information_of_types(tables)],
            "of rows": [each.to_dict() for each in information_of_rows(tables)],
        },
        "knock_out": side.knock_out,
    }
    known = ~np.isnan(tables.losses)
    data["losses"] = {
        kind: float(tables.losses[known & (np.array(tables.kinds) == kind)].mean())
        for kind in data["kinds"]
        if (known & (np.array(tables.kinds) == kind)).any()
    }
    return data


def utilisation(per_row: np.ndarray, present: list[int]) -> dict[str, np.ndarray]:
    """
    Args:
        per_row (`np.ndarray` of shape `(R, L, M, E)`): Choices or weights.
        present (`list[int]`): Token types that occur.

    Returns:
        `dict[str, np.ndarray]`: "all", then each type -> load over fair share `(L, E)`, 1 where the load is even.
    """
    total = per_row.sum(axis=0)
    found = {"all": total.sum(axis=1)} | {TOKEN_TYPES[m]: total[:, m] for m in present}
    return {name: load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) for name, load in found.items()}


def per_layer(per_row: np.ndarray) -> dict[str, list[float]]:
    """
    Args:
        per_row (`np.ndarray` of shape `(R, L, M, E)`): Choices or weights.

    Returns:
        `dict[str, list[float]]`: for each layer the entropy of the load in nats, its diversity `exp(entropy) / E`, the
        share of experts without a token, and the variation, standard deviation over mean.
    """
    load = per_row.sum(axis=(0, 2)).astype(float)  # (L, E)
    shares = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-9)
    entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(axis=1)
    return {
        "entropy": entropy.round(5).tolist(),
        "diversity": (np.exp(entropy) / load.shape[1]).round(5).tolist(),
        "dead": (load == 0).mean(axis=1).round(5).tolist(),
        "variation": (load.std(axis=1) / np.maximum(load.mean(axis=1), 1e-9)).round(5).tolist(),
    }


def _rounded(tables: Mapping[str, np.ndarray]) -> dict[str, list]:
    return {name: table.round(4).tolist() for name, table in tables.items()}


def _shares(counts: np.ndarray) -> list[float]:
    return (counts / max(counts.sum(), 1)).round(5).tolist()


def _routing_figures(side: Side, data: Mapping[str, Any]) -> dict[str, Any]:
    """Of one model."""
    tables = side.tables
    if tables is None:
        return {}
    experts, layers = [figures.short(name) for name in tables.expert_names], tables.layers
    tokens = sum(tables.num_tokens.values())
    note = (
        f"{side.name}: {len(tables.kinds)} rows, {tokens:,} tokens, top-{tables.num_experts_per_tok} of {len(experts)}"
    )
    total = tables.counts.sum(axis=0)  # (L, M, E)
    types = list(tables.num_tokens)
    drawn = {
        "utilisation": figures.utilisation(
            utilisation(tables.counts, tables.present), layers, experts, note, "choices"
        ),
        "utilisation-by-weight": figures.utilisation(
            utilisation(tables.weights, tables.present), layers, experts, note, "router weight"
        ),
        "spread": figures.spread(
            total[:, tables.present].sum(axis=0), types, experts, list(tables.num_tokens.values()), note
        ),
        "paths": figures.paths(tables.paths(), tokens, layers, experts, types, note),
    }
    if tables.num_experts_per_tok > 1 and len(experts) > 1:
        drawn["together"] = figures.together(tables.together.sum(axis=0).astype(float), experts, note)
    by_choice, by_weight = data["per_layer"]["by choice"], data["per_layer"]["by router weight"]
    titles = {
        "entropy": "entropy, nats",
        "diversity": "diversity exp(H)/N",
        "dead": "dead share",
        "variation": "variation",
    }
    drawn["layers"] = figures.lines(
        {title: {"choices": by_choice[key], "weight": by_weight[key]} for key, title in titles.items()}, layers, note
    )
    drawn["information"] = figures.information(
        {
            "expert and token's modality": data["information"]["of token types"],
            "expert and row's media": data["information"]["of rows"],
        },
        layers,
        note,
    )
    if side.knock_out:
        rises = {figures.short(name): kinds for name, kinds in side.knock_out.items()}
        drawn["knock-out"] = figures.knock_out(rises, note)
    return drawn


def _compared_lines(data: Mapping[str, Any]) -> Any:
    """Both models, layer by layer."""
    other = data["compared_with"]
    sides = ((figures.short(data["model"], 40), data), (figures.short(other["model"], 40), other))
    panels: dict[str, dict[str, list[float]]] = {
        "diversity exp(H)/N": {name: side["per_layer"]["by choice"]["diversity"] for name, side in sides}
    }
    for title, key in (("MI, token's modality", "of token types"), ("MI, row's media", "of rows")):
        panels[title] = {name: [e["value"]["value"] for e in side["information"][key]] for name, side in sides}
    if "same_choice" in data:
        panels["tokens with the same expert"] = {"both": data["same_choice"]}
    return figures.lines(panels, data["layers"], f"{data['rows']} rows")


__all__ = ["MixtureReport", "Side", "per_layer", "routing_report", "utilisation"]
