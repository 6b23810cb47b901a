"""The configuration: defaults, round trips, and what it refuses."""

import json
from itertools import chain, combinations

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config
from transformers import AutoConfig, LlamaConfig

from uni_moe_hf import BeatsConfig, UniMoEConfig
from uni_moe_hf.hub.configuration_uni_moe import AUTO_MAP


TOWERS = ("vision", "speech", "audio")
VOCAB = tiny_config().text_config.vocab_size
SUBSETS = list(chain.from_iterable(combinations(TOWERS, count) for count in range(4)))


def refusal(build) -> str:
    """The sentence with which a config is refused: a `ValueError`, which `@strict` wraps in an error of its own."""
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        build()
    error = caught.value if isinstance(caught.value, ValueError) else caught.value.__cause__
    assert isinstance(error, ValueError)
    return str(error)


@pytest.mark.parametrize("without", SUBSETS, ids=lambda names: "-".join(names) or "none")
def test_saved_config_loads_equal_whichever_towers_are_missing(without, tmp_path):
    config = tiny_config(without=without, video_pooling="none")
    config.save_pretrained(tmp_path / "first")
    loaded = AutoConfig.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")

    assert type(loaded) is UniMoEConfig and type(loaded.text_config) is LlamaConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert all((getattr(loaded, f"{tower}_config") is None) == (tower in without) for tower in TOWERS)
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "second/config.json").read_bytes()


def test_text_settings_survive_a_round_trip(tmp_path):
    text = {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts": 3,
        "num_experts_per_tok": 1,
        "expert_names": ["image", "speech", "audio"],
        "shared_expert_base": True,
        "expert_lora_rank": 4,
        "expert_lora_alpha": 2.5,
        "expert_lora_dropout": 0.25,
        "router_dtype": "bfloat16",
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,
    }
    tiny_config(text).save_pretrained(tmp_path)
    loaded = UniMoEConfig.from_pretrained(tmp_path).text_config
    assert {name: getattr(loaded, name) for name in text} == text


@pytest.mark.parametrize("without", SUBSETS, ids=lambda names: "-".join(names) or "none")
def test_modalities_follow_the_towers(without):
    expected = [("image", "vision"), ("video", "vision"), ("audio", "audio"), ("speech", "speech")]
    config = tiny_config(without=without)
    assert config.modalities == tuple(modality for modality, tower in expected if tower not in without)


def test_default_towers_are_clip_large_whisper_and_beats():
    config = UniMoEConfig(vision_config={}, speech_config={}, audio_config={})
    vision, beats = config.vision_config, config.audio_config
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("clip_vision_model", 1024, 24)
    assert (vision.image_size, vision.patch_size, config.image_seq_length) == (336, 14, 576)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.speech_config.max_source_positions == 1500
    assert (beats.hidden_size, beats.num_hidden_layers, beats.num_mel_bins, beats.patch_size) == (768, 12, 128, 16)
    assert (beats.num_buckets, beats.max_bucket_distance, beats.deep_norm) == (320, 800, True)
    assert (beats.num_conv_pos_embeddings, beats.num_conv_pos_embedding_groups) == (128, 16)
    assert config.audio_connector_config.encoder_hidden_size == 768
    assert (config.num_speech_query_tokens, config.num_audio_query_tokens) == (50, 50)
    assert config.video_pooling == "mean"


def test_default_text_config_has_four_own_experts_in_every_layer():
    config = UniMoEConfig()
    text = config.text_config
    assert config.modalities == () and config.image_seq_length is None and config.audio_connector_config is None
    assert text.mlp_layer_types == ["sparse"] * text.num_hidden_layers
    assert (text.num_experts, text.num_experts_per_tok, text.shared_expert_base) == (4, 2, False)
    assert (text.expert_lora_rank, text.expert_lora_alpha, text.expert_lora_dropout) == (8, 16, 0.0)
    assert (text.router_dtype, text.router_aux_loss_coef, text.output_router_logits) == ("float32", 0.0, False)


def test_placeholder_ids_follow_the_vocabulary_in_order():
    config = UniMoEConfig(text_config={"vocab_size": 100})
    ids = [getattr(config, f"{modality}_token_id") for modality in ("image", "video", "audio", "speech")]
    assert ids == [100, 101, 102, 103]


def test_full_selection_adds_the_class_token_to_a_picture():
    assert tiny_config().image_seq_length == 4
    assert tiny_config(vision_feature_select_strategy="full").image_seq_length == 5


def test_given_image_length_wins_over_the_computed_one():
    assert tiny_config(image_seq_length=9).image_seq_length == 9


def test_connector_width_follows_the_audio_tower():
    assert UniMoEConfig(audio_config={"hidden_size": 48}).audio_connector_config.encoder_hidden_size == 48


def test_tied_embeddings_of_a_plain_decoder_are_kept():
    assert tiny_config({"tie_word_embeddings": True}).tie_word_embeddings is True


def test_parts_may_be_given_as_configs():
    parts = {name: getattr(tiny_config(), name) for name in ("text_config", "vision_config", "audio_config")}
    config = UniMoEConfig(**parts)
    assert all(getattr(config, name) is part for name, part in parts.items())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_plain_llms_config_gets_the_mixtures_fields_and_stays_as_it_was(kind):
    plain = AutoConfig.for_model(kind, num_hidden_layers=3)
    before = plain.to_dict()
    config = UniMoEConfig(text_config=plain)
    assert type(config.text_config) is type(plain) and config.text_config.mlp_layer_types == ["sparse"] * 3
    assert plain.to_dict() == before and not hasattr(plain, "expert_lora_rank")
    again = UniMoEConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    assert again.text_config.to_dict() == config.text_config.to_dict()


