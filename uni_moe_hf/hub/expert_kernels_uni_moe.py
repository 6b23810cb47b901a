"""
How LoRA experts are computed: the routes behind `experts_implementation`.

| name | what it is | chosen by "auto" |
|---|---|---|
| "eager" | the readable reference, [`UniMoELoraExperts.forward`] | quantised stacks, sizes that no other route takes |
| "segmented" | rows sorted by expert, one dense product after the other, backward written by hand | elsewhere |
| "grouped_mm" | one grouped product for all experts, plain autograd | compiled and exported code; bases that train |
| "batched_mm" | gathered copies of weights, static shapes | on an accelerator up to 8 tokens without gradients; meta |

The choice depends on what is computed, never on timings: a run that is resumed takes the routes that it took.

Letters: N tokens, K experts per token, S = N * K routed rows, E experts, H hidden, I intermediate, R LoRA rank; n rows
of one expert.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .compat_uni_moe import grouped_linear
from .expert_segments_uni_moe import FEW_TOKENS, FrozenWeights, LoraFactors, segmented_experts


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a weight is none to compute with directly: torchao's hold `qdata`, bitsandbytes' are packed integers."""
    return any(hasattr(tensor, name) for name in ("qdata", "quant_state")) or not tensor.is_floating_point()


def auto_lora_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The route that [`choose_route`] names.

    Arguments and result as in [`grouped_mm_lora_experts_forward`].
    """
    route = choose_route(self, hidden_states)
    run = _segmented if route == "segmented" else ROUTES[route]  # whether it can be is not asked twice
    return run(self, hidden_states, top_k_index, top_k_weights)


def own_index(self: nn.Module, top_k_index: torch.Tensor) -> torch.Tensor:
    """
    Args:
        top_k_index (`torch.Tensor` of shape `(N, K)`): Experts of each token. Where experts are spread over processes,
            the number behind the last stands for those of others, and its weight is 0.

    Returns:
        `torch.Tensor` of the same shape: numbers of experts that are here.
    """
    return top_k_index.clamp(max=self.num_experts - 1)


def choose_route(self: nn.Module, hidden_states: torch.Tensor) -> str:
    """
    The rule behind `experts_implementation="auto"`.

    Args:
        self (`UniMoELoraExperts`): The experts.
        hidden_states (`torch.Tensor` of shape `(N, H)`): One row per token.

    Returns:
        `str`: "segmented", "batched_mm" or "grouped_mm" (which hands what it cannot serve on to "eager").
    """
    if not torch.compiler.is_compiling() and not _has_values(hidden_states):
        return "batched_mm"
    if not _can_be_segmented(self, hidden_states):
        return "grouped_mm" if _has_grouped_mm(hidden_states) else "batched_mm"
    if hidden_states.device.type != "cpu" and hidden_states.shape[0] <= FEW_TOKENS and not torch.is_grad_enabled():
        return "batched_mm"
    return "segmented"


def grouped_mm_lora_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Rows sorted by expert, one grouped product for all experts.

    Args:
        self (`UniMoELoraExperts`): Holds the weights.
        hidden_states (`torch.Tensor` of shape `(N, H)`): One row per token.
        top_k_index (`torch.Tensor` of shape `(N, K)`): Expert of each routed row, `int64` in `[0, E)`.
        top_k_weights (`torch.Tensor` of shape `(N, K)`): Weight of each routed row.

    Returns:
        `torch.Tensor` of shape `(N, H)`.
    """
    if _has_quantised_stacks(self) or not _fits_grouped_mm(self, hidden_states):
        return self.eager_forward(hidden_states, top_k_index, top_k_weights)
    if not _has_grouped_mm(hidden_states):
        return batched_mm_lora_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    top_k_index = own_index(self, top_k_index)
    num_tokens, top_k = top_k_index.shape
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (S,)
    token_of_row = order // top_k  # (S,)
    experts = torch.arange(self.num_experts, device=expert_of_row.device)
    offsets = torch.searchsorted(expert_of_row, experts, right=True).to(torch.int32)  # (E,), end of each expert's rows

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if grouped_linear is not None:
            return grouped_linear(rows, weight, offsets)
        return F.grouped_mm(rows.to(weight.dtype), weight.transpose(-2, -1), offs=offsets)

    rows = hidden_states[token_of_row]  # (S, H)
    weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (S, 1)
    output = _rows_through_experts(self, hidden_states, rows, weights, token_of_row, product)

    unsort = torch.empty_like(order)
    unsort[order] = torch.arange(order.numel(), device=order.device)
    return _sum_over_k(output, unsort, num_tokens, top_k)


