"""
LoRA experts one after the other, each on its own rows, with a backward pass written by hand.

With x the rows of one expert, w their routing weights, s the LoRA scaling, and W the frozen, A and B the LoRA weights:

    gate = x Wg' + s x Ag' Bg'      up = x Wu' + s x Au' Bu'      inner = silu(gate) * up
    output[token] += w (inner Wd' + s inner Ad' Bd')

With a shared base, W is the same for all experts, so `x Wg'` and `x Wu'` run once per token, and so does the last frozen
product: `sum_k w_k (inner_k Wd') = (sum_k w_k inner_k) Wd'`.

Letters: N tokens, K experts per token, S = N * K routed rows, E experts, H hidden, I intermediate, R LoRA rank; n rows
of one expert, padding included.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# At most so many tokens are "decoding": reading weights then costs more than any arithmetic.
FEW_TOKENS = 8


class FrozenWeights(NamedTuple):
    """Weights that do not learn: `(E, I, H)`, `(E, I, H)`, `(E, H, I)`; with a shared base the same without E."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class LoraFactors(NamedTuple):
    """LoRA of all experts, gate before up: `(E, 2R, H)`, `(E, 2I, R)`, `(E, R, I)`, `(E, H, R)`; and its scaling."""

    gate_up_a: torch.Tensor
    gate_up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor
    scaling: float

    def of(self, expert: int) -> "_ExpertLora":
        gate_b, up_b = self.gate_up_b[expert].chunk(2)
        return _ExpertLora(self.gate_up_a[expert], gate_b, up_b, self.down_a[expert], self.down_b[expert])


class _ExpertLora(NamedTuple):
    """One expert's factors: `(2R, H)`, `(I, R)`, `(I, R)`, `(R, I)`, `(H, R)`."""

    gate_up_a: torch.Tensor
    gate_b: torch.Tensor
    up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor


def segmented_experts(
    tokens: torch.Tensor,
    weights: torch.Tensor,
    index: torch.Tensor,
    frozen: FrozenWeights,
    lora: LoraFactors | None,
    num_experts: int,
    dropout: float = 0.0,
    recompute: bool = False,
) -> torch.Tensor:
    """
    Args:
        tokens (`torch.Tensor` of shape `(N, H)`): One row per token.
        weights (`torch.Tensor` of shape `(N, K)`): Routing weights, in the dtype of `tokens`.
        index (`torch.Tensor` of shape `(N, K)`): Experts of each token, `int64` in `[0, num_experts)`.
        frozen ([`FrozenWeights`]): Get no gradients. Their dtype may be another one (under autocast): each is then
            cast when it is used.
        lora ([`LoraFactors`], *optional*): `None` for plain experts.
        num_experts (`int`): E.
        dropout (`float`, *optional*, defaults to 0.0): Before each LoRA's first factor, in `[0, 1]`.
        recompute (`bool`, *optional*, defaults to `False`): Keep the tokens alone for backward, not gate and up.

    Returns:
        `torch.Tensor` of shape `(N, H)`, in the dtype of `tokens`. Differentiable once, in tokens, weights and LoRA.
    """
    factors = (None,) * 4 if lora is None else lora[:4]
    learning = any(tensor is not None and tensor.requires_grad for tensor in (tokens, weights, *factors))
    if dropout or (learning and torch.is_grad_enabled()):
        scaling = 0.0 if lora is None else lora.scaling
        settings = (num_experts, scaling, dropout, recompute)
        return _SegmentedExperts.apply(tokens, weights, index, *frozen, *factors, settings)
    split = _few_segments if tokens.shape[0] <= FEW_TOKENS else _segments
    output, _ = _run_segments(tokens, split(index, weights, num_experts), frozen, lora, _Dropout(0.0), keep=False)
    return output


class _Segment(NamedTuple):
    """The routed rows of one expert: their tokens `(n,)` and weights `(n, 1)`; `size` rows with padding."""

    expert: int
    tokens: torch.Tensor
    weights: torch.Tensor
    size: int


