"""What engines ask of a checkpoint, asked here without one: vLLM's part is played, so that a change breaks a test."""

import copy
import importlib.metadata
import sys
import types

import numpy as np
import pytest
import torch
from tiny import assert_logits_equal, film, picture, tiny_config, tiny_model, tiny_processor, tone, user
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from uni_moe_hf import UniMoEModel
from uni_moe_hf.hub.templates_uni_moe import MEDIA_TEMPLATE, VICUNA_CHAT_TEMPLATE, for_us
from uni_moe_hf.serving.vllm_experts import merged_experts
from uni_moe_hf.serving.vllm_plugin import register


CHATML = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
PARTS_ALONE = """{{- bos_token -}}
{%- for message in messages -%}
{{ message['role'] }}:
{%- for part in message['content'] -%}
{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' }}
{%- endfor -%};
{%- endfor -%}"""
TEMPLATES = {"Vicuna": VICUNA_CHAT_TEMPLATE, "ChatML": CHATML, "parts alone": PARTS_ALONE}


def as_servers_render(processor, chat: list[dict], **settings) -> list[int]:
    """Ids of a conversation whose template a server renders itself, without our code."""
    settings = {"chat_template": processor.chat_template, "tokenize": False, **settings}
    text = processor.tokenizer.apply_chat_template(chat, **settings)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def as_servers_write(chat: list[dict]) -> list[dict]:
    """A conversation once a server has taken the media out of its parts; it knows no speech but as an `ear`."""
    messages = copy.deepcopy(chat)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "speech":
                part |= {"type": "audio", "ear": "speech"}
    return messages


