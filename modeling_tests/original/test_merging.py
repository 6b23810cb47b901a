"""Two ears: what comes from which model, what must be equal, and what is said where it is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import load_case
from huggingface_hub import ModelCard
from originals import small_tokenizer, write_original
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_inputs
from transformers import AutoModel, AutoProcessor

from uni_moe_hf import convert_checkpoint, merge_modalities
from uni_moe_hf.cli import main


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> dict[str, Path]:
    """
    Models that share their LLM: experts in even layers (audio) and in all (speech), as in the released ones; kept
    LoRA. The fixtures' projectors differ, so the speech model gets the audio model's.
    """
    root, folders = tmp_path_factory.mktemp("parents"), {}
    for seed, variant in enumerate(("audio", "speech")):
        arguments = write_original(root / f"{variant}-in", variant=variant, llm_seed=7, seed=seed, layers=3)
        small_tokenizer().save_pretrained(arguments["base"])
        arguments["vision_tower"] = arguments["vision_tower"].parents[1] / "audio" / "clip"
        source = root / "audio-in" / "finetuned" / "non_lora_trainables.bin"
        if variant == "speech":
            shutil.copy(source, arguments["finetuned"])
        folders[variant] = root / variant
        convert_checkpoint(output=folders[variant], lora="keep", **arguments)
    # Attention was tuned apart, of course; here both adapters are made equal there.
    own = load_file(folders["audio"] / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in own.items() if ".mlp." not in name},
        folders["speech"] / "adapter" / "adapter_model.safetensors",
    )
    return folders


@pytest.fixture(scope="module")
def merged(parents, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "both"
    return merge_modalities(parents["audio"], parents["speech"], output, experts=["audio:1", "speech:2", "audio:0"])


def test_each_part_is_that_of_the_model_it_comes_from(parents, merged):
    state = load_file(merged / "model.safetensors")
    audio, speech = (load_file(parents[ear] / "model.safetensors") for ear in ("audio", "speech"))
    for name, tensor in state.items():
        if ".mlp." not in name:
            source = speech if name.startswith("model.speech_") else audio
            assert torch.equal(tensor, source[name]), name
    assert {name for name in audio | speech if ".mlp." not in name} == {name for name in state if ".mlp." not in name}
    experts = [(audio, 1), (speech, 2), (audio, 0)]
    for layer in (0, 2):  # sparse in both
        stem = f"model.language_model.layers.{layer}.mlp"
        for row, (source, index) in enumerate(experts):
            assert torch.equal(state[f"{stem}.gate.weight"][row], source[f"{stem}.gate.weight"][index])
            for name in (
                "gate_up_proj",
                "down_proj",
                "lora.gate_up_a",
                "lora.gate_up_b",
                "lora.down_a",
                "lora.down_b",
            ):
                assert torch.equal(state[f"{stem}.experts.{name}"][row], source[f"{stem}.experts.{name}"][index])


def test_a_dense_layer_of_one_model_becomes_its_experts_there(parents, merged):
    state, audio = load_file(merged / "model.safetensors"), load_file(parents["audio"] / "model.safetensors")
    adapter = load_file(parents["audio"] / "adapter" / "adapter_model.safetensors")
    stem = "model.language_model.layers.1.mlp"
    for row in (0, 2):
        gate_up = torch.cat([audio[f"{stem}.gate_proj.weight"], audio[f"{stem}.up_proj.weight"]])
        assert torch.equal(state[f"{stem}.experts.gate_up_proj"][row], gate_up)
        assert torch.equal(state[f"{stem}.experts.down_proj"][row], audio[f"{stem}.down_proj.weight"])
        for side in "ab":
            factors = [
                adapter[f"base_model.model.{stem}.{name}_proj.lora_{side.upper()}.weight"] for name in ("gate", "up")
            ]
            assert torch.equal(state[f"{stem}.experts.lora.gate_up_{side}"][row], torch.cat(factors))
        assert not state[f"{stem}.gate.weight"][row].any()
    assert not [name for name in load_file(merged / "adapter" / "adapter_model.safetensors") if ".mlp." in name]


def test_routed_to_one_models_experts_the_merged_model_computes_what_that_model_does(parents, merged, tmp_path):
    """The audio model with its first two experts alone, against both ears with these and others nobody is sent to."""
    output = merge_modalities(
        parents["audio"],
        parents["speech"],
        tmp_path / "both",
        experts=["audio:0", "audio:1", "audio:2", "audio:3", "speech:0"],
    )
    both, alone = AutoModel.from_pretrained(output).eval(), AutoModel.from_pretrained(parents["audio"]).eval()
    inputs = load_case("audio", "image_two_audios", alone.config).inputs
    for layer in both.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(without_expert(4))
    both = PeftModel.from_pretrained(both, output / "adapter").eval()
    alone = PeftModel.from_pretrained(alone, parents["audio"] / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(both(**inputs).logits, alone(**inputs).logits, atol=1e-4, rtol=0)


def without_expert(expert: int):
    """A router has no bias by which an expert could be left out."""

    def hook(router, args, outputs):
        logits = outputs[0].clone()
        logits[:, expert] = -torch.inf
        top, index = torch.topk(logits, router.config.num_experts_per_tok, dim=-1)
        return logits, torch.softmax(top, dim=-1), index

    return hook


def test_the_merged_model_hears_both_and_answers(merged):
    model, processor = AutoModel.from_pretrained(merged).eval(), AutoProcessor.from_pretrained(merged)
    assert model.config.modalities == ("image", "video", "audio", "speech")
    text = model.config.text_config
    assert (text.num_experts, text.expert_names) == (3, ["audio_1", "speech_2", "audio_0"])
    assert text.mlp_layer_types == ["sparse"] * 3
    clip = {"array": torch.ones(900).numpy(), "sampling_rate": 16000}
    chat = [{"role": "user", "content": [{"type": "speech", "speech": clip}, {"type": "audio", "audio": clip}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    words = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert words.shape[1] == inputs["input_ids"].shape[1] + 3
    card = ModelCard.load(merged / "README.md").text
    assert "BEATs" in card and "Whisper" in card and "stage 3" in card


def test_all_experts_of_both_by_default_and_their_own_names(parents, tmp_path):
    for ear in ("audio", "speech"):
        shutil.copytree(parents[ear], tmp_path / ear)
        config = json.loads((tmp_path / ear / "config.json").read_text())
        config["text_config"]["expert_names"] = ["text", f"{ear}-b", f"{ear}-c", f"{ear}-d"]
        (tmp_path / ear / "config.json").write_text(json.dumps(config))
    merge_modalities(tmp_path / "audio", tmp_path / "speech", tmp_path / "both", num_experts_per_tok=1)
    text = AutoModel.from_pretrained(tmp_path / "both").config.text_config
    assert text.expert_names[0] == "audio_text" and text.expert_names[4] == "speech_text"
    assert text.expert_names[1] == "audio-b" and text.num_experts == 8 and text.num_experts_per_tok == 1


def change(folder: Path, name: str, by: float, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    tensors[name] = tensors[name] + by
    save_file(tensors, folder / file, metadata={"format": "pt"})


SHARED = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, SHARED, 0.25), r"1 of \d+ tensors .*'model.language_model.layers.1.*by up to 0.25; both"),
        (lambda f: change(f, "model.vision_connector.projector.0.bias", 0.5), r"1 of 4 .*0.5; say whose vision conn"),
        (
            lambda f: change(
                f / "adapter",
                f"base_model.model.{SHARED.removesuffix('.weight')}.lora_B.weight",
                2.0,
                "adapter_model.safetensors",
            ),
            r"1 of 24 .*by up to 2; say whose adapter to take with --prefer",
        ),
        (lambda f: shutil.rmtree(f / "adapter"), r"Only the audio model has an adapter"),
        (
            lambda f: set_text(f, rms_norm_eps=0.1),
            r"differ in 1 of their settings, first in `rms_norm_eps`: 1e-06 in the",
        ),
        (
            lambda f: set_text(f, expert_lora_rank=8),
            r"`expert_lora_rank`: 4 in the audio model, 8 in the speech model",
        ),
        (
            lambda f: set_config(f, vision_feature_layer=-1),
            r"`vision_feature_layer` is -2 in the audio model, -1 in the",
        ),
        (
            lambda f: remove(f, "model.language_model.layers.1.mlp.gate.weight"),
            r"speech' lacks 'model\.\S+gate\.weight'",
        ),
        (lambda f: remove(f, "model.speech_tower.conv1.bias"), r"speech' lacks 'model\.speech_tower\.conv1\.bias'"),
        (lambda f: (f / "config.json").unlink(), r"holds no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"holds neither model.safetensors nor"),
    ],
)
def test_parts_that_should_be_shared_but_differ_are_named_with_figures(parents, damage, message, tmp_path):
    shutil.copytree(parents["speech"], tmp_path / "speech")
    damage(tmp_path / "speech")
    with pytest.raises(ValueError, match=message):
        merge_modalities(parents["audio"], tmp_path / "speech", tmp_path / "both")
    assert [path.name for path in tmp_path.iterdir()] == ["speech"]


def set_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def remove(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_text(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefer", ["audio", "speech"])
def test_of_projectors_and_adapters_that_differ_the_preferred_are_taken(parents, prefer, tmp_path):
    shutil.copytree(parents["speech"], tmp_path / "speech")
    lora = f"base_model.model.{SHARED.removesuffix('.weight')}.lora_B.weight"
    change(tmp_path / "speech", "model.vision_connector.projector.0.bias", 0.5)
    change(tmp_path / "speech" / "adapter", lora, 2.0, "adapter_model.safetensors")
    merge_modalities(parents["audio"], tmp_path / "speech", tmp_path / "both", prefer=prefer)
    source = {"audio": parents["audio"], "speech": tmp_path / "speech"}[prefer]
    for file, name in (
        ("model.safetensors", "model.vision_connector.projector.0.bias"),
        ("adapter/adapter_model.safetensors", lora),
    ):
        assert torch.equal(load_file(tmp_path / "both" / file)[name], load_file(source / file)[name])
    change(tmp_path / "speech", SHARED, 0.25)
    with pytest.raises(ValueError, match="both must come from one LLM"):  # no preference helps here
        merge_modalities(parents["audio"], tmp_path / "speech", tmp_path / "again", prefer=prefer)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (["audio:9"], r"no experts \['audio:9'\]; the two models have \['audio:0', "),
        (["0"], r"no experts \['0'\]"),
        (["audio:0", "audio:0"], "name one twice"),
        ([], "are none"),
    ],
)
def test_unknown_experts_are_refused(parents, experts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        merge_modalities(parents["audio"], parents["speech"], tmp_path / "both", experts=experts)


def test_the_models_must_each_have_their_ear(parents, tmp_path):
    with pytest.raises(ValueError, match=r"a sparse model with ears for \['speech'\], but a sparse one for audio"):
        merge_modalities(parents["speech"], parents["audio"], tmp_path / "both")


def test_the_command_merges_or_says_why_not(parents, tmp_path, capsys):
    command = ["merge-modalities", "--audio-model", str(parents["audio"]), "--speech-model", str(parents["speech"])]
    command += ["--experts", "audio:0", "speech:1", "--output"]
    assert main([*command, str(tmp_path / "both")]) == 0
    assert "3 of 3 layers sparse" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "both").eval()
    with torch.no_grad():
        assert model(**make_text(model.config)).logits.isfinite().all()
    assert main([*command, str(tmp_path / "both")]) == 1
    assert "is not empty" in capsys.readouterr().err


def make_text(config) -> dict[str, torch.Tensor]:
    return make_inputs(config, (5,))