def test_a_decoder_that_the_installed_library_does_not_know_is_named():
    sentence = refusal(lambda: UniMoEConfig(text_config={"model_type": "qwen99"}))
    assert "'qwen99'" in sentence and "transformers" in sentence and len(sentence) < 200


def test_saved_config_names_the_code_that_loads_it(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert saved["custom_pipelines"]["any-to-text"]["impl"] == "generation_uni_moe.AnyToTextPipeline"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"mlp_layer_types": []}, ["0 entries", "num_hidden_layers=2"]),
        ({"mlp_layer_types": ["sparse"]}, ["1 entries", "num_hidden_layers=2"]),
        ({"mlp_layer_types": ["sparse"] * 3}, ["3 entries", "num_hidden_layers=2"]),
        ({"mlp_layer_types": ["sparse", "moe"]}, ["'moe'", "'sparse'", "'dense'"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok=5", "num_experts=4"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0", "num_experts=4"]),
        ({"num_experts": 0}, ["num_experts=0", "4096"]),
        ({"num_experts": 4.0}, ["num_experts=4.0", "whole"]),
        ({"num_experts_per_tok": True}, ["num_experts_per_tok=True", "whole"]),
        ({"expert_names": ["image", "speech", "audio"]}, ["'speech'", "num_experts=4"]),
        ({"expert_names": "abcd"}, ["'abcd'", "num_experts=4"]),
        ({"expert_lora_alpha": "16"}, ["expert_lora_alpha='16'"]),
        ({"expert_lora_dropout": 1.5}, ["expert_lora_dropout=1.5"]),
        ({"shared_expert_base": "yes"}, ["shared_expert_base='yes'"]),
        ({"expert_activations": "drop"}, ["expert_activations='drop'", "recompute"]),
        ({"mlp_layer_types": "sparse"}, ["mlp_layer_types"]),
        ({"expert_lora_rank": -1}, ["expert_lora_rank=-1"]),
        ({"shared_expert_base": True, "expert_lora_rank": 0}, ["expert_lora_rank=0", "4 equal experts"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradicting_text_settings_are_refused_with_both_sides(text, words):
    sentence = refusal(lambda: tiny_config(text))
    assert all(word in sentence for word in words), sentence


def test_unknown_router_dtype_is_refused():
    assert "float33" in refusal(lambda: tiny_config({"router_dtype": "float33"}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_token_id": 7}, ["'image': 7", f"vocab_size={VOCAB}"]),
        ({"speech_token_id": -1}, ["'speech': -1", f"vocab_size={VOCAB}"]),
        (
            {"video_token_id": VOCAB - 1, "audio_token_id": 0},
            [f"'video': {VOCAB - 1}", "'audio': 0", f"vocab_size={VOCAB}"],
        ),
        ({"video_token_id": 9000, "audio_token_id": 9000}, ["differ", "'video': 9000", "'audio': 9000"]),
        ({"num_speech_query_tokens": 17}, ["num_speech_query_tokens=17", "max_target_positions=16"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradicting_joins_are_refused_with_both_sides(fields, words):
    sentence = refusal(lambda: tiny_config(**fields))
    assert all(word in sentence for word in words), sentence


def test_connector_without_its_tower_is_refused():
    sentence = refusal(lambda: tiny_config(without=("audio",), audio_connector_config={}))
    assert "`audio_connector_config`" in sentence and "`audio_config`" in sentence


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, ["`hidden_size` (30)", "`num_attention_heads` (4)"]),
        ({"num_mel_bins": 100}, ["`num_mel_bins` (100)", "`patch_size` (16)"]),
    ],
    ids=["heads", "mel-bins"],
)
def test_beats_sizes_that_do_not_divide_are_refused_with_both_numbers(fields, words):
    for build in (lambda: BeatsConfig(**fields), lambda: UniMoEConfig(audio_config=fields)):
        sentence = refusal(build)
        assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    "text",
    [
        {"shared_expert_base": True, "expert_lora_rank": 0, "mlp_layer_types": ["dense", "dense"]},
        {"shared_expert_base": True, "expert_lora_rank": 0, "num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 4},
        {"expert_names": ["a", "b", "c", "d"]},
    ],
    ids=lambda text: "-".join(text),
)
def test_settings_at_the_edge_are_allowed(text):
    config = tiny_config(text).text_config
    assert {name: getattr(config, name) for name in text} == text


def test_query_tokens_may_fill_the_query_decoder():
    assert tiny_config(num_speech_query_tokens=16).num_speech_query_tokens == 16


@pytest.mark.parametrize("field", ["video_pooling", "vision_feature_select_strategy"])
def test_unknown_choice_is_refused(field):
    with pytest.raises(StrictDataclassError, match=f"{field}.*max"):
        tiny_config(**{field: "max"})


def test_config_file_edited_into_a_contradiction_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["text_config"]["num_experts_per_tok"] = 9
    path.write_text(json.dumps(saved))
    sentence = refusal(lambda: UniMoEConfig.from_pretrained(tmp_path))
    assert "num_experts_per_tok=9" in sentence and "num_experts=4" in sentence


def test_a_saved_config_does_not_tell_where_its_parts_came_from(tmp_path):
    config = tiny_config()
    for part in (config.vision_config, config.speech_config, config.text_config):
        part._name_or_path = "/home/somebody/models/part"
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "somebody" not in text and "LABEL_0" not in text
    again, before = (each.to_dict() for each in (UniMoEConfig.from_pretrained(tmp_path), config))
    assert again["vision_config"] == before["vision_config"] and again["text_config"] == before["text_config"]
