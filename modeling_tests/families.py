"""
Families of LLMs, tiny and random, and what each must prove as a decoder: used by tests and by
`benchmarks/bench_families.py`.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import child_environment, film, make_inputs, picture, tiny_config, tiny_processor, tiny_tokenizer, tone
from tiny_parts import parts
from tiny_training import make_trainer, write_media
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, StaticCache

from uni_moe_hf import UniMoEForConditionalGeneration, export_expert, from_pretrained_parts, grow_experts
from uni_moe_hf.hub.expert_kernels_uni_moe import is_quantised
from uni_moe_hf.hub.experts_uni_moe import read_feed_forward
from uni_moe_hf.training.stages import prepare_stage


WINDOW = 8  # shorter than every prompt here
SMALL = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 16}  # low, so that it is felt
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32, "rope_theta": 5e5}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 1e4}
LONG_ROPE |= {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128}

# Name -> `model_type` and what is particular to it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Mistral": ("mistral", {"sliding_window": WINDOW}),
    "Ministral": ("ministral", ALTERNATING),
    "Ministral 3": ("ministral3", {}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {**ALTERNATING, **CAPPED, "attn_logit_softcapping": 1.0}),
    "Gemma 3": ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 16}),
    "Phi-3": ("phi3", {"sliding_window": WINDOW}),
    "Phi-4-mini": ("phi3", {"tie_word_embeddings": True, "rope_parameters": LONG_ROPE}),
    "OLMo": ("olmo", {"clip_qkv": 8.0}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", ALTERNATING),
    "Granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
    ),
    "GLM": ("glm", {}),
    "GLM-4": ("glm4", {}),
    "EXAONE 4": ("exaone4", ALTERNATING),
    "Command R": ("cohere", {"logit_scale": 0.0625, "use_qk_norm": True}),
    "Command R7B": ("cohere2", {**ALTERNATING, "logit_scale": 0.25}),
    "Seed-OSS": ("seed_oss", {}),
    "Helium": ("helium", {}),
    "StableLM": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Hunyuan": ("hunyuan_v1_dense", {}),
}
# One of each trait: SiLU, windows and SiLU, GELU with soft-capping, GELU with scaled embeddings, fused, multipliers.
REPRESENTATIVES = ("Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3", "Granite")


def plain_llm(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random LLM of the family, in evaluation mode."""
    kind, particular = FAMILIES[name]
    config = AutoConfig.for_model(kind, **{**SMALL, **particular})
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)  # the default leaves tiny models nearly blind to their inputs
            elif parameter.abs().sum() == 0 or (parameter == 1).all():
                parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases
    return in_dtype(llm, dtype)


