"""`generate` with media: caches, beams, assistants, score processors, and conversations that go on."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from tiny import MIXED, MODALITIES, assert_logits_equal, make_inputs, rows_alone, since, tiny_model, tiny_processor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from uni_moe_hf.hub.compat_uni_moe import CACHE


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


# Clips are encoded once

GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_every_clip_runs_through_its_tower_once(own_model, settings, monkeypatch):
    clips = Counter()
    for tower in ("vision_tower", "speech_tower", "audio_tower"):
        module = getattr(own_model.model, tower)
        run = module.forward
        monkeypatch.setattr(
            module, "forward", lambda x, *a, run=run, t=tower, **k: clips.update({t: len(x)}) or run(x, *a, **k)
        )
    inputs = make_inputs(own_model.config, MIXED, MIXED)
    own_model.generate(**inputs, **{**GREEDY, **settings})
    frames = inputs["pixel_values_videos"].flatten(0, 1)
    assert clips["vision_tower"] == len(inputs["pixel_values"]) + len(frames)
    assert clips["audio_tower"] == len(inputs["input_values"])
    assert clips["speech_tower"] == len(inputs["input_features"])


def test_encoder_outputs_may_be_given_in_place_of_media(own_model):
    inputs = make_inputs(own_model.config, MIXED, ("speech", 2))
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    encoded = own_model.model.encode_media(**inputs)
    assert set(encoded) == set(MODALITIES)
    assert torch.equal(own_model(**text, mm_encoder_outputs=encoded).logits, own_model(**text, **inputs).logits)
    answer = own_model.generate(**text, mm_encoder_outputs=encoded, **GREEDY, num_beams=2)
    assert torch.equal(answer, own_model.generate(**text, **inputs, **GREEDY, num_beams=2))
    for use in (own_model, partial(own_model.generate, **GREEDY)):
        with pytest.raises(ValueError, match="Got speech inputs as well as their `mm_encoder_outputs`"):
            use(**text, input_features=inputs["input_features"], mm_encoder_outputs=encoded)


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_a_prompt_may_be_read_in_chunks_that_cut_through_clips(model, size):
    inputs = make_inputs(model.config, MIXED, ("speech", 2, "image", 1))
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=size), model.generate(**inputs, **GREEDY))


# Conversations that go on


def turn(model, row: tuple, seed: int = 0) -> tuple[dict, dict]:
    """A conversation so far, and the same with an answer and a second question about new clips behind it."""
    first = make_inputs(model.config, row, seed=seed)
    answer = model.generate(**first, **GREEDY)
    more = make_inputs(model.config, ("image", 2, "speech", 1), seed=seed + 1)
    second = {"input_ids": torch.cat([answer, more.pop("input_ids")[:, 1:]], dim=1)}
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    del more["attention_mask"]
    return first, {**second, "new": more}


@pytest.mark.parametrize("row", [(3,), ("image", 1), MIXED], ids=str)
@pytest.mark.parametrize(
    ("given", "name"), [("all clips", "past_key_values"), ("new clips", "cache")], ids=["all-old", "new-new"]
)
@pytest.mark.parametrize("chunk", [None, pytest.param(3, marks=since(5, 22))])
def test_a_second_question_over_a_filled_cache_is_answered_as_from_scratch(model, row, given, name, chunk):
    first, second = turn(model, row)
    new = second.pop("new")
    every = {name: clips for name, clips in first.items() if name not in second}
    every |= {name: torch.cat([every[name], clips]) if name in every else clips for name, clips in new.items()}
    fresh = model.generate(**second, **every, **GREEDY)
    filled = model.generate(**first, **GREEDY, return_dict_in_generate=True)[CACHE]
    clips = every if given == "all clips" else new
    chunks = {"prefill_chunk_size": chunk} if chunk else {}
    assert torch.equal(model.generate(**second, **clips, **{name: filled}, **GREEDY, **chunks), fresh)


def test_an_answer_goes_on_where_its_cache_ends(model):
    """As the library's models do it: the same inputs again, with the words so far, in a padded batch."""
    inputs = make_inputs(model.config, MIXED, ("speech", 2), (4,))
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    half = model.generate(**inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=1)
    inputs["input_ids"] = half.sequences
    rest = model.generate(**inputs, past_key_values=half[CACHE], do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(rest, whole)


def test_clips_that_fit_neither_the_whole_nor_the_new_part_are_refused(own_model):
    first, second = turn(own_model, ("image", 1))
    filled = own_model.generate(**first, **GREEDY, return_dict_in_generate=True)[CACHE]
    clips = {**second.pop("new"), "pixel_values": torch.randn(3, 3, 16, 16)}
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 4, features: 12"):
        own_model.generate(**second, **clips, past_key_values=filled, **GREEDY)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_prompt_with_the_wrong_number_of_clips_are_refused_with_both_counts(own_model, settings):
    inputs = make_inputs(own_model.config, ("image", 2, "image"))
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 8, features: 4"):
        own_model.generate(**inputs, max_new_tokens=2, **settings)


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding_over_a_filled_cache_is_refused(own_model, how):
    """The library would run the prompt over its own cache again, and answer something else."""
    first, second = turn(own_model, ("image", 1))
    filled = own_model.generate(**first, **GREEDY, return_dict_in_generate=True)[CACHE]
    helper = {"assistant_model": own_model, "prompt_lookup_num_tokens": 3}[how]
    new = second.pop("new")
    with pytest.raises(ValueError, match="The cache already holds 10 tokens"):
        own_model.generate(**second, **new, past_key_values=filled, **GREEDY, **{how: helper})


# Assistants


@pytest.mark.parametrize("assistant", ["itself", "smaller"])
@pytest.mark.parametrize("row", [MIXED, (3,), ("speech", 1, "speech")], ids=str)
def test_an_assistant_sees_the_clips_and_leaves_the_answer_as_it_is(model, assistant, row):
    helper = model if assistant == "itself" else tiny_model({"num_hidden_layers": 1}, seed=1)
    inputs = make_inputs(model.config, row)
    seen = []
    handle = helper.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("mm_encoder_outputs")), with_kwargs=True
    )
    helped = model.generate(**inputs, **GREEDY, assistant_model=helper)
    handle.remove()
    assert torch.equal(helped, model.generate(**inputs, **GREEDY))
    assert any(seen) == any(isinstance(part, str) for part in row)


