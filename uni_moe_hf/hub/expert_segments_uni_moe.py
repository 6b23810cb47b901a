"""
LoRA experts one after the other, each on its own rows, with a backward pass written by hand.

With x the rows of one expert, w their routing weights, s the LoRA scaling, and W the frozen, A and B the LoRA weights:

    gate = x Wg' + s x Ag' Bg'      up = x Wu' + s x Au' Bu'      inner = act(gate) * up
    output[token] += w (inner Wd' + s inner Ad' Bd')

With a shared base, W is the same for all experts, so `x Wg'` and `x Wu'` run once per token, and so does the last
frozen product: `sum_k w_k (inner_k Wd') = (sum_k w_k inner_k) Wd'`.

Letters: N tokens, K experts per token, S = N * K routed rows, E experts, H hidden, I intermediate, R LoRA rank; n rows
of one expert, padding included.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .compat_uni_moe import onednn_linear


# At most so many tokens are "decoding": reading weights then costs more than any arithmetic.
FEW_TOKENS = 8

# Of each operand of an elementwise pass: some five of them fit a core's second-level cache.
CACHED_BYTES = 192 * 1024


class Activation(NamedTuple):
    """An activation: `run(x)`; `fill(x, out)`; `backward(gradient, x, out)`, with `out` of x's shape."""

    run: Callable[[torch.Tensor], torch.Tensor]
    fill: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _activation(run: Callable, fill: Callable, backward: Callable, **kind: str) -> Activation:
    return Activation(
        partial(run, **kind),
        lambda x, out: fill(x, **kind, out=out),
        lambda grad, x, out: backward(grad, x, **kind, grad_input=out),
    )


_SILU = (F.silu, torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input)
_GELU = (F.gelu, torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input)
# By the library's names.
ACTIVATIONS = {
    "silu": _activation(*_SILU),
    "gelu_pytorch_tanh": _activation(*_GELU, approximate="tanh"),
    "gelu": _activation(*_GELU, approximate="none"),
}


