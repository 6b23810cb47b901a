"""What each stage trains, by exact names, and that training it changes nothing else."""

from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import DENSE, ROUNDING, make_inputs, picture, tiny_config, tiny_model, tiny_processor
from tiny_training import make_trainer, rows, write_media

from uni_moe_hf import UniMoEDataCollator, UniMoEForConditionalGeneration
from uni_moe_hf.hub.expert_kernels_uni_moe import choose_route
from uni_moe_hf.hub.experts_uni_moe import UniMoELoraExperts
from uni_moe_hf.training.stages import prepare_stage, stage_table


LAYERS = [f"model.language_model.layers.{index}" for index in range(2)]


def trainable(model: torch.nn.Module) -> set[str]:
    """Names of trainable tensors without what PEFT puts into them."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
        for name in names
    }


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files that the rows name."""
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture
def trainer(media):
    return partial(make_trainer, media)


def test_stage_1_trains_all_connectors_and_nothing_else():
    model = tiny_model(DENSE)
    assert prepare_stage(model, "connectors") is None
    names = {name for name, _ in model.named_parameters() if "_connector." in name}
    assert trainable(model) == names
    assert {name.split(".")[1] for name in names} == {"vision_connector", "speech_connector", "audio_connector"}


def test_stage_1_of_one_modality_trains_one_connector():
    model = tiny_model(DENSE)
    prepare_stage(model, "connectors", ["audio"])
    assert {name.split(".")[1] for name in trainable(model)} == {"audio_connector"}


def test_stage_2_trains_mlp_lora_and_the_modalitys_projector():
    model = tiny_model(DENSE)
    wrapped = get_peft_model(model, prepare_stage(model, "experts", ["speech"]))
    lora = {
        f"{layer}.mlp.{name}_proj.lora_{side}.weight"
        for layer in LAYERS
        for name in ("gate", "up", "down")
        for side in "AB"
    }
    projector = {f"model.speech_connector.projector.{kind}" for kind in ("weight", "bias")}
    assert trainable(wrapped) == lora | projector
    assert wrapped.peft_config["default"].r == 64
    assert wrapped.peft_config["default"].lora_alpha == 16


