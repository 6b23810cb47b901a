"""Where routers start: even loads, and informed of what each expert is good for."""

import pytest
import torch
from tiny import labels_of, make_inputs, tiny_model

from uni_moe_hf import balance_routers, record_routing, start_routers
from uni_moe_hf.mixtures.router_starts import inform_routers


TEXT = {"num_experts": 2, "num_experts_per_tok": 1, "expert_lora_dropout": 0.1}
KINDS = {"image": ("image", 12), "speech": ("speech", 12)}


def experts_that_differ(seed: int = 0) -> tuple[torch.nn.Module, list[dict]]:
    """A model whose first expert says what picture rows want, the second what speech rows want; and such rows."""
    model = tiny_model(TEXT, seed=seed)
    batches = []
    for expert, row in enumerate(KINDS.values()):
        for number in range(4):
            batch = make_inputs(model.config, *[row] * 6, seed=10 * number + expert)
            labels = labels_of(model.config, batch)
            with torch.no_grad():
                hooks = [
                    module.register_forward_hook(
                        lambda m, a, out, expert=expert: (
                            out[0],
                            torch.ones_like(out[1]),
                            torch.full_like(out[2], expert),
                        )  # fmt: skip
                    )
                    for module in model.modules()
                    if type(module).__name__ == "UniMoETopKRouter"
                ]
                best = model(**batch).logits.argmax(-1)
                for hook in hooks:
                    hook.remove()
            labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, best[:, :-1])
            batches.append({**batch, "labels": labels})
    return model, batches


def losses(model, batches) -> list[float]:
    with torch.no_grad():
        return [model(**batch).loss.item() for batch in batches]


def routers_of_state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mlp.gate." in name}


def test_informed_routers_lower_the_loss_of_every_kind_keep_experts_in_use_and_change_nothing_else():
    model, batches = experts_that_differ()
    model.train()
    model.lm_head.requires_grad_(False)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    balance_routers(model, batches)
    model.eval()
    before = losses(model, batches)
    model.train()
    found = inform_routers(model, batches, steps=40)
    assert found.keys() == {"image", "speech"} and all(last < first for first, last in found.values())
    assert model.training and model.config.to_dict() == config
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {
        "model.language_model.layers.0.mlp.gate.weight",
        "model.language_model.layers.1.mlp.gate.weight",
    }
    model.eval()
    after = losses(model, batches)
    for kind in (slice(0, 4), slice(4, 8)):
        assert sum(after[kind]) < sum(before[kind])
    with record_routing(model) as routing, torch.no_grad():
        for batch in batches:
            model(**batch)
    load = routing.report().counts.sum(dim=1).double()
    assert (load.min(dim=1).values / load.mean(dim=1)).min() > 0.2  # no expert is left without tokens


def test_the_same_rows_inform_the_same_way_and_random_leaves_routers_alone():
    made = []
    for how in ("informed", "informed", "balanced", "random"):
        model, batches = experts_that_differ()
        before = routers_of_state(model)
        torch.manual_seed(len(made))  # whatever was drawn before
        start_routers(model, batches, how)
        made.append(routers_of_state(model))
    assert all(torch.equal(one, made[1][name]) for name, one in made[0].items())
    assert not any(torch.equal(one, made[2][name]) for name, one in made[0].items())
    assert all(torch.equal(one, before[name]) for name, one in made[3].items())


def test_routers_in_half_precision_and_identical_experts_stay_finite():
    model, batches = experts_that_differ()
    for experts in model._experts():
        experts.lora.gate_up_b.data.zero_()
        experts.lora.down_b.data.zero_()
    for module in model.modules():
        if type(module).__name__ == "UniMoETopKRouter":
            module.weight.data = module.weight.data.bfloat16()
    inform_routers(model, batches, steps=3)
    for weight in routers_of_state(model).values():
        assert weight.dtype == torch.bfloat16 and weight.isfinite().all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model, batches: batches.clear(), "there are none"),
        (lambda model, batches: batches[3].pop("labels"), "a batch has no `labels`"),
        (
            lambda model, batches: model.lm_head.weight.data.fill_(float("nan")),
            "The loss of rows of (image|speech) is nan",
        ),
    ],
)
def test_what_cannot_inform_is_one_sentence_and_changes_nothing(spoil, message):
    model, batches = experts_that_differ()
    spoil(model, batches)
    before = routers_of_state(model)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        inform_routers(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in routers_of_state(model).items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert model.config.text_config.num_experts_per_tok == 1


def test_pictures_of_no_numbers_interruptions_and_broken_gradients_leave_routers_as_they_were(monkeypatch):
    model, batches = experts_that_differ()
    before = routers_of_state(model)
    broken = [{**batch, "pixel_values": batch["pixel_values"] * float("nan")} for batch in batches[:4]]
    with pytest.raises(ValueError, match="The tokens at a router are no numbers"):
        start_routers(model, broken)
    layers = list(model.model.language_model.layers)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        balance_routers(model, batches)
    hook.remove()
    layers[0].mlp.gate.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="Routers became no numbers"):
        inform_routers(model, batches, steps=1)
    with pytest.raises(ValueError, match="`steps` is 0"):
        inform_routers(model, batches, steps=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in routers_of_state(model).items())


def test_each_module_is_in_its_own_mode_afterwards():
    model, batches = experts_that_differ()
    model.train()
    model.model.language_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    start_routers(model, batches)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


def test_an_unknown_start_and_a_dense_model_are_refused():
    model, batches = experts_that_differ()
    with pytest.raises(ValueError, match="`router_start` is 'best'; it must be one of informed, balanced, random"):
        start_routers(model, batches, "best")
    with pytest.raises(ValueError, match="The model is dense"):
        start_routers(tiny_model({"mlp_layer_types": ["dense", "dense"]}), batches, "random")