class FrozenWeights(NamedTuple):
    """Weights that do not learn: `(E, I, H)`, `(E, I, H)`, `(E, H, I)`; with a shared base the same without E."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @property
    def shared(self) -> bool:
        """Whether all experts have the same ones."""
        return self.down.dim() == 2


class LoraFactors(NamedTuple):
    """LoRA of all experts, gate before up: `(E, 2R, H)`, `(E, 2I, R)`, `(E, R, I)`, `(E, H, R)`; and its scaling."""

    gate_up_a: torch.Tensor
    gate_up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor
    scaling: float

    def of(self, expert: int) -> "_ExpertLora":
        """One expert's factors."""
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
    activation: str = "silu",
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
        lora ([`LoraFactors`], *optional*): `None` for plain experts. In any dtype for few tokens without gradients.
        num_experts (`int`): E.
        activation (`str`, *optional*, defaults to `"silu"`): One of `ACTIVATIONS`.
        dropout (`float`, *optional*, defaults to 0.0): Before each LoRA's first factor, in `[0, 1]`.
        recompute (`bool`, *optional*, defaults to `False`): Keep the tokens alone for backward, not gate and up.

    Returns:
        `torch.Tensor` of shape `(N, H)`, in the dtype of `tokens`. Differentiable once, in tokens, weights and LoRA.
    """
    factors = (None,) * 4 if lora is None else lora[:4]
    learning = any(tensor is not None and tensor.requires_grad for tensor in (tokens, weights, *factors))
    if dropout or (learning and torch.is_grad_enabled()):
        settings = (num_experts, lora.scaling if lora else 0.0, activation, dropout, recompute)
        return _SegmentedExperts.apply(tokens, weights, index, *frozen, *factors, settings)
    if tokens.shape[0] <= FEW_TOKENS:
        return _run_few(tokens, weights, index, frozen, lora, ACTIVATIONS[activation])
    segments = _cut(*_sort_by_expert(index, num_experts), index, weights)
    return _run_segments(tokens, segments, frozen, lora, activation, _Dropout(0.0), keep=False)[0]


class _Segment(NamedTuple):
    """The routed rows of one expert: their tokens `(n,)` and weights `(n, 1)`; `size` rows with padding."""

    expert: int
    tokens: torch.Tensor
    weights: torch.Tensor
    size: int


def _sort_by_expert(index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """Routed rows `(S,)` in the order of their experts, and how many each expert has."""
    flat = index.reshape(-1)
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=num_experts).tolist()


def _cut(order: torch.Tensor, counts: list[int], index: torch.Tensor, weights: torch.Tensor) -> list[_Segment]:
    """The sorted rows, cut where the expert changes."""
    token_of_row = order // index.shape[1]
    weight_of_row = weights.reshape(-1)[order].unsqueeze(-1)
    segments, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            segments.append(_Segment(expert, token_of_row[rows], weight_of_row[rows], _padded(count, weights)))
            start += count
    return segments


def _padded(count: int, like: torch.Tensor) -> int:
    """
    The number of rows with which `count` rows are computed.

    oneDNN builds a kernel for every number of rows it meets (0.4 to 1 ms), and routing brings new ones at every step.
    Rounding up to sixteen or more sizes per doubling costs 3 % more rows on average and ends that.
    """
    if like.device.type != "cpu" or like.dtype == torch.float64:
        return count
    step = max(4, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


class _Dropout:
    """Which elements are dropped, drawn from a seed: backward draws them again, in the same order, and keeps none."""

    def __init__(self, probability: float, seed: int = 0, device: torch.device | None = None):
        self.probability = probability
        self.generator = torch.Generator(device).manual_seed(seed) if probability else None

    @property
    def scaling(self) -> float:
        """Of what is kept; it is left to LoRA's own scaling, which costs nothing."""
        return 1 / (1 - self.probability) if self.probability < 1 else 0.0

    def draw(self, rows: torch.Tensor) -> torch.Tensor | None:
        """
        Positions in the flattened `rows`, or a mask of their shape on an accelerator, which must not wait for a count.
        Distances between positions are geometric; drawing these takes a tenth of the time of a mask's `bernoulli_`.
        """
        if self.generator is None:
            return None
        if rows.device.type != "cpu" or self.probability == 1:
            chances = torch.empty(rows.shape, device=rows.device)
            return chances.uniform_(generator=self.generator) < self.probability
        count, chance = rows.numel(), self.probability
        spread = math.sqrt(count * chance * (1 - chance))
        positions, start = [], -1
        while start < count:  # once, but for one draw in 1e9
            uniform = torch.rand(int(count * chance + 6 * spread) + 16, generator=self.generator)
            distances = uniform.neg_().log1p_().mul_(1 / math.log1p(-chance)).long() + 1
            positions.append(distances.cumsum_(0).add_(start))
            start = int(positions[-1][-1])
        found = torch.cat(positions)
        return found[: int(torch.searchsorted(found, count))]


class _Scratch:
    """Buffers that the experts of a call share: a new one for each costs page faults, a tenth of a step."""

    def __init__(self, like: torch.Tensor, segments: list[_Segment]):
        self.like, self.rows = like, max((segment.size for segment in segments), default=0)
        self.buffers = {}

    def __call__(self, name: str, size: int, width: int) -> torch.Tensor:
        """`(size, width)` of the buffer of this name; holds what the last call left there."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.rows, width)
        return self.buffers[name][:size]


class _Entered(NamedTuple):
    """One expert's rows `(n, H)`, gate and up `(n, I)`; of LoRA `low` `(n, 2R)`, and `low_down` `(n, R)` if kept."""

    rows: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    factors: _ExpertLora | None = None
    low: torch.Tensor | None = None
    low_down: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


class _Pass:
    """What forward and backward share: experts one after the other, the same buffers for all."""

    def __init__(self, tokens, segments, frozen: FrozenWeights, lora: LoraFactors | None, activation, dropout, kept):
        self.tokens, self.segments, self.frozen, self.lora = tokens, segments, frozen, lora
        self.activation, self.dropout, self.kept = ACTIVATIONS[activation], dropout, kept
        self.scaling = 0.0 if lora is None else lora.scaling * dropout.scaling
        self.scratch = _Scratch(tokens, segments)
        if frozen.shared:  # (N, I)
            self.base = [_linear(tokens, weight) if kept is None else next(kept) for weight in frozen[:2]]

    def rows_of(self, source: torch.Tensor, segment: _Segment, name: str) -> torch.Tensor:
        """One expert's rows of `source` `(N, width)`, in a buffer."""
        return _take(source, segment.tokens, self.scratch(name, segment.size, source.shape[1]))

    def enter(self, segment: _Segment) -> _Entered:
        """Computed, or read from what forward kept."""
        rows, is_new = self.rows_of(self.tokens, segment, "rows"), self.kept is None
        if self.frozen.shared:
            gate, up = (self.rows_of(base, segment, n) for base, n in zip(self.base, ("gate", "up"), strict=True))
        elif is_new:
            gate, up = (_linear(rows, weight[segment.expert]) for weight in self.frozen[:2])
        else:
            gate, up = next(self.kept), next(self.kept)
        if self.lora is None:
            return _Entered(rows, gate, up)
        factors, dropped = self.lora.of(segment.expert), self.dropout.draw(rows)
        if is_new:
            low, low_down = _low_rank(rows, factors.gate_up_a, self.scaling, dropped), None
        else:
            low, low_down = next(self.kept), next(self.kept)
        if self.frozen.shared or is_new:
            gate, up = _add_low_rank(gate, up, low, factors)
        return _Entered(rows, gate, up, factors, low, low_down, dropped)