def batched_mm_lora_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Each routed row meets a gathered copy of its expert's weights: static shapes, right for few tokens on a GPU.

    Arguments and result as in [`grouped_mm_lora_experts_forward`].
    """
    if _has_quantised_stacks(self):
        return self.eager_forward(hidden_states, top_k_index, top_k_weights)

    top_k_index = own_index(self, top_k_index)
    num_tokens, top_k = top_k_index.shape
    expert_of_row = top_k_index.reshape(-1)  # (S,)
    token_of_row = torch.arange(num_tokens, device=top_k_index.device).repeat_interleave(top_k)  # (S,)

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weight[expert_of_row], rows.unsqueeze(-1)).squeeze(-1)

    rows = hidden_states[token_of_row]  # (S, H)
    weights = top_k_weights.reshape(-1, 1)  # (S, 1)
    output = _rows_through_experts(self, hidden_states, rows, weights, token_of_row, product)
    return _sum_over_k(output, None, num_tokens, top_k)


def _rows_through_experts(self, hidden_states, rows, weights, token_of_row, product) -> torch.Tensor:
    """`(S, H)` routed rows through their experts, weighted; `product(rows, stack)` is one linear map per expert."""
    lora = self.lora_tensors(hidden_states)
    if self.shared_base:
        # The frozen products need each token once, not once per expert.
        gate, up = (half[token_of_row] for half in self.base_gate_up(hidden_states))  # (S, I) each
    else:
        gate, up = product(rows, self.gate_up_proj).chunk(2, dim=-1)  # (S, I) each
    if lora is not None:
        low_gate, low_up = product(self.lora_dropout(rows), lora.gate_up_a).chunk(2, dim=-1)  # (S, R) each
        b_gate, b_up = lora.gate_up_b.chunk(2, dim=1)  # (E, I, R) each
        gate = gate + self.lora_scaling * product(low_gate, b_gate)
        up = up + self.lora_scaling * product(low_up, b_up)

    inner = self.act_fn(gate) * up  # (S, I)
    output = self.base.down_proj(inner) if self.shared_base else product(inner, self.down_proj)  # (S, H)
    if lora is not None:
        low = product(self.lora_dropout(inner), lora.down_a)  # (S, R)
        output = output + self.lora_scaling * product(low, lora.down_b)
    return output * weights


def _sum_over_k(rows: torch.Tensor, order: torch.Tensor | None, num_tokens: int, top_k: int) -> torch.Tensor:
    """`(S, H)` weighted rows to `(N, H)`; a sum over a reshaped axis is deterministic, `index_add_` on CUDA is not."""
    rows = rows if order is None else rows[order]
    return rows.unflatten(0, (num_tokens, top_k)).sum(dim=1)


def _has_grouped_mm(hidden_states: torch.Tensor) -> bool:
    """Whether there is a grouped product for this: torch's own, new in 2.10, compiles in bfloat16 alone."""
    if grouped_linear is not None:
        return True
    compiles = not torch.compiler.is_compiling() or hidden_states.dtype == torch.bfloat16
    return hasattr(F, "grouped_mm") and compiles


def _has_quantised_stacks(self: nn.Module) -> bool:
    """torchao's tensors give out single experts but know no grouped or batched product."""
    return not self.shared_base and is_quantised(self.gate_up_proj)


