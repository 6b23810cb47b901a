"""`generate` with media: caches, beams, assistants, score processors, and conversations that go on."""

from functools import partial

import pytest
import torch
from tiny import MIXED, assert_logits_equal, make_inputs, rows_alone, tiny_model

from uni_moe_hf import UniMoEForConditionalGeneration


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def model(request) -> UniMoEForConditionalGeneration:
    """Not to be changed by tests."""
    return tiny_model({"shared_expert_base": request.param})


@pytest.fixture(scope="module")
def own_model() -> UniMoEForConditionalGeneration:
    """Not to be changed by tests."""
    return tiny_model()


def test_greedy_generation_with_a_cache_equals_generation_without(model):
    inputs = make_inputs(model.config, MIXED, ("speech", 2))
    generate = partial(model.generate, **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cached = generate()
    assert torch.equal(cached, generate(use_cache=False))
    assert torch.equal(cached, generate(cache_implementation="static"))
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 6


def test_greedy_generation_follows_the_forward_pass(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    generated = own_model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for _ in range(4):
        logits = own_model(**inputs).logits[:, -1]
        logits[:, own_model.generation_config.eos_token_id] = -torch.inf
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(dim=-1, keepdim=True)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(generated, inputs["input_ids"])


def test_batched_generation_equals_generation_row_by_row(model):
    rows = (MIXED, (2,), ("speech", 1, "speech"), (1, "audio", "image", "image"))
    inputs = make_inputs(model.config, *rows)
    generate = partial(model.generate, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    together = generate(**inputs)[:, -5:]
    alone = [generate(**single)[:, -5:] for single in rows_alone(inputs, rows)]
    assert torch.equal(together, torch.cat(alone))


def test_sampled_words_lie_in_the_vocabulary(model):
    inputs = make_inputs(model.config, MIXED)
    words = model.generate(
        **inputs, max_new_tokens=20, min_new_tokens=20, do_sample=True, temperature=5.0, num_return_sequences=4
    )[:, -20:]
    assert words.shape == (4, 20) and words.min() >= 0 and words.max() < model.config.text_config.vocab_size
    assert len(words.unique(dim=0)) == 4


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"top_p": 0.9, "top_k": 5}], ids=str
)
def test_sampling_controls_bear_placeholders_in_the_prompt(own_model, settings):
    """Placeholder ids lie behind the scores, which repetition penalties look up by id."""
    inputs = make_inputs(own_model.config, MIXED)
    words = own_model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=True, **settings)[0, -5:]
    assert words.max() < own_model.config.text_config.vocab_size
    if "no_repeat_ngram_size" in settings:
        assert not set(words.tolist()) & set(inputs["input_ids"][0].tolist()) and len(words.unique()) == 5


@pytest.mark.parametrize(
    "row", [("image", 2, "image", 1), (1, "speech", "speech"), ("audio", "video", "audio", "video")]
)
@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_every_beam_and_sequence_hears_and_sees_its_rows_clips_in_order(own_model, row, settings):
    """Two rows of several clips each: the first step's scores of every copy are those of its own row, within 1e-5."""
    inputs = make_inputs(own_model.config, row, row)
    expected = own_model(**inputs).logits[:, -1].repeat_interleave(2, dim=0)
    outputs = own_model.generate(
        **inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **settings
    )
    assert_logits_equal(outputs.logits[0], expected)


def test_generation_from_embeddings_equals_generation_from_ids(own_model):
    inputs = make_inputs(own_model.config, (6,))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    embeddings = own_model.get_input_embeddings()(inputs["input_ids"])
    from_embeddings = own_model.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **settings)
    assert torch.equal(from_embeddings[:, -4:], own_model.generate(**inputs, **settings)[:, -4:])


def test_generation_bears_router_logits(own_model):
    inputs = make_inputs(own_model.config, MIXED, (3,))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with_logits = own_model.generate(**inputs, **settings, output_router_logits=True)
    assert torch.equal(with_logits, own_model.generate(**inputs, **settings))
