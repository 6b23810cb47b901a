"""What cannot be converted is one sentence, and nothing is left behind."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from golden import FIXTURES, VARIANTS
from originals import copy_fixture, read, write_original
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from tiny_conversions import assert_same_files, convert_by_command, edit, set_config
from transformers import AutoModel

from uni_moe_hf import convert_checkpoint
from uni_moe_hf.cli import main


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Bomb:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def arm(file: Path, protocol: int) -> None:
    with open(file, "wb") as output:
        pickle.dump({"model.norm.weight": Bomb()}, output, protocol=protocol)


DAMAGES = {
    "no base": (lambda f: shutil.rmtree(f / "base"), r"no folder .*base' for --base"),
    "empty base": (lambda f: (f / "base/pytorch_model.bin").unlink(), r"holds neither model\.safetensors nor"),
    "no config": (lambda f: (f / "finetuned/config.json").unlink(), r"no file .*config\.json"),
    "config no JSON": (lambda f: (f / "finetuned/config.json").write_text("{"), r"no valid JSON"),
    "config a list": (lambda f: (f / "finetuned/config.json").write_text("[]"), r"holds a list"),
    "no adapter": (lambda f: (f / "finetuned/adapter_model.bin").unlink(), r"no file .*adapter_model\.bin"),
    "no adapter config": (lambda f: (f / "finetuned/adapter_config.json").unlink(), r"no file .*adapter_config\.json"),
    "no routers": (lambda f: (f / "finetuned/mlp_gates.bin").unlink(), r"no file .*mlp_gates\.bin"),
    "no connector": (lambda f: (f / "finetuned/mm_audio_aligner.bin").unlink(), r"no file .*mm_audio_aligner\.bin"),
    "no projector": (lambda f: (f / "finetuned/non_lora_trainables.bin").unlink(), r"no file .*non_lora_train"),
    "truncated base": (lambda f: truncate(f / "base/pytorch_model.bin"), r"pytorch_model\.bin' is truncated"),
    "truncated adapter": (lambda f: truncate(f / "finetuned/adapter_model.bin"), r"adapter_model\.bin' is truncated"),
    "truncated tower": (lambda f: truncate(f / "clip/model.safetensors"), r"model\.safetensors' is truncated"),
    "empty file": (lambda f: (f / "finetuned/mlp_gates.bin").write_bytes(b""), r"mlp_gates\.bin' is truncated"),
    "text": (lambda f: (f / "finetuned/mlp_gates.bin").write_text("hello"), r"mlp_gates\.bin' is (truncated|refused)"),
    "code": (lambda f: arm(f / "finetuned/mlp_gates.bin", 2), r"mlp_gates\.bin' is refused: it would run \S+system"),
    "newer code": (lambda f: arm(f / "base/pytorch_model.bin", 5), r"pytorch_model\.bin' is refused"),
    "code in a zip": (
        lambda f: torch.save({"x": Bomb()}, f / "finetuned/adapter_model.bin"),
        r"adapter_model\.bin' is refused: it would run \S+system",
    ),
    "a list": (lambda f: torch.save([1], f / "finetuned/mlp_gates.bin"), r"holds a list, not a dict"),
    "a number": (lambda f: torch.save({"x": 1}, f / "finetuned/mlp_gates.bin"), r"'x', which is a int"),
    "no weight map": (
        lambda f: (f / "base/pytorch_model.bin.index.json").write_text('{"weight_map": ["a"]}'),
        r"index\.json' has no `weight_map`",
    ),
    "Git LFS pointer": (
        lambda f: (f / "base/pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid x"),
        r"is a Git LFS pointer",
    ),
    "no embeddings": (
        lambda f: edit(f / "base/pytorch_model.bin", lambda t: {k: v for k, v in t.items() if "embed_tok" not in k}),
        r"lacks 'model\.embed_tokens\.weight'",
    ),
    "empty adapter": (
        lambda f: torch.save({}, f / "finetuned/adapter_model.bin"),
        r"names 'model\.layers\.0\.\S+' as a target, but 'adapter_model\.bin' has no LoRA for it",
    ),
    "a router that is no matrix": (
        lambda f: edit(f / "finetuned/mlp_gates.bin", lambda t: {k: v.sum() for k, v in t.items()}),
        r"router of layer 0 has shape \(\)",
    ),
    "a factor that is no matrix": (
        lambda f: edit(f / "finetuned/adapter_model.bin", lambda t: {k: v.sum() for k, v in t.items()}),
        r"no matrix",
    ),
    "scale": (lambda f: set_config(f / "finetuned/adapter_config.json", lora_alpha="16"), r"`lora_alpha='16'` has"),
    "sparse tensor": (
        lambda f: edit(
            f / "base/pytorch_model.bin", lambda t: t | {"lm_head.weight": t["lm_head.weight"].to_sparse()}
        ),
        r"torch\.sparse_coo and no named dense tensor",
    ),
    "float8": (
        lambda f: edit(f / "base/pytorch_model.bin", lambda t: t | {"x": torch.zeros(2).to(torch.float8_e4m3fn)}),
        r"an unknown dtype",
    ),
    "layers no number": (lambda f: set_config(f / "finetuned/config.json", num_hidden_layers="4"), r"config\.json'"),
    "heads zero": (lambda f: set_config(f / "finetuned/config.json", num_attention_heads=0), r"."),
    "vision layer": (
        lambda f: set_config(f / "finetuned/config.json", mm_vision_select_layer=99),
        r"reads layer 99 of a vision tower of 3 layers",
    ),
    "activation": (
        lambda f: set_config(f / "finetuned/config.json", hidden_act="snake"),
        r"describes no model .*snake",
    ),
    "activation of a tower": (lambda f: set_config(f / "clip/config.json", hidden_act="snake"), r"describes no model"),
    "missing key": (
        lambda f: edit(f / "base/pytorch_model.bin", lambda t: {k: v for k, v in t.items() if "norm.w" not in k}),
        r"pytorch_model\.bin' lacks 'model\.layers\.0\.input_layernorm\.weight'",
    ),
    "unknown key": (
        lambda f: edit(f / "base/pytorch_model.bin", lambda t: t | {"model.extra.weight": t["model.norm.weight"]}),
        r"holds 'model\.extra\.weight', for which the model has no place",
    ),
    "missing expert": (
        lambda f: edit(
            f / "base/pytorch_model.bin", lambda t: {k: v for k, v in t.items() if "experts.3.up" not in k}
        ),
        r"lacks 'model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight'",
    ),
    "half a LoRA": (
        lambda f: edit(
            f / "finetuned/adapter_model.bin",
            lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj.lora_B" not in k},
        ),
        r"adapter_model\.bin' lacks 'model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight'",
    ),
    "adapter of a larger base": (
        lambda f: edit(
            f / "finetuned/adapter_model.bin",
            lambda t: t | {k.replace("layers.0.", "layers.9."): v for k, v in t.items() if "layers.0." in k},
        ),
        r"'model\.layers\.9\.\S+ and \d+ more, for which the model has no place; is the adapter for another base\?",
    ),
    "adapter of a wider base": (
        lambda f: edit(
            f / "finetuned/adapter_model.bin",
            lambda t: {k: torch.zeros(8, 80) if v.shape == (8, 64) else v for k, v in t.items()},
        ),
        r"of shape \(8, 80\), but '\S+' needs \(8, 64\); is the adapter for another base\?",
    ),
    "rank": (lambda f: set_config(f / "finetuned/adapter_config.json", r=4), r"states rank 4 but factors have rank 8"),
    "DoRA": (lambda f: set_config(f / "finetuned/adapter_config.json", use_dora=True), r"LORA with use_dora"),
    "another method": (
        lambda f: set_config(f / "finetuned/adapter_config.json", peft_type="IA3"),
        "type IA3",
    ),
    "vocabulary": (
        lambda f: set_config(f / "finetuned/config.json", vocab_size=400),
        r"'model\.embed_tokens\.weight' of shape \(320, 64\), but '\S+' needs \(400, 64\)",
    ),
    "too few layers": (
        lambda f: set_config(f / "finetuned/config.json", num_hidden_layers=2),
        r"states 2 layers but layer [23] has a router",
    ),
    "generation config no JSON": (lambda f: (f / "base/generation_config.json").write_text("{"), r"no valid JSON"),
    "generation config absurd": (
        lambda f: (f / "base/generation_config.json").write_text('{"max_new_tokens": -3}'),
        r"generation_config\.json' cannot be used",
    ),
    "one tensor twice": (
        lambda f: edit(
            f / "finetuned/adapter_model.bin",
            lambda t: t | {k.replace(".weight", ".default.weight"): v for k, v in t.items() if "q_proj" in k},
        ),
        r"means the same tensor",
    ),
    "no top-k": (
        lambda f: set_config(f / "finetuned/config.json", num_experts_per_tok=None),
        r"does not state `num_experts_per_tok`",
    ),
    "top-k above experts": (
        lambda f: set_config(f / "finetuned/config.json", num_experts_per_tok=5),
        r"`num_experts_per_tok=5` must lie between 1 and `num_experts=4`",
    ),
    "another projector": (
        lambda f: set_config(f / "finetuned/config.json", mm_projector_type="linear"),
        r"`mm_projector_type='linear'`, but only 'mlp2x_gelu'",
    ),
    "no routers at all": (
        lambda f: [
            edit(f / file, lambda t: {k: v for k, v in t.items() if "mlp.gate." not in k} or {"x": torch.ones(1)})
            for file in ("base/pytorch_model.bin", "finetuned/mlp_gates.bin")
        ],
        r"The base holds no router",
    ),
    "wrong vision tower": (
        lambda f: edit_tower(f / "clip", hidden_size=16),
        r"of shape \(64, 32\), but 'model\.vision_connector\S+' needs \(64, 16\); are vision tower and base those",
    ),
    "tower of another kind": (
        lambda f: set_config(f / "clip/config.json", model_type="bert"),
        r"holds a 'bert' model, but a 'clip_vision_model' is needed",
    ),
    "tokenizer too large": (
        lambda f: enlarge(tiny_tokenizer()).save_pretrained(f / "base"),
        r"has \d+ tokens but the model 320 rows",
    ),
}


def enlarge(tokenizer):
    tokenizer.add_tokens([f"word{index}" for index in range(200)])
    return tokenizer


def edit_tower(folder: Path, **fields) -> None:
    """A whole other CLIP: its weights fit its config."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**{**json.loads((folder / "config.json").read_text()), **fields})
    CLIPVisionModel(config).save_pretrained(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_files_are_one_sentence_and_leave_nothing_behind(damage, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variant = "speech"
    arguments = copy_fixture(variant, tmp_path / "in")
    change, message = DAMAGES[damage]
    change(tmp_path / "in")
    assert re.search(message, convert_by_command(arguments, tmp_path / "deep" / "out", capsys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]  # neither output nor anything that code made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("audio_tower"), "give --audio-tower, and only that"),
        (lambda a: a.update(speech_tower=a.pop("audio_tower")), "no folder .* for --speech-tower"),
        (lambda a: a.update(audio_tower=a["base"] / "pytorch_model.bin"), "has no entry 'cfg'"),
        (lambda a: a.update(audio_tower=a["base"] / "nothing.pt"), "no file .*nothing.pt"),
        (lambda a: a.update(experts=a["base"]), "--experts is for the 8-expert set"),
        (lambda a: a.update(tokenizer=a["vision_tower"]), "holds no tokenizer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message, tmp_path, capsys):
    arguments = copy_fixture("audio", tmp_path / "in")
    change(arguments)
    assert re.search(message, convert_by_command(arguments, tmp_path / "out", capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_bias": True}, "conv_bias=True"),
        ({"layer_norm_first": True}, "layer_norm_first=True"),
        ({"encoder_layers": 2}, "holds 'encoder.layers.2"),
        ({"encoder_layers": 4}, "lacks 'encoder.layers.3"),
        ({"encoder_embed_dim": 32}, "needs"),
        ({"encoder_embed_dim": None}, "lacks ['encoder_embed_dim']"),
    ],
)
def test_another_beats_is_refused(change, message, tmp_path, capsys):
    arguments = copy_fixture("audio", tmp_path / "in")
    content = torch.load(arguments["audio_tower"], weights_only=True)
    content["cfg"] = {key: value for key, value in {**content["cfg"], **change}.items() if value is not None}
    torch.save(content, arguments["audio_tower"])
    assert message in convert_by_command(arguments, tmp_path / "out", capsys)


def test_a_beats_that_does_not_state_its_dropouts_has_none(tmp_path):
    arguments = copy_fixture("audio", tmp_path / "in")
    content = torch.load(arguments["audio_tower"], weights_only=True)
    content["cfg"] = {key: value for key, value in content["cfg"].items() if "dropout" not in key}
    torch.save(content, arguments["audio_tower"])
    convert_checkpoint(output=tmp_path / "out", **arguments)
    assert AutoModel.from_pretrained(tmp_path / "out").config.audio_config.dropout == 0


def test_a_beats_with_a_classifier_or_several_tables_is_refused(tmp_path, capsys):
    arguments = copy_fixture("audio", tmp_path / "in")
    whole = torch.load(arguments["audio_tower"], weights_only=True)
    torch.save({**whole, "model": {**whole["model"], "predictor.bias": torch.ones(3)}}, arguments["audio_tower"])
    assert "is it a self-supervised BEATs?" in convert_by_command(arguments, tmp_path / "out", capsys)
    key = "encoder.layers.1.self_attn.relative_attention_bias.weight"
    whole["model"][key] = whole["model"].get(key, torch.zeros(32, 4)) + 1
    torch.save(whole, arguments["audio_tower"])
    assert "one table for all layers" in convert_by_command(arguments, tmp_path / "out", capsys)


@pytest.mark.parametrize("file", ["experts/mlp_base.bin", "finetuned/5_mlp_experts.bin"])
def test_a_missing_file_of_the_eight_is_named(file, tmp_path, capsys):
    arguments = write_original(tmp_path / "in", experts=8, eight=True, layers=1)
    (tmp_path / "in" / file).unlink()
    assert Path(file).name in convert_by_command(arguments, tmp_path / "out", capsys)
    del arguments["experts"]
    assert "--experts" in convert_by_command(arguments, tmp_path / "out", capsys)


def test_a_missing_shard_is_named(tmp_path, capsys):
    arguments = write_original(tmp_path / "in", layers=1, shards=3)
    (arguments["base"] / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin' is missing" in convert_by_command(arguments, tmp_path / "out", capsys)
    (arguments["base"] / "pytorch_model.bin.index.json").unlink()
    assert "pytorch_model-00002-of-00003.bin' is missing" in convert_by_command(arguments, tmp_path / "out", capsys)


def test_router_lora_beside_the_routers_alone_is_merged_too(tmp_path):
    arguments = write_original(tmp_path / "in", variant="audio", layers=1)
    convert_checkpoint(output=tmp_path / "one", router_lora="merge", **arguments)
    edit(arguments["finetuned"] / "adapter_model.bin", lambda t: {k: v for k, v in t.items() if ".mlp.gate." not in k})
    config = json.loads((arguments["finetuned"] / "adapter_config.json").read_text())
    targets = [name for name in config["target_modules"] if not name.endswith(".mlp.gate")]
    set_config(arguments["finetuned"] / "adapter_config.json", target_modules=targets)
    convert_checkpoint(output=tmp_path / "two", router_lora="merge", **arguments)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    arguments = copy_fixture("speech", tmp_path / "in")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert_checkpoint(output=tmp_path / "link", **arguments)
    assert (tmp_path / "real" / "config.json").is_file() and (tmp_path / "link").is_symlink()


def test_nothing_is_overwritten(tmp_path, capsys):
    arguments = copy_fixture("speech", tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "is not empty" in convert_by_command(arguments, tmp_path / "out", capsys)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    assert "is a file" in convert_by_command(arguments, tmp_path / "out" / "thesis.txt", capsys)
    (tmp_path / "out" / "thesis.txt").unlink()
    convert_checkpoint(output=tmp_path / "out", **arguments)  # an empty folder is fine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    arguments = copy_fixture("speech", tmp_path / "in")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uni_moe_hf.original.conversion.complete_folder", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(output=tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out"], "--base is missing"),
        (["--output", "out", "--base", "x"], "--vision-tower is missing"),
        (["--output", "out", "--reverse", "x", "--base", "y"], "leave out --base"),
        (["--output", "out", "--reverse", "x", "--dtype", "float16"], "leave out --dtype"),
        (["--output", "out", "--reverse", "x"], "has no original.safetensors"),
    ],
)
def test_the_command_says_what_is_missing(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_command_goes_back(converted, tmp_path, capsys):
    assert main(["convert", "--reverse", str(converted["audio", "keep"]), "--output", str(tmp_path / "back")]) == 0
    assert "in the original's layout" in capsys.readouterr().out
    assert_same_files(tmp_path / "back", FIXTURES / "audio")


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dump_of_all_that_was_trained_counts_less_than_the_files_of_its_parts(variant, same, tmp_path):
    """As the original writes it during training: routers and the audio projector stand in it as well."""
    arguments = write_original(tmp_path / "in", variant=variant, layers=2)
    convert_checkpoint(output=tmp_path / "plain", **arguments)
    folder = arguments["finetuned"]

    def dump(tensors: dict) -> dict:
        for name in ("mm_audio_aligner", "mlp_gates"):
            for key, value in read(folder / f"{name}.bin").items():
                key = key if key.startswith("base_model.model.") else f"base_model.model.{key}"
                tensors[key] = value.clone() if same else value + 1
        return tensors

    edit(folder / "non_lora_trainables.bin", dump)
    convert_checkpoint(output=tmp_path / "dumped", **arguments)
    plain, dumped = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "dumped"))
    assert plain.keys() == dumped.keys() and all(torch.equal(plain[name], dumped[name]) for name in plain)


@pytest.mark.parametrize("layers", [10**9, 10**6, -1, 0])
def test_an_absurd_number_of_layers_is_refused_at_once(layers, tmp_path, capsys):
    arguments = copy_fixture("speech", tmp_path / "in")
    for file in (tmp_path / "in").glob("*/config.json"):
        if "num_hidden_layers" in file.read_text() and file.parent.name in ("base", "finetuned"):
            set_config(file, num_hidden_layers=layers)
    message = convert_by_command(arguments, tmp_path / "out", capsys)
    assert "num_hidden_layers" in message or "layers but layer" in message
