"""
Where tokens are routed: which experts see which modality.

Letters: B batch, T sequence, L sparse layers, M modalities with text first, E experts, K experts per token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local
from typing import Any

import numpy as np
import torch
from torch import nn

from ..hub.compat_uni_moe import cache_of
from ..hub.configuration_uni_moe import MODALITIES
from .expert_adapters import expert_names


# In the order of `mm_token_type_ids`.
TOKEN_TYPES = ("text", *MODALITIES)


@dataclass(frozen=True)
class RoutingReport:
    r"""
    Where tokens were routed.

    Args:
        counts (`torch.LongTensor` of shape `(L, M, E)`): How often a router sent a token of a modality to an expert.
        layers (`tuple[int]`): Numbers of the sparse layers.
        expert_names (`tuple[str]`): Of the E experts.
        num_experts_per_tok (`int`): K.
    """

    counts: torch.Tensor
    layers: tuple[int, ...]
    expert_names: tuple[str, ...]
    num_experts_per_tok: int
    modalities: tuple[str, ...] = TOKEN_TYPES

    @property
    def num_tokens(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(L, M)`: tokens that each router saw."""
        return self.counts.sum(dim=-1) // self.num_experts_per_tok

    @property
    def load(self) -> torch.Tensor:
        """
        `torch.Tensor` of shape `(L, M, E)`, float64: share of a modality's routes that went to each expert. Rows sum
        to 1, or are 0 where there were no tokens of the modality.
        """
        counts = self.counts.double()
        return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def entropy(self) -> torch.Tensor:
        """
        `torch.Tensor` of shape `(L, M)`, float64: entropy of [`load`] over its largest possible value, the logarithm
        of E. 1 is balanced; with K experts per token, `log(K) / log(E)` is collapsed; NaN without tokens.
        """
        load = self.load
        entropy = -torch.xlogy(load, load).sum(dim=-1) / math.log(max(2, load.shape[-1]))
        return entropy.masked_fill(self.num_tokens == 0, math.nan)

    @property
    def specialisation(self) -> torch.Tensor:
        """
        `torch.Tensor` of shape `(L,)`, float64: mutual information of expert and modality over its bound, 0 where the
        expert tells nothing of the token's modality, 1 where it tells all. A few tokens lie above 0 by chance alone.
        """
        counts = self.counts.double().numpy()
        shares = counts.sum(axis=-1) / np.maximum(counts.sum(axis=(-2, -1))[:, None], 1)  # (L, M)
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=-1)
        bound = np.minimum(entropy, math.log(max(2, counts.shape[-1])))
        found = mutual_information(counts)
        return torch.from_numpy(np.divide(found, bound, out=np.zeros_like(found), where=bound > 1e-9))

    @property
    def dead(self) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(L, M, E)`: experts that no token of a modality that was there was sent to."""
        return (self.counts == 0) & (self.num_tokens > 0).unsqueeze(-1)

    def dead_experts(self) -> list[tuple[int, str]]:
        """`list` of (layer, expert name): experts that no token of any modality was sent to."""
        idle = (self.counts.sum(dim=1) == 0) & (self.num_tokens.sum(dim=1) > 0).unsqueeze(-1)  # (L, E)
        return [(self.layers[layer], self.expert_names[expert]) for layer, expert in idle.nonzero().tolist()]

    def to_dict(self) -> dict[str, Any]:
        """`dict` of plain numbers and names, ready for JSON; modalities without tokens are left out."""
        present = [(i, name) for i, name in enumerate(self.modalities) if self.num_tokens[:, i].any()]
        return {
            "experts": list(self.expert_names),
            "num_experts_per_tok": self.num_experts_per_tok,
            "layers": [
                {
                    "layer": layer,
                    "modalities": {
                        name: {
                            "tokens": int(self.num_tokens[row, i]),
                            "load": [round(share, 6) for share in self.load[row, i].tolist()],
                            "entropy": round(float(self.entropy[row, i]), 6),
                            "dead": [e for e, idle in zip(self.expert_names, self.dead[row, i], strict=True) if idle],
                        }
                        for i, name in present
                    },
                }
                for row, layer in enumerate(self.layers)
            ],
            "dead_experts": [list(pair) for pair in self.dead_experts()],
        }

    def __str__(self) -> str:
        width = max(8, *(len(name) + 2 for name in self.expert_names))
        head = "".join(f"{name:>{width}}" for name in self.expert_names)
        lines = [f"{'layer':<7}{'modality':<10}{'tokens':>9}{'entropy':>9}{head}   dead"]
        for row, layer in enumerate(self.layers):
            for i, name in enumerate(self.modalities):
                if not self.num_tokens[row, i]:
                    continue
                load = "".join(f"{share:>{width}.1%}" for share in self.load[row, i].tolist())
                dead = [e for e, idle in zip(self.expert_names, self.dead[row, i], strict=True) if idle]
                tokens, entropy = int(self.num_tokens[row, i]), float(self.entropy[row, i])
                lines.append(f"{layer:<7}{name:<10}{tokens:>9}{entropy:>9.3f}{load}   {', '.join(dead) or '-'}")
        return "\n".join(lines)


def mutual_information(table: np.ndarray) -> np.ndarray:
    """
    Args:
        table (`np.ndarray` of shape `(..., M, E)`): Counts.

    Returns:
        `np.ndarray` of shape `(...)`: in nats; 0 for an empty table.
    """
    total = table.sum(axis=(-2, -1), keepdims=True)
    joint = table / np.maximum(total, 1)
    product = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, product, out=np.ones_like(joint), where=joint > 0)
    return np.maximum((joint * np.log(ratio)).sum(axis=(-2, -1)), 0.0)


class RoutingRecorder:
    """Counts routes while [`record_routing`] is open; [`report`] may be asked for at any time."""

    def __init__(self, config: Any, layers: tuple[int, ...], generation_config: Any = None):
        text_config = config.get_text_config()
        self.config = config
        self.layers = layers
        ends = [
            getattr(c, name, None)
            for c in (text_config, generation_config)
            for name in ("eos_token_id", "pad_token_id")
        ]
        ends = [token_id for end in ends for token_id in (end if isinstance(end, list) else [end])]
        self._end_ids = torch.tensor(sorted({token_id for token_id in ends if token_id is not None}), dtype=torch.long)
        self.num_experts, self.top_k = text_config.num_experts, text_config.num_experts_per_tok
        self.expert_names = tuple(expert_names(text_config))
        self._counts = dict.fromkeys(self.layers)  # layer -> (M, E) on its router's device
        # Of each thread: `types` (B * T,) of the tokens that are under way, M for those not counted; `waiting` layers.
        self._pass = local()
        self._lock = Lock()
        self.paused = False  # while it is True, nothing is counted

    def report(self) -> RoutingReport:
        """
        Returns:
            [`RoutingReport`] of all that was counted so far.
        """
        empty = torch.zeros(len(TOKEN_TYPES), self.num_experts, dtype=torch.long)
        with self._lock:
            counts = [empty if counted is None else counted[:-1].cpu().clone() for counted in self._counts.values()]
        return RoutingReport(torch.stack(counts), self.layers, self.expert_names, self.top_k)

    def reset(self) -> None:
        """Forgets what was counted."""
        with self._lock:
            self._counts = dict.fromkeys(self.layers)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Notes the types of the tokens that come, and that every router is to count them once."""
        if args:
            kwargs = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        ids, embeds, cache = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), cache_of(kwargs)
        tokens = ids if ids is not None else embeds
        self._pass.waiting = set()
        if tokens is None or self.paused:  # without tokens the model itself will complain
            return
        if ids is not None:
            types = token_types(self.config, ids)
        elif kwargs.get("mm_token_type_ids") is not None:
            types = kwargs["mm_token_type_ids"].to(tokens.device, torch.long)
        else:
            types = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)  # (B, T)
        past = 0 if cache is None else cache.get_seq_length()
        is_real = _real_tokens(kwargs.get("attention_mask"), types.shape, int(past))
        if is_real is not None:
            types = types.masked_fill(~is_real.to(types.device), len(TOKEN_TYPES))
        if ids is not None and types.shape[1] == 1 and int(past) > 0:
            # Rows of a batch that have ended get a token in every step until all have.
            types = types.masked_fill(torch.isin(ids, self._end_ids.to(ids.device)), len(TOKEN_TYPES))
        self._pass.types = types.flatten()
        self._pass.waiting = set(self.layers)

    def _after_router(self, layer: int, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Adds a router's choices. Gradient checkpointing runs it a second time, without the model around it."""
        waiting = getattr(self._pass, "waiting", ())
        if layer not in waiting:
            return
        waiting.discard(layer)
        chosen = output[2].detach()  # (N, K)
        types = self._pass.types.to(chosen.device)  # (N,)
        cells = (types.unsqueeze(-1) * self.num_experts + chosen).flatten()  # (N * K,)
        with self._lock:
            if self._counts[layer] is None:
                # One row more for padding, so that nothing has to be picked out, which would wait for the device.
                shape = (len(TOKEN_TYPES) + 1, self.num_experts)
                self._counts[layer] = torch.zeros(shape, dtype=torch.long, device=chosen.device)
            self._counts[layer].view(-1).scatter_add_(0, cells, torch.ones_like(cells))


def token_types(config: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """
    Args:
        config ([`UniMoEConfig`]): With the ids of placeholders.
        input_ids (`torch.LongTensor` of shape `(B, T)`): Placeholders expanded.

    Returns:
        `torch.LongTensor` of shape `(B, T)`: each token's number in `TOKEN_TYPES`.
    """
    types = torch.zeros_like(input_ids)
    for number, modality in enumerate(MODALITIES, start=1):
        types.masked_fill_(input_ids == getattr(config, f"{modality}_token_id", -1), number)
    return types


def routers_of(model: nn.Module) -> tuple[nn.Module, list[tuple[int, nn.Module]]]:
    """
    Args:
        model (`nn.Module`): A Uni-MoE with sparse layers, bare or inside PEFT, a trainer or DDP.

    Returns:
        `tuple`: the module that sees a whole batch, and the routers with the numbers of their layers. PEFT keeps a
        trained copy of a router beside the original: both are here, and one of them runs.

    Raises:
        ValueError: the model has no Uni-MoE inside, or no router.
    """
    # By name: a checkpoint's own code has its own copy of every class.
    named = [(name, module, type(module).__name__) for name, module in model.named_modules()]
    roots = [module for _, module, kind in named if kind == "UniMoEModel"]
    roots = roots or [
        module for _, module, _ in named if any(k.__name__ == "SparseDecoderMixin" for k in type(module).__mro__)
    ]
    if not roots:
        raise ValueError(f"A {type(model).__name__} holds no Uni-MoE, so there is no routing to look at.")
    routers = [
        (int(name.split("layers.")[-1].split(".")[0]), module)
        for name, module, kind in named
        if kind == "UniMoETopKRouter"
    ]
    if not routers:
        raise ValueError("All layers of this model are dense, so there is no routing to look at; grow experts first.")
    return roots[0], routers


def _real_tokens(mask: Any, shape: torch.Size, past: int) -> torch.Tensor | None:
    """`(B, T)` which of the tokens under way are no padding; `None` when all are."""
    if not isinstance(mask, torch.Tensor):
        return None
    length = shape[1]
    if mask.dim() == 2:
        return mask[:, past : past + length].bool() if mask.shape[1] > length else mask.bool()
    # A ready-made mask `(B, 1, T, keys)` for a static cache: padding does not even see itself.
    positions = torch.arange(length, device=mask.device)
    own = mask[:, 0, positions, past + positions]
    return (own if own.dtype == torch.bool else own == 0).expand(shape)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    r"""
    Counts which experts the tokens of each modality are sent to, in forward passes, `generate` and training alike.

    Every real token counts once per layer: padding does not, nor what gradient checkpointing computes again, nor the
    filling of rows that have ended, by the ids in the model's configs. Beams and an assistant's rejected guesses are
    tokens like any other; padding in a flex attention mask that was made beforehand cannot be told from the rest. The
    model may run in several threads.

    Args:
        model (`nn.Module`): A Uni-MoE with sparse layers, bare or inside PEFT, a trainer or DDP.

    Yields:
        [`RoutingRecorder`], whose `report()` gives a [`RoutingReport`].

    Raises:
        ValueError: the model has no Uni-MoE inside, or no router.

    Example:

    ```python
    >>> from uni_moe_hf import record_routing

    >>> with record_routing(model) as routing:
    ...     answer = model.generate(**inputs)
    >>> print(routing.report())
    ```
    """
    root, routers = routers_of(model)
    layers = tuple(dict.fromkeys(layer for layer, _ in routers))
    recorder = RoutingRecorder(root.config, layers, getattr(model, "generation_config", None))
    handles = [root.register_forward_pre_hook(recorder._before_model, with_kwargs=True)]
    for layer, router in routers:
        handles.append(
            router.register_forward_hook(lambda _, __, output, layer=layer: recorder._after_router(layer, output))
        )
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "TOKEN_TYPES",
    "RoutingRecorder",
    "RoutingReport",
    "mutual_information",
    "record_routing",
    "routers_of",
    "token_types",
]