def _fits_grouped_mm(self: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether every operand's rows are multiples of 16 bytes and its dtype has a kernel, as `grouped_mm` demands."""
    if hidden_states.dtype == torch.float64:
        return False
    sizes = [self.hidden_size, self.intermediate_size] + ([self.lora_rank] if self.lora is not None else [])
    width = hidden_states.element_size()
    if not self.shared_base:  # under autocast tokens may be wider than the weights that they are cast to
        width = min(width, self.gate_up_proj.element_size())
    return all(size * width % 16 == 0 for size in sizes)


def segmented_lora_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Rows sorted by expert; each expert's rows go through dense products, and backward is written by hand.

    Only LoRA, the router's weights and the tokens get gradients. Kept for backward are the tokens, gate and up (with a
    shared base: of each token, not of each routed row) and the low-rank rows, or the tokens alone where
    `expert_activations="recompute"`. With a shared base every frozen product, the last one too, runs once per token:
    the weighted sum over a token's experts is taken before it.

    Arguments and result as in [`grouped_mm_lora_experts_forward`].
    """
    if not _can_be_segmented(self, hidden_states):
        return grouped_mm_lora_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return _segmented(self, hidden_states, top_k_index, top_k_weights)


def _segmented(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """[`segmented_lora_experts_forward`] where nothing is in the way."""
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    tokens = hidden_states.to(torch.get_autocast_dtype(device)) if autocast else hidden_states
    dropout = self.lora_dropout.p if self.training and self.lora is not None else 0.0
    # While decoding, only the factors of the experts that are met are worth a cast.
    decodes = tokens.shape[0] <= FEW_TOKENS and not dropout and not torch.is_grad_enabled()
    factors = self.lora_tensors(None if decodes else tokens)
    lora = None if factors is None else LoraFactors(*factors, self.lora_scaling)
    with torch.autocast(device, enabled=False):
        output = segmented_experts(
            tokens,
            top_k_weights.to(tokens.dtype),
            own_index(self, top_k_index),
            _frozen_weights(self),
            lora,
            self.num_experts,
            activation=self.activation,
            dropout=dropout,
            recompute=self.config.expert_activations == "recompute",
        )
    return output.to(hidden_states.dtype)


def _can_be_segmented(self: nn.Module, hidden_states: torch.Tensor) -> bool:
    """
    Whether the frozen weights are plain tensors that may be read where they lie, and nothing but LoRA learns.

    Not so when compiling or on tensors without values (the number of an expert's rows is read), and when a shared
    base's layers must be *called*: quantised, wrapped by PEFT, offloaded or split.
    """
    if torch.compiler.is_compiling() or not _has_values(hidden_states) or self.activation is None:
        return False
    if self.shared_base:
        first = (self.base.gate_up_proj,) if self.has_fused_base else (self.base.gate_proj, self.base.up_proj)
        layers = (*first, self.base.down_proj)
        if any(type(layer) is not nn.Linear or _is_hooked(layer) for layer in layers):
            return False
        weights = [layer.weight for layer in layers]
    else:
        weights = [self.gate_up_proj, self.down_proj]
    # Exact types: quantised and sharded tensors are subclasses. Of spread experts each process sees a plain tensor.
    return all(type(weight) in (torch.Tensor, nn.Parameter) and _is_frozen(weight) for weight in weights)


def _has_values(tensor: torch.Tensor) -> bool:
    """Not so on the meta device, and for fake tensors, which are a type of their own."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta


def _is_hooked(layer: nn.Module) -> bool:
    """Whether something acts on the layer's calls: hooks, or a `forward` put in place of its own."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or "forward" in layer.__dict__


def _is_frozen(weight: torch.Tensor) -> bool:
    return not (weight.requires_grad and torch.is_grad_enabled())


def _frozen_weights(self: nn.Module) -> FrozenWeights:
    if self.shared_base:
        return FrozenWeights(*self.base_weights())
    # Halves of rows, so that each expert's part is contiguous: oneDNN is a thousand times slower on strided weights.
    return FrozenWeights(*self.gate_up_proj.chunk(2, dim=1), self.down_proj)


def _eager(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    return self.eager_forward(hidden_states, top_k_index, top_k_weights)


# What `experts_implementation` may be. The names that the library knows too mean here what knows about LoRA.
ROUTES = {
    "eager": _eager,
    "auto": auto_lora_experts_forward,
    "segmented": segmented_lora_experts_forward,
    "grouped_mm": grouped_mm_lora_experts_forward,
    "batched_mm": batched_mm_lora_experts_forward,
}


class ExpertsRouteMixin:
    """Lets a model name the routes above, and take "auto" where nothing is asked for."""

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """
        Args:
            requested_experts (`str`, *optional*): A name, or `None` for "auto".

        Returns:
            `str`: The name.

        Raises:
            ValueError: no route has this name.
        """
        if requested_experts is not None and requested_experts not in ROUTES:
            known = ", ".join(f'"{name}"' for name in ROUTES)
            raise ValueError(f'There is no `experts_implementation="{requested_experts}"`; there are {known}.')
        return requested_experts or "auto"

    def get_experts_implementation(self) -> dict[str, str]:
        """`dict[str, str]`: the route by which experts are computed, in the form that the setter takes."""
        routes = {module.experts_implementation for module in self._routed_modules()}
        return {"": next(iter(routes), "auto")}

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """
        Args:
            experts_implementation (`str` or `dict`): A name, or names by sub-config, of which the decoder's counts.

        Raises:
            ValueError: no route has this name.
        """
        if isinstance(experts_implementation, dict):
            current = self.get_experts_implementation()[""]
            experts_implementation = experts_implementation.get("text_config", experts_implementation.get("", current))
        route = self.get_correct_experts_implementation(experts_implementation)
        for module in self._routed_modules():
            module.experts_implementation = route

    def _routed_modules(self) -> list[nn.Module]:
        return [module for module in self.modules() if hasattr(module, "experts_implementation")]


__all__ = [
    "ROUTES",
    "ExpertsRouteMixin",
    "auto_lora_experts_forward",
    "batched_mm_lora_experts_forward",
    "choose_route",
    "grouped_mm_lora_experts_forward",
    "is_quantised",
    "own_index",
    "segmented_lora_experts_forward",
]
