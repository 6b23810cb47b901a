"""How connectors' outputs compare with text embeddings."""

import json

import pytest
import torch
from tiny import MIXED, MODALITIES, make_inputs, tiny_model, tiny_processor, tone, user

from uni_moe_hf import connector_statistics


ROWS = (MIXED, (2,), ("speech", 1, "speech"), (1, "audio", "image", "image"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    """Sparse in every second layer. Not to be changed by tests."""
    return tiny_model({"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]})


def test_connector_statistics_are_those_of_the_features(model):
    inputs = make_inputs(model.config, *ROWS)
    report = connector_statistics(model, inputs)
    assert list(report.statistics) == ["text", *MODALITIES]
    speech = model.get_speech_features(inputs["input_features"]).pooler_output.detach().flatten(0, 1)
    found = report.statistics["speech"]
    assert found.count == len(speech) == 9
    norms = speech.norm(dim=-1)
    assert found.norm_mean == pytest.approx(norms.mean().item(), rel=1e-5)
    assert found.norm_quantiles[0] == pytest.approx(norms.min().item(), rel=1e-5)
    assert found.norm_quantiles[2] == pytest.approx(norms.median().item(), rel=1e-5)
    assert (found.mean, found.std) == pytest.approx((speech.mean().item(), speech.std(correction=0).item()), rel=1e-4)
    words = inputs["input_ids"][(inputs["input_ids"] < model.config.text_config.vocab_size)]
    words = words[inputs["attention_mask"][inputs["input_ids"] < model.config.text_config.vocab_size].bool()]
    assert report.statistics["text"].count == len(words)


def test_a_modality_off_scale_is_warned_of_by_name(caplog):
    model = tiny_model()
    inputs = make_inputs(model.config, *ROWS)
    assert connector_statistics(model, inputs, max_ratio=1e4).off_scale == [] and not caplog.records
    with torch.no_grad():
        model.model.speech_connector.projector.weight.mul_(1e6)
    report = connector_statistics(model, inputs, max_ratio=1e4)
    assert report.off_scale == ["speech"] and report.ratios["speech"] > 1e4
    assert len(caplog.records) == 1 and "outputs for speech" in caplog.text
    assert "off scale" in str(report) and json.loads(json.dumps(report.to_dict()))["off_scale"] == ["speech"]


def test_connector_statistics_are_the_same_in_training_mode():
    model = tiny_model().train()
    inputs = make_inputs(model.config, *ROWS)
    first = connector_statistics(model, inputs)
    assert model.training and model.model.training and connector_statistics(model, inputs) == first


def test_a_batch_of_the_processor_can_be_looked_at(model):
    chat = user({"type": "speech", "speech": tone()}, "what is this")
    inputs = tiny_processor(model.config).apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert list(connector_statistics(model, inputs).statistics) == ["text", "speech"]
    assert connector_statistics(model, inputs).statistics["speech"].count == 3


def test_a_batch_without_media_and_a_foreign_model_are_refused(model):
    with pytest.raises(ValueError, match="holds no media"):
        connector_statistics(model, make_inputs(model.config, (3,)))
    with pytest.raises(ValueError, match="no connectors"):
        connector_statistics(torch.nn.Linear(2, 2), {})
