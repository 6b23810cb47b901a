"""
What routers do with rows, counted row by row: the tables from which every figure about routing is made.

Letters: R rows, L sparse layers, M token types with text first, E experts, K experts per token, N tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.answering import answer_losses
from ..hub.configuration_uni_moe import MODALITIES
from ..mixtures.routing import TOKEN_TYPES, routers_of, token_types


@dataclass
class RoutingTables:
    r"""
    Args:
        counts (`np.ndarray` of shape `(R, L, M, E)`): Choices of an expert by the tokens of a type, K for each token.
        weights (`np.ndarray` of shape `(R, L, M, E)`): The same by the routers' weights, 1 for each token.
        together (`np.ndarray` of shape `(L, E, E)`): Tokens that went to both of two experts; on the diagonal choices.
        paths (`dict[str, Counter]`): Token type -> how many tokens had a path, the heaviest expert of each layer.
        kinds (`list[str]`): Of each row its modalities, such as "image+speech", or "text".
        losses (`np.ndarray` of shape `(R,)`): Mean loss of each row's answer in nats; NaN without an answer.
        is_right (`np.ndarray` of shape `(R,)`): Whether each token of the answer is the likeliest one.
        layers (`tuple[int]`): Numbers of the sparse layers.
        expert_names (`tuple[str]`): Of the E experts.
        num_experts_per_tok (`int`): K.
    """

    counts: np.ndarray
    weights: np.ndarray
    together: np.ndarray
    paths: dict[str, Counter]
    kinds: list[str]
    losses: np.ndarray
    is_right: np.ndarray
    layers: tuple[int, ...]
    expert_names: tuple[str, ...]
    num_experts_per_tok: int

    @property
    def num_tokens(self) -> dict[str, int]:
        """Token type -> real tokens; types without any are left out."""
        counts = self.counts[:, 0].sum(axis=(0, 2)) // self.num_experts_per_tok  # (M,)
        return {name: int(count) for name, count in zip(TOKEN_TYPES, counts, strict=True) if count}

    @property
    def types(self) -> list[int]:
        """`list[int]`: numbers of the token types that occur."""
        return [number for number, name in enumerate(TOKEN_TYPES) if name in self.num_tokens]


@dataclass
class TokenRoutes:
    """
    One row's tokens.

    Args:
        input_ids (`np.ndarray` of shape `(N,)`): Placeholders expanded, without padding.
        types (`np.ndarray` of shape `(N,)`): In `TOKEN_TYPES`.
        experts (`np.ndarray` of shape `(L, N)`): The heaviest expert of each token.
        weights (`np.ndarray` of shape `(L, N)`): Its weight.
    """

    input_ids: np.ndarray
    types: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


@dataclass
class _Pass:
    """What routers answered in the forward pass that is under way."""

    chosen: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (B * T, K)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def _watching(routers: list[tuple[int, nn.Module]]) -> Iterator[_Pass]:
    seen = _Pass()

    def note(layer: int, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        seen.weights[layer], seen.chosen[layer] = output[1].detach().float(), output[2].detach()

    handles = [
        router.register_forward_hook(lambda _, __, output, layer=layer: note(layer, output))
        for layer, router in routers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_routing(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], keep: int = 0
) -> tuple[RoutingTables, list[TokenRoutes]]:
    r"""
    Runs a model over batches and counts what its routers choose.

    Args:
        model (`nn.Module`): A Uni-MoE with sparse layers, bare or inside PEFT, quantised or not.
        batches (`Iterable[dict]`): Model inputs on its device; with `labels`, losses are kept as well.
        keep (`int`, *optional*, defaults to 0): Rows whose single tokens are returned: the first of each kind, then
            the next of each, until so many are found.

    Returns:
        `tuple`: the tables, and the routes of the tokens of up to `keep` rows in the order of the rows' kinds.

    Raises:
        ValueError: the model has no Uni-MoE inside or no router, or there are no batches.
    """
    root, routers = routers_of(model)
    layers = tuple(dict.fromkeys(layer for layer, _ in routers))
    config = root.config.get_text_config()
    experts, top_k = config.num_experts, config.num_experts_per_tok
    names = tuple(config.expert_names or map(str, range(experts)))
    counts, weights, losses, is_right, kinds = [], [], [], [], []
    together = np.zeros((len(layers), experts, experts), dtype=np.int64)
    paths: dict[str, Counter] = {name: Counter() for name in TOKEN_TYPES}
    kept: dict[str, list[TokenRoutes]] = {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            with _watching(routers) as seen:
                if batch.get("labels") is not None:
                    means, right = answer_losses(model, dict(batch))
                else:
                    model(**batch, logits_to_keep=1)
                    means, right = [float("nan")] * len(batch["input_ids"]), [False] * len(batch["input_ids"])
            ids = batch["input_ids"].cpu()
            mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
            types = token_types(root.config, ids)  # (B, T)
            rows = len(ids)
            has_label = [True] * rows if batch.get("labels") is None else (batch["labels"] != -100).any(1).tolist()
            losses += [mean if known else float("nan") for mean, known in zip(means, has_label, strict=True)]
            is_right += right
            chosen = torch.stack([seen.chosen[layer].cpu() for layer in layers])  # (L, B * T, K)
            shares = torch.stack([seen.weights[layer].cpu() for layer in layers])  # (L, B * T, K)
            batch_counts, batch_weights = _tables(chosen, shares, types, mask, experts)
            counts.append(batch_counts)
            weights.append(batch_weights)
            together += _together(chosen[:, mask.flatten()], experts)
            heaviest = chosen.gather(2, shares.argmax(dim=2, keepdim=True)).squeeze(2)  # (L, B * T)
            for number, name in enumerate(TOKEN_TYPES):
                of_type = heaviest[:, (mask & (types == number)).flatten()]
                if of_type.shape[1]:
                    found, times = np.unique(of_type.T.numpy(), axis=0, return_counts=True)
                    paths[name].update(
                        {tuple(path): int(n) for path, n in zip(found.tolist(), times.tolist(), strict=True)}
                    )
            top = shares.max(dim=2).values
            for row in range(rows):
                kind = kind_of_row(types[row][mask[row]].numpy())
                kinds.append(kind)
                if len(kept.setdefault(kind, [])) < keep:
                    span = slice(row * ids.shape[1], (row + 1) * ids.shape[1])
                    here = mask[row]
                    kept[kind].append(
                        TokenRoutes(
                            ids[row][here].numpy(),
                            types[row][here].numpy(),
                            heaviest[:, span][:, here].numpy(),
                            top[:, span][:, here].numpy(),
                        )
                    )
    finally:
        for module, training in modes.items():
            module.training = training
    if not counts:
        raise ValueError("There are no rows, so there is no routing to look at.")
    tables = RoutingTables(
        np.concatenate(counts),
        np.concatenate(weights),
        together,
        paths,
        kinds,
        np.array(losses),
        np.array(is_right),
        layers,
        names,
        top_k,
    )
    in_turn = [routes[place] for place in range(keep) for routes in kept.values() if place < len(routes)]
    return tables, in_turn[:keep]


def kind_of_row(types: np.ndarray) -> str:
    """Of the types of its tokens: "text", or its modalities joined by "+"."""
    held = [modality for number, modality in enumerate(MODALITIES, start=1) if (types == number).any()]
    return "+".join(held) or "text"


def _tables(
    chosen: torch.Tensor, shares: torch.Tensor, types: torch.Tensor, mask: torch.Tensor, experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choices and weights `(B, L, M, E)` of a batch: `(L, B * T, K)` each, of tokens `(B, T)`."""
    layers, _, top_k = chosen.shape
    rows, length = types.shape
    cells = torch.arange(rows)[:, None] * len(TOKEN_TYPES) + types  # (B, T)
    cells = cells[mask][:, None] * experts  # (N, 1)
    counts = torch.zeros(layers, rows * len(TOKEN_TYPES) * experts, dtype=torch.long)
    weights = torch.zeros(layers, rows * len(TOKEN_TYPES) * experts, dtype=torch.float64)
    real = mask.flatten()
    for layer in range(layers):
        at = (cells + chosen[layer, real]).flatten()  # (N * K,)
        counts[layer].scatter_add_(0, at, torch.ones_like(at))
        weights[layer].scatter_add_(0, at, shares[layer, real].flatten().double())
    shape = (layers, rows, len(TOKEN_TYPES), experts)
    return counts.view(shape).transpose(0, 1).numpy(), weights.view(shape).transpose(0, 1).numpy()


def _together(chosen: torch.Tensor, experts: int) -> np.ndarray:
    """Tokens `(L, E, E)` that went to both experts, of choices `(L, N, K)`."""
    made = []
    for layer in chosen:
        is_chosen = torch.zeros(len(layer), experts).scatter_(1, layer, 1.0)  # (N, E)
        made.append((is_chosen.T @ is_chosen).round().long())
    return torch.stack(made).numpy()


__all__ = ["RoutingTables", "TokenRoutes", "kind_of_row", "trace_routing"]
