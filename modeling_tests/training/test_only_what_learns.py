"""What training computes and what it leaves out: graphs of frozen towers, positions without a label."""

from functools import partial

import pytest
import torch
from tiny import DENSE, EXACT, MIXED, ROUNDING, TOWERS, checkpoint_activations, labels_of, make_inputs, tiny_model
from tiny_training import make_own_trainer, make_trainer, write_media
from trl.trainer.utils import add_fused_lm_head

from uni_moe_hf import prepare_stage


STAGES = {"connectors": DENSE, "experts": DENSE, "moe": {"shared_expert_base": True}}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def watched(model: torch.nn.Module, names: list[str]) -> dict[str, list[bool]]:
    """Whether outputs of these modules needed a gradient, call by call."""
    found = {name: [] for name in names}

    def note(module, args, output, name):
        tensors = [output] if isinstance(output, torch.Tensor) else [t for t in output.values() if torch.is_tensor(t)]
        found[name].append(any(tensor.requires_grad for tensor in tensors))

    for name, module in model.named_modules():
        short = name.removeprefix("base_model.model.").removeprefix("model.")
        if short in found:
            module.register_forward_hook(partial(note, name=short))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", list(STAGES))
def test_frozen_towers_keep_no_graph_in_any_stage(stage, checkpointing, media, tmp_path):
    """Trainers ask all embeddings for gradients, those of the towers too."""
    for make in (make_trainer, make_own_trainer):
        model = tiny_model(STAGES[stage])
        if make is make_trainer:
            peft_config = prepare_stage(model, stage)
            trainer = make(media, model, tmp_path, peft_config, gradient_checkpointing=checkpointing)
        else:
            trainer = make(media, tmp_path, model, stage, gradient_checkpointing=checkpointing)
        trainer.model.enable_input_require_grads()
        bodies = ["speech_connector.decoder", "audio_connector.qformer"]
        found = watched(trainer.model, [f"{name}_tower" for name in TOWERS] + bodies)
        trainer.train()
        for name, needed in found.items():
            trains_body = stage == "connectors" and name in bodies
            assert needed and all(each == trains_body for each in needed), (name, needed)


def test_a_tower_that_is_trained_keeps_its_graph():
    model = tiny_model(DENSE)
    prepare_stage(model, "connectors")
    model.model.vision_tower.requires_grad_(True)
    model.train()
    inputs = make_inputs(model.config, MIXED, MIXED)
    model(**inputs, labels=labels_of(model.config, inputs)).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "_tower" in n}
    assert gradients and all(name.startswith("model.vision_tower") for name in gradients)


def test_what_goes_into_a_frozen_tower_may_need_a_gradient():
    """Of what a picture shows, for who asks which pixels matter."""
    model = tiny_model(DENSE)
    model.requires_grad_(False)
    pixels = torch.randn(1, 3, 16, 16, requires_grad=True)
    model.get_image_features(pixels).pooler_output.sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("text", [{}, {"router_aux_loss_coef": 0.1, "output_router_logits": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_labelled_positions_alone_give_the_losses_and_gradients_of_all(text, checkpointing):
    """TRL's head by its own `forward` scores everything; called as trainers call it, what is learned."""
    model = tiny_model(text)
    prepare_stage(model, "moe")
    model.requires_grad_(True)
    model.model.audio_connector.eval()
    if checkpointing:
        checkpoint_activations(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    inputs = make_inputs(model.config, MIXED, (2, "speech", 4), padding="right")
    labels = labels_of(model.config, inputs)
    labels[:, :-5] = -100
    lengths = []
    model.model.register_forward_hook(lambda _, args, out: lengths.append(out.last_hidden_state.shape[:2]))

    found = []
    for call in (model.forward, model):
        model.train()
        model.model.audio_connector.eval()
        model.zero_grad()
        outputs = call(**inputs, labels=labels, fused_lm_head=True)
        outputs.loss.backward()
        found.append((outputs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (whole, all_gradients), (part, gradients) = found
    scored = int((labels[:, 1:] != -100).sum())
    assert lengths == [tuple(labels.shape), (1, scored)]
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)), name
    assert gradients.keys() == all_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name], **EXACT, msg=name)


def test_a_batch_without_labels_gives_a_loss_of_zero_that_can_be_learned_from():
    model = tiny_model()
    add_fused_lm_head(model)
    inputs = make_inputs(model.config, MIXED, (2,))
    model.train()
    outputs = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100), fused_lm_head=True)
    assert outputs.loss == 0 and not outputs.label_mask.any()
    assert outputs.log_probs.shape == (2, inputs["input_ids"].shape[1] - 1)
    outputs.loss.backward()


def test_our_own_loss_scores_labelled_positions_alone_in_training():
    model = tiny_model({"router_aux_loss_coef": 0.1})
    inputs = make_inputs(model.config, MIXED, (2, "speech", 4), padding="right")
    labels = labels_of(model.config, inputs)
    labels[0, -5:] = labels[1, 5:] = -100
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:-1].numel()))
    found = []
    for train in (False, True):
        model.train(train)
        model.model.audio_connector.eval()
        model.zero_grad()
        outputs = model(**inputs, labels=labels, output_router_logits=True)
        outputs.loss.backward()
        found.append((outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (whole, all_gradients), (part, gradients) = found
    is_scored = labels[:, 1:] != -100
    assert rows == [labels.numel(), int(is_scored.sum())]
    torch.testing.assert_close(part.loss, whole.loss, atol=1e-6, rtol=0)  # the sum is made in another order
    assert torch.equal(part.aux_loss, whole.aux_loss)
    assert part.logits.shape == whole.logits.shape
    torch.testing.assert_close(part.logits[:, :-1][is_scored], whole.logits[:, :-1][is_scored], **ROUNDING)
    assert part.logits[:, :-1][~is_scored].isinf().all()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name], atol=1e-5, rtol=1e-4, msg=name)

    # A loss function of somebody's own is given what it can move by one, as the library's contract has it.
    def own(logits, labels, vocab_size, **kwargs):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    plain = model.loss_function
    model.loss_function = own
    given = model(**inputs, labels=labels, output_router_logits=True)
    torch.testing.assert_close(given.loss, whole.loss, atol=1e-6, rtol=0)
    model.loss_function = plain
    # Who asks for some positions gets those.
    assert model(**inputs, labels=None, logits_to_keep=2).logits.shape[1] == 2
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(
        model(**inputs, labels=labels, shift_labels=shifted, output_router_logits=True).loss,
        whole.loss,
        atol=1e-6,
        rtol=0,
    )
