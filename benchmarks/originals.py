"""Random checkpoints in the original's formats, of any size: towers and connectors are those of the fixtures."""

import json
import shutil
import string
from pathlib import Path

import torch
from golden import FIXTURES, towers_of
from transformers import LlamaTokenizer


EIGHT_FILES = ("audiocap", "basev", "base", "base1", "base4", "base7", "base", "base7")


def write_original(
    folder: Path,
    variant: str = "speech",
    layers: int = 3,
    experts: int = 4,
    top_k: int = 2,
    rank: int = 4,
    alpha: float = 16,
    shards: int = 1,
    seed: int = 0,
    eight: bool = False,
    every: int | None = None,
    router_lora: bool | None = None,
    llm_seed: int | None = None,
    hidden: int = 64,
    inner: int = 144,
    vocab: int = 320,
    heads: int = 4,
) -> dict:
    """
    Writes `base`, `finetuned` and, for the 8-expert layout, `experts`; gives the arguments of `convert_checkpoint`.

    As in the released ones, the audio variant has experts in every second layer and LoRA on its routers, the speech
    variant experts in all layers, unless told otherwise. Models of one `llm_seed` share everything but experts.
    """
    generator = torch.Generator().manual_seed(seed if llm_seed is None else llm_seed)

    def noise(*shape: int, scale: float = 0.1) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    fixture = FIXTURES / variant
    like_audio = variant == "audio" and not eight
    sparse = range(0, layers, every or (2 if like_audio else 1))
    router_lora = like_audio if router_lora is None else router_lora
    base = {"model.embed_tokens.weight": noise(vocab, hidden, scale=1.0), "lm_head.weight": noise(vocab, hidden)}
    base["model.norm.weight"] = 1 + noise(hidden)
    linears = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(layers) for name in "qkvo"]
    base |= {f"{name}.weight": noise(hidden, hidden) for name in linears}
    for layer in range(layers):
        base[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** (
            -torch.arange(0, hidden // heads, 2).float() / (hidden // heads)
        )
        for name in ("input", "post_attention"):
            base[f"model.layers.{layer}.{name}_layernorm.weight"] = 1 + noise(hidden)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    generator.manual_seed(seed + 1000)
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        names = [f"{mlp}.experts.{expert}" for expert in range(4 if eight else experts)] if layer in sparse else [mlp]
        for name in names:
            base |= {f"{name}.{projection}_proj.weight": noise(*shape) for projection, shape in shapes.items()}
            linears += [f"{name}.{projection}_proj" for projection in shapes]
        if layer in sparse:
            base[f"{mlp}.gate.weight"] = noise(4 if eight else experts, hidden)
            linears += [f"{mlp}.gate"] if router_lora else []
    if eight:
        linears = [name for name in linears if ".mlp." not in name]
    aligner = torch.load(fixture / "finetuned" / "mm_audio_aligner.bin", weights_only=True)
    projector = torch.load(fixture / "finetuned" / "non_lora_trainables.bin", weights_only=True)
    if hidden != 64:
        aligner = {key: _widened(key, value, hidden, generator) for key, value in aligner.items()}
        projector = {key: _widened(key, value, hidden, generator) for key, value in projector.items()}
    base |= {key: torch.zeros_like(value) for key, value in aligner.items()}

    adapter = {}
    for name in linears:
        rows, columns = base[f"{name}.weight"].shape
        adapter[f"base_model.model.{name}.lora_A.weight"] = noise(rank, columns)
        adapter[f"base_model.model.{name}.lora_B.weight"] = noise(rows, rank)
    gates = {key: noise(*value.shape) for key, value in base.items() if key.endswith(".mlp.gate.weight")}
    if router_lora:
        for key in [key for key in adapter if ".mlp.gate.lora" in key]:
            raw = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            gates[raw] = adapter[key].clone()

    for name in ("base", "finetuned"):
        (folder / name).mkdir(parents=True)
    config = json.loads((fixture / "base" / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    arguments = {"base": folder / "base", "finetuned": folder / "finetuned", **towers_of(variant)}
    if eight:
        config |= {"lora_r": rank, "lora_alpha": alpha, "moe_type": "dense", "model_type": "llava_llama"}
        gates = {
            f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg.weight": noise(experts, hidden) for layer in range(layers)
        }
        (folder / "experts").mkdir()
        for name in set(EIGHT_FILES):
            tensors = {
                f"model.layers.{layer}.mlp.{projection}_proj.weight": noise(*shape)
                for layer in range(layers)
                for projection, shape in shapes.items()
            }
            torch.save(tensors, folder / "experts" / f"mlp_{name}.bin")
        for expert in range(experts):
            tensors = {}
            for layer in range(layers):
                stem = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.0"
                for projection, (rows, columns) in shapes.items():
                    tensors[f"{stem}.{projection}_proj_lora_A.weight"] = noise(rank, columns)
                    tensors[f"{stem}.{projection}_proj_lora_B.weight"] = noise(rows, rank)
            torch.save(tensors, folder / "finetuned" / f"{expert}_mlp_experts.bin")
        arguments["experts"] = folder / "experts"
    for name in ("base", "finetuned"):
        (folder / name / "config.json").write_text(json.dumps(config))
    save_base(base, folder / "base", shards)
    for name, tensors in (
        ("adapter_model", adapter),
        ("mm_audio_aligner", aligner),
        ("non_lora_trainables", projector),
        ("mlp_gates", gates),
    ):
        torch.save(tensors, folder / "finetuned" / f"{name}.bin")
    settings = json.loads((fixture / "finetuned" / "adapter_config.json").read_text())
    settings |= {"r": rank, "lora_alpha": alpha, "target_modules": linears}
    (folder / "finetuned" / "adapter_config.json").write_text(json.dumps(settings))
    return arguments


def _widened(key: str, value: torch.Tensor, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """A projector's tensor for an LLM of another width."""
    if "projector" not in key:
        return value
    shape = [hidden if size == 64 else size for size in value.shape]
    return torch.randn(shape, generator=generator) * 0.1


def save_base(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """One file, or shards with an index as the library writes it."""
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = list(tensors)
    where = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        torch.save({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def small_tokenizer() -> LlamaTokenizer:
    """Bytes and letters, fewer than the fixtures' embeddings have rows."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[], unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def copy_fixture(variant: str, folder: Path) -> dict:
    """The fixture's checkpoint where it may be damaged; gives the arguments of `convert_checkpoint`."""
    shutil.copytree(FIXTURES / variant, folder)
    arguments = {"base": folder / "base", "finetuned": folder / "finetuned"}
    return arguments | {name: folder / path.name for name, path in towers_of(variant).items()}


def read(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a pickle."""
    return torch.load(file, weights_only=True)