@pytest.mark.parametrize("shared", [True, False])
def test_stage_3_trains_attention_lora_expert_lora_routers_and_projectors(shared):
    model = tiny_model({"shared_expert_base": shared})
    wrapped = get_peft_model(model, prepare_stage(model, "moe"))
    attention = {
        f"{layer}.self_attn.{name}_proj.lora_{side}.weight" for layer in LAYERS for name in "qkvo" for side in "AB"
    }
    mixture = {f"{layer}.mlp.gate.weight" for layer in LAYERS} | {
        f"{layer}.mlp.experts.lora.{name}"
        for layer in LAYERS
        for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")
    }
    projectors = {
        f"model.{ear}_connector.projector.{kind}" for ear in ("speech", "audio") for kind in ("weight", "bias")
    }
    projectors |= {
        f"model.vision_connector.projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert trainable(wrapped) == attention | mixture | projectors
    assert wrapped.peft_config["default"].r == 8


@pytest.mark.parametrize(
    ("stage", "text", "message"),
    [
        ("connectors", None, "starts from a dense model but this one is sparse"),
        ("experts", None, "starts from a dense model but this one is sparse"),
        ("moe", DENSE, "starts from a sparse model but this one is dense"),
        ("fourth", DENSE, "no stage 'fourth'"),
    ],
)
def test_a_stage_from_the_wrong_parent_is_refused(stage, text, message):
    with pytest.raises(ValueError, match=message):
        prepare_stage(tiny_model(text), stage)


def test_a_modality_without_tower_cannot_be_trained():
    with pytest.raises(ValueError, match=r"no tower for \['speech'\]"):
        prepare_stage(tiny_model(DENSE, without=("speech",)), "experts", ["speech"])


def test_the_table_counts_every_parameter_once():
    model = tiny_model(DENSE)
    prepare_stage(model, "connectors")
    table = stage_table(model, 2e-5)
    counted = sum(int(cell.replace(",", "")) for line in table.splitlines()[1:] for cell in line[26:].split()[:2])
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stage", ["connectors", "experts", "moe"])
def test_plain_sft_trainer_trains_what_the_stage_names_and_nothing_else(stage, tmp_path, trainer):
    model = tiny_model(None if stage == "moe" else DENSE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sft = trainer(model, tmp_path, prepare_stage(model, stage), max_steps=6)
    names = trainable(sft.model)
    sft.train()
    after = sft.model.merge_and_unload().state_dict() if stage != "connectors" else sft.model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    touched = {name.replace(".lora_A", "").replace(".lora_B", "") for name in names}
    assert changed <= touched
    # What saw no token may stay; connectors, projectors and attention all did.
    assert {name for name in touched if "projector" in name or "self_attn" in name} <= changed
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_a_stage_1_checkpoint_resumes_to_the_very_same_weights(tmp_path, trainer):
    def run(folder, **overrides):
        model = tiny_model(DENSE)
        prepare_stage(model, "connectors")
        return trainer(model, folder, save_strategy="steps", save_steps=2, **overrides)

    whole = run(tmp_path / "whole")
    whole.train()
    half = run(tmp_path / "half", max_steps=4)
    half.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, half.model.state_dict()[name]), name


def test_a_stage_3_checkpoint_resumes_to_the_very_same_weights_and_loads_with_peft(tmp_path, trainer):
    def run(folder):
        model = tiny_model({"shared_expert_base": True, "expert_lora_dropout": 0.1})
        return trainer(model, folder, prepare_stage(model, "moe"), save_strategy="steps", save_steps=2)

    whole = run(tmp_path / "whole")
    whole.train()
    half = run(tmp_path / "half")
    half.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, half.model.state_dict()[name]), name

    inputs = tiny_processor()(text="<image> what", images=picture(), return_tensors="pt")
    trained = whole.model.eval()(**inputs).logits
    parent = tiny_model({"shared_expert_base": True, "expert_lora_dropout": 0.1})
    loaded = PeftModel.from_pretrained(parent, tmp_path / "whole/checkpoint-4").eval()
    torch.testing.assert_close(loaded(**inputs).logits, trained, **ROUNDING)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, trained, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = UniMoEForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**inputs).logits, merged(**inputs).logits, **ROUNDING)


def test_training_loss_equals_the_models_own_loss(tmp_path, trainer, media):
    model = tiny_model({"router_aux_loss_coef": 0.1}, seed=4)
    processor = tiny_processor(model.config)
    batch = UniMoEDataCollator(processor, media_root=media)(rows(6))
    own = model(**batch, output_router_logits=True)
    sft = trainer(model, tmp_path, prepare_stage(model, "moe"))
    sft.model.eval()
    loss = sft.compute_loss(sft.model, dict(batch))
    torch.testing.assert_close(loss, own.loss, atol=1e-5, rtol=1e-5)
    assert own.aux_loss > 0


def test_gradient_checkpointing_does_not_change_a_stage(tmp_path, trainer):
    def run(folder, checkpointing):
        model = tiny_model({"shared_expert_base": True})
        sft = trainer(
            model, folder, prepare_stage(model, "moe", lora_dropout=0.0), gradient_checkpointing=checkpointing
        )
        sft.train()
        return sft.model.state_dict()

    plain, checkpointed = run(tmp_path / "a", False), run(tmp_path / "b", True)
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, checkpointed[name], atol=1e-5, rtol=1e-5)


def test_a_text_only_model_has_no_projectors_to_train():
    config = tiny_config(without=("vision", "speech", "audio"))
    model = UniMoEForConditionalGeneration(config)
    names = trainable(get_peft_model(model, prepare_stage(model, "moe")))
    assert names
    assert not any("connector" in name for name in names)