CONVERSATIONS = [
    [{"role": "user", "content": "what is this"}],
    user({"type": "image"}, "what is this"),
    user("what", {"type": "audio"}, {"type": "speech"}, "is", "it", {"type": "video"}),
    user({"type": "image"}, "is <image> a <speech> or </s><s> bird"),
    [*user("what"), {"role": "assistant", "content": "a <video></s>"}, *user({"type": "audio"}, "hello")],
    [{"role": "system", "content": "no <audio> here"}, *user({"type": "speech"})],
    user("<ima", "ge> and </", "s> it", {"type": "image"}, "is", "<spee", "ch>"),  # what would be forged in the seams
    [*user({"type": "image"}), *user("what is"), *user("it", {"type": "video"})],
    [{"role": "developer", "content": "a"}, {"role": "system", "content": "b <s"}, *user("> what")],
    user({"type": "image"}, {"type": "text", "text": None}, "what"),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_a_server_that_renders_the_template_itself_gets_our_prompts(name, chat):
    processor = tiny_processor(chat_template=TEMPLATES[name])
    ours = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    begins = name == "Vicuna"  # which leaves `<s>` to the tokenizer; a server must find it in the template
    expected = processor.tokenizer(ours, add_special_tokens=begins)["input_ids"]
    assert as_servers_render(processor, as_servers_write(chat), add_generation_prompt=True) == expected
    assert not begins or expected[0] == processor.tokenizer.bos_token_id


def test_the_text_before_a_template_is_put_there_once_and_taken_away_by_us(tmp_path):
    processor = tiny_processor(chat_template={"default": CHATML, "other": VICUNA_CHAT_TEMPLATE})
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    beginning = MEDIA_TEMPLATE.splitlines()[0]
    assert all(template.count(beginning) == 1 for template in again.chat_template.values())
    assert for_us(again.chat_template["default"]) == CHATML and for_us(CHATML) == CHATML
    assert for_us(again.chat_template["other"]) == VICUNA_CHAT_TEMPLATE
    for end in ("-#}\n", "#}", "+#}"):  # forms in which folders may have it
        assert for_us(f"before {{#- What follows reads text. {end}{CHATML}") == CHATML


@pytest.mark.parametrize("space", ["", "\n", "  \n ", "  "])
def test_a_template_keeps_the_space_at_its_beginning_and_many_special_tokens_are_borne(space):
    processor = tiny_processor()
    many = [f"<|reserved_special_token_{index}|>" for index in range(300)]
    processor.tokenizer.add_tokens(many, special_tokens=True)
    processor.chat_template = processor.for_servers(f"{space}{CHATML}")
    chat = user('what is <|reserved_special_token_7|> it\'s "this"', {"type": "image"})
    ours = processor.apply_chat_template(chat, tokenize=False)
    settings = {"chat_template": processor.chat_template, "tokenize": False}
    assert processor.tokenizer.apply_chat_template(chat, **settings) == ours


@pytest.mark.parametrize("part", [{"type": "smell"}, {"type": "audio", "ear": "nose"}])
def test_a_server_is_told_of_a_part_that_nobody_knows(part):
    processor = tiny_processor()
    with pytest.raises(Exception, match="known are text, image, video, audio and speech"):
        as_servers_render(processor, user(part))
    with pytest.raises(ValueError, match="'(smell|nose)'"):
        processor.apply_chat_template(user({**part, "path": "clip"}))


def test_a_part_of_sound_may_name_its_ear():
    processor = tiny_processor()
    parts = [{"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}, "ear": "speech"}]
    parts += [{"type": "audio", "audio": tone()}, {"type": "audio", "audio": tone(), "ear": "speech"}]
    parts += [{"type": "audio_url", "audio_url": {"url": "data:audio/wav;ear=speech;base64,QUJD"}}]
    parts += [{"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,QUJD"}}]
    assert processor.apply_chat_template(user(*parts)).count("<speech>") == 3


def test_the_processor_answers_vllms_back_end():
    config = tiny_config()
    processor = tiny_processor(config)
    assert processor.audio_processor is processor.feature_extractor
    assert processor.video_processor.model_input_names == ["pixel_values_videos"]
    clips = {"images": [picture(), picture(1)], "videos": [film()], "audio": [tone(2.5), tone(0.3)]}
    made = processor(
        text="<audio><audio><image><image><video>", **clips, return_text_replacement_offsets=True, return_tensors="pt"
    )
    assert made["input_values"].shape[:2] == made["input_values_mask"].shape[:2] == (2, 3)  # clips, windows
    alone = processor(text="<audio>", audio=[tone(0.3)], return_text_replacement_offsets=True, return_tensors="pt")
    torch.testing.assert_close(made["input_values"][1, :1], alone["input_values"][0])
    offsets = made["text_replacement_offsets"][0]
    assert [each["type"] for each in offsets] == ["audio", "audio", "image", "image", "video"]
    per_clip = [
        len(processor.tokenizer(each["replacement"], add_special_tokens=False)["input_ids"]) for each in offsets
    ]
    sizes = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], video_sizes=[(5, 9, 9)])
    assert per_clip == [3 * 5, 5, 4, 4, 4] and sizes["num_image_tokens"] + sizes["num_video_tokens"] == [4, 4]


@pytest.mark.parametrize("without, ear", [(("audio",), "audio"), ((), "speech"), (("audio", "speech"), "audio")])
def test_sound_that_vllm_alone_would_give_to_the_wrong_ear_is_not_offered(without, ear):
    assert tiny_processor(tiny_config(without=without), default_ear=ear).audio_processor is None


def test_the_longest_clip_is_known_where_vllm_looks_for_it_and_not_saved():
    config = tiny_config({"max_position_embeddings": 77})
    assert config.audio_config.max_source_positions == 77
    assert "max_source_positions" not in config.to_dict()["audio_config"]
    assert "max_source_positions" in config.to_dict()["speech_config"]


@pytest.fixture
def vllm_attention():
    """vLLM's name for attention, with the library's own behind it."""
    AttentionInterface.register("vllm", sdpa_attention_forward)
    yield
    AttentionInterface._global_mapping.pop("vllm", None)


def built_by_vllm(model) -> UniMoEModel:
    """A model as vLLM's back end makes it: from its config, without its head, then weights by name."""
    config = copy.deepcopy(model.config)
    config.text_config._attn_implementation = "vllm"
    made = AutoModel.from_config(config).eval()
    made.load_state_dict(model.model.state_dict())
    return made