def test_prompt_lookup_leaves_the_answer_as_it_is(model):
    inputs = make_inputs(model.config, MIXED)
    assert torch.equal(
        model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), model.generate(**inputs, **GREEDY)
    )


@pytest.mark.parametrize(
    ("kind", "message"), [("llama", "the assistant takes text only"), ("narrow", "the assistant has hidden size 16")]
)
def test_an_assistant_that_cannot_take_the_clips_is_refused(own_model, kind, message):
    narrow = tiny_model({"hidden_size": 16, "intermediate_size": 32}, seed=1)
    config = LlamaConfig(
        vocab_size=own_model.config.text_config.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    helper = narrow if kind == "narrow" else LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=message):
        own_model.generate(**make_inputs(own_model.config, ("image", 2)), **GREEDY, assistant_model=helper)
    words = make_inputs(own_model.config, (3,))
    helped = own_model.generate(**words, **GREEDY, assistant_model=helper)
    assert torch.equal(helped, own_model.generate(**words, **GREEDY))


# Scores


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": [[380]]},
        {"suppress_tokens": [380, 383]},
        {"encoder_repetition_penalty": 1.2},
        {"encoder_no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
        {"min_p": 0.1, "do_sample": True},
        {"typical_p": 0.5, "do_sample": True},
        {"exponential_decay_length_penalty": (1, 1.1)},
    ],
    ids=str,
)
def test_score_processors_bear_placeholders_in_prompts_and_rules(own_model, settings):
    assert own_model.config.image_token_id == 380  # behind the vocabulary, so it has no score
    inputs = make_inputs(own_model.config, MIXED, ("speech", 2))
    words = own_model.generate(**inputs, **{**GREEDY, **settings})[:, -5:]
    assert words.max() < 380
    if next(iter(settings)) in ("bad_words_ids", "suppress_tokens"):  # what cannot be said anyway changes nothing
        assert torch.equal(words, own_model.generate(**inputs, **GREEDY)[:, -5:])