def in_dtype(llm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As loaded from a file: rotary frequencies stay in float32."""
    if dtype == torch.float32:
        return llm
    made = type(llm)._from_config(copy.deepcopy(llm.config), dtype=dtype).eval()
    made.load_state_dict(llm.state_dict())
    return made


def composed(llm: nn.Module, **changes) -> UniMoEForConditionalGeneration:
    """The LLM with tiny random towers."""
    towers = tiny_config()
    torch.manual_seed(1)
    given = {**parts(), **changes, "language_model": llm}
    queries = {"num_speech_query_tokens": 3, "num_audio_query_tokens": 5}
    model = from_pretrained_parts(**given, **queries).eval()
    assert towers.modalities == model.config.modalities
    return model


def grown(model: UniMoEForConditionalGeneration, shared: bool = True, **settings) -> UniMoEForConditionalGeneration:
    """A mixture of three experts that differ, from the dense model."""
    model = grow_experts(copy.deepcopy(model), dict.fromkeys("abc"), shared_base=shared, **settings).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for experts in model._experts():
            experts.lora.gate_up_b.normal_(std=0.1)
            experts.lora.down_b.normal_(std=0.1)
    return model


def words(rows: int = 2, length: int = 20) -> torch.Tensor:
    """Ids of text, longer than every window here."""
    return torch.arange(3, 3 + rows * length).reshape(rows, length)


def only(model: UniMoEForConditionalGeneration, expert: int) -> UniMoEForConditionalGeneration:
    """The model with every token routed to one expert alone."""
    for module in model.modules():
        if type(module).__name__ == "UniMoETopKRouter":
            count = model.config.text_config.num_experts
            logits = torch.full((count,), -1e4)
            logits[expert] = 1e4
            module.forward = lambda rows, logits=logits, count=count: (
                logits.expand(len(rows), -1),
                torch.tensor([[1.0, 0.0]]).expand(len(rows), -1),
                torch.tensor([[expert, (expert + 1) % count]]).expand(len(rows), -1),
            )
    return model


def adapter_of(llm: nn.Module, folder: Path, seed: int = 3) -> torch.Tensor:
    """Saves random LoRA on the feed-forward layers of the plain LLM; its logits with it."""
    names = list(read_feed_forward(llm.get_decoder().layers[0].mlp).projections)
    wrapped = get_peft_model(copy.deepcopy(llm), LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped(input_ids=words()).logits


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value above 1."""
    assert found.shape == expected.shape and expected.isfinite().all()
    return ((found.float() - expected.float()).abs().max() / expected.abs().max().clamp(min=1)).item()


# What is checked. Each takes the family's name and an empty folder, and returns what was seen.


@torch.no_grad()
def check_logits(name: str, folder: Path) -> str:
    """Text alone gives the plain LLM's logits bit for bit, in float32 and bfloat16, padded rows included."""
    for dtype in (torch.float32, torch.bfloat16):
        llm = plain_llm(name, dtype)
        model = composed(llm)
        ids, mask = words(), torch.ones(2, 20, dtype=torch.long)
        mask[1, :6] = 0
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            found, expected = model(**inputs).logits, llm(**inputs).logits
            kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            assert found.dtype == dtype and torch.equal(found[kept], expected[kept]), (dtype, gap(found, expected))
    return "equal"


@torch.no_grad()
def check_caches(name: str, folder: Path) -> str:
    """Greedy words are the plain LLM's with every cache; a mixture's are those of running all of it at every step."""
    llm = plain_llm(name)
    model = composed(llm)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings["attention_mask"] = torch.ones(2, 20, dtype=torch.long)
    caches: dict[str, Callable[[Any], dict[str, Any]]] = {
        "none": lambda config: {"use_cache": False},
        "dynamic": lambda config: {"past_key_values": DynamicCache(config=config)},
        "static": lambda config: {"cache_implementation": "static"},
        "static made before": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=40)},
        "offloaded": lambda config: {"cache_implementation": "offloaded"},
    }
    sparse = grown(model)
    wanted, of_mixture = llm.generate(words(), **settings), sparse.generate(words(), **settings, use_cache=False)
    for cache, make in caches.items():
        if cache != "offloaded" or torch.cuda.is_available():
            config = model.config.get_text_config()
            assert torch.equal(model.generate(words(), **settings, **make(config)), wanted), cache
            assert torch.equal(sparse.generate(words(), **settings, **make(config)), of_mixture), f"mixture, {cache}"
    return "equal"


@torch.no_grad()
def check_adapters(name: str, folder: Path) -> str:
    """Growing and routing to one is PEFT on the plain LLM; an exported expert is an adapter of the plain LLM again."""
    llm = plain_llm(name)
    expected = adapter_of(llm, folder / "adapter")
    dense = composed(llm)
    model = grow_experts(copy.deepcopy(dense), {"plain": None, "news": folder / "adapter"}).eval()
    seen = [gap(only(copy.deepcopy(model), 1)(input_ids=words()).logits, expected)]
    seen.append(gap(only(copy.deepcopy(model), 0)(input_ids=words()).logits, llm(input_ids=words()).logits))
    own = grow_experts(copy.deepcopy(dense), {"plain": None, "news": folder / "adapter"}, shared_base=False).eval()
    seen.append(gap(only(own, 1)(input_ids=words()).logits, expected))
    # Also after training, when gate and up have LoRA of their own.
    trained = copy.deepcopy(model)
    for experts in trained._experts():
        experts.lora.gate_up_a.add_(0.05 * torch.randn_like(experts.lora.gate_up_a))
    for number, source in enumerate((model, trained)):
        export_expert(source, folder / f"export{number}", "news")
        plain = PeftModel.from_pretrained(copy.deepcopy(llm), folder / f"export{number}")
        report = plain.load_adapter(folder / f"export{number}", adapter_name="again")
        assert not [key for key in report.missing_keys if "lora_" in key] and not report.unexpected_keys
        wanted = only(copy.deepcopy(source), 1)(input_ids=words()).logits
        seen.append(gap(plain.eval()(input_ids=words()).logits, wanted))
        regrown = grow_experts(copy.deepcopy(dense), {"x": None, "y": folder / f"export{number}"}).eval()
        seen.append(gap(only(regrown, 1)(input_ids=words()).logits, wanted))
    assert max(seen) <= 1e-5, seen
    return f"{max(seen):.0e}"


