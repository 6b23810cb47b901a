"""Quantised on loading: what stays as it is, what is refused, and that the rest still trains, saves and loads."""

from collections import OrderedDict

import pytest
import torch
from tiny import picture, tiny_model, tiny_processor
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from uni_moe_hf import UniMoEForConditionalGeneration, UniMoEModel, grow_experts
from uni_moe_hf.expert_kernels_uni_moe import _fits_grouped_mm
from uni_moe_hf.quantization_uni_moe import is_quantised
from uni_moe_hf.stages import prepare_stage


WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64
SHARED = {**WIDE, "shared_expert_base": True, "expert_lora_rank": 8}
OWN = {**WIDE, "shared_expert_base": False}
METHODS = ["int8", "4bit", "8bit"]


def quantisation(method: str, **settings):
    if method == "int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2), **settings)
    pytest.importorskip("bitsandbytes")
    settings = {"llm_int8_skip_modules" if k == "modules_to_not_convert" else k: v for k, v in settings.items()}
    # Double quantisation: without it bitsandbytes 0.50 saves wrong scales after inference on a CPU with AVX512-BF16.
    return BitsAndBytesConfig(**{f"load_in_{method}": True}, bnb_4bit_use_double_quant=True, **settings)


def inputs(model):
    return tiny_processor(model.config)(text="<image> what", images=picture(), return_tensors="pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {"shared": SHARED, "own": OWN, "dense": {**WIDE, "mlp_layer_types": ["dense", "dense"]}}
    for name, text in folders.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tiny_model(text).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_only_the_decoders_layers_are_quantised_and_the_rest_has_the_models_dtype(method, dtype, saved):
    model = UniMoEForConditionalGeneration.from_pretrained(
        saved["shared"], dtype=dtype, quantization_config=quantisation(method)
    )
    names = {name for name, parameter in model.named_parameters() if is_quantised(parameter)}
    layers = [f"model.language_model.layers.{index}" for index in range(2)]
    wanted = {f"{layer}.self_attn.{name}_proj.weight" for layer in layers for name in "qkvo"}
    wanted |= {f"{layer}.mlp.experts.base.{name}_proj.weight" for layer in layers for name in ("gate", "up", "down")}
    assert names == wanted
    assert {p.dtype for name, p in model.named_parameters() if name not in names} == {dtype}
    # LoRA of rank 8 alone goes through the grouped product, so the base's one-byte weights do not count.
    assert all(_fits_grouped_mm(e, torch.zeros(1, 64, dtype=dtype)) for e in model._experts())


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_model_saves_and_loads_exactly(method, saved, tmp_path):
    model = UniMoEForConditionalGeneration.from_pretrained(
        saved["shared"], dtype=torch.bfloat16, quantization_config=quantisation(method)
    )
    model.save_pretrained(tmp_path)
    again = UniMoEForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs(again)).logits, model(**inputs(model)).logits, atol=0, rtol=0)
    prepare_stage(again, "moe")


def test_the_model_without_head_keeps_the_same_parts(saved):
    model = UniMoEModel.from_pretrained(saved["shared"], quantization_config=quantisation("int8"))
    assert {name.split(".")[0] for name, p in model.named_parameters() if is_quantised(p)} == {"language_model"}


@pytest.mark.parametrize("method", METHODS)
def test_own_bases_are_not_left_out_without_a_word(method, saved):
    with pytest.raises(ValueError, match="own bases"):
        UniMoEForConditionalGeneration.from_pretrained(saved["own"], quantization_config=quantisation(method))


def test_fp8_does_not_throw_the_experts_lora_away(saved, monkeypatch):
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **kwargs: None)
    for name in ("own", "shared"):
        with pytest.raises(ValueError, match="without LoRA"):
            UniMoEForConditionalGeneration.from_pretrained(saved[name], quantization_config=FineGrainedFP8Config())


@pytest.mark.parametrize("route", ["eager", "grouped_mm", "batched_mm"])
def test_stacks_named_in_a_config_are_quantised_and_every_route_takes_them(route, saved):
    pytest.importorskip("torchao")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    stacks = r"re:model\.language_model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)"
    config = TorchAoConfig(FqnToConfig(OrderedDict({stacks: Int8WeightOnlyConfig(version=2)})))
    model = UniMoEForConditionalGeneration.from_pretrained(saved["own"], quantization_config=config)
    model.set_experts_implementation(route)
    assert all(is_quantised(experts.gate_up_proj) for experts in model._experts())
    plain = UniMoEForConditionalGeneration.from_pretrained(saved["own"], experts_implementation="eager")
    with torch.no_grad():
        for experts, quantised in zip(plain._experts(), model._experts(), strict=True):
            experts.gate_up_proj.copy_(quantised.gate_up_proj.dequantize())
            experts.down_proj.copy_(quantised.down_proj.dequantize())
        torch.testing.assert_close(model(**inputs(model)).logits, plain(**inputs(plain)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_needs_plain_weights_says_so(method, saved):
    def load(name, **settings):
        return UniMoEForConditionalGeneration.from_pretrained(
            saved[name], quantization_config=quantisation(method, **settings)
        )

    with pytest.raises(ValueError, match="cannot be merged"):
        load("shared").merge_expert_lora()
    with pytest.raises(ValueError, match="unquantised"):
        grow_experts(load("dense"), {"a": None, "b": None})
    with pytest.raises(ValueError, match="in full but they are quantised"):
        prepare_stage(load("shared", modules_to_not_convert=["lm_head"]), "moe")