def test_a_stage_that_would_train_nothing_somewhere_is_refused():
    plain = tiny_model({"expert_lora_rank": 0})
    with pytest.raises(ValueError, match=r"No module of the model matches '.*experts.*lora'.*would train nothing"):
        prepare_stage(plain, "moe")
    deaf = UniMoEForConditionalGeneration(tiny_config(DENSE, without=("vision", "speech", "audio")))
    with pytest.raises(ValueError, match=r"trains nothing but connectors, and there are none for \[\]"):
        prepare_stage(deaf, "connectors")
    assert any("self_attn" in name for name in trainable(plain)) and trainable(deaf)  # nothing was frozen


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_stage_three_under_peft_takes_the_fast_route(shared):
    model = tiny_model({"shared_expert_base": shared})
    trained = get_peft_model(model, prepare_stage(model, "moe")).train()
    layers = [module for module in trained.modules() if isinstance(module, UniMoELoraExperts)]
    assert {choose_route(experts, torch.zeros(20, experts.hidden_size)) for experts in layers} == {"segmented"}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("stage", ["connectors", "experts", "moe"])
def test_what_is_trained_of_a_bfloat16_model_is_float32_and_moves_at_the_papers_rate(
    stage, autocast, tmp_path, trainer
):
    """In bfloat16 itself, two thirds of the weights would stay where they were: the updates are below its rounding."""
    model = tiny_model(None if stage == "moe" else DENSE).to(torch.bfloat16)
    settings = {"learning_rate": 2e-5, "bf16": autocast, "max_steps": 6}
    sft = trainer(model, tmp_path, prepare_stage(model, stage), **settings)
    dtypes = {parameter.requires_grad: set() for parameter in sft.model.parameters()}
    for parameter in sft.model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes[True] == {torch.float32} and torch.bfloat16 in dtypes[False]
    before = {name: p.detach().clone() for name, p in sft.model.named_parameters() if p.requires_grad}
    sft.train()
    for name, parameter in sft.model.named_parameters():
        if name in before and "projector" in name and "weight" in name:
            assert (parameter != before[name]).float().mean() > 0.99, name


@pytest.mark.parametrize("stage", ["connectors", "moe"])
def test_a_bfloat16_models_checkpoint_resumes_to_the_very_same_weights(stage, tmp_path, trainer):
    def run(folder):
        model = tiny_model(DENSE if stage == "connectors" else None).to(torch.bfloat16)
        peft_config = prepare_stage(model, stage)
        return trainer(model, folder, peft_config, save_strategy="steps", save_steps=2, bf16=True, learning_rate=1e-4)

    whole, half = run(tmp_path / "whole"), run(tmp_path / "half")
    whole.train()
    half.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, half.model.state_dict()[name]), name


@pytest.mark.parametrize("stage", ["connectors", "experts", "moe"])
def test_weights_that_were_cast_after_peft_copied_them_take_what_comes(stage):
    """Over a base of 4 or 8 bits TRL makes what is trained bfloat16; PEFT keeps a copy of what it was before."""
    model = tiny_model(None if stage == "moe" else DENSE).to(torch.bfloat16)
    config = prepare_stage(model, stage)
    wrapped = model if config is None else get_peft_model(model, config)
    inputs = make_inputs(model.config, ("image", "audio", 3), ("video", "speech"))
    for dtype in (torch.bfloat16, torch.float32):
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        wrapped(**inputs).logits.float().sum().backward()
    if config is not None:
        with torch.no_grad(), wrapped.disable_adapter():
            assert wrapped(**inputs).logits.isfinite().all()


def test_a_float64_model_stays_one():
    model = tiny_model(DENSE).to(torch.float64)
    prepare_stage(model, "connectors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("stage", ["connectors", "moe"])
def test_a_bfloat16_model_computes_the_same_with_its_trained_parts_in_float32(stage):
    """Within bfloat16's rounding of connector outputs (0.02) before an expert is chosen."""
    model = tiny_model(DENSE if stage == "connectors" else None).to(torch.bfloat16).eval()
    inputs = make_inputs(model.config, ["image", "audio", "speech"], ["video"])
    media = {name: tensor for name, tensor in inputs.items() if "input_ids" != name and "attention" not in name}
    with torch.no_grad():
        plain = model.model.encode_media(**media)
        prepare_stage(model, stage)
        mixed = model.model.encode_media(**media)
        assert model(**inputs).logits.dtype == torch.bfloat16
    for modality, outputs in plain.items():
        other = mixed[modality].pooler_output
        assert other.dtype == torch.float32
        torch.testing.assert_close(outputs.pooler_output.float(), other, atol=0.02, rtol=0.02)