CHILD = """
import json, sys, torch
from transformers import AutoModel
results = {}
for folder in sys.argv[2:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = torch.load(f"{folder}/inputs.pt")
    with torch.no_grad():
        logits = model(**inputs["inputs"], output_router_logits=True)
        again = model.generate(**inputs["inputs"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model.save_pretrained(f"{folder}/again")
    second = AutoModel.from_pretrained(f"{folder}/again", trust_remote_code=True).eval()
    with torch.no_grad():
        logits2 = second(**inputs["inputs"]).logits
    results[folder] = [
        (logits.logits - inputs["logits"]).abs().max().item(),
        (logits2 - logits.logits).abs().max().item(),
        len(logits.router_logits),
        torch.equal(again, inputs["words"]),
    ]
assert "uni_moe_hf" not in sys.modules
json.dump(results, open(sys.argv[1], "w"))
"""


@torch.no_grad()
def check_saved(name: str, folder: Path) -> str:
    """Saved, loaded in a process without this package, saved again: the same logits and words, shared or own bases."""
    folders = []
    for kind in ("shared", "own"):
        model = grown(composed(plain_llm(name)), kind == "shared")
        model.save_pretrained(folder / kind)
        inputs = make_inputs(model.config, ("image", 4, "audio", "speech", 9))
        inputs.pop("mm_token_type_ids", None)
        generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        saved = {"inputs": inputs, "logits": model(**inputs).logits, "words": generated}
        torch.save(saved, folder / kind / "inputs.pt")
        folders.append(str(folder / kind))
    environment = child_environment(HF_MODULES_CACHE=str(folder / "modules"), PYTHONPATH="")
    command = [sys.executable, "-c", CHILD, str(folder / "results.json"), *folders]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    for first, second, recorded, same_words in results.values():
        assert first <= 1e-5 and second == 0 and recorded == 2 and same_words, results
    return f"{max(each[0] for each in results.values()):.0e}"


def check_stages(name: str, folder: Path) -> str:
    """One step of each stage by plain `SFTTrainer`, whose fused head gives our own loss; what is frozen stays."""
    (folder / "media").mkdir()
    media, gaps = write_media(folder / "media"), []
    dense = composed(plain_llm(name))
    for stage in ("connectors", "experts", "moe"):
        model = copy.deepcopy(dense) if stage != "moe" else grown(dense)
        peft_config = prepare_stage(model, stage)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        trainer = make_trainer(media, model, folder / stage, peft_config, max_steps=1, learning_rate=1e-2)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        bare = trainer.model.get_base_model() if peft_config is not None else trainer.model
        trainer.model.eval()
        with torch.no_grad():
            mine = bare(**batch).loss
            fused = bare(**batch, fused_lm_head=True).loss
        gaps.append(abs((mine - fused).item()) / max(1.0, abs(mine.item())))
        trainer.model.train()
        trainer.train()
        after = bare.state_dict()
        moved = [key for key, tensor in before.items() if key in after and not torch.equal(after[key], tensor)]
        assert not [key for key in moved if "_tower." in key or ".self_attn." in key or ".embed_tokens." in key], moved
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert trained and torch.isfinite(torch.stack([p.detach().sum() for p in trained])).all()
        if stage == "connectors":
            assert any("connector" in key for key in moved)
        else:
            second = [p for n, p in trainer.model.named_parameters() if "lora_B" in n and p.requires_grad]
            assert second and any(p.abs().sum() > 0 for p in second)
    assert max(gaps) <= 1e-5, gaps
    return f"{max(gaps):.0e}"


