"""The fast route: rows sorted by expert, a backward pass written by hand, dropout from a seed."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from tiny import ROUNDING
from tiny_experts import (
    INNER,
    RANK,
    assert_all_close,
    both_bases,
    every_route,
    every_routing,
    experts_of,
    freeze,
    make_config,
    make_experts,
    on_route,
    output_and_gradients,
    routed,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from uni_moe_hf.hub import compat_uni_moe, expert_segments_uni_moe
from uni_moe_hf.hub.expert_kernels_uni_moe import choose_route


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


both_activations = pytest.mark.parametrize("activations", ["save", "recompute"])


@both_bases
@both_activations
@every_routing
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_segments_give_the_eager_output_and_gradients_in_float64(shared, activations, routing, act):
    experts = freeze(make_experts(shared, expert_activations=activations, hidden_act=act).double())
    tokens, index, weights = routing
    routing = tokens.double(), index, weights.double()
    expected = output_and_gradients(experts, *routing)
    assert choose_route(on_route(experts, "auto"), tokens) == "segmented"
    assert_all_close(output_and_gradients(on_route(experts, "auto"), *routing), expected, atol=1e-12, rtol=1e-12)


@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("draw", range(12))
def test_segments_of_random_shapes_give_the_eager_gradients_of_float64(activations, dtype, draw):
    """Within 1e-5 of each tensor's norm in float32; in half precision within four times eager's rounding and 1 %."""
    pick = random.Random(draw).choice
    sizes = {
        "hidden_size": pick([8, 40, 130]),
        "intermediate_size": pick([12, 130, 700]),
        "num_experts": pick([1, 3, 16]),
        "expert_lora_rank": pick([0, 1, 8, 32]),
        "hidden_act": pick(["silu", "gelu_pytorch_tanh", "gelu"]),
    }
    sizes["num_experts_per_tok"] = pick(range(1, min(3, sizes["num_experts"]) + 1))
    config = make_config(pick([False, True]), "eager", expert_activations=activations, **sizes)
    experts = experts_of(config, pick([LlamaMLP, Phi3MLP]))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts = freeze(experts.to(dtype))
    count, hidden = pick([1, 9, 50, 400]), sizes["hidden_size"]
    skew = pick([0.0, 1.0, 50.0]) * torch.arange(sizes["num_experts"])  # at 50 all tokens want the same experts
    logits, index = (torch.randn(count, sizes["num_experts"]) + skew).topk(sizes["num_experts_per_tok"])
    routing = torch.randn(count, hidden).to(dtype), index, logits.softmax(dim=-1).to(dtype)

    exact = copy.deepcopy(experts).double()
    expected = output_and_gradients(exact, routing[0].double(), index, routing[2].double())
    actual = output_and_gradients(on_route(experts, "auto"), *routing)
    with torch.no_grad():
        actual["few"] = on_route(experts, "auto")(*(tensor[:8] for tensor in routing))
    expected["few"] = expected["output"][:8]
    eager = output_and_gradients(experts, *routing)
    eager["few"] = eager["output"][:8]
    for name, tensor in expected.items():
        if tensor is not None:
            assert actual[name].dtype == dtype
            error, rounding = (
                (result[name].double() - tensor).norm() / tensor.norm().clamp(min=1e-9) for result in (actual, eager)
            )
            assert error <= (1e-5 if dtype == torch.float32 else 4 * rounding + 1e-2), f"{name}: {error}, {rounding}"


@both_bases
@both_activations
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gradients_of_segments_are_the_differences_of_their_output(shared, activations, dropout, act):
    """`gradcheck` in float64; with dropout, under one seed."""
    fields = {"hidden_size": 6, "intermediate_size": 10, "expert_lora_rank": 2, "hidden_act": act}
    experts = make_experts(shared, "auto", expert_lora_dropout=dropout, expert_activations=activations, **fields)
    experts = freeze(experts.double()).train()
    tokens, index, weights = routed(9, hidden=6)

    def output(tokens, weights, *factors):
        torch.manual_seed(0)
        lora = dict(zip((name for name, _ in experts.lora.named_parameters()), factors, strict=True))
        names = {f"lora.{name}": factor for name, factor in lora.items()}
        return torch.func.functional_call(experts, names, (tokens, index, weights))

    inputs = [tokens.double(), weights.double(), *experts.lora.parameters()]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(output, inputs)


@both_bases
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_give_the_same_gradients_under_dropout(shared, reentrant):
    experts = freeze(make_experts(shared, "auto", expert_lora_dropout=0.4)).train()
    torch.manual_seed(5)
    expected = output_and_gradients(experts, *routed())
    torch.manual_seed(5)
    layer = copy.copy(experts)
    layer.forward = lambda *args: checkpoint(experts, *args, use_reentrant=reentrant)
    assert_all_close(output_and_gradients(layer, *routed()), expected, atol=0, rtol=0)


@both_bases
def test_what_segments_keep_is_seen_by_hooks_and_is_the_input_alone_when_recomputing(shared):
    """Kept beside weights and routing: tokens; when saving also gate, up (of tokens or of rows), low-rank rows."""
    tokens, index, weights = routed(64)
    sizes = {}
    for activations in ("save", "recompute"):
        experts = freeze(make_experts(shared, "auto", expert_activations=activations))
        own = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        kept = {}

        def pack(tensor, own=own, kept=kept):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = experts(tokens.clone().requires_grad_(), index, weights)
        sizes[activations] = sum(kept.values())
        output.sum().backward()
    assert sizes["recompute"] == tokens.numel() + weights.numel()
    rows = 64 if shared else 128
    extra = sizes["save"] - sizes["recompute"]
    assert rows * 2 * INNER + 128 * 3 * RANK <= extra <= 1.3 * (rows * 2 * INNER + 128 * 3 * RANK)  # padding


@both_bases
def test_frozen_weights_get_neither_gradients_nor_copies(shared):
    experts = freeze(make_experts(shared, "auto", hidden_size=256, intermediate_size=384))
    frozen = min(p.numel() for name, p in experts.named_parameters() if not name.startswith("lora."))
    tokens, index, weights = routed(4, hidden=256)
    with torch.profiler.profile(profile_memory=True) as profile:
        experts(tokens.clone().requires_grad_(), index, weights).sum().backward()
    events = profile.profiler.kineto_results.events()
    assert 0 < max(e.nbytes() for e in events if e.name() == "[memory]") < frozen * 4 // 2
    assert all(p.grad is None for name, p in experts.named_parameters() if not name.startswith("lora."))


@both_bases
@both_activations
def test_frozen_lora_gets_no_gradients_and_changes_none(shared, activations):
    experts = freeze(make_experts(shared, "auto", expert_activations=activations))
    expected = output_and_gradients(experts, *routed())
    actual = output_and_gradients(copy.deepcopy(experts).requires_grad_(False), *routed())
    for name in ("output", "tokens", "weights"):
        assert torch.equal(actual.pop(name), expected[name])
    assert set(actual.values()) == {None}


@both_bases
def test_a_token_that_overflows_spoils_itself_alone(shared):
    experts = freeze(make_experts(shared, "auto"))
    tokens, index, weights = routed()
    spoiled = tokens.clone()
    spoiled[0] = torch.inf
    expected = output_and_gradients(experts, tokens, index, weights)
    actual = output_and_gradients(experts, spoiled, index, weights)
    for name in ("output", "tokens"):
        torch.testing.assert_close(actual[name][1:], expected[name][1:], **ROUNDING)
        assert actual[name][0].isnan().any()


@both_bases
@both_activations
def test_segments_repeat_bit_for_bit_and_may_be_sent_back_twice(shared, activations):
    experts = freeze(make_experts(shared, "auto", expert_activations=activations))
    tokens, index, weights = routed(50)
    tokens.requires_grad_()
    output = experts(tokens, index, weights)
    assert torch.equal(output, experts(tokens, index, weights))
    first, second = (torch.autograd.grad(output.sum(), tokens, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_second_derivatives_of_segments_are_refused():
    experts = freeze(make_experts(False, "auto"))
    tokens, index, weights = routed()
    tokens.requires_grad_()
    (grad,) = torch.autograd.grad(experts(tokens, index, weights).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@both_bases
@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_tokens_without_gradients_equal_eager(shared, count):
    experts = make_experts(shared)
    tokens, index, weights = routed(count)
    twice = index[:, :1].expand_as(index)  # both slots at one expert: no router does it, no answer may depend on it
    for chosen in (index, twice):
        with torch.no_grad():
            expected, actual = (layer(tokens, chosen, weights) for layer in (experts, on_route(experts, "auto")))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@both_bases
def test_autocast_of_segments_gives_the_gradients_of_eager(shared):
    """Within 5 % of each tensor's largest value; LoRA's gradients stay float32, as its weights are."""
    experts = freeze(make_experts(shared))
    results = []
    for route in ("eager", "auto"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(output_and_gradients(on_route(experts, route), *routed(50)))
    for name, tensor in results[0].items():
        if tensor is not None:
            assert results[1][name].dtype == tensor.dtype, name
            assert (results[1][name] - tensor).abs().max() <= 0.05 * tensor.abs().max(), name


def test_what_experts_keep_is_save_or_recompute():
    with pytest.raises(StrictDataclassError, match="expert_activations"):
        make_config(expert_activations="keep")


# The private operator


@pytest.fixture
def forget_the_operator():
    compat_uni_moe.onednn_linear.cache_clear()
    yield
    compat_uni_moe.onednn_linear.cache_clear()


def wrong(rows, weight, *others):
    return rows @ weight.T + 1


def absent(*args):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("operator", [wrong, absent, None])
def test_a_private_operator_that_is_wrong_or_gone_is_not_used(operator, monkeypatch, forget_the_operator):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=operator) if operator else object())
    assert compat_uni_moe.onednn_linear() is None
    rows, weight = torch.randn(300, 200), torch.randn(100, 200)
    assert torch.equal(expert_segments_uni_moe._linear(rows, weight), F.linear(rows, weight))


def test_products_equal_the_public_ones_whatever_computes_them(monkeypatch, forget_the_operator):
    """1e-4 on sums of 200 products. Half precision, float64 and small products never take the private operator."""
    rows, weight, base = torch.randn(300, 200), torch.randn(100, 200), torch.randn(300, 100)
    torch.testing.assert_close(expert_segments_uni_moe._linear(rows, weight), rows @ weight.T, atol=1e-4, rtol=1e-4)
    turned = expert_segments_uni_moe._linear(rows, weight.T.contiguous().T)
    torch.testing.assert_close(turned, rows @ weight.T, atol=1e-4, rtol=1e-4)
    added = expert_segments_uni_moe._add_linear(base.clone(), rows, weight)
    torch.testing.assert_close(added, base + rows @ weight.T, atol=1e-4, rtol=1e-4)
    assert not expert_segments_uni_moe._prefers_onednn(rows.bfloat16(), weight.bfloat16())
    assert not expert_segments_uni_moe._prefers_onednn(rows.double(), weight.double())
    assert not expert_segments_uni_moe._prefers_onednn(rows[:20], weight[:20])
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not expert_segments_uni_moe._prefers_onednn(rows, weight)


def test_rows_are_padded_to_sixteen_or_more_sizes_per_doubling():
    like = torch.zeros(1)
    sizes = [expert_segments_uni_moe._padded(count, like) for count in range(1, 4097)]
    assert all(count <= size < 1.07 * count + 4 for count, size in enumerate(sizes, start=1))
    assert len({size for size in sizes if 1024 < size <= 2048}) == 16
    assert expert_segments_uni_moe._padded(37, like.double()) == 37


# Dropout


@both_bases
@every_route
def test_dropout_acts_in_training_only(shared, route):
    experts = make_experts(shared, route, expert_lora_dropout=0.5)
    without = make_experts(shared, route)
    torch.testing.assert_close(experts(*routed()), without(*routed()), atol=0, rtol=0)
    experts.train()
    first, second = experts(*routed()), experts(*routed())
    assert not torch.allclose(first, second)


@both_bases
@every_route
def test_dropout_spares_the_frozen_network(shared, route):
    experts = make_experts(shared, route, expert_lora_dropout=0.5)
    nn.init.zeros_(experts.lora.gate_up_b)
    nn.init.zeros_(experts.lora.down_b)
    expected = experts(*routed())
    torch.testing.assert_close(experts.train()(*routed()), expected, atol=0, rtol=0)


@both_bases
@every_route
def test_full_dropout_leaves_the_frozen_network(shared, route):
    """Dropout stands before every first factor, so at 1.0 nothing gets through LoRA."""
    experts = make_experts(shared, route, expert_lora_dropout=1.0).train()
    actual = experts(*routed())
    nn.init.zeros_(experts.lora.gate_up_b)
    nn.init.zeros_(experts.lora.down_b)
    torch.testing.assert_close(actual, experts.eval()(*routed()), atol=0, rtol=0)


@pytest.mark.parametrize("probability", [1e-4, 0.05, 0.5, 0.97])
def test_every_element_is_dropped_with_the_same_probability(probability):
    """Counts of 40 draws within five standard deviations: over all elements, and over the first and last hundred."""
    dropout, rows = expert_segments_uni_moe._Dropout(probability, seed=0), torch.ones(50, 400)
    draws = torch.zeros(rows.numel())
    for _ in range(40):
        dropped = dropout.draw(rows)
        assert (dropped.diff() > 0).all() and (0 <= dropped).all() and (dropped < rows.numel()).all()
        draws += expert_segments_uni_moe._drop(rows, dropped).flatten() == 0
    for part in (draws, draws[:100], draws[-100:]):
        expected, spread = 40 * len(part) * probability, (40 * len(part) * probability * (1 - probability)) ** 0.5
        assert abs(part.sum() - expected) < 5 * spread + 1
    assert torch.equal(rows, torch.ones_like(rows))  # of which a copy was changed


@both_bases
def test_dropout_keeps_the_mean(shared):
    """Of 600 outputs, in their own spread: within 0.5; a wrong scale gives 1.5."""
    experts = make_experts(shared, "auto", expert_lora_dropout=0.5)
    with torch.no_grad():
        expected, outputs = experts(*routed()), []
        experts.train()
        for _ in range(600):
            outputs.append(experts(*routed()))
    errors = (torch.stack(outputs).mean(dim=0) - expected) / torch.stack(outputs).std(dim=0).clamp(min=1e-6)
    assert errors.square().mean().sqrt() < 0.5
