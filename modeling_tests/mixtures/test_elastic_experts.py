"""Experts that come and go: exact where they should be, on shared and own bases; refused before anything changes."""

import copy

import pytest
import torch
from families import only
from peft import PeftModel, get_peft_model
from test_growing import randomised, text_ids, train_expert
from tiny import DENSE, ROUNDING, make_inputs, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from uni_moe_hf import UniMoEForConditionalGeneration, grow_experts, prepare_stage
from uni_moe_hf.hub.experts_uni_moe import merged_weights
from uni_moe_hf.mixtures.elastic_experts import add_expert, clone_expert, drop_expert, merge_experts
from uni_moe_hf.mixtures.expert_adapters import expert_names, export_expert, export_expert_stack
from uni_moe_hf.mixtures.router_starts import balance_routers
from uni_moe_hf.mixtures.routing import record_routing


MODES = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, tuple[str, torch.Tensor]]:
    """Folders of adapters on one dense model, and the logits of the dense model that carries each."""
    root = tmp_path_factory.mktemp("adapters")
    settings = {"image": ("image", 4), "speech": ("speech", 4), "audio": ("audio", 8)}
    return {
        name: train_expert(root / name, modality, seed, r=rank, lora_alpha=2 * rank)
        for seed, (name, (modality, rank)) in enumerate(settings.items())
    }


def grown(
    adapters: dict, shared: bool, names: tuple[str, ...] = ("image", "speech")
) -> UniMoEForConditionalGeneration:
    torch.manual_seed(0)
    experts = {"text": None, **{name: adapters[name][0] for name in names}}
    model = grow_experts(tiny_model(DENSE), experts, shared_base=shared, lora_rank=4, lora_alpha=8).eval()
    with torch.no_grad():
        for block in model.modules():
            if type(block).__name__ == "UniMoETopKRouter":
                block.weight.mul_(20)
        for experts_ in model._experts():
            if not shared:
                experts_.lora.gate_up_b.normal_(std=0.1)
                experts_.lora.down_b.normal_(std=0.1)
    return model


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=text_ids()).logits


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@MODES
def test_adding_and_dropping_is_the_identity(adapters, shared, tmp_path):
    model = grown(adapters, shared)
    add_expert(model, "fourth", like=None if shared else "text")
    before, logits, config = state_of(model), logits_of(model), model.config.to_dict()
    add_expert(model, "fifth", adapters["image"][0], like=None if shared else "text", projectors={"image": "fifth"})
    assert model.config.text_config.num_experts == 5 and not torch.equal(logits_of(model), logits)
    drop_expert(model, "fifth")
    assert_same_state(model, before)
    assert torch.equal(logits_of(model), logits) and model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), logits, atol=1e-5, rtol=0)


