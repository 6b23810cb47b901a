"""Quantised on loading: what stays as it is, what is refused, and that the rest still trains, saves and loads."""

from collections import OrderedDict

import pytest
import torch
from peft import PeftModel
from tiny import picture, tiny_model, tiny_processor
from tiny_training import make_own_trainer, make_trainer, write_media
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from uni_moe_hf import UniMoEForConditionalGeneration, UniMoEModel, grow_experts
from uni_moe_hf.hub.expert_kernels_uni_moe import _fits_grouped_mm, is_quantised
from uni_moe_hf.training.stages import prepare_stage


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
    dtypes = {name: p.dtype for name, p in model.named_parameters() if name not in names}
    assert {dtypes.pop(f"{layer}.mlp.gate.weight") for layer in layers} == {torch.float32}
    assert set(dtypes.values()) == {dtype}
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


@pytest.mark.parametrize("method", METHODS)
def test_stage_3_trains_on_a_quantised_base_and_its_adapter_loads_again(method, saved, tmp_path):
    """bitsandbytes under TRL wants bf16 throughout. What is quantised stays bit for bit; the adapter gives 0.0."""

    def load():
        return UniMoEForConditionalGeneration.from_pretrained(
            saved["shared"], dtype=torch.bfloat16, quantization_config=quantisation(method)
        )

    model = load()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if is_quantised(p)}
    media = tmp_path / "media"
    media.mkdir()
    peft_config = prepare_stage(model, "moe")
    run = make_trainer(write_media(media), model, tmp_path, peft_config, save_strategy="steps", save_steps=4)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    # 8 attention layers twice; 2 routers and 2 times 4 factors; 4 + 2 + 2 tensors of projectors.
    assert len(before) == 16 + 2 + 8 + 8
    run.train()
    after = dict(run.model.named_parameters())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    kept = {name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in after.items()}
    for name, tensor in frozen.items():
        for part in ("qdata", "scale") if hasattr(tensor, "qdata") else ("data",):
            assert torch.equal(getattr(kept[name], part), getattr(tensor, part)), name

    base = load()
    prepare_stage(base, "moe")  # in float32 what was trained in it: PEFT's copies have the base's precision
    loaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint-4").eval()
    for name, parameter in loaded.named_parameters():
        if name in before:  # PEFT loads in float32, TRL trains bitsandbytes models in bfloat16
            parameter.data = parameter.data.to(before[name].dtype)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs(loaded)).logits, run.model.eval()(**inputs(model)).logits)


@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_our_trainer_trains_float32_over_a_quantised_base(method, saved, tmp_path):
    model = UniMoEForConditionalGeneration.from_pretrained(
        saved["shared"], dtype=torch.bfloat16, quantization_config=quantisation(method)
    )
    media = tmp_path / "media"
    media.mkdir()
    run = make_own_trainer(write_media(media), tmp_path, model, "moe", learning_rate=4e-5, max_steps=3)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    run.train()
    moved = {name: (p != before[name]).float().mean() for name, p in run.model.named_parameters() if name in before}
    assert all(share > 0.9 for name, share in moved.items() if "projector" in name and "weight" in name), moved


# optimum-quanto compiles its kernels on first use.
@pytest.mark.parametrize("backend", [pytest.param("quanto", marks=pytest.mark.slow), "fp8"])
def test_a_quantised_cache_answers_like_a_plain_one(backend, saved):
    """The first word comes from the unquantised prefill; of the others all but a few agree at 8 bits."""
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
    model = UniMoEForConditionalGeneration.from_pretrained(saved["shared"]).eval()
    config = {"backend": backend, **({"nbits": 4} if backend == "quanto" else {})}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = model.generate(**inputs(model), **settings)
    quantised = model.generate(**inputs(model), **settings, cache_implementation="quantized", cache_config=config)
    length = inputs(model)["input_ids"].shape[1]
    assert quantised.shape == plain.shape and quantised[0, length] == plain[0, length]
    beams = {**settings, "num_beams": 2, "num_return_sequences": 2, "cache_implementation": "quantized"}
    assert model.generate(**inputs(model), **beams, cache_config=config).shape == (2, length + 8)
