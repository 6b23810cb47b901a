"""Conversion: the original's numbers in both LoRA modes, the way back bit for bit, and one sentence for bad files."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from golden import FIXTURES, TOLERANCES, VARIANTS, case_names, differences, load_case
from huggingface_hub import ModelCard
from originals import EIGHT_FILES, copy_fixture, read, save_base, small_tokenizer, write_original
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import assert_pixels_equal
from tiny_conversions import assert_same_files, command_for, convert_by_command, edit, read_base, set_config
from transformers import AutoModel, AutoProcessor

from uni_moe_hf import convert_checkpoint, revert_checkpoint
from uni_moe_hf.cli import main
from uni_moe_hf.original.checkpoints import read_metadata


CASES = [(variant, case) for variant in VARIANTS for case in case_names(variant)]


ROUTES = ("eager", "auto", "segmented", "grouped_mm", "batched_mm")


def load(folder: Path) -> torch.nn.Module:
    """A converted model with its adapter, where there is one."""
    model = AutoModel.from_pretrained(folder).eval()
    if (folder / "adapter").is_dir():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a missing key is no more than a warning to PEFT
            model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    return model


@pytest.fixture(scope="module")
def models(converted) -> dict[tuple[str, str], torch.nn.Module]:
    return {key: load(folder) for key, folder in converted.items()}


def assert_within(found: dict[str, float]) -> None:
    assert set(found) == set(TOLERANCES)
    assert all(found[name] <= tolerance for name, tolerance in TOLERANCES.items()), found


@pytest.mark.parametrize("lora", ["merge", "keep"])
@pytest.mark.parametrize(("variant", "case"), CASES)
def test_every_number_of_the_original_is_met(models, variant, case, lora):
    model = models[variant, lora]
    assert_within(differences(model, load_case(variant, case, model.config)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lora", ["merge", "keep"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_route_meets_the_original(converted, variant, lora, route):
    model = load(converted[variant, lora])
    (model.base_model.model if lora == "keep" else model).set_experts_implementation(route)
    assert_within(differences(model, load_case(variant, "image_two_audios", model.config)))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("lora", ["merge", "keep"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_mixed_batch_gives_the_originals_single_results(models, variant, lora, padding):
    model = models[variant, lora]
    names = ("text", "image", "image_two_audios", "video", "audio", "long_audio_2_windows", "video_audio")
    cases = [load_case(variant, name, model.config) for name in names]
    length = max(case.lengths[0] for case in cases)
    inputs = {"input_ids": [], "attention_mask": []}
    for case in cases:
        fill = torch.zeros(1, length - case.lengths[0], dtype=torch.long)
        for name, rows in inputs.items():
            own = case.inputs[name]
            rows.append(torch.cat((fill, own) if padding == "left" else (own, fill), dim=1))
    for name in ("pixel_values", "pixel_values_videos", "input_values", "input_values_mask", "input_features"):
        if clips := [case.inputs[name] for case in cases if name in case.inputs]:
            inputs[name] = clips
    with torch.no_grad():
        logits = model(**{name: torch.cat(rows) for name, rows in inputs.items()}).logits
    for row, case in enumerate(cases):
        own = slice(length - case.lengths[0], length) if padding == "left" else slice(case.lengths[0])
        torch.testing.assert_close(logits[row, own], case.expected["logits"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_folder_meets_the_original_without_this_package(converted, variant, tmp_path):
    case = load_case(variant, "video_audio", AutoModel.from_pretrained(converted[variant, "merge"]).config)
    save_file(case.inputs, tmp_path / "inputs.safetensors")
    code = f"""
        import sys
        sys.modules["uni_moe_hf"] = None
        from safetensors.torch import load_file, save_file
        from transformers import AutoModel
        model = AutoModel.from_pretrained({str(converted[variant, "merge"])!r}, trust_remote_code=True).eval()
        outputs = model(**load_file("inputs.safetensors"))
        save_file({{"logits": outputs.logits.detach()}}, "outputs.safetensors")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    logits = load_file(tmp_path / "outputs.safetensors")["logits"]
    torch.testing.assert_close(logits, case.expected["logits"], atol=1e-4, rtol=0)