@MODES
def test_an_added_adapter_is_the_dense_model_with_it(adapters, shared):
    """Also one of a larger rank than the model's: the others are filled up without changing what they compute."""
    model = grown(adapters, shared, ("image",))
    first = logits_of(only(grown(adapters, shared, ("image",)), 1))
    add_expert(model, "audio", adapters["audio"][0], like=None if shared else "text", projectors={"audio": "audio"})
    assert model.config.text_config.expert_lora_rank == (8 if shared else 4)
    names = ["text", "image", "audio"]
    assert expert_names(model.config.text_config) == names
    routed = only(model, 1)
    torch.testing.assert_close(logits_of(routed), first, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for experts in model._experts():
            if not shared:
                experts.lora.gate_up_b[2], experts.lora.down_b[2] = 0, 0
    # `only` replaces the routers' forward; a new call replaces it again.
    torch.testing.assert_close(logits_of(only(model, 2)), adapters["audio"][1], atol=1e-4, rtol=1e-4)


@MODES
def test_an_added_expert_without_adapter_is_the_plain_network(adapters, shared):
    model = grown(adapters, shared)
    add_expert(model, "new", like=None if shared else "text")
    torch.testing.assert_close(logits_of(only(model, 3)), logits_of(tiny_model(DENSE)), atol=1e-4, rtol=1e-4)


@MODES
def test_a_clone_computes_the_same_and_is_dropped_without_trace(adapters, shared):
    model = grown(adapters, shared)
    before = state_of(model)
    clone_expert(model, "speech", "copy")
    assert expert_names(model.config.text_config) == ["text", "image", "speech", "copy"]
    for name, tensor in model.state_dict().items():
        if tensor.dim() and tensor.shape[0] == 4 and ".mlp." in name and ".base." not in name:
            assert torch.equal(tensor[2], tensor[3])
    drop_expert(model, "copy")
    assert_same_state(model, before)


@MODES
def test_a_dropped_expert_takes_its_own_row_along_and_no_other(adapters, shared):
    model = grown(adapters, shared)
    before = state_of(model)
    drop_expert(model, "image")
    assert expert_names(model.config.text_config) == ["text", "speech"]
    for name, tensor in model.state_dict().items():
        if "language_model" in name and ".mlp." in name and ".base." not in name:
            assert torch.equal(tensor, before[name][[0, 2]])


def dense_delta(model: UniMoEForConditionalGeneration, expert: int) -> list[torch.Tensor]:
    """What LoRA adds to an expert's weights in every layer, gate and up in one."""
    deltas = []
    for experts in model._experts():
        gate_up = torch.zeros(2 * experts.intermediate_size, experts.hidden_size)
        down = torch.zeros(experts.hidden_size, experts.intermediate_size)
        added = merged_weights(gate_up, down, experts.lora(), experts.lora_scaling)
        deltas += [part[expert] for part in added]
    return deltas


@pytest.mark.parametrize("weights", [{"image": 1.0, "speech": 1.0}, {"speech": 0.3, "image": 0.7}])
@MODES
def test_merging_is_the_weighted_sum_where_the_rank_suffices(adapters, shared, weights):
    if not shared:
        weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    model = grown(adapters, shared, ("image", "speech", "audio"))  # rank 8 for the shared base: 4 + 4 fit
    if not shared:
        with torch.no_grad():
            for experts in model._experts():  # second halves of the rank empty, so that both fit
                experts.lora.gate_up_b[..., 2:], experts.lora.down_b[..., 2:] = 0, 0
    deltas = {name: dense_delta(model, expert_names(model.config.text_config).index(name)) for name in weights}
    bases = [dict(experts.named_parameters()) for experts in model._experts()]
    bases = [{name: tensor.detach().clone() for name, tensor in base.items()} for base in bases]
    errors = merge_experts(model, weights, "both")
    assert max(errors.values()) < 1e-5 and len(errors) == 6
    assert expert_names(model.config.text_config) == ["text", "both", "audio"]
    expected = [sum(w * deltas[name][i] for name, w in weights.items()) for i in range(4)]
    for found, wanted in zip(dense_delta(model, 1), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    if not shared:
        for experts, base in zip(model._experts(), bases, strict=True):
            wanted = sum(w * base["down_proj"][["text", "image", "speech"].index(name)] for name, w in weights.items())
            torch.testing.assert_close(experts.down_proj[1].data, wanted)


def test_what_a_small_rank_cuts_off_is_the_least_possible_and_is_reported(adapters):
    model = grown(adapters, True)
    deltas = [dense_delta(model, index) for index in (1, 2)]
    errors = merge_experts(model, {"image": 1.0, "speech": 1.0}, "both", rank=3)
    inner = model.config.text_config.intermediate_size
    for layer in range(2):
        gate_up, down = (deltas[0][2 * layer + i] + deltas[1][2 * layer + i] for i in range(2))
        for name, wanted in (("gate", gate_up[:inner]), ("up", gate_up[inner:]), ("down", down)):
            values = torch.linalg.svdvals(wanted.double())
            expected = (values[3:].norm() / values.norm()).item()
            assert errors[f"layers.{layer} {name}"] == pytest.approx(expected, rel=1e-4)
            assert expected > 0.01


@pytest.mark.parametrize("kind", ["shared", "even"])
def test_an_expert_of_a_mixture_is_exported_for_the_plain_llm(adapters, kind, tmp_path, recwarn):
    model = grow_experts(
        tiny_model(DENSE), {"text": None, "image": adapters["image"][0]}, layers="all" if kind == "shared" else "even"
    ).eval()
    export_expert(model, tmp_path, "image")
    llama = PeftModel.from_pretrained(plain_llama(), tmp_path).eval()
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message).lower()]
    torch.testing.assert_close(logits_of(llama), logits_of(only(model, 1)), atol=1e-4, rtol=1e-4)
    again = grow_experts(
        tiny_model(DENSE), {"text": None, "image": tmp_path}, layers="all" if kind == "shared" else "even"
    )
    torch.testing.assert_close(logits_of(only(again.eval(), 1)), logits_of(llama), atol=1e-4, rtol=1e-4)