@pytest.mark.parametrize(
    "text", [{"shared_expert_base": True}, {"expert_lora_rank": 0}, {"mlp_layer_types": ["dense"] * 2}]
)
def test_vllm_gets_a_model_without_head_whose_table_bears_placeholders(text, vllm_attention):
    model = tiny_model(text)
    made = built_by_vllm(model)
    assert type(made) is UniMoEModel
    ids = torch.tensor([[5, 6, model.config.image_token_id, 7]])
    rows = made.get_input_embeddings()(ids)
    assert torch.equal(rows[0, [0, 1, 3]], model.get_input_embeddings()(ids[0, [0, 1, 3]]))
    positions = torch.arange(4)[None]
    with torch.no_grad():
        hidden = made(inputs_embeds=rows, position_ids=positions, use_cache=False, return_dict=False)[0]
        expected = model.model(inputs_embeds=rows, position_ids=positions).last_hidden_state
    assert_logits_equal(hidden, expected)


def test_vllm_finds_nothing_to_fuse_in_a_shared_base(vllm_attention):
    made = built_by_vllm(tiny_model({"shared_expert_base": True, "mlp_layer_types": ["dense", "sparse"]}))
    dense, sparse = (layer.mlp for layer in made.language_model.layers)
    with pytest.raises(NotImplementedError, match="one by one"):
        sparse.experts.base(torch.zeros(1, 32))
    assert dense(torch.zeros(1, 32)).shape == (1, 32)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ({}, "leave out the LoRA"),
        ({"hidden_act": "gelu", "expert_lora_rank": 0}, "SiLU"),
        ({"model_type": "granite", "logits_scaling": 8.0, "shared_expert_base": True}, "scale the logits"),
    ],
)
def test_vllm_alone_is_kept_from_what_it_would_compute_wrongly(text, sentence, vllm_attention):
    model = tiny_model(text)
    with pytest.raises(ValueError, match=f"{sentence}.*uni-moe-hf beside vLLM"):
        built_by_vllm(model)
    model.config.text_config.served_by_plugin = True  # as the plug-in says
    built_by_vllm(model)


def test_windows_come_by_clip_from_vllm(vllm_attention):
    model = tiny_model({"shared_expert_base": True})
    made, processor = built_by_vllm(model), tiny_processor(model.config)
    clips = [processor(audio=[tone(seconds)], return_tensors="pt") for seconds in (0.3, 2.5)]
    values, masks = ([clip[name] for clip in clips] for name in ("input_values", "input_values_mask"))
    with torch.no_grad():
        expected = model.get_audio_features(torch.cat(values), torch.cat(masks)).pooler_output
        listed = made.get_audio_features(values, input_values_mask=masks).pooler_output
        packed = made.get_audio_features(values[1][None], input_values_mask=masks[1][None]).pooler_output
    assert_logits_equal(listed, expected)
    assert_logits_equal(packed, expected[1:])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_experts_merged_while_they_load_are_those_of_merge_expert_lora(shared, kind):
    model = tiny_model({"model_type": kind, "shared_expert_base": shared})
    scaling = model.config.text_config.expert_lora_alpha / model.config.text_config.expert_lora_rank
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shuffled = [*weights.items()]
    np.random.default_rng(0).shuffle(shuffled)
    made = dict(merged_experts(iter(shuffled), scaling))
    model.merge_expert_lora()
    expected = model.state_dict()
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made[name], tensor), name
    with pytest.raises(ValueError, match="layers.1.mlp' are incomplete"):
        dict(
            merged_experts(
                (item for item in weights.items() if "layers.1.mlp.experts.lora.down_a" not in item[0]), 1.0
            )
        )


def test_vllm_finds_the_plug_in_and_is_told_a_name_without_importing_it(monkeypatch):
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert points["uni_moe"].load() is register
    told = {}
    registry = types.SimpleNamespace(register_model=told.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    register()
    register()
    assert told == {"UniMoEForConditionalGeneration": "uni_moe_hf.serving.vllm_model:UniMoEForVLLM"}
    assert "uni_moe_hf.serving.vllm_model" not in sys.modules
