"""What is counted of routing, under padding, caches and checkpointing."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import MIXED, MODALITIES, checkpoint_activations, labels_of, make_inputs, rows_alone, tiny_model

from uni_moe_hf import record_routing
from uni_moe_hf.mixtures.routing import TOKEN_TYPES, RoutingReport


ROWS = (MIXED, (2,), ("speech", 1, "speech"), (1, "audio", "image", "image"))
# One clip of each: 4 tokens of a picture, 4 of a video, 5 of sound, 3 of speech.
CLIP_TOKENS = {"image": 4, "video": 4, "audio": 5, "speech": 3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    """Sparse in every second layer. Not to be changed by tests."""
    return tiny_model({"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]})


def num_hooks(model) -> int:
    """The library leaves hooks of its own on what it records."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def report_of(model, *batches, **settings) -> RoutingReport:
    with torch.no_grad(), record_routing(model) as routing:
        for batch in batches:
            model(**batch, **settings)
    return routing.report()


def counts_by_hand(model, inputs) -> torch.Tensor:
    """From the router logits that the model returns: `(L, M, E)`."""
    ids, mask = inputs["input_ids"].flatten(), inputs["attention_mask"].flatten().bool()
    ids_of = [getattr(model.config, f"{modality}_token_id") for modality in MODALITIES]
    counts = torch.zeros(2, 5, 4, dtype=torch.long)
    for layer, logits in enumerate(model(**inputs, output_router_logits=True).router_logits):
        for token, experts in enumerate(logits.topk(2).indices.tolist()):
            kind = ids_of.index(int(ids[token])) + 1 if int(ids[token]) in ids_of else 0
            for expert in experts if mask[token] else ():
                counts[layer, kind, expert] += 1
    return counts


@pytest.mark.parametrize("padding", ["left", "right"])
def test_every_real_token_counts_once_per_layer_under_its_modality(model, padding):
    inputs = make_inputs(model.config, *ROWS, padding=padding)
    report = report_of(model, inputs)
    assert torch.equal(report.counts, counts_by_hand(model, inputs))
    assert report.layers == (0, 2) and report.modalities == ("text", *MODALITIES) == TOKEN_TYPES
    clips = [part for row in ROWS for part in row if isinstance(part, str)]
    expected = [clips.count(modality) * CLIP_TOKENS[modality] for modality in MODALITIES]
    words = int(inputs["attention_mask"].sum()) - sum(expected)
    assert report.num_tokens.tolist() == [[words, *expected]] * 2


def test_a_padded_batch_counts_like_its_rows_one_by_one(model):
    inputs = make_inputs(model.config, *ROWS)
    assert torch.equal(report_of(model, inputs).counts, report_of(model, *rows_alone(inputs, ROWS)).counts)


