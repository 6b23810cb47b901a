"""
How LoRA experts are computed: the routes behind `experts_implementation`.

Letters: N tokens, K experts per token, S = N * K routed rows, E experts, H hidden, I intermediate, R LoRA rank.
`UniMoELoraExperts.forward` is the readable reference ("eager"); the routes here give the same numbers.
"""

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface, _grouped_linear

from .quantization_uni_moe import is_quantised


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

    num_tokens, top_k = top_k_index.shape
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)  # (S,)
    token_of_row = order // top_k  # (S,)
    experts = torch.arange(self.num_experts, device=expert_of_row.device)
    offsets = torch.searchsorted(expert_of_row, experts, right=True).to(torch.int32)  # (E,), end of each expert's rows

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _grouped_linear(rows, weight, offsets)

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
        gate = self.base.gate_proj(hidden_states)[token_of_row]  # (S, I)
        up = self.base.up_proj(hidden_states)[token_of_row]  # (S, I)
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


class LoraExpertsInterface(ExpertsInterface):
    """The library's names for its expert routes, bound to the functions that know about LoRA."""

    _global_mapping = {
        "grouped_mm": grouped_mm_lora_experts_forward,
        "batched_mm": batched_mm_lora_experts_forward,
    }


__all__ = ["LoraExpertsInterface", "batched_mm_lora_experts_forward", "grouped_mm_lora_experts_forward"]