@torch.no_grad()
def check_batches(name: str, folder: Path) -> str:
    """A padded batch of rows with different media equals the rows one by one."""
    model = grown(composed(plain_llm(name)))
    processor = tiny_processor(model.config)
    rows = [
        {"text": "<image> what is it", "images": [picture()]},
        {"text": "hello"},
        {
            "text": "is <speech> it <audio> a bird <image>",
            "speech": [tone(1.5)],
            "audio": [tone()],
            "images": [picture(2)],
        },
        {"text": "<video> red", "videos": [film()]},
    ]
    together: dict[str, Any] = {"text": [row["text"] for row in rows]}
    for kind in ("images", "speech", "audio", "videos"):
        together[kind] = [clip for row in rows for clip in row.get(kind, [])]
    batch = processor(**together, padding=True, return_tensors="pt")
    # As `generate` counts them. Where a norm follows the rotation, as in Hunyuan, more than distances count.
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits
    seen = []
    for index, row in enumerate(rows):
        alone = model(**processor(**row, return_tensors="pt")).logits[0]
        seen.append(gap(logits[index, -len(alone) :], alone))
    assert max(seen) <= 1e-5, seen
    return f"{max(seen):.0e}"


@torch.no_grad()
def check_merging(name: str, folder: Path) -> str:
    """Merged experts compute the same, and unmerged ones are what they were."""
    seen = []
    for shared in (True, False):
        model = grown(composed(plain_llm(name)), shared)
        before, state = model(input_ids=words()).logits, copy.deepcopy(model.state_dict())
        model.merge_expert_lora()
        seen.append(gap(model(input_ids=words()).logits, before))
        model.unmerge_expert_lora()
        after = model.state_dict()
        assert all(gap(after[key], tensor) <= (0 if shared else 1e-6) for key, tensor in state.items())
    assert max(seen) <= 1e-5, seen
    return f"{max(seen):.0e}"


@torch.no_grad()
def check_devices(name: str, folder: Path) -> str:
    """`device_map`, with layers offloaded to memory and to disk."""
    model = grown(composed(plain_llm(name)))
    expected = model(input_ids=words()).logits
    model.save_pretrained(folder / "saved")
    where = {f"model.{part}": "cpu" for part, _ in model.model.named_children() if part != "language_model"}
    decoder = model.model.language_model
    where |= {f"model.language_model.{part}": "cpu" for part, _ in decoder.named_children() if part != "layers"}
    where |= {"model.language_model.layers.0": "cpu", "model.language_model.layers.1": "disk", "lm_head": "cpu"}
    mapped = UniMoEForConditionalGeneration.from_pretrained(
        folder / "saved", device_map=where, offload_folder=folder / "offload"
    )
    seen = [gap(mapped(input_ids=words()).logits, expected)]
    seen.append(gap(cpu_offload(model, torch.device("cpu"))(input_ids=words()).logits, expected))
    assert max(seen) <= 1e-5, seen  # a shared base that must be called takes another route
    split = UniMoEForConditionalGeneration(copy.deepcopy(model.config))
    assert {type(layer).__name__ for layer in split.model.language_model.layers} <= set(split._no_split_modules)
    return f"{max(seen):.0e}"


@torch.no_grad()
def check_quantised(name: str, folder: Path) -> str:
    """8 and 4 bits with a shared base: what is a linear layer of the decoder is quantised, and little is lost."""
    pytest.importorskip("bitsandbytes")
    model = grown(composed(plain_llm(name)))
    expected = model(input_ids=words()).logits
    model.save_pretrained(folder / "saved")
    seen = []
    for bits in ("8bit", "4bit"):
        settings = BitsAndBytesConfig(**{f"load_in_{bits}": True}, bnb_4bit_use_double_quant=True)
        loaded = UniMoEForConditionalGeneration.from_pretrained(folder / "saved", quantization_config=settings)
        names = {n for n, p in loaded.named_parameters() if is_quantised(p)}
        assert sum(".mlp.experts.base." in n for n in names) == 2 * len(read_feed_forward_names(model))
        logits = loaded(input_ids=words()).logits.float()
        seen.append(((logits - expected).norm() / expected.norm()).item())
    assert seen[0] <= 0.1 and seen[1] <= 0.6, seen
    return f"{seen[0]:.2f}, {seen[1]:.2f}"


def read_feed_forward_names(model: UniMoEForConditionalGeneration) -> tuple[str, ...]:
    """Linear layers of a shared base."""
    return read_feed_forward(next(iter(model._experts())).base).projections


CHECKS: Mapping[str, Callable[[str, Path], str]] = {
    "logits, fp32 and bf16": check_logits,
    "words with every cache": check_caches,
    "experts = PEFT, export": check_adapters,
    "saved, no package, saved": check_saved,
    "three stages, fused loss": check_stages,
    "padded mixed batch": check_batches,
    "merge and unmerge": check_merging,
    "device_map": check_devices,
    "8 and 4 bits": check_quantised,
}
