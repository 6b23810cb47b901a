"""What a GPU computes beside what a CPU does. Skipped where there is none: `python benchmarks/gpu.py` runs them."""

import copy

import pytest
import torch
from tiny import DENSE, MIXED, labels_of, make_inputs, tiny_model, tiny_processor
from tiny_training import make_own_trainer, rows, rows_apart, write_media
from trl.trainer.utils import add_fused_lm_head

from uni_moe_hf import FeatureCache, UniMoEDataCollator, encode_rows, evaluate
from uni_moe_hf.evaluation.tasks import Task


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

STAGES = {"connectors": DENSE, "experts": DENSE, "moe": {"shared_expert_base": True}}
# Of float32 values of order 1, summed in another order by other kernels.
CLOSE = {"atol": 1e-3, "rtol": 1e-3}


def on_gpu(inputs: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"), 12)


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32: differences are the order of sums alone."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("route", ["auto", "eager", "segmented", "grouped_mm", "batched_mm"])
def test_every_route_gives_the_losses_and_gradients_of_the_cpu(route, shared):
    model = tiny_model({"shared_expert_base": shared})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora." in name or ".mlp.gate." in name or "_connector" in name)
    other = copy.deepcopy(model).cuda()
    other.set_experts_implementation(route)
    inputs = make_inputs(model.config, MIXED, (2, "speech", 4))
    labels = labels_of(model.config, inputs)
    expected = model(**inputs, labels=labels)
    found = other(**on_gpu(inputs), labels=labels.cuda())
    torch.testing.assert_close(found.logits.cpu(), expected.logits, **CLOSE)
    expected.loss.backward()
    found.loss.backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad.cpu(), parameter.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    model = tiny_model({"shared_expert_base": True}).cuda()
    inputs = on_gpu(make_inputs(model.config, MIXED))
    with torch.no_grad():
        expected = model(**inputs).logits
        found = copy.deepcopy(model).to(dtype)(**inputs).logits.float()
    assert (found - expected).norm() / expected.norm() < 0.1


def test_the_same_words_are_generated():
    model = tiny_model()
    inputs = make_inputs(model.config, MIXED, ("speech", 2))
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.cuda().generate(**on_gpu(inputs), **settings).cpu(), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_trains_in_bfloat16(stage, checkpointing, media, tmp_path):
    trainer = make_own_trainer(
        media,
        tmp_path,
        tiny_model(STAGES[stage]),
        stage,
        use_cpu=False,
        bf16=True,
        gradient_checkpointing=checkpointing,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    assert all(parameter.is_cuda for parameter in trainer.model.parameters())


def test_features_from_a_cache_train_as_media_do(media, tmp_path):
    def losses(processor=None, model=None) -> list[float]:
        model = model or tiny_model(DENSE)
        trainer = make_own_trainer(media, tmp_path / "x", model, "connectors", use_cpu=False, processor=processor)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    expected = losses()
    model = tiny_model(DENSE).cuda()
    processor = tiny_processor(model.config)
    cache = FeatureCache(tmp_path / "cache", model, processor, fill=True)
    encode_rows(rows(), model, UniMoEDataCollator(processor, media_root=media), cache)
    processor.feature_cache = cache
    assert losses(processor, model) == pytest.approx(expected, rel=1e-3)


def test_labelled_positions_alone_are_scored():
    model = tiny_model().cuda().train()
    model.model.audio_connector.eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    inputs = on_gpu(make_inputs(model.config, MIXED, (2, "speech", 4), padding="right"))
    labels = labels_of(model.config, inputs)
    labels[:, :-5] = -100
    whole = model.forward(**inputs, labels=labels, fused_lm_head=True)
    part = model(**inputs, labels=labels, fused_lm_head=True)
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name), atol=1e-4, rtol=1e-4)
    assert torch.equal(part.label_mask, whole.label_mask)


def test_answers_and_likelihoods_are_those_of_the_cpu(media):
    asked = [row for row in rows_apart(12) if len(row["messages"][0]["content"]) == 2]
    model = tiny_model(seed=2)
    processor = tiny_processor(model.config)
    written = Task("written", metrics=("exact_match",), decoding={"max_new_tokens": 4})
    for task, name in ((written, "prediction"), ("preference", "losses")):
        expected = evaluate(model.cpu(), processor, task, asked, media_root=media)
        found = evaluate(model.cuda(), processor, task, asked, media_root=media)
        half = evaluate(copy.deepcopy(model).bfloat16(), processor, task, asked, media_root=media)
        assert not found.unreadable and not half.unreadable
        for number, record in expected.records.items():
            if name == "prediction":
                assert found.records[number] == record
            else:
                assert found.records[number][name] == pytest.approx(record[name], rel=1e-3)
                assert half.records[number][name] == pytest.approx(record[name], rel=0.1)