def with_tokenizer(folder: Path, variant: str) -> dict:
    """The fixture with a tokenizer in its base, as the released bases have one."""
    arguments = copy_fixture(variant, folder)
    small_tokenizer().save_pretrained(arguments["base"])
    return arguments


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_processor_is_converted_and_meets_the_originals_front_ends(variant, tmp_path):
    done = convert_checkpoint(output=tmp_path / "out", **with_tokenizer(tmp_path / "in", variant))
    assert done.processor == ""
    processor, golden = (
        AutoProcessor.from_pretrained(tmp_path / "out"),
        load_file(FIXTURES / variant / "frontends.safetensors"),
    )
    for picture in ("square", "wide", "tall"):
        pixels = processor(images=Image.fromarray(golden[f"{picture}/rgb"].numpy()), return_tensors="pt").pixel_values
        assert_pixels_equal(pixels[0], golden[f"{picture}/pixel_values"])
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert processor.image_token_id == model.config.image_token_id >= model.config.text_config.vocab_size
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == 320  # not resized
    chat = [
        {
            "role": "user",
            "content": [{"type": variant, variant: {"array": np.ones(900, np.float32), "sampling_rate": 16000}}],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def original_ids(pieces: sentencepiece.SentencePieceProcessor, prompt: str) -> list[int | str]:
    """The original's way: the prompt is cut at the placeholders, each part is encoded on its own, one BOS in front."""
    ids: list[int | str] = [pieces.bos_id()]
    for part in re.split(r"(<image>|<audio>|<video>)", prompt):
        ids += [part] if part.startswith("<") and part.endswith(">") else pieces.encode(part) if part else []
    return ids


def test_a_bare_sentencepiece_model_encodes_prompts_as_the_original_does(tmp_path):
    arguments = copy_fixture("audio", tmp_path / "in")
    words = "bird bell red blue yes no question answer image sound".split()
    lines = [f"the {word} of USER: and ASSISTANT: what is it? {index}" for index in range(9) for word in words]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(arguments["base"] / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (arguments["base"] / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))
    convert_checkpoint(output=tmp_path / "out", **arguments)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    pieces = sentencepiece.SentencePieceProcessor(str(arguments["base"] / "tokenizer.model"))
    marks = {getattr(processor, f"{kind}_token_id"): f"<{kind}>" for kind in ("image", "audio")}
    clips = {"image": np.zeros((9, 9, 3), np.uint8), "audio": np.ones(900, np.float32)}
    chat = [{"role": "user", "content": "x"}]
    system = processor.apply_chat_template(chat, tokenize=False).removeprefix("<s>").split(" USER:")[0]
    for order in ((), ("image",), ("audio",), ("image", "audio"), ("audio", "image")):
        for question in ("what is it?", "bird", "naïve 東京?\n\nyes"):
            parts = [*({"type": kind, kind: clips[kind]} for kind in order), {"type": "text", "text": question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
            )
            ids = [marks.get(token, token) for token in inputs["input_ids"][0]]
            once = [ids[i] for i in range(len(ids)) if i == 0 or ids[i] != ids[i - 1] or isinstance(ids[i], int)]
            media = "".join(f"<{kind}>\n" for kind in order)
            prompt = f"{system} USER: {media}{question} ASSISTANT:"
            assert once == original_ids(pieces, prompt), (order, question)


def test_a_damaged_tokenizer_is_one_sentence(tmp_path, capsys):
    arguments = copy_fixture("audio", tmp_path / "in")
    (arguments["base"] / "tokenizer.model").write_bytes(b"no model at all")
    assert "cannot be read" in convert_by_command(arguments, tmp_path / "out", capsys)


@pytest.mark.parametrize("clip", ["second", "odd"])
def test_the_converted_beats_meets_the_original(models, clip):
    golden = load_file(FIXTURES / "audio" / "frontends.safetensors")
    tower = models["audio", "merge"].model.audio_tower
    with torch.no_grad():
        features = tower(golden[f"{clip}/fbank_normalized"][None]).last_hidden_state
    torch.testing.assert_close(features, golden[f"{clip}/beats_last_hidden_state"], atol=1e-5, rtol=0)


# --- Other sizes: every weight is what its files say


def expected_weight(arguments: dict, key: str, scale: float) -> torch.Tensor:
    """A weight of the base with its LoRA, by hand."""
    weight, adapter = read_base(arguments["base"])[key], read(arguments["finetuned"] / "adapter_model.bin")
    stem = f"base_model.model.{key.removesuffix('.weight')}"
    return weight + scale * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]


SIZES = [
    {"variant": "speech", "experts": 3, "top_k": 1, "rank": 2, "layers": 3, "shards": 2, "seed": 1},
    {"variant": "audio", "experts": 8, "top_k": 2, "rank": 16, "layers": 5, "shards": 2, "seed": 2, "alpha": 8},
    {"variant": "audio", "experts": 3, "top_k": 3, "rank": 1, "layers": 1, "shards": 1, "seed": 3},
    {"variant": "speech", "experts": 8, "top_k": 1, "rank": 8, "layers": 2, "shards": 3, "seed": 4},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_other_sizes_convert_and_every_weight_is_what_its_files_say(size, tmp_path):
    arguments = write_original(tmp_path / "in", **size)
    convert_checkpoint(output=tmp_path / "merged", **arguments)
    convert_checkpoint(output=tmp_path / "kept", lora="keep", **arguments)
    merged, kept = load(tmp_path / "merged"), load(tmp_path / "kept")
    text, state = merged.config.text_config, merged.state_dict()
    assert (text.num_experts, text.num_experts_per_tok) == (size["experts"], size["top_k"])
    sparse = [index for index, kind in enumerate(text.mlp_layer_types) if kind == "sparse"]
    assert sparse == list(range(0, size["layers"], 2 if size["variant"] == "audio" else 1))
    scale = size.get("alpha", 16) / size["rank"]
    gates = read(arguments["finetuned"] / "mlp_gates.bin")
    for layer in sparse:
        stem, ours = f"model.layers.{layer}.mlp", f"model.language_model.layers.{layer}.mlp"
        assert torch.equal(state[f"{ours}.gate.weight"], gates[f"{stem}.gate.weight"])
        for expert in range(size["experts"]):
            gate, up, down = (
                expected_weight(arguments, f"{stem}.experts.{expert}.{name}_proj.weight", scale)
                for name in ("gate", "up", "down")
            )
            torch.testing.assert_close(state[f"{ours}.experts.gate_up_proj"][expert], torch.cat([gate, up]))
            torch.testing.assert_close(state[f"{ours}.experts.down_proj"][expert], down)
    name = "layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(
        state[f"model.language_model.{name}"], expected_weight(arguments, f"model.{name}", scale)
    )
    inputs = load_case(size["variant"], "image_two_audios", merged.config).inputs
    with torch.no_grad():
        expected = merged(**inputs).logits
        torch.testing.assert_close(kept(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("lora", ["merge", "keep"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_router_lora_is_lost_as_in_the_original_and_added_on_request(variant, lora, tmp_path):
    arguments = write_original(tmp_path / "in", variant=variant, layers=2)
    routers = {}
    for choice in ("drop", "merge"):
        convert_checkpoint(output=tmp_path / choice, router_lora=choice, lora=lora, **arguments)
        routers[choice] = load_file(tmp_path / choice / "model.safetensors")[
            "model.language_model.layers.0.mlp.gate.weight"
        ]
    plain = read(arguments["finetuned"] / "mlp_gates.bin")["model.layers.0.mlp.gate.weight"]
    assert torch.equal(routers["drop"], plain)
    if variant == "speech":  # it has none
        assert torch.equal(routers["merge"], plain)
    else:
        adapter = read(arguments["finetuned"] / "adapter_model.bin")
        a, b = (adapter[f"base_model.model.model.layers.0.mlp.gate.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(routers["merge"], plain + 4 * b @ a)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_made_in_float32_and_rounded_once(dtype, tmp_path):
    arguments = write_original(tmp_path / "in", layers=1)
    convert_checkpoint(output=tmp_path / "out", dtype=dtype, **arguments)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    name = "layers.0.self_attn.q_proj.weight"
    expected = expected_weight(arguments, f"model.{name}", 4.0)
    # The factors' product differs in its last bits with the way it is summed: one step of the lower precision at most.
    off = state[f"model.language_model.{name}"].float() != expected.to(getattr(torch, dtype)).float()
    assert off.float().mean() < 0.01
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_alone_is_a_model_too(variant, tmp_path):
    arguments = write_original(tmp_path / "in", variant=variant)
    del arguments["finetuned"]
    projector = {
        key.removeprefix("base_model.model."): value
        for key, value in read(FIXTURES / variant / "finetuned" / "non_lora_trainables.bin").items()
    }
    torch.save(projector, arguments["base"] / "mm_projector.bin")
    convert_checkpoint(output=tmp_path / "out", **arguments)
    state, base = load_file(tmp_path / "out" / "model.safetensors"), read_base(arguments["base"])
    for name in ("gate.weight", "experts.0.down_proj.weight"):
        ours = f"model.language_model.layers.0.mlp.{name.replace('0.', '').replace('down_proj.weight', 'down_proj')}"
        found = state[ours] if "gate" in name else state[ours][0]
        assert torch.equal(found, base[f"model.layers.0.mlp.{name}"])
    assert torch.equal(state["model.vision_connector.projector.0.bias"], projector["model.mm_projector.0.bias"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["stage"] is None


def test_the_published_towers_spellings_are_understood(tmp_path):
    """Whisper's prefix, CLIP's text half and buffers, names with `.default.`, a random Whisper in the base."""
    arguments = write_original(tmp_path / "in", layers=1, shards=2)
    whisper, clip = tmp_path / "whisper", tmp_path / "clip"
    shutil.copytree(arguments["speech_tower"], whisper)
    tensors = load_file(whisper / "model.safetensors")
    save_file({f"model.{key}": value for key, value in tensors.items()}, whisper / "model.safetensors")
    clip.mkdir()
    tensors = load_file(arguments["vision_tower"] / "model.safetensors")
    tensors |= {"text_model.final_layer_norm.bias": torch.ones(3), "visual_projection.weight": torch.ones(3, 3)}
    tensors |= {"logit_scale": torch.ones(()), "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(tensors, clip / "pytorch_model.bin")
    vision = json.loads((arguments["vision_tower"] / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    convert_checkpoint(output=tmp_path / "one", **arguments)
    adapter = {
        k.replace(".weight", ".default.weight"): v
        for k, v in read(arguments["finetuned"] / "adapter_model.bin").items()
    }
    torch.save(adapter, arguments["finetuned"] / "adapter_model.bin")
    base = read_base(arguments["base"]) | {"model.audio_tower.encoder.conv1.weight": torch.ones(2)}
    base["model.vision_tower.vision_tower.vision_model.x"] = torch.ones(2)
    (arguments["base"] / "pytorch_model.bin.index.json").unlink()
    for file in arguments["base"].glob("*.bin"):
        file.unlink()
    save_base(base, arguments["base"], shards=3)
    (arguments["base"] / "pytorch_model.bin.index.json").unlink()  # shards alone are enough
    convert_checkpoint(output=tmp_path / "two", **arguments | {"speech_tower": whisper, "vision_tower": clip})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_old_pickles_are_read(tmp_path):
    arguments = write_original(tmp_path / "in", layers=1)
    convert_checkpoint(output=tmp_path / "one", **arguments)
    for file in (arguments["base"] / "pytorch_model.bin", arguments["finetuned"] / "adapter_model.bin"):
        torch.save(read(file), file, _use_new_zipfile_serialization=False)
    convert_checkpoint(output=tmp_path / "two", **arguments)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def replace_connector(arguments: dict, tensors: dict[str, torch.Tensor]) -> None:
    """In both places where the original keeps it."""
    torch.save(tensors, arguments["finetuned"] / "mm_audio_aligner.bin")
    base = {key: value for key, value in read_base(arguments["base"]).items() if "aligner" not in key}
    torch.save(base | tensors, arguments["base"] / "pytorch_model.bin")


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_depth_of_the_connector_is_that_of_its_keys(depth, tmp_path):
    """The paper says four layers, the released connectors have twelve, the fixture's Whisper decoder two."""
    arguments = write_original(tmp_path / "in", layers=1)
    tensors = read(arguments["finetuned"] / "mm_audio_aligner.bin")
    layers = {int(match[1]) for key in tensors if (match := re.search(r"audio_decoder\.layers\.(\d+)", key))}
    for layer in set(range(depth)) - layers:
        tensors |= {k.replace("layers.0.", f"layers.{layer}."): v for k, v in tensors.items() if "layers.0." in k}
    tensors = {
        k: v for k, v in tensors.items() if not any(f"layers.{layer}." in k for layer in layers - set(range(depth)))
    }
    replace_connector(arguments, tensors)
    convert_checkpoint(output=tmp_path / "out", **arguments)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert len(model.model.speech_connector.decoder.layers) == depth
    assert len(model.model.speech_tower.layers) == 2


@pytest.mark.parametrize(("depth", "period"), [(4, 2), (3, 1), (2, 2), (6, 3)])
def test_depth_and_period_of_the_q_former_are_those_of_its_keys(depth, period, tmp_path):
    arguments = write_original(tmp_path / "in", variant="audio", layers=1)
    tensors = read(arguments["finetuned"] / "mm_audio_aligner.bin")
    first = {key: value for key, value in tensors.items() if "encoder.layer.0." in key}
    tensors = {key: value for key, value in tensors.items() if "encoder.layer." not in key}
    for layer in range(depth):
        tensors |= {
            key.replace("layer.0.", f"layer.{layer}."): value
            for key, value in first.items()
            if layer % period == 0 or "crossattention" not in key
        }
    replace_connector(arguments, tensors)
    convert_checkpoint(output=tmp_path / "out", **arguments)
    config = AutoModel.from_pretrained(tmp_path / "out").config.audio_connector_config
    assert (config.num_hidden_layers, config.cross_attention_frequency) == (depth, period)


# --- The 8-expert set


@pytest.mark.parametrize("lora", ["merge", "keep"])
@pytest.mark.parametrize("shards", [1, 2])
def test_each_of_eight_experts_is_its_file_plus_its_lora(lora, shards, tmp_path):
    arguments = write_original(tmp_path / "in", experts=8, eight=True, layers=2, shards=shards)
    convert_checkpoint(output=tmp_path / "out", lora=lora, **arguments)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    text = model.config.text_config
    assert text.expert_names == ["audiocap", "basev", "base", "base1", "base4", "base7", "base_6", "base7_7"]
    assert (text.num_experts, text.num_experts_per_tok, text.router_dtype) == (8, 2, "float32")
    gates = read(arguments["finetuned"] / "mlp_gates.bin")
    if lora == "keep":
        model.merge_expert_lora()
    for layer, decoder_layer in enumerate(model.model.language_model.layers):
        router = gates[f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg.weight"]
        assert torch.equal(decoder_layer.mlp.gate.weight, router)
        for expert, file in enumerate(EIGHT_FILES):
            base = read(arguments["experts"] / f"mlp_{file}.bin")
            factors = read(arguments["finetuned"] / f"{expert}_mlp_experts.bin")
            weights = {}
            for name in ("gate", "up", "down"):
                stem = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.0.{name}_proj_lora"
                delta = factors[f"{stem}_B.weight"] @ factors[f"{stem}_A.weight"]
                weights[name] = base[f"model.layers.{layer}.mlp.{name}_proj.weight"] + 4.0 * delta
            stack = decoder_layer.mlp.experts
            torch.testing.assert_close(stack.gate_up_proj[expert].data, torch.cat([weights["gate"], weights["up"]]))
            torch.testing.assert_close(stack.down_proj[expert].data, weights["down"])
    inputs = load_case("speech", "image_two_audios", model.config).inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)  # nothing is drawn at random


@pytest.mark.parametrize("lora", ["merge", "keep"])
def test_the_eights_experts_have_their_own_rank_and_scale(lora, tmp_path):
    arguments = write_original(tmp_path / "in", experts=8, eight=True, layers=1, rank=4)
    set_config(arguments["base"] / "config.json", lora_alpha=32)  # the attention's is 16
    for expert in range(8):
        file = arguments["finetuned"] / f"{expert}_mlp_experts.bin"
        edit(file, lambda t: {k: torch.cat([v, v], dim=0 if "_A." in k else 1) / 2 for k, v in t.items()})
    convert_checkpoint(output=tmp_path / "out", lora=lora, **arguments)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    if lora == "keep":
        assert (model.config.text_config.expert_lora_rank, model.config.text_config.expert_lora_alpha) == (8, 32)
        model.merge_expert_lora()
    factors = read(arguments["finetuned"] / "0_mlp_experts.bin")
    stem = "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.0.down_proj_lora"
    base = read(arguments["experts"] / "mlp_audiocap.bin")["model.layers.0.mlp.down_proj.weight"]
    expected = base + 32 / 8 * factors[f"{stem}_B.weight"] @ factors[f"{stem}_A.weight"]
    found = model.model.language_model.layers[0].mlp.experts.down_proj[0].data
    torch.testing.assert_close(found, expected)


def test_experts_files_with_their_frozen_weights_and_other_local_numbers_are_read(tmp_path):
    arguments = write_original(tmp_path / "in", experts=8, eight=True, layers=1)
    convert_checkpoint(output=tmp_path / "one", **arguments)
    for expert in range(8):
        file = arguments["finetuned"] / f"{expert}_mlp_experts.bin"
        tensors = {key.replace("experts.0.", f"experts.{expert}."): value for key, value in read(file).items()}
        stem = f"model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}"
        torch.save(tensors | {f"{stem}.gate_proj.weight": torch.zeros(144, 64)}, file)
    convert_checkpoint(output=tmp_path / "two", **arguments)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_gives_every_tensor_of_the_fixtures_bit_for_bit(converted, variant, tmp_path):
    revert_checkpoint(converted[variant, "keep"], tmp_path / "back")
    assert_same_files(tmp_path / "back", FIXTURES / variant)


@pytest.mark.parametrize("size", [*SIZES, {"eight": True, "experts": 8, "layers": 2, "shards": 2, "rank": 2}], ids=str)
def test_the_way_back_and_forth_changes_nothing(size, tmp_path):
    arguments = write_original(tmp_path / "in", **size)
    convert_checkpoint(output=tmp_path / "out", lora="keep", **arguments)
    revert_checkpoint(tmp_path / "out", tmp_path / "back", max_shard_size="200KB")
    assert (tmp_path / "back" / "base" / "pytorch_model.bin.index.json").is_file()
    assert_same_files(tmp_path / "back", tmp_path / "in")
    again = arguments | {
        name: tmp_path / "back" / name for name in ("base", "finetuned", "experts") if name in arguments
    }
    convert_checkpoint(output=tmp_path / "again", lora="keep", **again)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "original.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("out", "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_nothing_that_was_merged_into_routers_is_lost_on_the_way_back(tmp_path):
    arguments = write_original(tmp_path / "in", variant="audio", layers=2)
    convert_checkpoint(output=tmp_path / "out", lora="keep", router_lora="merge", **arguments)
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same_files(tmp_path / "back", tmp_path / "in")


def test_the_first_tensor_of_a_connector_stays_the_first(converted, tmp_path):
    """The original's trainer takes it for the queries."""
    revert_checkpoint(converted["speech", "keep"], tmp_path / "back")
    file = "finetuned/mm_audio_aligner.bin"
    assert list(read(tmp_path / "back" / file)) == list(read(FIXTURES / "speech" / file))


def test_a_base_without_anything_to_drop_goes_back(tmp_path):
    arguments = write_original(tmp_path / "in", layers=1)
    base = {
        k: v for k, v in read_base(arguments["base"]).items() if "inv_freq" not in k and "embed_tokens" not in k[40:]
    }
    projector = read(FIXTURES / "speech" / "base" / "mm_projector.bin")
    torch.save(base | projector, arguments["base"] / "pytorch_model.bin")
    del arguments["finetuned"]
    convert_checkpoint(output=tmp_path / "out", lora="keep", **arguments)
    assert not load_file(tmp_path / "out" / "original.safetensors")
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    found = read_base(tmp_path / "back" / "base")
    assert found.keys() == base.keys() | projector.keys()
    assert all(torch.equal(found[key], base[key]) for key in base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "adapter"), r"lora_A\.weight' and others is missing in 'finetuned/adapter_model"),
        (
            lambda f: remove_tensor(f / "model.safetensors", "lm_head.weight"),
            r"'lm_head\.weight' is missing in 'base/",
        ),
        (lambda f: set_metadata(f, files='{"base": "/tmp/evil.bin"}'), r"wants to write '/tmp/evil\.bin'"),
        (lambda f: set_metadata(f, files='{"base": "base/../../evil.bin"}'), r"wants to write"),
        (lambda f: set_metadata(f, eight=None), r"does not state \['eight'\]"),
    ],
)
def test_a_folder_that_is_not_what_was_converted_cannot_go_back(converted, damage, message, tmp_path):
    shutil.copytree(converted["speech", "keep"], tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def remove_tensor(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def set_metadata(folder: Path, **facts: str | None) -> None:
    file = folder / "original.safetensors"
    metadata = {key: value for key, value in {**read_metadata(file), **facts}.items() if value is not None}
    save_file(load_file(file), file, metadata=metadata)


def test_a_merged_model_cannot_go_back(converted, tmp_path):
    with pytest.raises(ValueError, match="only what was converted with --lora keep can go back"):
        revert_checkpoint(converted["speech", "merge"], tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- The folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_card_says_where_it_comes_from_and_what_binds_it(variant, tmp_path, capsys):
    arguments = write_original(tmp_path / "in", variant=variant, layers=1)
    command = [*command_for(arguments, tmp_path / "My Model"), "--lora", "keep"]
    assert main(command) == 0
    assert "1 layers sparse" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "My Model" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "any-to-any",
        "other",
    )
    assert "custom_code" in card.data.tags
    assert f"--output '{tmp_path / 'My Model'}'" in card.text
    licences = ("research use", "LLaMA", "Vicuna", "CLIP", "BEATs" if variant == "audio" else "Whisper")
    assert all(word in card.text for word in licences)
    assert "base_model.model" not in card.text and "adapter" in card.text


@pytest.mark.parametrize("samples", [None, False, True])
def test_a_generation_config_that_would_not_save_any_more_is_mended(samples, tmp_path):
    """LLaVA's file has a temperature without saying that it samples: greedy search, in the original too."""
    arguments = write_original(tmp_path / "in", layers=1)
    settings = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096, "transformers_version": "4.31.0"}
    settings |= {} if samples is None else {"do_sample": samples}
    (arguments["base"] / "generation_config.json").write_text(json.dumps(settings))
    convert_checkpoint(output=tmp_path / "out", **arguments)
    config = AutoModel.from_pretrained(tmp_path / "out").generation_config
    assert config.max_length == 4096 and bool(config.do_sample) == bool(samples)
    assert (config.temperature, config.top_p) == ((0.9, 0.6) if samples else (None, None))


def test_the_interval_variant_of_speech_converts_and_goes_back(tmp_path):
    """v1.5: a query decoder, experts in even layers, LoRA on routers; connector and gates in bfloat16."""
    arguments = write_original(tmp_path / "in", every=2, router_lora=True, layers=3)
    for name in ("mm_audio_aligner", "mlp_gates"):
        edit(arguments["finetuned"] / f"{name}.bin", lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    convert_checkpoint(output=tmp_path / "out", lora="keep", **arguments)
    model = load(tmp_path / "out")
    assert model.config.text_config.mlp_layer_types == ["sparse", "dense", "sparse"]
    assert model.config.modalities == ("image", "video", "speech")
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert_same_files(tmp_path / "back", tmp_path / "in")


def test_a_model_converted_to_a_lower_precision_gives_back_rounded_weights(tmp_path):
    arguments = write_original(tmp_path / "in", layers=1)
    convert_checkpoint(output=tmp_path / "out", lora="keep", dtype="bfloat16", **arguments)
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    found, expected = read_base(tmp_path / "back" / "base"), read_base(arguments["base"])
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[key], expected[key].bfloat16())


def test_experts_can_be_named(tmp_path):
    arguments = write_original(tmp_path / "in", experts=3, layers=1)
    convert_checkpoint(output=tmp_path / "out", expert_names=["a", "b", "c"], **arguments)
    assert AutoModel.from_pretrained(tmp_path / "out").config.text_config.expert_names == ["a", "b", "c"]


def test_without_a_tokenizer_the_command_says_that_there_is_no_processor(tmp_path, capsys):
    arguments = write_original(tmp_path / "in", layers=1)
    command = command_for(arguments, tmp_path / "out")
    assert main(command) == 0
    assert "the processor was not converted" in capsys.readouterr().out
    small_tokenizer().save_pretrained(tmp_path / "words")
    command[2] = str(tmp_path / "with")
    assert main([*command, "--tokenizer", str(tmp_path / "words")]) == 0
    assert "processor" not in capsys.readouterr().out
    assert (tmp_path / "with" / "processor_config.json").is_file()
