"""The whole model: every mix of modalities, batches, generation, losses, saving and bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    FEATURES,
    MIXED,
    MODALITIES,
    ROUNDING,
    TOWERS,
    assert_logits_equal,
    checkpoint_activations,
    labels_of,
    make_inputs,
    rows_alone,
    tiny_config,
    tiny_model,
    tokens_per_clip,
)
from tiny_experts import both_bases
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from uni_moe_hf import UniMoEForConditionalGeneration
from uni_moe_hf.hub import expert_kernels_uni_moe


SUBSETS = [chosen for count in range(4) for chosen in itertools.combinations(TOWERS, count)]


every_modality = pytest.mark.parametrize("modality", MODALITIES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Forward


@pytest.mark.parametrize("row", [(5,), *((2, m, 3) for m in MODALITIES), MIXED], ids=["none", *MODALITIES, "together"])
def test_forward_takes_every_modality_alone_together_and_none(model, row):
    inputs = make_inputs(model.config, row)
    outputs = model(**inputs)
    assert outputs.logits.shape == (*inputs["input_ids"].shape, model.config.text_config.vocab_size)
    assert outputs.logits.isfinite().all() and outputs.loss is None and outputs.aux_loss is None
    for modality in MODALITIES:
        features = getattr(outputs, f"{modality}_hidden_states")
        if modality in row:
            tokens = tokens_per_clip(model.config, 2)[modality]
            assert features.shape == (row.count(modality), tokens, model.config.text_config.hidden_size)
        else:
            assert features is None


@every_modality
def test_clip_changes_what_follows_it_and_nothing_before(model, modality):
    inputs = make_inputs(model.config, (4, modality, 3))
    before = model(**inputs).logits
    inputs[FEATURES[modality]] = inputs[FEATURES[modality]].flip(-1) * 2
    change = (model(**inputs).logits - before).abs().amax(dim=-1)[0]
    assert (change[:5] < 1e-5).all() and (change[5:] > 1e-3).all()


@pytest.mark.parametrize("without", SUBSETS, ids=lambda names: "-".join(names) or "none")
def test_model_lives_without_any_of_its_towers(without):
    model = tiny_model(without=without)
    parts = {name for name, _ in model.model.named_children()}
    towers = [f"{tower}_{part}" for tower in TOWERS if tower not in without for part in ("tower", "connector")]
    assert parts == {"language_model", *towers}
    inputs = make_inputs(model.config, (*model.config.modalities, 3), (2,))
    assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@both_bases
def test_features_stand_on_the_placeholders_in_reading_order_across_rows(shared):
    model = tiny_model({"shared_expert_base": shared})
    rows = (("image", 1, "speech"), (2, "image", "speech", "image"), (1, "audio", "video", "audio"))
    inputs = make_inputs(model.config, *rows)
    with torch.no_grad():
        embeddings = model(**inputs, output_hidden_states=True).hidden_states[0]
        features = {
            "image": model.get_image_features(inputs["pixel_values"]),
            "video": model.get_video_features(inputs["pixel_values_videos"]),
            "audio": model.get_audio_features(inputs["input_values"], inputs["input_values_mask"]),
            "speech": model.get_speech_features(inputs["input_features"]),
        }
    for modality, outputs in features.items():
        placed = embeddings[inputs["input_ids"] == getattr(model.config, f"{modality}_token_id")]
        assert torch.equal(placed, outputs.pooler_output.flatten(0, 1))
    words = inputs["input_ids"] < model.config.text_config.vocab_size
    assert torch.equal(embeddings[words], model.get_input_embeddings()(inputs["input_ids"][words]))


def test_absent_modalities_run_no_tower(own_model, monkeypatch):
    for tower in TOWERS:
        for part in ("tower", "connector"):
            monkeypatch.setattr(getattr(own_model.model, f"{tower}_{part}"), "forward", None)
    assert own_model(**make_inputs(own_model.config, (5,))).logits.isfinite().all()


def test_dense_model_equals_llama():
    model = tiny_model({"mlp_layer_types": ["dense", "dense"]}, without=TOWERS)
    fields = {name: value for name, value in model.config.text_config.to_dict().items() if name != "model_type"}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    llama.load_state_dict({name.replace("language_model.", ""): w for name, w in model.state_dict().items()})
    inputs = make_inputs(model.config, (9,), (4,))
    assert_logits_equal(model(**inputs).logits, llama(**inputs).logits)


def test_sparse_model_with_a_shared_base_and_zero_lora_equals_the_dense_one():
    sparse = tiny_model({"shared_expert_base": True})
    for experts in sparse._experts():
        nn.init.zeros_(experts.lora.gate_up_b)
        nn.init.zeros_(experts.lora.down_b)
    dense = tiny_model({"mlp_layer_types": ["dense", "dense"]})
    names = {
        name.replace("mlp.", "mlp.experts.base.") if ".mlp." in name else name: name for name in dense.state_dict()
    }
    weights = {names[name]: w for name, w in sparse.state_dict().items() if name in names}
    weights |= {name: w for name, w in sparse.state_dict().items() if "language_model" not in name}
    dense.load_state_dict(weights)
    inputs = make_inputs(sparse.config, MIXED)
    assert_logits_equal(sparse(**inputs).logits, dense(**inputs).logits)


def test_alternating_layers_are_built_as_listed():
    model = tiny_model({"mlp_layer_types": ["sparse", "dense"]})
    first, second = (layer.mlp for layer in model.model.language_model.layers)
    assert hasattr(first, "experts") and not hasattr(second, "experts")
    outputs = model(**make_inputs(model.config, MIXED), output_router_logits=True)
    assert len(outputs.router_logits) == 1


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_mixed_batch_equals_its_rows_one_by_one(model, padding):
    rows = (MIXED, (2,), ("speech", 5, "speech"), (1, "audio", 2), (3, "video"), ("image", "audio"))
    inputs = make_inputs(model.config, *rows, padding=padding)
    logits = model(**inputs).logits
    for index, single in enumerate(rows_alone(inputs, rows)):
        valid = inputs["attention_mask"][index].bool()
        assert_logits_equal(logits[index, valid], model(**single).logits[0])


def test_token_types_have_no_influence(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    types = torch.zeros_like(inputs["input_ids"])
    for number, modality in enumerate(MODALITIES, start=1):
        types[inputs["input_ids"] == getattr(own_model.config, f"{modality}_token_id")] = number
    assert torch.equal(own_model(**inputs, mm_token_type_ids=types).logits, own_model(**inputs).logits)


def test_words_may_come_as_embeddings(own_model):
    inputs = make_inputs(own_model.config, (6,))
    embeddings = own_model.get_input_embeddings()(inputs["input_ids"])
    logits = own_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    assert_logits_equal(logits, own_model(**inputs).logits)


def test_logits_to_keep_keeps_the_last_positions(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    full = own_model(**inputs).logits
    torch.testing.assert_close(own_model(**inputs, logits_to_keep=2).logits, full[:, -2:], **ROUNDING)
    chosen = torch.tensor([0, 5])
    torch.testing.assert_close(own_model(**inputs, logits_to_keep=chosen).logits, full[:, chosen], **ROUNDING)


def test_outputs_may_be_a_tuple(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    outputs = own_model(**inputs, return_dict=False)
    assert isinstance(outputs, tuple) and torch.equal(outputs[0], own_model(**inputs).logits)


def test_hidden_states_and_attentions_come_from_every_layer():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = make_inputs(model.config, MIXED)
    length = inputs["input_ids"].shape[1]
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == 3 * [(1, length, 32)]
    assert [weights.shape for weights in outputs.attentions] == 2 * [(1, 4, length, length)]


def test_eager_attention_equals_sdpa(own_model):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    rows = (MIXED, ("speech", "audio"))
    inputs = make_inputs(own_model.config, *rows)
    valid = inputs["attention_mask"].bool()
    assert_logits_equal(eager(**inputs).logits[valid], own_model(**inputs).logits[valid], 1e-4)


@pytest.mark.parametrize("route", ["eager", "batched_mm"])
@both_bases
def test_every_route_gives_the_same_logits(shared, route):
    model, other = (tiny_model({"shared_expert_base": shared}) for _ in range(2))
    other.set_experts_implementation(route)
    inputs = make_inputs(model.config, MIXED)
    assert_logits_equal(other(**inputs).logits, model(**inputs).logits)


def test_grouped_products_are_the_default(own_model, monkeypatch):
    calls, original = [], expert_kernels_uni_moe.grouped_linear
    monkeypatch.setattr(expert_kernels_uni_moe, "grouped_linear", lambda *args: calls.append(args) or original(*args))
    own_model(**make_inputs(own_model.config, (4,)))
    assert len(calls) == 2 * 7  # two layers; one product for gate and up, one for down, five for their LoRA


# Features


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1])
def test_pictures_are_read_from_the_configured_layer(strategy, layer):
    model = tiny_model(vision_feature_select_strategy=strategy, vision_feature_layer=layer).model
    pixels = torch.randn(2, 3, 16, 16)
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    expected = model.vision_connector(states[:, 1:] if strategy == "default" else states)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected, **ROUNDING)
    assert expected.shape[1] == model.config.image_seq_length


@pytest.mark.parametrize("asked", [None, False, True])
def test_asking_for_hidden_states_or_not_changes_no_feature(own_model, asked):
    pixels = torch.randn(2, 3, 16, 16)
    expected = own_model.get_image_features(pixels).pooler_output
    outputs = own_model.get_image_features(pixels, output_hidden_states=asked)
    assert torch.equal(outputs.pooler_output, expected)
    with pytest.raises(ValueError, match="`vision_feature_select_strategy='cls'` must be 'default' or 'full'"):
        own_model.get_image_features(pixels, vision_feature_select_strategy="cls")


def test_frames_are_averaged_after_the_projector():
    model = tiny_model().model
    videos = torch.randn(2, 3, 3, 16, 16)
    frames = torch.stack([model.get_image_features(video).pooler_output for video in videos])  # (V, F, P, H)
    pooled = model.get_video_features(videos).pooler_output
    torch.testing.assert_close(pooled, frames.mean(dim=1), atol=1e-5, rtol=0)
    first = model.get_image_features(videos.mean(dim=1)).pooler_output
    assert (pooled - first).abs().max() > 1e-2


def test_without_pooling_frames_follow_each_other():
    model = tiny_model(video_pooling="none")
    videos = torch.randn(2, 3, 3, 16, 16)
    frames = [model.get_image_features(video).pooler_output.flatten(0, 1) for video in videos]
    torch.testing.assert_close(model.get_video_features(videos).pooler_output, torch.stack(frames), atol=1e-5, rtol=0)
    inputs = make_inputs(model.config, ("video", 2), frames=3)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 12
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["audio", "speech"])
def test_sound_features_are_the_connectors_of_the_towers(own_model, kind):
    model, inputs = own_model.model, make_inputs(own_model.config, ("audio", "speech", "audio"))
    if kind == "audio":
        arguments = inputs["input_values"], inputs["input_values_mask"]
        outputs, tower = model.get_audio_features(*arguments), model.audio_tower(*arguments)
        expected = model.audio_connector(tower.last_hidden_state)
    else:
        outputs = model.get_speech_features(inputs["input_features"])
        tower = model.speech_tower(inputs["input_features"])
        expected = model.speech_connector(tower.last_hidden_state)
    torch.testing.assert_close(outputs.last_hidden_state, tower.last_hidden_state, **ROUNDING)
    torch.testing.assert_close(outputs.pooler_output, expected, **ROUNDING)


def test_mask_of_sound_reaches_the_tower(own_model):
    inputs = make_inputs(own_model.config, ("audio", 3))
    masked = own_model(**inputs).logits
    del inputs["input_values_mask"]
    assert (own_model(**inputs).logits - masked).abs().max() > 1e-4


def test_vision_tower_may_be_another_backbone():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = tiny_config(without=("vision",), vision_config=vision, vision_feature_select_strategy="full")
    model = UniMoEForConditionalGeneration(config).eval()
    assert model(**make_inputs(config, ("image", 2))).logits.isfinite().all()


# Refusals


@every_modality
@pytest.mark.parametrize("change", ["more", "fewer", "missing", "unannounced"])
def test_placeholders_and_features_that_differ_are_refused_with_both_counts(own_model, modality, change):
    config, tokens = own_model.config, tokens_per_clip(own_model.config, 2)[modality]
    placeholders, clips = {"more": (1, 2), "fewer": (2, 1), "missing": (1, 0), "unannounced": (0, 1)}[change]
    inputs = make_inputs(config, (1, *[modality] * placeholders, 2))
    donor = make_inputs(config, [modality] * max(clips, 1))
    for name in (FEATURES[modality], "input_values_mask"):
        inputs.pop(name, None)
        if clips and name in donor:
            inputs[name] = donor[name]
    with pytest.raises(ValueError) as caught:
        own_model(**inputs)
    sentence = str(caught.value)
    assert modality in sentence.lower()
    assert f"tokens: {tokens * placeholders}" in sentence and f"features: {tokens * clips}" in sentence


@every_modality
def test_one_placeholder_too_few_is_refused(own_model, modality):
    inputs = make_inputs(own_model.config, (modality, 2))
    tokens = tokens_per_clip(own_model.config, 2)[modality]
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    inputs["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match=f"tokens: {tokens - 1}, features: {tokens}"):
        own_model(**inputs)


@every_modality
def test_features_without_a_tower_are_refused_by_name(own_model, modality):
    inputs = make_inputs(own_model.config, (modality, 2))
    deaf = tiny_model(without=TOWERS)
    with pytest.raises(ValueError, match=rf"`{FEATURES[modality]}`.*no tower for {modality}"):
        deaf(**inputs)


@every_modality
def test_placeholders_without_a_tower_are_refused_by_name(own_model, modality):
    inputs = make_inputs(own_model.config, (modality, 2))
    deaf = tiny_model(without=TOWERS)
    with pytest.raises(ValueError, match=modality):
        deaf(input_ids=inputs["input_ids"])


def test_ids_behind_the_placeholders_are_refused(own_model):
    unknown = own_model.config.speech_token_id + 1
    with pytest.raises(IndexError):
        own_model(input_ids=torch.tensor([[1, unknown]]))


def test_ids_and_embeddings_together_or_neither_are_refused(own_model):
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        own_model(input_ids=torch.ones(1, 2, dtype=torch.int64), inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        own_model()


@every_modality
def test_media_with_embeddings_are_refused(own_model, modality):
    media = {FEATURES[modality]: make_inputs(own_model.config, (modality,))[FEATURES[modality]]}
    with pytest.raises(ValueError, match=f"{modality} inputs together with `inputs_embeds`"):
        own_model(inputs_embeds=torch.zeros(1, 2, 32), **media)


def test_video_without_a_frame_axis_is_refused_with_its_shape(own_model):
    inputs = make_inputs(own_model.config, ("video", 2))
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\)"):
        own_model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flatten(0, 1)})


# Losses


def test_loss_is_the_mean_cross_entropy_of_the_next_words(model):
    inputs = make_inputs(model.config, MIXED, (2, "speech", 4))
    labels = labels_of(model.config, inputs)
    outputs = model(**inputs, labels=labels)
    predicted, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    kept = targets != -100
    expected = -predicted[kept].log_softmax(dim=-1).gather(1, targets[kept, None]).mean()
    torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=0)

    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(summed, expected * kept.sum() / 100, atol=1e-5, rtol=0)


def test_auxiliary_loss_comes_with_router_logits_only():
    model = tiny_model({"router_aux_loss_coef": 0.5})
    inputs = make_inputs(model.config, MIXED, (2, "speech", 4))
    labels = labels_of(model.config, inputs)
    plain, routed = model(**inputs, labels=labels), model(**inputs, labels=labels, output_router_logits=True)
    assert plain.aux_loss is None and plain.router_logits is None
    assert [logits.shape for logits in routed.router_logits] == 2 * [(inputs["input_ids"].numel(), 4)]
    torch.testing.assert_close(routed.loss, plain.loss + 0.5 * routed.aux_loss, **ROUNDING)

    model.config.text_config.output_router_logits = True
    assert torch.equal(model(**inputs, labels=labels).loss, routed.loss)
    assert model(**inputs, labels=labels, output_router_logits=False).aux_loss is None


def test_auxiliary_loss_is_load_times_probability_over_valid_tokens():
    model = tiny_model()
    inputs = make_inputs(model.config, MIXED, (2, "speech", 4))
    outputs = model(**inputs, output_router_logits=True)
    valid = inputs["attention_mask"].bool().flatten()
    probabilities = torch.cat([logits[valid] for logits in outputs.router_logits]).softmax(dim=-1)  # (tokens, E)
    load = F.one_hot(probabilities.topk(2).indices, 4).float().mean(dim=0)  # (K, E)
    expected = 4 * (load * probabilities.mean(dim=0)).sum()
    torch.testing.assert_close(outputs.aux_loss, expected, atol=1e-5, rtol=0)


def test_dense_model_has_no_auxiliary_loss():
    model = tiny_model({"mlp_layer_types": ["dense", "dense"]}, without=TOWERS)
    outputs = model(**make_inputs(model.config, (4,)), output_router_logits=True)
    assert outputs.aux_loss is None and not outputs.router_logits


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@both_bases
def test_auxiliary_loss_teaches_every_router(shared, checkpointing):
    model = tiny_model({"shared_expert_base": shared}).train()
    if checkpointing:
        checkpoint_activations(model)
    outputs = model(**make_inputs(model.config, (5, "image")), output_router_logits=True)
    outputs.aux_loss.backward()
    for layer in model.model.language_model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-6


@both_bases
def test_gradient_checkpointing_gives_the_same_gradients(shared):
    """Within 1e-5 of each gradient's largest value, or of 1; dropout is drawn alike."""
    model = tiny_model({"shared_expert_base": shared}).train()
    inputs = make_inputs(model.config, MIXED, ("speech", 3))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.zero_grad()
        torch.manual_seed(1)
        outputs = model(**inputs, labels=labels_of(model.config, inputs), output_router_logits=True)
        (outputs.loss + outputs.aux_loss).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        error = (checkpointed[name] - gradient).abs().max()
        assert error <= 1e-5 * max(1, gradient.abs().max()), f"{name}: {error}"


