"""Growing experts from adapters, and writing them as adapters again."""

import json

import pytest
import torch
from families import only
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import DENSE, tiny_config, tiny_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from uni_moe_hf import UniMoEForConditionalGeneration
from uni_moe_hf.hub.configuration_uni_moe import is_sparse
from uni_moe_hf.mixtures.expert_adapters import export_expert
from uni_moe_hf.mixtures.growing import grow_experts
from uni_moe_hf.training.stages import prepare_stage


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same module with every trainable tensor moved, so that adapters differ from what they start as."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def train_expert(folder, modality: str, seed: int, **lora) -> tuple[str, torch.Tensor]:
    """Saves a random stage-2 adapter; returns its folder and the logits of the dense model that carries it."""
    model = tiny_model(DENSE)
    wrapped = randomised(get_peft_model(model, prepare_stage(model, "experts", [modality], **lora)), seed).eval()
    wrapped.save_pretrained(folder)
    return str(folder), wrapped(input_ids=text_ids()).logits.detach()


def text_ids() -> torch.Tensor:
    return torch.arange(2, 42).reshape(2, 20)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two adapters on one dense model, of different modalities and ranks, with the logits of each."""
    root = tmp_path_factory.mktemp("experts")
    return {
        "image": train_expert(root / "image", "image", 1, r=8, lora_alpha=16),
        "speech": train_expert(root / "speech", "speech", 2, r=16, lora_alpha=8),
    }


@pytest.mark.parametrize("name", ["image", "speech"])
def test_each_adapter_becomes_an_expert_without_loss(experts, name):
    model = grow_experts(tiny_model(DENSE), {"text": None, **{key: folder for key, (folder, _) in experts.items()}})
    model = only(model.eval(), ["text", "image", "speech"].index(name))
    torch.testing.assert_close(model(input_ids=text_ids()).logits, experts[name][1], atol=1e-4, rtol=1e-4)


def test_an_expert_without_adapter_is_the_plain_network(experts):
    plain = tiny_model(DENSE)(input_ids=text_ids()).logits
    model = grow_experts(tiny_model(DENSE), {"text": None, "image": experts["image"][0]}).eval()
    torch.testing.assert_close(only(model, 0)(input_ids=text_ids()).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["image", "speech"])
def test_own_bases_hold_the_merged_adapter_and_a_fresh_lora(experts, name):
    folders = {key: folder for key, (folder, _) in experts.items()}
    model = grow_experts(tiny_model(DENSE), folders, shared_base=False, lora_rank=8).eval()
    assert model.config.text_config.expert_lora_rank == 8
    assert all(not experts_.lora.gate_up_b.any() for experts_ in model._experts())
    model = only(model, list(folders).index(name))
    torch.testing.assert_close(model(input_ids=text_ids()).logits, experts[name][1], atol=1e-4, rtol=1e-4)


def test_a_grown_model_is_saved_and_loaded(experts, tmp_path):
    model = grow_experts(tiny_model(DENSE), {"text": None, "image": experts["image"][0]}).eval()
    model.save_pretrained(tmp_path)
    loaded = UniMoEForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.text_config.expert_names == ["text", "image"]
    assert torch.equal(loaded(input_ids=text_ids()).logits, model(input_ids=text_ids()).logits)


def test_growing_only_even_layers_keeps_the_others_dense(experts):
    model = grow_experts(tiny_model(DENSE), {"text": None, "image": experts["image"][0]}, layers="even")
    assert model.config.text_config.mlp_layer_types == ["sparse", "dense"]
    assert hasattr(model.model.language_model.layers[1].mlp, "gate_proj")


def test_growing_brings_the_trained_projectors(experts):
    model = grow_experts(tiny_model(DENSE), {key: folder for key, (folder, _) in experts.items()})
    for modality, connector in (("image", "vision"), ("speech", "speech")):
        tensors = load_file(f"{experts[modality][0]}/adapter_model.safetensors")
        kept = {k[k.index(f"{connector}_connector") :]: v for k, v in tensors.items() if "projector" in k}
        own = model.model.state_dict()
        assert kept
        assert all(torch.equal(own[name], tensor) for name, tensor in kept.items())


def test_experts_that_disagree_about_a_projector_need_a_choice(experts, tmp_path):
    other, _ = train_expert(tmp_path, "speech", 5, r=8)
    folders = {"speech": experts["speech"][0], "long": other}
    model = tiny_model(DENSE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'speech', 'long'.*different projectors for speech"):
        grow_experts(model, folders)
    assert not is_sparse(model.config.text_config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    grown = grow_experts(model, folders, projectors={"speech": "long"})
    key = "base_model.model.model.speech_connector.projector.weight"
    chosen = load_file(f"{other}/adapter_model.safetensors")[key]
    assert torch.equal(grown.model.speech_connector.projector.weight, chosen)


@pytest.mark.parametrize(
    ("projectors", "message"),
    [
        ({"speech": "image"}, "to 'image', whose adapter trained none for speech"),
        ({"image": "image", "video": "other"}, "maps vision to both"),
        ({"smell": "image"}, "maps 'smell'"),
    ],
)
def test_projectors_that_cannot_be_chosen_are_refused(experts, projectors, message, tmp_path):
    folders = {name: folder for name, (folder, _) in experts.items()}
    folders["other"] = train_expert(tmp_path / "other", "image", 5)[0]
    with pytest.raises(ValueError, match=message):
        grow_experts(tiny_model(DENSE), folders, projectors=projectors)


def test_an_export_that_is_cut_short_is_no_adapter_and_old_projectors_do_not_stay(experts, tmp_path, monkeypatch):
    out = export_expert(experts["image"][0], tmp_path / "out")
    model = grow_experts(tiny_model(DENSE), {"text": None, "speech": experts["speech"][0]})
    export_expert(model, out, "speech")
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    def full(tensors, file, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("uni_moe_hf.mixtures.expert_adapters.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_expert(experts["image"][0], out)
    assert not (out / "adapter_config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is a file; give a folder"):
        export_expert(experts["image"][0], tmp_path / "file")


def test_what_experts_cannot_grow_from_is_refused_and_stays_as_it_was(experts, tmp_path):
    folders = {name: folder for name, (folder, _) in experts.items()}
    finished = tiny_model(DENSE, stage="experts")
    with pytest.raises(ValueError, match="already hold an expert; grow from what stage 1 left"):
        grow_experts(finished, folders)
    with torch.device("meta"):
        empty = UniMoEForConditionalGeneration(tiny_config(DENSE))
    with pytest.raises(ValueError, match="offloaded or empty"):
        grow_experts(empty, folders)
    model = tiny_model(DENSE)
    with pytest.raises(ValueError, match="merge or unload its adapter first"):
        grow_experts(get_peft_model(tiny_model(DENSE), LoraConfig(target_modules=["q_proj"])), folders)
    for wrong in ({"lora_dropout": 1.5}, {"layers": []}, {"layers": ["0"]}, {"num_experts_per_tok": 3}):
        with pytest.raises((ValueError, StrictDataclassError)):
            grow_experts(model, folders, **wrong)
    assert not is_sparse(model.config.text_config) and not any("gate.weight" in name for name in model.state_dict())


def test_a_model_of_the_checkpoints_own_code_is_refused(tmp_path):
    class UniMoEForConditionalGeneration(torch.nn.Module):
        """As `trust_remote_code` makes it, where the package was not imported before."""

    with pytest.raises(ValueError, match="code that came with its checkpoint; load it with"):
        grow_experts(UniMoEForConditionalGeneration(), {"text": None, "other": None})


def test_experts_of_a_half_precision_model_keep_their_adapters_precision(experts):
    folders = {name: folder for name, (folder, _) in experts.items()}
    model = grow_experts(tiny_model(DENSE).to(torch.bfloat16), folders)
    for block in (layer.mlp for layer in model.model.language_model.layers):
        assert block.gate.weight.dtype == block.experts.lora.gate_up_a.dtype == torch.float32
        assert block.experts.base.gate_proj.weight.dtype == torch.bfloat16
    tensors = load_file(f"{folders['speech']}/adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    assert torch.equal(model.model.language_model.layers[0].mlp.experts.lora.down_a[1], tensors[key])


def test_an_exported_expert_is_a_plain_adapter_of_the_plain_llm(experts, tmp_path, recwarn):
    folder = export_expert(experts["image"][0], tmp_path / "expert")
    dense = tiny_model(DENSE)
    text = {
        k: v
        for k, v in dense.config.text_config.to_dict().items()
        if k in LlamaConfig().to_dict() and k != "model_type"
    }
    llama = LlamaForCausalLM(LlamaConfig(**text)).eval()
    llama.model.load_state_dict(dense.model.language_model.state_dict())
    llama.lm_head.load_state_dict(dense.lm_head.state_dict())
    wrapped = PeftModel.from_pretrained(llama, folder)
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message).lower()]
    torch.testing.assert_close(wrapped(input_ids=text_ids()).logits, experts["image"][1], atol=1e-5, rtol=1e-5)
    assert set(load_file(folder / "projector.safetensors")) == {
        f"vision_connector.projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }


def test_growing_from_exported_experts_equals_growing_from_checkpoints(experts, tmp_path):
    exported = {key: export_expert(folder, tmp_path / key) for key, (folder, _) in experts.items()}
    torch.manual_seed(0)
    first = grow_experts(tiny_model(DENSE), {key: folder for key, (folder, _) in experts.items()}).state_dict()
    torch.manual_seed(0)
    second = grow_experts(tiny_model(DENSE), exported).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_sparse_model_cannot_grow_again(experts):
    with pytest.raises(ValueError, match="already has 4 experts in 2 layers"):
        grow_experts(tiny_model(), {"image": experts["image"][0]})


def test_adapters_that_do_not_fit_are_refused(experts, tmp_path):
    source = experts["image"][0]
    config = json.loads(open(f"{source}/adapter_config.json").read())
    tensors = load_file(f"{source}/adapter_model.safetensors")

    def written(name: str, config: dict, tensors: dict) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        return str(tmp_path / name)

    missing = {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.up_proj.lora_A" not in key}
    wide = {key: torch.nn.functional.pad(t, (0, 1)) if "lora_A" in key else t for key, t in tensors.items()}
    alien = tensors | {"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}
    cases = {
        "missing": (config, missing, r"layer 1 `up_proj` is missing"),
        "wide": (config, wide, r"\(8, 33\).*expected \(8, 32\)|expected \(8, 32\)"),
        "alien": (config, alien, "neither MLP LoRA nor a projector"),
        "dora": (config | {"use_dora": True}, tensors, "use_dora"),
        "pissa": (config | {"init_lora_weights": "pissa"}, tensors, "init_lora_weights='pissa'"),
        "patterns": (config | {"alpha_pattern": {"layers.0.mlp.gate_proj": 64}}, tensors, "alpha_pattern"),
        "silent": (config | {"lora_alpha": 0}, tensors, "`r` and `lora_alpha` above 0"),
        "no rank": ({k: v for k, v in config.items() if k != "r"}, tensors, "`r` and `lora_alpha` above 0"),
    }
    for name, (settings, weights, message) in cases.items():
        folder, model = written(name, settings, weights), tiny_model(DENSE)
        with pytest.raises(ValueError, match=message):
            grow_experts(model, {"image": folder}, num_experts_per_tok=1)
        assert not is_sparse(model.config.text_config)
        if name in ("alien", "dora", "pissa", "patterns", "silent"):
            with pytest.raises(ValueError, match=message):
                export_expert(folder, tmp_path / f"{name} out")
            assert not (tmp_path / f"{name} out").exists()
    for file, content in (("adapter_config.json", b"{"), ("adapter_model.safetensors", b"cut")):
        folder = written(f"torn {file}", config, tensors)
        (tmp_path / f"torn {file}" / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}' cannot be read"):
            grow_experts(tiny_model(DENSE), {"image": folder}, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="adapter_config.json"):
        grow_experts(tiny_model(DENSE), {"image": tmp_path / "nowhere"})


def test_an_adapter_of_a_plain_llama_from_peft_can_become_an_expert(tmp_path):
    dense = tiny_model(DENSE)
    text = {
        k: v
        for k, v in dense.config.text_config.to_dict().items()
        if k in LlamaConfig().to_dict() and k != "model_type"
    }
    llama = LlamaForCausalLM(LlamaConfig(**text)).eval()
    llama.model.load_state_dict(dense.model.language_model.state_dict())
    llama.lm_head.load_state_dict(dense.lm_head.state_dict())
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["gate_proj", "up_proj", "down_proj"], use_rslora=True)
    wrapped = randomised(get_peft_model(llama, config), 3).eval()
    wrapped.save_pretrained(tmp_path)
    model = grow_experts(dense, {"text": None, "news": tmp_path}).eval()
    logits = only(model, 1)(input_ids=text_ids()).logits
    torch.testing.assert_close(logits, wrapped(input_ids=text_ids()).logits, atol=1e-4, rtol=1e-4)
