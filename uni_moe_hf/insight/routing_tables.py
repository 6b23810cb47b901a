"""
What routers do with rows, counted row by row: the tables from which every figure about routing is made.

Letters: B batch, T sequence, R rows, L sparse layers, M token types with text first, E experts, K experts per token,
N tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.answering import answer_losses
from ..hub.configuration_uni_moe import MODALITIES
from ..mixtures.evaluating import evaluating
from ..mixtures.expert_adapters import expert_names
from ..mixtures.progress import progress_bar
from ..mixtures.routing import TOKEN_TYPES, routers_of, token_types


@dataclass
class RoutingTables:
    r"""
    Args:
        counts (`np.ndarray` of shape `(R, L, M, E)`): Choices of an expert by the tokens of a type, K for each token.
        weights (`np.ndarray` of shape `(R, L, M, E)`): The same by the routers' weights, 1 for each token.
        together (`np.ndarray` of shape `(L, E, E)`): Tokens that went to both of two experts; on the diagonal choices.
        tokens (`np.ndarray` of shape `(N,)`): Vocabulary ids of all real tokens, row after row.
        types (`np.ndarray` of shape `(N,)`): Their types, numbers in `TOKEN_TYPES`.
        heaviest (`np.ndarray` of shape `(L, N)`): The expert with the largest weight for each token.
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
    tokens: np.ndarray
    types: np.ndarray
    heaviest: np.ndarray
    kinds: list[str]
    losses: np.ndarray
    is_right: np.ndarray
    layers: tuple[int, ...]
    expert_names: tuple[str, ...]
    num_experts_per_tok: int

    @property
    def num_tokens(self) -> dict[str, int]:
        """Token type -> real tokens; types without any are left out."""
        found = {name: int((self.types == number).sum()) for number, name in enumerate(TOKEN_TYPES)}
        return {name: count for name, count in found.items() if count}

    @property
    def present(self) -> list[int]:
        """`list[int]`: numbers of the token types that occur."""
        return [number for number, name in enumerate(TOKEN_TYPES) if name in self.num_tokens]

    def paths(self, count: int = 10) -> list[tuple[tuple[int, ...], dict[str, int]]]:
        """
        Args:
            count (`int`, *optional*, defaults to 10): How many.

        Returns:
            `list[tuple]`: the commonest paths of tokens through the layers, as the heaviest expert of each, and how
            many tokens of each type took them.
        """
        found, inverse, times = np.unique(self.heaviest.T, axis=0, return_inverse=True, return_counts=True)
        inverse = inverse.reshape(-1)
        made = []
        for place in np.argsort(-times, kind="stable")[:count]:
            of_path = np.bincount(self.types[inverse == place], minlength=len(TOKEN_TYPES))
            by_type = {TOKEN_TYPES[number]: int(of_path[number]) for number in self.present if of_path[number]}
            made.append((tuple(found[place].tolist()), by_type))
        return made


@dataclass
class Pass:
    """What routers answered in the forward pass that is under way."""

    chosen: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (B * T, K)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def watching(routers: list[tuple[int, nn.Module]]) -> Iterator[Pass]:
    """What routers answer, by the number of their layer; each forward pass takes the place of the one before."""
    seen = Pass()

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
def trace_routing(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> RoutingTables:
    r"""
    Runs a model over batches and counts what its routers choose.

    Args:
        model (`nn.Module`): A Uni-MoE with sparse layers, bare or inside PEFT, quantised or not.
        batches (`Iterable[dict]`): Model inputs on its device; with `labels`, losses are kept as well.

    Returns:
        [`RoutingTables`].

    Raises:
        ValueError: the model has no Uni-MoE inside or no router, or there are no batches.
    """
    root, routers = routers_of(model)
    layers = tuple(dict.fromkeys(layer for layer, _ in routers))
    config = root.config.get_text_config()
    experts = config.num_experts
    together = np.zeros((len(layers), experts, experts), dtype=np.int64)
    found: dict[str, list[np.ndarray]] = {}
    kinds: list[str] = []
    with evaluating(model):
        for batch in progress_bar(batches, desc="routing", unit="batch"):
            with watching(routers) as seen:
                losses, is_right = _answers(model, batch)
            ids = batch["input_ids"].cpu()  # (B, T)
            mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
            types = token_types(root.config, ids)
            chosen = torch.stack([seen.chosen[layer].cpu() for layer in layers])  # (L, B * T, K)
            shares = torch.stack([seen.weights[layer].cpu() for layer in layers])
            heaviest = chosen.gather(2, shares.argmax(dim=2, keepdim=True)).squeeze(2)  # (L, B * T)
            real = mask.flatten()
            counts, weights = _tables(chosen, shares, types, mask, experts)
            made = {"counts": counts, "weights": weights, "losses": losses, "is_right": is_right}
            made |= {"tokens": ids[mask].numpy(), "types": types[mask].numpy()}
            made["heaviest"] = heaviest[:, real].short().numpy()
            for name, values in made.items():
                found.setdefault(name, []).append(values)
            together += _together(chosen[:, real], experts)
            kinds += [kind_of_row(types[row][mask[row]].numpy()) for row in range(len(ids))]
    if not kinds:
        raise ValueError("There are no rows, so there is no routing to look at.")
    joined = {name: np.concatenate(parts, axis=1 if name == "heaviest" else 0) for name, parts in found.items()}
    return RoutingTables(
        **joined,
        together=together,
        kinds=kinds,
        layers=layers,
        expert_names=tuple(expert_names(config)),
        num_experts_per_tok=config.num_experts_per_tok,
    )


def _answers(model: nn.Module, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Runs a batch; losses `(B,)`, NaN for rows without an answer, and whether answers are the likeliest."""
    labels = batch.get("labels")
    if labels is None:
        model(**batch, logits_to_keep=1)
        return np.full(len(batch["input_ids"]), np.nan), np.zeros(len(batch["input_ids"]), dtype=bool)
    losses, is_right = answer_losses(model, dict(batch))
    has_answer = (labels != -100).any(dim=1).cpu().numpy()
    return np.where(has_answer, losses, np.nan), np.array(is_right) & has_answer


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


__all__ = ["RoutingTables", "kind_of_row", "trace_routing"]