def test_every_part_that_is_used_gets_a_gradient():
    """All but what the model never reads: the vision tower behind layer -2."""
    model = tiny_model().train()
    inputs = make_inputs(model.config, MIXED)
    model(**inputs, labels=labels_of(model.config, inputs)).loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    unread = ("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm.")
    assert [name for name in idle if not name.startswith(unread)] == []


# Precision


@both_bases
def test_bf16_model_runs_and_generates(shared):
    model = tiny_model({"shared_expert_base": shared}).to(torch.bfloat16)
    inputs = make_inputs(model.config, MIXED, ("speech", 3))
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    words = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)[:, -4:]
    assert words.shape == (2, 4) and words.max() < model.config.text_config.vocab_size


def test_model_trains_under_autocast(model):
    """The loss within 0.05 of float32's."""
    inputs = make_inputs(model.config, MIXED)
    labels = labels_of(model.config, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, model(**inputs, labels=labels).loss, atol=0.05, rtol=0)


def test_videos_of_different_lengths_are_those_alone():
    """Frames that only fill a row up count for nothing, in both ways of pooling (1e-5: another order of sums)."""
    for pooling in ("mean", "none"):
        model = tiny_model(video_pooling=pooling)
        videos = torch.randn(2, 4, 3, 16, 16)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        found = model.get_video_features(videos, mask).pooler_output.flatten(0, 1)
        alone = [model.get_video_features(videos[row : row + 1, : mask[row].sum()]).pooler_output for row in (0, 1)]
        torch.testing.assert_close(found, torch.cat([each.flatten(0, 1) for each in alone]), atol=1e-5, rtol=1e-5)


def test_a_conversation_beyond_the_decoders_positions_is_told_once(caplog):
    model = tiny_model({"max_position_embeddings": 12})
    inputs = make_inputs(model.config, (13,))
    for _ in range(2):
        with torch.no_grad():
            model(**inputs)
    assert caplog.text.count("The conversation has 14 tokens, media included, and the decoder was made for 12") == 1
    caplog.clear()
    other = tiny_model({"max_position_embeddings": 12})
    other.generate(**make_inputs(other.config, (8,)), max_new_tokens=8, min_new_tokens=8)
    assert caplog.text.count("The conversation has") == 1 and "has 13 tokens" in caplog.text