def _segments(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> list[_Segment]:
    """The routing `(N, K)` by expert; idle experts are left out. Reads the row counts: one wait for the device."""
    order, counts = _sort_by_expert(index, num_experts)
    return list(_cut(order, counts, index, weights))


def _sort_by_expert(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """Routed rows `(S,)` in the order of their experts, and how many each expert has."""
    flat = index.reshape(-1)
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=num_experts).tolist()


def _cut(order: torch.Tensor, counts: list[int], index: torch.Tensor, weights: torch.Tensor) -> Iterator[_Segment]:
    token_of_row = order // index.shape[1]
    weight_of_row = weights.reshape(-1)[order].unsqueeze(-1)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            yield _Segment(expert, token_of_row[rows], weight_of_row[rows], _padded(count, weights))
            start += count


def _few_segments(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> list[_Segment]:
    """As [`_segments`] for a few tokens: sorting a handful of numbers with tensors costs more than the experts."""
    slots_of = {}
    for slot, expert in enumerate(index.reshape(-1).tolist()):
        slots_of.setdefault(expert, []).append(slot)
    flat, top_k = weights.reshape(-1, 1), index.shape[1]
    segments = []
    for expert, slots in slots_of.items():
        tokens = torch.tensor([slot // top_k for slot in slots], device=index.device)
        chosen = flat[slots[0] : slots[0] + 1] if len(slots) == 1 else flat[slots]
        segments.append(_Segment(expert, tokens, chosen, len(slots)))
    return segments


def _padded(count: int, like: torch.Tensor) -> int:
    """
    The number of rows with which `count` rows are computed.

    oneDNN builds a kernel for every number of rows it meets (0.4 to 1 ms), and routing brings new ones at every step.
    Rounding up to sixteen or more sizes per doubling costs 3 % more rows on average and ends that.
    """
    if like.device.type != "cpu" or like.dtype == torch.float64:
        return count
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


class _Dropout:
    """Dropout whose masks come from a seed: backward draws them again, in the same order, instead of keeping them."""

    def __init__(self, probability: float, seed: int = 0, device: torch.device | None = None):
        self.probability = probability
        self.generator = torch.Generator(device).manual_seed(seed) if probability else None

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows after dropout, and the mask to multiply their gradient with (`None`: nothing was dropped)."""
        if not self.probability:
            return rows, None
        keep = 1.0 - self.probability
        mask = torch.empty_like(rows).bernoulli_(keep, generator=self.generator)
        mask = mask.div_(keep) if keep else mask
        return rows * mask, mask


def _run_segments(
    tokens: torch.Tensor,
    segments: list[_Segment],
    frozen: FrozenWeights,
    lora: LoraFactors | None,
    dropout: _Dropout,
    keep: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output `(N, H)`, and what [`_SegmentedExperts`] keeps for backward."""
    gate_weight, up_weight, down_weight = frozen
    shared, kept = down_weight.dim() == 2, []
    output = torch.zeros_like(tokens)
    if shared:
        base_gate, base_up = _linear(tokens, gate_weight), _linear(tokens, up_weight)  # (N, I)
        inner_sum = torch.zeros_like(base_gate)
        kept += [base_gate, base_up]
    for expert, token, weight, size in segments:
        if shared:
            rows = _take(tokens, token, size) if lora is not None else None  # (n, H)
            gate, up = _take(base_gate, token, size), _take(base_up, token, size)  # (n, I)
        else:
            rows = _take(tokens, token, size)
            gate, up = _linear(rows, gate_weight[expert]), _linear(rows, up_weight[expert])
        if lora is not None:
            factors = lora.of(expert)
            low = _linear(dropout(rows)[0], factors.gate_up_a).mul_(lora.scaling)  # (n, 2R)
            gate, up = _add_low_rank(gate, up, low, factors)
        inner = _swiglu(gate, up)  # (n, I)
        if shared:
            if lora is not None:
                low_down = _linear(dropout(inner)[0], factors.down_a).mul_(lora.scaling)  # (n, R)
                _put(output, token, _linear(low_down, factors.down_b), weight)
            _put(inner_sum, token, inner, weight)
        else:
            rows_out = _linear(inner, down_weight[expert])  # (n, H)
            if lora is not None:
                low_down = _linear(dropout(inner)[0], factors.down_a).mul_(lora.scaling)
                rows_out = _add_linear(rows_out, low_down, factors.down_b)
            _put(output, token, rows_out, weight)
            kept += [gate, up]
        if lora is not None:
            kept += [low, low_down]
        if not keep:
            kept.clear()
    if shared:
        output = _add_linear(output, inner_sum, down_weight)
    return output, kept


def _add_low_rank(gate, up, low, factors: _ExpertLora) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up `(n, I)`, which may be overwritten, with LoRA's part; `low` `(n, 2R)` holds both low-rank rows."""
    low_gate, low_up = (half.contiguous() for half in low.chunk(2, dim=1))
    return _add_linear(gate, low_gate, factors.gate_b), _add_linear(up, low_up, factors.up_b)


class _SegmentedExperts(torch.autograd.Function):
    """
    [`_run_segments`] with its backward pass.

    The gradient of a routing weight is the product of an expert's output and the incoming gradient; it is taken as
    `<grad_output @ down, inner>`, so that the outputs need not be kept.
    """

    @staticmethod
    def forward(ctx, tokens, weights, index, gate, up, down, gate_up_a, gate_up_b, down_a, down_b, settings):
        num_experts, scaling, dropout, recompute = settings
        lora = None if gate_up_a is None else LoraFactors(gate_up_a, gate_up_b, down_a, down_b, scaling)
        order, counts = _sort_by_expert(index, num_experts)
        # From the global generator, so that a checkpointed forward that is run again draws it again.
        seed = int(torch.randint(2**62, ())) if dropout else 0
        segments = list(_cut(order, counts, index, weights))
        masks = _Dropout(dropout, seed, tokens.device)
        output, kept = _run_segments(tokens, segments, FrozenWeights(gate, up, down), lora, masks, keep=not recompute)
        ctx.save_for_backward(
            tokens, weights, index, order, gate, up, down, gate_up_a, gate_up_b, down_a, down_b, *kept
        )
        ctx.counts, ctx.scaling, ctx.dropout, ctx.seed = counts, scaling, dropout, seed
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        with torch.autocast(grad_output.device.type, enabled=False):
            return _SegmentedExperts._backward(ctx, grad_output.contiguous())

    @staticmethod
    def _backward(ctx, grad_output):
        tokens, weights, index, order, gate_weight, up_weight, down_weight, *rest = ctx.saved_tensors
        lora = None if rest[0] is None else LoraFactors(*rest[:4], ctx.scaling)
        kept, recompute = iter(rest[4:]), len(rest) == 4
        dropout = _Dropout(ctx.dropout, ctx.seed, tokens.device)
        shared = down_weight.dim() == 2

        grad_tokens, grad_weights = torch.zeros_like(tokens), []
        grad_lora = (
            None if lora is None else LoraFactors(*(torch.zeros_like(factor) for factor in lora[:4]), lora.scaling)
        )
        if shared:
            if recompute:
                base_gate, base_up = _linear(tokens, gate_weight), _linear(tokens, up_weight)
            else:
                base_gate, base_up = next(kept), next(kept)
            grad_inner_sum = _linear(grad_output, down_weight.t())  # (N, I)
            grad_base_gate, grad_base_up = torch.zeros_like(base_gate), torch.zeros_like(base_up)
        for expert, token, weight, size in _cut(order, ctx.counts, index, weights):
            factors = None if lora is None else lora.of(expert)
            rows = _take(tokens, token, size)
            dropped_rows, rows_mask = dropout(rows) if lora is not None else (rows, None)
            # What forward knew.
            if shared:
                gate, up = _take(base_gate, token, size), _take(base_up, token, size)
            elif recompute:
                gate, up = _linear(rows, gate_weight[expert]), _linear(rows, up_weight[expert])
            else:
                gate, up = next(kept), next(kept)
            low = low_down = None
            if lora is not None and recompute:
                low = _linear(dropped_rows, factors.gate_up_a).mul_(lora.scaling)
            elif lora is not None:
                low, low_down = next(kept), next(kept)
            if lora is not None and (shared or recompute):
                gate, up = _add_low_rank(gate, up, low, factors)

            # Down: gradients of its input, per unit of routing weight.
            grad_rows = _take(grad_output, token, size)  # (n, H)
            if shared:
                grad_inner = _take(grad_inner_sum, token, size)  # (n, I)
            else:
                grad_inner = _linear(grad_rows, down_weight[expert].t())
            if lora is not None:
                grad_low_down = _linear(grad_rows, factors.down_b.t()).mul_(lora.scaling)  # (n, R)
                if ctx.dropout:
                    inner_mask = dropout(torch.ones_like(gate))[0]
                    grad_inner += _linear(grad_low_down, factors.down_a.t()).mul_(inner_mask)
                else:
                    grad_inner = _add_linear(grad_inner, grad_low_down, factors.down_a.t())
            inner, grad_gate, grad_up, grad_weight = _swiglu_backward(grad_inner, gate, up, _pad(weight, size))
            grad_weights.append(grad_weight[: token.shape[0]])

            # Gate and up.
            grad_low = None
            if lora is not None:
                if ctx.dropout:
                    inner *= inner_mask
                if low_down is None:
                    low_down = _linear(inner, factors.down_a).mul_(lora.scaling)
                grads, weight = grad_lora.of(expert), _pad(weight, size)
                low_gate, low_up = (half.contiguous() for half in low.chunk(2, dim=1))
                grads.down_b.copy_(_outer(low_down * weight, grad_rows).t())
                grads.down_a.copy_(_outer(grad_low_down * weight, inner))
                grads.gate_b.copy_(_outer(low_gate, grad_gate).t())
                grads.up_b.copy_(_outer(low_up, grad_up).t())
                grad_low = torch.cat([_linear(grad_gate, factors.gate_b.t()), _linear(grad_up, factors.up_b.t())], 1)
                grad_low.mul_(lora.scaling)  # (n, 2R)
                grads.gate_up_a.copy_(_outer(grad_low, dropped_rows))
            grad_rows = None
            if shared:
                _put(grad_base_gate, token, grad_gate)
                _put(grad_base_up, token, grad_up)
            else:
                grad_rows = _linear(grad_gate, gate_weight[expert].t())
                grad_rows = _add_linear(grad_rows, grad_up, up_weight[expert].t())
            if lora is not None:
                if rows_mask is not None or grad_rows is None:
                    low_part = _linear(grad_low, factors.gate_up_a.t())
                    low_part = low_part if rows_mask is None else low_part.mul_(rows_mask)
                    grad_rows = low_part if grad_rows is None else grad_rows.add_(low_part)
                else:
                    grad_rows = _add_linear(grad_rows, grad_low, factors.gate_up_a.t())
            if grad_rows is not None:
                _put(grad_tokens, token, grad_rows)
        if shared:
            grad_tokens = _add_linear(grad_tokens, grad_base_gate, gate_weight.t())
            grad_tokens = _add_linear(grad_tokens, grad_base_up, up_weight.t())
        grad_of_row = torch.empty_like(weights).reshape(-1)
        grad_of_row[order] = torch.cat(grad_weights) if grad_weights else grad_of_row
        factors = (None,) * 4 if lora is None else grad_lora[:4]
        return grad_tokens, grad_of_row.view_as(weights), None, None, None, None, *factors, None


# Rows


def _take(source: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """`(size, width)`: the rows named by `rows` `(n,)`, then rows of zeros, which stay zero in every product."""
    taken = source.new_empty(size, source.shape[1])
    torch.index_select(source, 0, rows, out=taken[: rows.shape[0]])
    taken[rows.shape[0] :].zero_()
    return taken


def _put(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Adds `values` `(size, width)`, overwritten, times `weights` `(n, 1)` to the named rows; no row is named twice."""
    values = values[: rows.shape[0]]
    target.index_add_(0, rows, values if weights is None else values.mul_(weights))


def _pad(column: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(column, (0, 0, 0, size - column.shape[0]))


# Products. Weights follow the rows' dtype, which differs from theirs under autocast only.


def _linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows @ weight.T`."""
    weight = weight.to(rows.dtype)
    if _prefers_onednn(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def _add_linear(base: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`base + rows @ weight.T`; `base` may be overwritten."""
    weight = weight.to(rows.dtype)
    if _prefers_onednn(rows, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(rows, base, weight, None, "add")
    return base.addmm_(rows, weight.t())


def _outer(narrow: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """`narrow.T @ wide`, `(R, width)`: with the thin operand first, up to four times faster in MKL than transposed."""
    return _linear(narrow.t(), wide.t())


def _prefers_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Float32 on a CPU with AVX-512, where MKL may take its AVX2 kernels; small products are cheaper to call in MKL."""
    return (
        rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.shape[0] * weight.numel() > 1_000_000
        and min(weight.shape) >= 16
        and torch.backends.mkldnn.enabled
        and _has_onednn_linear()
    )


@cache
def _has_onednn_linear() -> bool:
    """Whether the private operator is there and gives what the public ones give, tried once per process."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight, base = (torch.randn(*shape, generator=generator) for shape in ((24, 48), (32, 48), (24, 32)))
    expected = rows @ weight.T
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        plain = operator(rows, weight, None, "none", [], "")
        turned = operator(rows, weight.T.contiguous().T, None, "none", [], "")
        added = operator.binary(rows, base, weight, None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return False
    pairs = ((plain, expected), (turned, expected), (added, base + expected))
    return all(torch.allclose(actual, wanted, atol=1e-4) for actual, wanted in pairs)


# SwiGLU


def _blocks(rows: torch.Tensor) -> Iterator[slice]:
    """On a CPU 64 rows at a time, so that what one pass writes the next one finds in the cache."""
    step = 64 if rows.device.type == "cpu" else max(rows.shape[0], 1)
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`."""
    inner = torch.empty_like(gate)
    for block in _blocks(gate):
        torch.ops.aten.silu.out(gate[block], out=inner[block]).mul_(up[block])
    return inner


def _swiglu_backward(
    grad_inner: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        grad_inner (`torch.Tensor` of shape `(n, I)`): Gradient per unit of routing weight; overwritten.
        gate, up (`torch.Tensor` of shape `(n, I)`): As in forward.
        weights (`torch.Tensor` of shape `(n, 1)`): Routing weights.

    Returns:
        `tuple(torch.Tensor)`: *inner* `(n, I)`, gradients of *gate* and *up* `(n, I)`, and of the *weights* `(n,)`.
    """
    inner, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    grad_weights = gate.new_empty(gate.shape[0])
    for block in _blocks(gate):
        g, u, grad, out_gate, out_up = gate[block], up[block], grad_inner[block], grad_gate[block], grad_up[block]
        torch.ops.aten.silu.out(g, out=out_up)
        torch.mul(out_up, u, out=inner[block])
        torch.mul(grad, inner[block], out=out_gate)
        torch.sum(out_gate, 1, out=grad_weights[block])
        grad.mul_(weights[block])
        out_up.mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(u), g, grad_input=out_gate)
    return inner, grad_gate, grad_up, grad_weights


__all__ = ["FEW_TOKENS", "FrozenWeights", "LoraFactors", "segmented_experts"]