def plain_llama() -> LlamaForCausalLM:
    dense = tiny_model(DENSE)
    known = LlamaConfig().to_dict()
    text = {k: v for k, v in dense.config.text_config.to_dict().items() if k in known and k != "model_type"}
    llama = LlamaForCausalLM(LlamaConfig(**text)).eval()
    llama.model.load_state_dict(dense.model.language_model.state_dict())
    llama.lm_head.load_state_dict(dense.lm_head.state_dict())
    return llama


def test_the_stack_of_all_experts_is_a_plain_peft_adapter_of_plain_experts(adapters, tmp_path, recwarn):
    model = grown(adapters, shared=False)
    export_expert_stack(model, tmp_path)
    plain = tiny_model({"num_experts": 3, "expert_lora_rank": 0, "expert_names": ["text", "image", "speech"]}).eval()
    own = {name: tensor for name, tensor in model.state_dict().items() if ".lora." not in name}
    plain.load_state_dict(own)
    assert not torch.allclose(logits_of(plain), logits_of(model), atol=1e-3)
    wrapped = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message).lower()]
    torch.testing.assert_close(logits_of(wrapped), logits_of(model), atol=1e-4, rtol=1e-4)


@MODES
def test_balanced_routers_send_as_many_tokens_to_each_expert(shared):
    """Measured on tokens that were not used for balancing."""
    model = tiny_model({"shared_expert_base": shared, "num_experts": 6}, seed=2).eval()
    with torch.no_grad():  # hidden states of real models share a large common part
        model.get_input_embeddings().weight.add_(2 * torch.randn(32))
    rows = (("image", 60, "speech"), (90,), (70, "audio"))
    calibration = [make_inputs(model.config, *rows, seed=seed) for seed in range(12)]
    fresh = [make_inputs(model.config, *rows, seed=100 + seed) for seed in range(12)]
    loads = {}
    for name in ("before", "after"):
        with record_routing(model) as routing, torch.no_grad():
            for batch in fresh:
                model(**batch)
        counts = routing.report().counts.sum(dim=1)  # (layers, experts)
        loads[name] = (counts.max(dim=-1).values / counts.min(dim=-1).values).max().item()
        if name == "before":
            ratios = balance_routers(model, calibration)
    assert loads["before"] > 1.5 >= loads["after"], loads
    assert set(ratios) == {0, 1} and max(ratios.values()) < 1.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, a: add_expert(m, "image"), "an expert 'image' already"),
        (lambda m, a: add_expert(m, "x", like="text"), "With a shared base every expert starts from it"),
        (
            lambda m, a: add_expert(m, "x", a["audio"][0]),
            r"brings another projector for audio .* `projectors=\{'audio'",
        ),
        (lambda m, a: add_expert(m, "x", "nowhere"), "holds no adapter_config.json"),
        (
            lambda m, a: add_expert(m, "x", a["audio"][0], projectors={"speech": "x"}),
            "to 'x', whose adapter trained none for speech",
        ),
        (lambda m, a: add_expert(m, 5), "name is text, not 5"),
        (lambda m, a: merge_experts(m, {"text": float("nan"), "image": 1.0}, "y"), "add up to nan"),
        (lambda m, a: merge_experts(m, {"text": 1.0, "image": -1.0 + 1e-9}, "y"), "else not to 0"),
        (lambda m, a: balance_routers(m, []), "there are none"),
        (lambda m, a: drop_expert(m, "x"), r"no expert 'x'; the model has \['text', 'image', 'speech'\]"),
        (None, "1 experts are left, but every token goes to"),
        (lambda m, a: clone_expert(m, "x", "y"), "no expert 'x'"),
        (lambda m, a: clone_expert(m, "text", "image"), "an expert 'image' already"),
        (lambda m, a: merge_experts(m, {"text": 1.0}, "y"), "at least two experts"),
        (lambda m, a: merge_experts(m, {"text": 1.0, "x": 1.0}, "y"), "no expert 'x'"),
        (lambda m, a: merge_experts(m, {"text": 1.0, "image": -1.0}, "y"), "add up to 0"),
        (lambda m, a: merge_experts(m, {"text": 1.0, "image": 1.0}, "speech"), "an expert 'speech' already"),
        (lambda m, a: merge_experts(m, {"text": 1, "image": 1}, "y", rank=9), "must lie between 1 and"),
        (lambda m, a: merge_experts(m, {"text": 1, "image": 1, "speech": 1}, "y"), "1 experts would be left"),
        (lambda m, a: export_expert(m, "out", "x"), "no expert 'x'"),
        (lambda m, a: export_expert_stack(m, "out"), "`shared_expert_base=True`"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_changes_nothing(adapters, change, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = grown(adapters, shared=True)
    if change is None:
        drop_expert(model, "text")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        drop_expert(model, "image") if change is None else change(model, adapters)
    assert_same_state(model, before)
    assert not list(tmp_path.iterdir())


def test_own_bases_need_a_base_to_start_from_and_weights_that_keep_it(adapters):
    model = grown(adapters, shared=False)
    with pytest.raises(ValueError, match=r"pass `like=` one of \['text', 'image', 'speech'\]"):
        add_expert(model, "x")
    with pytest.raises(ValueError, match="add up to 2; with own bases they must to 1"):
        merge_experts(model, {"text": 1.0, "image": 1.0}, "y")
    with pytest.raises(ValueError, match="has a base of its own"):
        export_expert(model, "out", "image")


def test_a_model_under_peft_or_without_experts_is_refused(adapters):
    model = grown(adapters, shared=True)
    with pytest.raises(ValueError, match="merge or unload its adapter first"):
        drop_expert(get_peft_model(model, prepare_stage(model, "moe")), "text")
    with pytest.raises(ValueError, match="The model is dense"):
        drop_expert(tiny_model(DENSE), "text")


def test_experts_per_token_may_be_lowered_and_then_experts_dropped(adapters):
    model = grown(adapters, shared=True)
    model.config.text_config.num_experts_per_tok = 1
    one = logits_of(model)
    copied = type(model)(copy.deepcopy(model.config)).eval()
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(copied), one, **ROUNDING)  # what is saved is what is here
    drop_expert(drop_expert(model, "text"), "image")
    assert logits_of(model).isfinite().all() and model.config.text_config.num_experts == 1


def test_a_merge_before_a_change_cannot_be_undone_after_it(adapters):
    model = grown(adapters, shared=True)
    model.merge_expert_lora()
    drop_expert(model, "image")
    with pytest.raises(ValueError, match="not merged"):
        model.unmerge_expert_lora()
    assert logits_of(model).isfinite().all()


def test_a_projector_that_was_not_named_must_be_the_models(adapters, tmp_path):
    """An adapter with two projectors, of which one is asked for."""
    dense = tiny_model(DENSE)
    both = randomised(get_peft_model(dense, prepare_stage(dense, "experts", ["image", "speech"], r=4)), 9)
    both.save_pretrained(tmp_path)
    model = grown(adapters, shared=True)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"another projector for vision .*'image': 'x'"):
        add_expert(model, "x", tmp_path, projectors={"speech": "x"})
    assert_same_state(model, before)
    add_expert(model, "x", tmp_path, projectors={"speech": "x", "image": "x"})


def test_routers_of_a_half_precision_model_are_balanced_as_they_are_saved(tmp_path):
    model = tiny_model({"shared_expert_base": True, "num_experts": 8, "hidden_size": 128}, seed=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(4 * torch.randn(128))
    model.save_pretrained(tmp_path)
    model = UniMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    batches = [make_inputs(model.config, (90,), (70, "audio"), seed=seed) for seed in range(12)]
    ratios = balance_routers(model, batches)
    assert max(ratios.values()) < 1.2
    model.save_pretrained(tmp_path / "again")
    again = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "again")
    for block, other in zip(model._experts(), again._experts(), strict=True):
        assert block.num_experts == other.num_experts
    for name, tensor in model.state_dict().items():
        if ".mlp.gate." in name:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, again.state_dict()[name])


def test_a_changed_mixture_trains(adapters):
    model = grown(adapters, shared=True)
    add_expert(model, "audio", adapters["audio"][0], projectors={"audio": "audio"})
    trained = randomised(get_peft_model(model, prepare_stage(model, "moe")), 3)
    trained(input_ids=text_ids(), labels=text_ids()).loss.backward()
    lora = next(iter(model._experts())).lora.modules_to_save["default"]
    assert lora.gate_up_b.grad.shape[0] == 4