def test_bad_words_are_not_said(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    said = own_model.generate(**inputs, **GREEDY)[0, -5:].tolist()
    others = own_model.generate(**inputs, **GREEDY, bad_words_ids=[[380], [said[0]], [said[1], said[2]]])[0, -5:]
    assert said[0] not in others.tolist()


def test_stop_strings_may_be_given_with_the_processor(own_model):
    """`transformers serve` passes the processor where the library asks for a tokenizer."""
    processor = tiny_processor(own_model.config)
    inputs = make_inputs(own_model.config, MIXED)
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 1}
    length = inputs["input_ids"].shape[1]
    words = own_model.generate(**inputs, **settings, suppress_tokens=list(range(3, 260)))[0, length:]
    stop = processor.tokenizer.decode(words[2]).strip()
    assert stop
    for tokenizer in (processor, processor.tokenizer):
        stopped = own_model.generate(
            **inputs, **settings, suppress_tokens=list(range(3, 260)), stop_strings=[stop], tokenizer=tokenizer
        )[0, length:]
        assert len(stopped) <= 3 < len(words) and processor.tokenizer.decode(stopped).endswith(stop)


def test_a_resized_vocabulary_never_says_a_placeholder():
    """Rows for new words lie behind the placeholders', which get scores and must not be chosen."""
    model = tiny_model()
    model.resize_token_embeddings(390, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[380:384] *= 100
    inputs = make_inputs(model.config, MIXED)
    for settings in ({"temperature": 5.0}, {"top_k": 1}, {"top_p": 0.5}):
        words = model.generate(**inputs, max_new_tokens=30, min_new_tokens=30, do_sample=True, **settings)[0, -30:]
        assert not {380, 381, 382, 383} & set(words.tolist())


@pytest.mark.parametrize("where", ["the model's defaults", "a config", "the call"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words_ids", [[380]]),
        ("bad_words_ids", [[380], [7]]),
        ("suppress_tokens", [7]),
        ("encoder_repetition_penalty", 1.3),
        ("encoder_no_repeat_ngram_size", 2),
        ("repetition_penalty", 1.3),
    ],
    ids=str,
)
def test_a_setting_holds_wherever_it_is_named(own_model, name, value, where):
    """Among the model's defaults, in a config beside which these count, and in the call: the same words."""
    inputs = make_inputs(own_model.config, MIXED, ("speech", 2))
    lengths = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
    expected = own_model.generate(**inputs, **lengths, **{name: value})
    defaults = copy.deepcopy(own_model.generation_config)
    try:
        if where == "the model's defaults":
            setattr(own_model.generation_config, name, value)
            config = GenerationConfig(**lengths)
            words = own_model.generate(**inputs, generation_config=config)
        elif where == "a config":
            config = GenerationConfig(**lengths, **{name: value})
            before = config.to_dict()
            words = own_model.generate(**inputs, generation_config=config)
            assert config.to_dict() == before
        else:
            words = own_model.generate(**inputs, **lengths, **{name: value})
    finally:
        own_model.generation_config = defaults
    assert torch.equal(words, expected)


def test_arguments_may_be_given_in_the_librarys_order(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    ids = inputs.pop("input_ids")
    stop = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + 2)])
    words = own_model.generate(ids, None, None, stop, **inputs, **GREEDY)
    assert words.shape[1] == ids.shape[1] + 2


def test_media_beside_embeddings_are_refused(own_model):
    inputs = make_inputs(own_model.config, MIXED)
    embeddings = torch.randn(*inputs["input_ids"].shape, own_model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match="inputs together with `inputs_embeds`"):
        own_model.generate(**inputs, inputs_embeds=embeddings, **GREEDY)


def test_clips_pass_through_a_wrapped_preparation(own_model, monkeypatch):
    """PEFT's prompt learning puts a function of keyword arguments alone in the place of ours."""
    inputs = make_inputs(own_model.config, MIXED)
    expected, prepare = own_model.generate(**inputs, **GREEDY), own_model.prepare_inputs_for_generation
    monkeypatch.setattr(own_model, "prepare_inputs_for_generation", lambda *args, **kwargs: prepare(*args, **kwargs))
    assert torch.equal(own_model.generate(**inputs, **GREEDY), expected)