def test_token_types_serve_where_there_are_no_ids(model):
    embeddings = torch.randn(1, 6, 32)
    types = torch.tensor([[0, 1, 1, 4, 0, 2]])
    report = report_of(model, {"inputs_embeds": embeddings, "mm_token_type_ids": types})
    assert report.num_tokens.tolist() == [[2, 2, 1, 0, 1]] * 2
    assert report_of(model, {"inputs_embeds": embeddings}).num_tokens.tolist() == [[6, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generation_counts_prompt_and_answer(model, cache):
    """With a cache every token runs once; without, the whole sequence again in every step."""
    inputs = make_inputs(model.config, *ROWS)
    prompts = report_of(model, inputs).num_tokens
    with record_routing(model) as routing:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **cache)
    steps = 4 if cache.get("use_cache") is False else 1
    # The last word of an answer never runs.
    words = 3 * len(ROWS) if steps == 1 else (1 + 2 + 3) * len(ROWS)
    expected = prompts * steps
    expected[:, 0] += words
    assert torch.equal(routing.report().num_tokens, expected)


def test_rows_that_have_ended_are_not_counted_on(model):
    """Whatever a batch does with rows that have ended, it counts like its rows one by one."""
    inputs = make_inputs(model.config, *ROWS)
    end = int(model.generate(**inputs, max_new_tokens=3, do_sample=False)[1, -2])
    settings = {"max_new_tokens": 8, "do_sample": False}
    before = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [end, 2], 0
    try:
        with record_routing(model) as together:
            answers = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        with record_routing(model) as alone:
            for row in rows_alone(inputs, ROWS):
                model.generate(**row, **settings)
    finally:
        model.generation_config = before
    assert len({row.tolist().index(end) if end in row else 8 for row in answers}) > 1  # they end at different times
    assert torch.equal(together.report().counts, alone.report().counts)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_counts_once(reentrant):
    model = tiny_model().train()
    model.model.audio_connector.eval()  # no dropout: the same features twice
    inputs = [make_inputs(model.config, *ROWS[:2]), make_inputs(model.config, *ROWS[2:], seed=1)]
    plain = report_of(model, *inputs).counts
    checkpoint_activations(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    with record_routing(model) as routing:
        # Both forward passes first: the second's must not be taken for the first's recomputation.
        losses = [model(**batch, labels=labels_of(model.config, batch)).loss for batch in inputs]
        sum(losses).backward()
    assert torch.equal(routing.report().counts, plain)


def test_recording_leaves_the_model_as_it_was(model):
    inputs = make_inputs(model.config, *ROWS)
    before, hooks = model(**inputs).logits, num_hooks(model)
    with record_routing(model) as routing:
        assert torch.equal(model(**inputs).logits, before)
    counted = routing.report().counts
    model(**inputs)
    assert torch.equal(routing.report().counts, counted)
    assert num_hooks(model) == hooks


def test_recording_ends_when_the_model_fails(model):
    hooks = num_hooks(model)
    with pytest.raises(ValueError, match="do not match"), record_routing(model):
        model(input_ids=torch.tensor([[model.config.image_token_id]]))
    assert num_hooks(model) == hooks


def test_a_recorder_can_begin_anew(model):
    inputs = make_inputs(model.config, *ROWS)
    with record_routing(model) as routing:
        model(**inputs)
        first = routing.report()
        routing.reset()
        assert not routing.report().counts.any()
        model(**inputs)
        assert torch.equal(routing.report().counts, first.counts)


def test_routing_inside_peft_is_recorded(model):
    from peft import LoraConfig, get_peft_model

    inner = tiny_model()
    wrapped = get_peft_model(inner, LoraConfig(target_modules=["q_proj"]))
    inputs = make_inputs(inner.config, *ROWS)
    assert torch.equal(report_of(wrapped, inputs).counts, report_of(inner, inputs).counts)


def test_a_router_that_peft_trains_a_copy_of_is_counted_with_its_adapter_on_and_off():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    inputs = make_inputs(model.config, *ROWS)
    tokens = report_of(tiny_model(), inputs).num_tokens
    assert torch.equal(report_of(wrapped, inputs).num_tokens, tokens)
    with wrapped.disable_adapter():
        assert torch.equal(report_of(wrapped, inputs).num_tokens, tokens)


@pytest.mark.parametrize("route", ["eager", "grouped_mm", "batched_mm"])
def test_a_collapsed_router_is_seen(route):
    """All pictures to experts 1 and 2, whatever else: entropy log 2 / log 4, and two dead experts for pictures."""
    model = tiny_model({"expert_names": ["text", "vision", "depth", "speech"]})
    model.set_experts_implementation(route)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.register_forward_hook(lambda _, args, out: (out[0], out[1], _collapsed(args[0], out[2])))
    inputs = make_inputs(model.config, MIXED)
    report = report_of(model, inputs)
    assert torch.equal(report.load, torch.tensor([0.0, 0.5, 0.5, 0.0]).double().expand(2, 5, 4))
    torch.testing.assert_close(report.entropy, torch.full((2, 5), 0.5).double())
    assert report.dead_experts() == [(0, "text"), (0, "speech"), (1, "text"), (1, "speech")]
    assert report.dead.sum().item() == 2 * 5 * 2
    assert "text, speech" in str(report)


def _collapsed(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[1, 2]]).expand_as(chosen).contiguous()


def test_a_router_pulled_to_one_side_collapses_in_the_report():
    """A router whose weights prefer two experts for everything: found from its own logits, no hook of ours."""
    model = tiny_model(seed=1)
    balanced = report_of(model, inputs := make_inputs(model.config, *ROWS))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            # Norms after which the first component is always 1 leave the router a constant to lean on.
            layer.post_attention_layernorm.register_forward_hook(
                lambda _, __, out: torch.cat([torch.ones_like(out[..., :1]), out[..., 1:]], dim=-1)
            )
            layer.mlp.gate.weight[:, 0] = torch.tensor([50.0, 40.0, -50.0, -60.0])
    collapsed = report_of(model, inputs)
    assert not balanced.dead_experts()
    assert {expert for _, expert in collapsed.dead_experts()} == {"2", "3"}
    assert (collapsed.entropy.nan_to_num(0.5) - 0.5).abs().max() < 1e-9 < balanced.entropy.nan_to_num(1).min() - 0.5


def test_load_and_entropy_of_a_hand_written_count():
    counts = torch.zeros(1, 5, 4, dtype=torch.long)
    counts[0, 0] = torch.tensor([4, 2, 1, 1])
    counts[0, 3] = torch.tensor([3, 3, 0, 0])
    report = RoutingReport(counts, (7,), ("a", "b", "c", "d"), 2)
    assert report.num_tokens.tolist() == [[4, 0, 0, 3, 0]]
    assert report.load[0, 0].tolist() == [0.5, 0.25, 0.125, 0.125]
    assert report.load[0, 1].tolist() == [0.0] * 4
    assert report.entropy[0, 0].item() == pytest.approx(1.75 * math.log(2) / math.log(4))
    assert math.isnan(report.entropy[0, 1]) and report.entropy[0, 3].item() == pytest.approx(0.5)
    assert report.dead[0].nonzero().tolist() == [[3, 2], [3, 3]] and report.dead_experts() == []
    told = json.loads(json.dumps(report.to_dict()))
    assert told["layers"][0]["layer"] == 7 and set(told["layers"][0]["modalities"]) == {"text", "audio"}
    assert told["layers"][0]["modalities"]["audio"] == {
        "tokens": 3,
        "load": [0.5, 0.5, 0.0, 0.0],
        "entropy": 0.5,
        "dead": ["c", "d"],
    }


def test_a_dense_model_and_a_foreign_one_are_refused():
    dense = tiny_model({"mlp_layer_types": ["dense", "dense"]})
    with pytest.raises(ValueError, match="All layers of this model are dense"), record_routing(dense):
        pass
    with pytest.raises(ValueError, match="A Linear holds no Uni-MoE"), record_routing(torch.nn.Linear(2, 2)):
        pass


# Connectors


def test_a_model_that_runs_in_several_threads_is_counted_whole():
    model = tiny_model()
    batches = [make_inputs(model.config, (5 + index, "image"), (3,), seed=index) for index in range(6)]
    with record_routing(model) as routing, torch.no_grad():
        for inputs in batches:
            model(**inputs)
    expected = routing.report().counts
    for _ in range(5):
        with record_routing(model) as routing, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda inputs: torch.no_grad()(lambda: model(**inputs))(), batches))
        assert torch.equal(routing.report().counts, expected)
