"""vLLM itself serves checkpoints: `make test-vllm` runs these in an environment of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TESTS, film, picture, tiny_model, tiny_processor, tone, user

from uni_moe_hf import UniMoEForConditionalGeneration


pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")

CHILD = TESTS / "serving" / "vllm_child.py"
# Heads of a size that vLLM's attention on CPUs has; a table whose length is a multiple of 64 has no room behind it.
TEXT = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
TEXT |= {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096}
LORA = {"expert_lora_rank": 4}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Files as people have them: a turned photograph, transparency, stereo at 22 kHz, a video."""
    import av

    root = tmp_path_factory.mktemp("media")
    for index in range(3):
        Image.fromarray(picture(index)).save(root / f"{index}.png")
    turned = Image.fromarray(picture(3, (24, 40)))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "turned.jpg", exif=exif)
    glass = np.concatenate([picture(4), picture(5)[..., :1]], axis=-1)
    Image.fromarray(glass).save(root / "glass.png")
    for name, seconds, pitch in (
        ("short", 0.4, 300),
        ("long", 3.3, 500),
        ("longer", 70, 440),
        ("ten minutes", 600, 440),
    ):
        soundfile.write(root / f"{name}.wav", tone(seconds, pitch), 16000)
    soundfile.write(root / "stereo.wav", np.stack([tone(1.2, 350, 22050), tone(1.2, 700, 22050)], 1), 22050)
    with av.open(str(root / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in film(7, 45):
            pixels = np.kron(frame[:16, :16], np.ones((2, 2, 1), np.uint8))
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return root


def conversations(root: Path, modalities: tuple[str, ...] = ("image", "video", "audio", "speech")) -> list[list[dict]]:
    """Every kind of question, of what a model takes."""

    def clip(kind: str, name: str) -> dict:
        return {"type": kind, "path": str(root / name)}

    image, photo, glass = clip("image", "0.png"), clip("image", "turned.jpg"), clip("image", "glass.png")
    video = clip("video", "film.mp4")
    sounds = {ear: [clip(ear, f"{name}.wav") for name in ("short", "long", "stereo")] for ear in ("audio", "speech")}
    short, long, stereo = sounds["audio"]
    asked, told, said = sounds["speech"]
    asks = [
        ("what is this",),
        (image, "what is this"),
        (photo, "what"),
        (glass, "what"),
        (video, "what"),
        (short, "what"),
        (stereo,),
        (long, "a"),
        (asked, "what"),
        (told,),
        (said, "what"),
        (image, asked),
        (photo, short, "what"),
        (video, long),
        (short, long, "is it"),
        ("a", image, "b", glass, "what"),
        (told, short, asked, "what"),
        (image, video, "b", short, told, "what"),
        (image, "is <image> or </s> a bird <audio>"),
    ]
    kinds = {"text", *modalities}
    chats = [user(*parts) for parts in asks if all(isinstance(p, str) or p["type"] in kinds for p in parts)]
    return [*chats, [*user("what is this"), {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}]
            + user("is it red")]  # fmt: skip


def saved(folder: Path, text: dict | None = None, merged: bool = False, **settings) -> Path:
    """A random checkpoint."""
    model = tiny_model({**TEXT, **LORA, **(text or {})}, **settings)
    if merged:
        model.merge_expert_lora()
    model.save_pretrained(folder)
    processor = tiny_processor(model.config)
    processor.feature_extractor.max_audio_windows = 600
    processor.save_pretrained(folder)
    return folder


def run(tmp_path: Path, folder: Path, seconds: int = 300, plugin: bool = True, **task) -> dict:
    """A task's result; a step that fails can spin for ever, so there is a limit."""
    task_file, result_file = tmp_path / "task.json", tmp_path / "result.json"
    task_file.write_text(json.dumps({"folder": str(folder), "asks": ["batch"], **task}))
    # Two processes on one CPU must be told where to run.
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent) if plugin else "", "VLLM_CPU_OMP_THREADS_BIND": "0|0"}
    if task.get("options", {}).get("tensor_parallel_size") is None:
        del environment["VLLM_CPU_OMP_THREADS_BIND"]
    if not plugin:
        environment |= {"VLLM_PLUGINS": "none", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(
        [sys.executable, str(CHILD), str(task_file), str(result_file)],
        env=environment, cwd=tmp_path, timeout=seconds, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(result_file.read_text())


def differing(result: dict, name: str = "batch") -> list[int]:
    """Which conversations got other words than `generate`'s."""
    assert len(result["wanted"]) == len(result[name]) > 0
    return [index for index, pair in enumerate(zip(result["wanted"], result[name], strict=True)) if pair[0] != pair[1]]


def test_all_that_a_checkpoint_takes_is_answered_as_by_generate(tmp_path, media):
    folder = saved(tmp_path / "model", {"shared_expert_base": True})
    lengths = [(ear, length) for ear in ("audio", "speech") for length in ("longer", "ten minutes")]
    long = [user({"type": ear, "path": str(media / f"{length}.wav")}, "what") for ear, length in lengths]
    chats = [*conversations(media), *long]
    broken = media / "broken.wav"
    broken.write_bytes(b"RIFF nothing")
    (media / "tale.txt").write_text("no picture")
    bad = [
        user({"type": "audio", "path": str(broken)}),
        user({"type": "image", "path": str(media / "tale.txt")}),
        [*user("what"), {"role": "assistant", "content": [{"type": "text", "text": "a"}]}, {"role": "judge", "content": [{"type": "text", "text": "a"}]}],  # noqa: E501
    ]  # fmt: skip
    prompts = ["USER: is <image> a <speech> ASSISTANT:", "<audio>"]  # without clips: read as padding
    asks = ["batch", "single", "scores of prompts", "one name, two ears", "counts"]
    # Prompts are read in pieces, and what was read once is kept.
    options = {"max_num_batched_tokens": 96, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    options |= {"max_model_len": 3300, "limit_mm_per_prompt": dict.fromkeys(("image", "video", "audio", "speech"), 4)}
    result = run(tmp_path, folder, chats=chats, asks=asks, bad=bad, prompts=prompts, options=options)
    assert "refused" not in result, result["refused"]
    assert differing(result) == [] and differing(result, "single") == []
    assert [answer[:2] for answer in result["wanted"]] == result["scores"]
    assert all(refusal is not None for refusal in result["refusals"]), result["refusals"]
    assert result["prompts"] == [2, 2]
    assert result["ears"][0] == result["ears"][2] != result["ears"][1]
    assert all("placeholder" in sentence for sentence in result["counts"]), result["counts"]


def test_a_checkpoint_that_lacks_experts_is_refused(tmp_path):
    folder = saved(tmp_path / "model", {}, merged=True)
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.experts.down_proj"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = run(tmp_path, folder)
    assert "lacks the experts' weights ['layers.1.mlp.experts.down_proj']" in result["refused"]


FUSED, AS_THEY_ARE = ({"additional_config": {"fuse_experts": choice}} for choice in (True, False))
GEMMA = {"model_type": "gemma2", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# A cap of attention that is not felt: vLLM obeys it, `sdpa` of the releases that vLLM works with does not.
GEMMA |= {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 16}
GRANITE = {"model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}

# What a checkpoint can be -> its decoder, how it is saved, options of the engine.
CHECKPOINTS = {
    "experts with bases of their own": ({}, {}, {}),
    "the same, as they are": ({}, {}, AS_THEY_ARE),
    "a shared base, fused": ({"shared_expert_base": True}, {}, FUSED),
    "merged experts": ({}, {"merged": True}, {}),
    "merged experts, as they are": ({}, {"merged": True}, AS_THEY_ARE),
    "a dense model": ({"mlp_layer_types": ["dense", "dense"]}, {}, {}),
    "every second layer sparse": ({"mlp_layer_types": ["dense", "sparse"], "shared_expert_base": True}, {}, {}),
    "speech alone": ({}, {"without": ("vision", "audio")}, {}),
    "vision alone": ({}, {"without": ("speech", "audio")}, {}),
    "sound alone": ({}, {"without": ("speech", "vision")}, {}),
    "speech cut to its length": ({}, {"cut_speech_windows": True}, {}),
    "every frame of a video": ({}, {"video_pooling": "none"}, {}),
    "Qwen3": ({"model_type": "qwen3", "tie_word_embeddings": True}, {}, {}),
    "Gemma 2": (GEMMA, {}, {}),
    "Gemma 2, a shared base": ({**GEMMA, "shared_expert_base": True}, {}, {}),
    "Phi-3": ({"model_type": "phi3", "shared_expert_base": True}, {}, {}),
    "Granite": (GRANITE, {}, {}),
    "Command R": ({"model_type": "cohere", "logit_scale": 0.0625, "use_qk_norm": True}, {}, {}),
}


WAYS = {
    "compiled": {"enforce_eager": False},
    "in bfloat16": {"dtype": "bfloat16"},
    "over two processes": {"tensor_parallel_size": 2},
    "fused over two processes": {"tensor_parallel_size": 2, **FUSED},
}


@pytest.mark.parametrize("way", WAYS)
def test_however_the_engine_runs_words_are_the_same(way, tmp_path, media):
    folder = saved(tmp_path / "model", {"shared_expert_base": True, "num_key_value_heads": 2})
    result = run(tmp_path, folder, chats=conversations(media), options=WAYS[way])
    assert "refused" not in result, result["refused"]
    if way == "in bfloat16":  # rounding moves later words of a random model, which is sure of none
        assert [answer[0] for answer in result["wanted"]] == [answer[0] for answer in result["batch"]]
    else:
        assert differing(result) == []


def test_an_adapter_of_attention_is_served_as_the_model_that_holds_it(tmp_path, media):
    folder, rank = saved(tmp_path / "model", {"shared_expert_base": True}), 4
    model = UniMoEForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(1)
    factors = {}
    for name, layer in model.named_modules():
        if "language_model" in name and name.endswith(("q_proj", "v_proj")):
            down, up = torch.randn(rank, layer.in_features), 0.2 * torch.randn(layer.out_features, rank)
            layer.weight.data += 2.0 * up @ down
            factors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    settings |= {"target_modules": ["q_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, adapter / "adapter_model.safetensors")
    model.save_pretrained(tmp_path / "whole")
    tiny_processor(model.config).save_pretrained(tmp_path / "whole")
    chats = conversations(media)[:14]
    whole = run(tmp_path, tmp_path / "whole", chats=chats)
    options = {"enable_lora": True, "max_lora_rank": 8}
    result = run(tmp_path, folder, chats=chats, adapter=str(adapter), options=options)
    assert differing(whole) == []
    assert result["batch"] == whole["batch"] and result["batch"] != result["wanted"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_whatever_a_checkpoint_is_it_is_served_as_by_generate(name, tmp_path, media):
    text, settings, options = CHECKPOINTS[name]
    folder = saved(tmp_path / "model", text, **settings)
    modalities = tiny_modalities(settings.get("without", ()))
    result = run(tmp_path, folder, chats=conversations(media, modalities), options=options)
    assert "refused" not in result, result["refused"]
    assert differing(result) == []


def tiny_modalities(without: tuple[str, ...]) -> tuple[str, ...]:
    """What a model takes that lacks towers."""
    towers = {"image": "vision", "video": "vision", "audio": "audio", "speech": "speech"}
    return tuple(modality for modality, tower in towers.items() if tower not in without)


@pytest.mark.parametrize("merged", [False, True])
def test_a_folder_alone_is_served_right_or_refused(merged, tmp_path, media):
    """By vLLM without the plug-in: pictures, videos, text, and sound by the ear that hears plain `audio`."""
    folder = saved(tmp_path / "model", {"shared_expert_base": True}, merged=merged)
    # vLLM resamples sound with torchaudio, which this environment lacks.
    unheard = [{"type": "speech"}, {"path": str(media / "stereo.wav")}]
    heard = [
        chat
        for chat in conversations(media)
        if not any(lacks.items() <= part.items() for lacks in unheard for part in chat[0]["content"])
    ]
    speech = user({"type": "speech", "path": str(media / "short.wav")}, "what")
    prompts = ["USER: is <image> a <speech> ASSISTANT:", "<audio>"]
    task = {"chats": heard, "asks": ["batch", "single"], "bad": [speech], "prompts": prompts}
    task["options"] = {"media_io_kwargs": {"video": {"num_frames": -1}}}  # else it hands over 32 of them
    result = run(tmp_path, folder, plugin=False, **task)
    assert "refused" not in result, result["refused"]
    assert differing(result) == [] and differing(result, "single") == []
    assert result["prompts"] == [2, 2] and all(result["refusals"])


@pytest.mark.parametrize(
    "text, settings, sentence",
    [
        ({}, {}, "would leave out the LoRA"),
        ({**GEMMA, "expert_lora_rank": 0}, {}, "would compute experts with SiLU"),
        ({**GRANITE, "shared_expert_base": True}, {}, "would not scale the logits by `logits_scaling`"),
    ],
)
def test_what_vllm_alone_would_compute_wrongly_is_refused(text, settings, sentence, tmp_path):
    folder = saved(tmp_path / "model", text, **settings)
    result = run(tmp_path, folder, plugin=False)
    assert sentence in result["refused"] and "install uni-moe-hf beside vLLM" in result["refused"]