def _run_segments(
    tokens, segments, frozen: FrozenWeights, lora: LoraFactors | None, activation: str, dropout: _Dropout, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output `(N, H)`, and what [`_BackwardPass`] reads in the same order."""
    forward = _Pass(tokens, segments, frozen, lora, activation, dropout, None)
    output, kept = torch.zeros_like(tokens), []
    if frozen.shared:
        inner_sum = torch.zeros_like(forward.base[0])
        kept += forward.base if keep else []
    for segment in segments:
        expert, token, weight, size = segment
        entered = forward.enter(segment)
        inner = forward.scratch("inner", size, frozen.down.shape[-1])
        inner = _gated(entered.gate, entered.up, forward.activation, inner)
        if lora is not None:
            low_down = _low_rank(inner, entered.factors.down_a, forward.scaling, dropout.draw(inner))  # (n, R)
        if keep:
            kept += [] if frozen.shared else [entered.gate, entered.up]
            kept += [] if lora is None else [entered.low, low_down]
        if not frozen.shared:
            result = _linear(inner, frozen.down[expert])  # (n, H)
            result = result if lora is None else _add_linear(result, low_down, entered.factors.down_b)
            _put(output, token, result, weight)
        else:
            if lora is not None:
                _put(output, token, _linear(low_down, entered.factors.down_b), weight)
            _put(inner_sum, token, inner, weight)
    return (_add_linear(output, inner_sum, frozen.down) if frozen.shared else output), kept


def _run_few(
    tokens, weights, index, frozen: FrozenWeights, lora: LoraFactors | None, activation: Activation
) -> torch.Tensor:
    """
    [`_run_segments`] for a few tokens, without gradients. Decoding costs what reading weights costs, plus the calls:
    nothing is sorted, padded or kept, and a single token is not gathered either.
    """
    shared, single, top_k = frozen.shared, tokens.shape[0] == 1, index.shape[1]
    slots_of = {}
    for slot, expert in enumerate(index.reshape(-1).tolist()):
        slots_of.setdefault((expert, slot) if single else (expert, None), []).append(slot)
    output, weights = torch.zeros_like(tokens), weights.reshape(-1, 1)
    if shared:
        base_gate, base_up = _linear(tokens, frozen.gate), _linear(tokens, frozen.up)  # (N, I)
        inner_sum = torch.zeros_like(base_gate)
    for (expert, _), slots in slots_of.items():
        if single:
            rows, weight = tokens, weights[slots[0] : slots[0] + 1]
        else:
            token = torch.tensor([slot // top_k for slot in slots], device=tokens.device)
            rows, weight = tokens[token], weights[slots]
        if not shared:
            gate, up = _linear(rows, frozen.gate[expert]), _linear(rows, frozen.up[expert])  # (n, I)
        else:
            gate, up = (base_gate, base_up) if single else (base_gate[token], base_up[token])
        if lora is not None:
            factors = _ExpertLora(*(factor.to(tokens.dtype) for factor in lora.of(expert)))
            low_gate, low_up = F.linear(rows, factors.gate_up_a).chunk(2, dim=1)  # (n, R)
            gate = torch.addmm(gate, low_gate, factors.gate_b.t(), alpha=lora.scaling)
            up = torch.addmm(up, low_up, factors.up_b.t(), alpha=lora.scaling)
        inner = activation.run(gate).mul_(up)
        sums = [(inner_sum, inner)] if shared else [(output, _linear(inner, frozen.down[expert]))]
        if lora is not None:
            low = F.linear(F.linear(inner, factors.down_a), factors.down_b)  # (n, H)
            sums.append((output, low.mul_(lora.scaling)))
        for target, values in sums:
            if single:
                target.addcmul_(values, weight)
            else:
                target.index_add_(0, token, values * weight)
    return _add_linear(output, inner_sum, frozen.down) if shared else output


class _SegmentedExperts(torch.autograd.Function):
    """
    [`_run_segments`] with its backward pass.

    The gradient of a routing weight is the product of an expert's output and the incoming gradient; it is taken as
    `<grad_output @ down, inner>`, so that the outputs need not be kept.
    """

    @staticmethod
    def forward(ctx, tokens, weights, index, gate, up, down, gate_up_a, gate_up_b, down_a, down_b, settings):
        num_experts, scaling, activation, dropout, recompute = settings
        lora = None if gate_up_a is None else LoraFactors(gate_up_a, gate_up_b, down_a, down_b, scaling)
        order, counts = _sort_by_expert(index, num_experts)
        # From the global generator, so that a checkpointed forward that is run again draws it again.
        seed = int(torch.randint(2**62, ())) if dropout else 0
        segments, drop = _cut(order, counts, index, weights), _Dropout(dropout, seed, tokens.device)
        frozen = FrozenWeights(gate, up, down)
        output, kept = _run_segments(tokens, segments, frozen, lora, activation, drop, keep=not recompute)
        # All tensors go this way, none on `ctx`: hooks that offload or count what is saved must see them.
        ctx.save_for_backward(tokens, weights, index, order, *frozen, gate_up_a, gate_up_b, down_a, down_b, *kept)
        ctx.counts, ctx.settings, ctx.seed = counts, settings, seed
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_tokens, grad_weights, grads = _BackwardPass(ctx, grad_output.contiguous()).run()
        return grad_tokens, grad_weights, *(None,) * 4, *((None,) * 4 if grads is None else grads[:4]), None


class _BackwardPass(_Pass):
    """Gradients, expert by expert in forward's order, in which dropout draws as it did then."""

    def __init__(self, ctx, grad_output: torch.Tensor):
        tokens, self.weights, index, self.order, gate, up, down, *rest = ctx.saved_tensors
        _, scaling, activation, probability, recompute = ctx.settings
        factors, kept, dropout = rest[:4], iter(rest[4:]), _Dropout(probability, ctx.seed, tokens.device)
        lora = None if factors[0] is None else LoraFactors(*factors, scaling)
        segments, frozen = _cut(self.order, ctx.counts, index, self.weights), FrozenWeights(gate, up, down)
        super().__init__(tokens, segments, frozen, lora, activation, dropout, None if recompute else kept)
        self.grads = None
        if any(ctx.needs_input_grad[6:10]):
            self.grads = LoraFactors(*(torch.zeros_like(factor) for factor in factors), scaling)
        self.grad_output, self.grad_tokens = grad_output, torch.zeros_like(tokens)
        if frozen.shared:
            self.grad_inner_sum = _linear(grad_output, down.t())  # (N, I)
            self.grad_base = [torch.zeros_like(base) for base in self.base]

    def run(self) -> tuple[torch.Tensor, torch.Tensor, LoraFactors | None]:
        """Gradients of tokens `(N, H)`, of routing weights `(N, K)` and of LoRA."""
        found = [self._one_expert(segment) for segment in self.segments]
        if self.frozen.shared:
            for grad, weight in zip(self.grad_base, self.frozen[:2], strict=True):
                self.grad_tokens = _add_linear(self.grad_tokens, grad, weight.t())
        grad_weights = torch.empty_like(self.weights)
        if found:
            grad_weights.view(-1)[self.order] = torch.cat(found)
        return self.grad_tokens, grad_weights, self.grads

    def _one_expert(self, segment: _Segment) -> torch.Tensor:
        """Adds to the gradients of tokens and of LoRA; those of the routing weights are returned."""
        entered, count = self.enter(segment), segment.tokens.shape[0]
        # Through the down projection and the gate, first per unit of routing weight.
        grad_rows = self.rows_of(self.grad_output, segment, "grad_rows")  # (n, H)
        if self.frozen.shared:
            grad_inner = self.rows_of(self.grad_inner_sum, segment, "grad_inner")  # (n, I)
        else:
            grad_inner = _linear(grad_rows, self.frozen.down[segment.expert].t())
        inner_dropped = grad_low = grad_low_down = None
        if self.lora is not None:
            inner_dropped = self.dropout.draw(entered.gate)
            grad_low_down = _linear(grad_rows, entered.factors.down_b.t()).mul_(self.scaling)  # (n, R)
            grad_inner = _add_dropped(grad_inner, grad_low_down, entered.factors.down_a.t(), inner_dropped)
        weight = F.pad(segment.weights, (0, 0, 0, segment.size - count))
        buffer = partial(self.scratch, size=segment.size, width=entered.up.shape[1])
        is_kept = not self.frozen.shared and self.kept is not None  # then it must stay what it is
        grad_up = buffer("grad_up") if is_kept else entered.up
        inner, grad_gate, grad_up, grad_weight = _gated_backward(
            grad_inner, entered.gate, entered.up, weight, self.activation, buffer("inner"), grad_up
        )
        if self.lora is not None:
            grad_low = [_linear(grad_gate, entered.factors.gate_b.t()), _linear(grad_up, entered.factors.up_b.t())]
            grad_low = torch.cat(grad_low, 1).mul_(self.scaling)  # (n, 2R)
        if self.grads is not None:
            through = (inner, inner_dropped, grad_low_down * weight, grad_rows)
            self._to_lora(segment.expert, entered, weight, *through, grad_gate, grad_up, grad_low)
        self._to_tokens(segment, entered, grad_rows, grad_gate, grad_up, grad_low)
        return grad_weight[:count]

    def _to_lora(
        self, expert, entered: _Entered, weight, inner, dropped, grad_low_down, grad_rows, grad_gate, grad_up, grad_low
    ) -> None:
        low_gate, low_up = entered.low.chunk(2, dim=1)
        if (low_down := entered.low_down) is None:
            low_down = _low_rank(inner, entered.factors.down_a, self.scaling, dropped)
        grad = self.grads.of(expert)
        grad.down_b.copy_(_outer(low_down * weight, grad_rows).t())
        grad.down_a.copy_(_outer(grad_low_down, _drop(inner, dropped)))
        grad.gate_b.copy_(_outer(low_gate.contiguous(), grad_gate).t())
        grad.up_b.copy_(_outer(low_up.contiguous(), grad_up).t())
        grad.gate_up_a.copy_(_outer(grad_low, _drop(entered.rows, entered.dropped)))

    def _to_tokens(self, segment: _Segment, entered: _Entered, grad_rows, grad_gate, grad_up, grad_low) -> None:
        if self.frozen.shared:  # the frozen products come last, once for every token
            for total, grad in zip(self.grad_base, (grad_gate, grad_up), strict=True):
                _put(total, segment.tokens, grad)
            grad_rows.zero_()
        else:
            grad_rows = _linear(grad_gate, self.frozen.gate[segment.expert].t())
            grad_rows = _add_linear(grad_rows, grad_up, self.frozen.up[segment.expert].t())
        if self.lora is not None:
            grad_rows = _add_dropped(grad_rows, grad_low, entered.factors.gate_up_a.t(), entered.dropped)
        if self.lora is not None or not self.frozen.shared:
            _put(self.grad_tokens, segment.tokens, grad_rows)


# Rows


def _take(source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, filled with the rows of `source` named by `rows` `(n,)`, then with zeros: they stay zero throughout."""
    torch.index_select(source, 0, rows, out=out[: rows.shape[0]])
    out[rows.shape[0] :].zero_()
    return out


def _put(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Adds `values` `(size, width)`, overwritten, times `weights` `(n, 1)` to the named rows, each named once."""
    values = values[: rows.shape[0]]
    target.index_add_(0, rows, values if weights is None else values.mul_(weights))


def _drop_(rows: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """`rows`, with zeros where [`_Dropout.draw`] says so."""
    if dropped is None:
        return rows
    if dropped.dtype == torch.bool:
        return rows.masked_fill_(dropped, 0)
    rows.view(-1).index_fill_(0, dropped, 0)
    return rows


def _drop(rows: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
    """[`_drop_`] on a copy."""
    return rows if dropped is None else _drop_(rows.clone(), dropped)


# LoRA


def _low_rank(rows: torch.Tensor, first: torch.Tensor, scaling: float, dropped: torch.Tensor | None) -> torch.Tensor:
    """Rows after dropout and LoRA's first factor, scaled: `(n, R)` or `(n, 2R)`."""
    return _linear(_drop(rows, dropped), first).mul_(scaling)


def _add_low_rank(gate, up, low, factors: _ExpertLora) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up `(n, I)`, which may be overwritten, with LoRA's part; `low` `(n, 2R)` holds both low-rank rows."""
    low_gate, low_up = (half.contiguous() for half in low.chunk(2, dim=1))
    return _add_linear(gate, low_gate, factors.gate_b), _add_linear(up, low_up, factors.up_b)


def _add_dropped(
    base: torch.Tensor, low: torch.Tensor, first: torch.Tensor, dropped: torch.Tensor | None
) -> torch.Tensor:
    """`base`, which may be overwritten, plus a gradient that goes back through LoRA's first factor and dropout."""
    if dropped is None:
        return _add_linear(base, low, first)
    return base.add_(_drop_(_linear(low, first), dropped))


# Products. Weights follow the rows' dtype, which differs from theirs under autocast only.


def _linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows @ weight.T`."""
    weight = weight if weight.dtype == rows.dtype else weight.to(rows.dtype)
    if _prefers_onednn(rows, weight):
        return onednn_linear()(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def _add_linear(base: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`base + rows @ weight.T`; `base` may be overwritten."""
    weight = weight if weight.dtype == rows.dtype else weight.to(rows.dtype)
    if rows.shape[1] >= 16 and _prefers_onednn(rows, weight):
        return onednn_linear().binary(rows, base, weight, None, "add")
    return base.addmm_(rows, weight.t())


def _outer(narrow: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """`narrow.T @ wide`, `(R, width)`: with the thin operand first, up to four times faster in MKL than transposed."""
    return _linear(narrow.t(), wide.t())


def _prefers_onednn(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Float32 on a CPU with AVX-512, where MKL may take its AVX2 kernels; small ones are quicker to call in MKL."""
    return (
        rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and (rows.shape[0] * weight.numel() > 4_000_000 or (rows.shape[0] <= FEW_TOKENS and weight.numel() > 100_000))
        and torch.backends.mkldnn.enabled
        and onednn_linear() is not None
    )


# The gate


def _blocks(rows: torch.Tensor) -> Iterator[slice]:
    """On a CPU so many rows at a time that what one pass writes the next one finds in the cache."""
    count, width = rows.shape
    step = max(1, CACHED_BYTES // (width * rows.element_size())) if rows.device.type == "cpu" else max(1, count)
    return (slice(start, start + step) for start in range(0, count, step))


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation, out: torch.Tensor) -> torch.Tensor:
    """`out`, filled with `act(gate) * up`."""
    for block in _blocks(gate):
        activation.fill(gate[block], out[block]).mul_(up[block])
    return out


def _gated_backward(
    grad_inner, gate, up, weights, activation: Activation, inner, grad_up
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        grad_inner (`torch.Tensor` of shape `(n, I)`): Gradient per unit of routing weight; overwritten.
        gate, up (`torch.Tensor` of shape `(n, I)`): As in forward.
        weights (`torch.Tensor` of shape `(n, 1)`): Routing weights.
        activation ([`Activation`]): Of the gate.
        inner (`torch.Tensor` of shape `(n, I)`): Filled with `act(gate) * up`.
        grad_up (`torch.Tensor` of shape `(n, I)`): Filled with the gradient of `up`, and may be `up`.

    Returns:
        `tuple(torch.Tensor)`: *inner*, gradients of *gate* (in the memory of `grad_inner`) and *up* `(n, I)`, and of
        the *weights* `(n,)`.
    """
    grad_weights = gate.new_empty(gate.shape[0])
    for block in _blocks(gate):
        g, u, grad, inner_block = gate[block], up[block], grad_inner[block], inner[block]
        activated = activation.run(g)
        torch.mul(activated, u, out=inner_block)
        product = grad * inner_block
        torch.sum(product, 1, out=grad_weights[block])
        grad.mul_(weights[block])
        torch.mul(grad, u, out=product)
        torch.mul(grad, activated, out=grad_up[block])
        activation.backward(product, g, grad)
    return inner, grad_inner, grad_up, grad_weights


__all__ = ["ACTIVATIONS", "FEW_TOKENS", "FrozenWeights", "LoraFactors", "segmented_experts"]
