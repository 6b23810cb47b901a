"""BEATs from the published file: every tensor in its place, or one sentence."""

import re

import pytest
import torch
from golden import FIXTURES
from tiny import tiny_tokenizer, tone
from tiny_parts import parts

from uni_moe_hf import BeatsModel, build_processor, from_pretrained_parts
from uni_moe_hf.cli.main import main
from uni_moe_hf.mixtures.beats_file import KERNEL, read_beats
from uni_moe_hf.original.checkpoints import TensorFiles
from uni_moe_hf.original.formats import Layout, canonical


FILE = FIXTURES / "audio" / "beats.pt"
TABLE = "encoder.layers.1.self_attn.relative_attention_bias.weight"
QFORMER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def changed(folder, change) -> str:
    """The file with other content."""
    content = torch.load(FILE, weights_only=True)
    change(content)
    torch.save(content, folder / "BEATs_changed.pt")
    return str(folder / "BEATs_changed.pt")


def test_every_tensor_is_that_of_the_file():
    """By the names and the arithmetic with which whole models are converted."""
    model, files = read_beats(FILE), TensorFiles([FILE], canonical("audio"), "model")
    for name, tensor in model.state_dict().items():
        (part,) = Layout(False, 0).parts_of(f"model.audio_tower.{name}")
        stored = files.read(part.key[1])
        if part.norm is not None:
            stored = stored * (files.read(part.norm[1]) / stored.norm(dim=(0, 1), keepdim=True))
        assert torch.equal(tensor, stored), name


def finetune(content: dict) -> None:
    content["model"] |= {"predictor.weight": torch.zeros(5, 8), "predictor.bias": torch.zeros(5)}
    content["cfg"] |= {"finetuned_model": True, "predictor_dropout": 0.1, "predictor_class": 5}
    content["label_dict"] = {0: "/m/0dgw9r"}


def test_of_a_finetuned_one_the_classifier_is_left_out(tmp_path):
    model = read_beats(changed(tmp_path, finetune))
    assert all(torch.equal(tensor, read_beats(FILE).state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_model_takes_the_file_as_its_ear(tmp_path):
    settings = {"audio_connector_config": QFORMER, "num_audio_query_tokens": 5}
    llm = parts()["language_model"]
    model = from_pretrained_parts(llm, audio_tower=str(FILE), dtype="float32", **settings).eval()
    assert main(["beats", str(FILE), str(tmp_path / "folder")]) == 0
    other = from_pretrained_parts(llm, audio_tower=str(tmp_path / "folder"), **settings)
    saved = BeatsModel.from_pretrained(tmp_path / "folder").state_dict()
    for name, tensor in model.model.audio_tower.state_dict().items():
        assert torch.equal(tensor, other.model.audio_tower.state_dict()[name]) and torch.equal(tensor, saved[name])
    processor = build_processor(model.config, tiny_tokenizer(), chunk_length=1, audio_feature_extractor=str(FILE))
    inputs = processor(text="what <audio>", audio=tone(1.5), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == 10
    assert model(**inputs).logits.isfinite().all()
    auto = from_pretrained_parts(llm, audio_tower=str(FILE), dtype="auto", **settings)
    assert auto.model.audio_tower.dtype == torch.float32
    half = from_pretrained_parts(llm.to(torch.bfloat16), audio_tower=str(FILE), dtype="bfloat16", **settings)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("cfg"), "has no entry 'cfg'; give a BEATs checkpoint as published"),
        (lambda c: c.update(model=[1]), "has no entry 'model'"),
        (lambda c: c["cfg"].pop("encoder_layers"), r"lacks \['encoder_layers'\]"),
        (lambda c: c["cfg"].update(gru_rel_pos=False), "gru_rel_pos=False"),
        (lambda c: c["cfg"].update(encoder_layers=10**9), "num_hidden_layers=1000000000"),
        (lambda c: c["cfg"].update(encoder_layers=9), "holds no 'encoder.layers.[0-9]"),
        (lambda c: c["cfg"].update(encoder_layers=1), "holds 'encoder.layers.1.*no place"),
        (lambda c: c["model"].pop("encoder.pos_conv.0.weight_g"), "holds no 'encoder.pos_conv.0.weight_g'"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "holds 'extra', for which"),
        (lambda c: c["model"].update({"layer_norm.bias": torch.zeros(3)}), r"'layer_norm.bias' of shape \(3,\)"),
        (lambda c: c["model"].update({f"{KERNEL}.weight_g": torch.ones(())}), r"weight_g' of shape \(\), but"),
        (lambda c: c["model"][f"{KERNEL}.weight_v"].mul_(0), "NaN or infinite values of 'encoder.pos_conv.weight'"),
        (
            lambda c: c["model"]["layer_norm.weight"].fill_(float("inf")),
            "NaN or infinite values of 'layer_norm.weight'",
        ),
        (lambda c: c["model"].update({3: torch.zeros(1)}), "holds '3', for which"),
        (lambda c: c["model"].update({TABLE: None}), "differs from the first layer's"),
        (lambda c: c["model"].update({"layer_norm.bias": torch.zeros(4).to_sparse()}), "holds no 'layer_norm.bias'"),
        (lambda c: c["cfg"].update(activation_fn="nope"), "activation_fn='nope'"),
        (lambda c: c["cfg"].update(encoder_embed_dim=2**23), "but its `cfg` says"),
        (lambda c: c["cfg"].update(max_distance=4), "max_bucket_distance=4"),
        (lambda c: c["cfg"].update(encoder_attention_heads=5), "must be a multiple of `num_attention_heads`"),
        (lambda c: c["cfg"].update(encoder_layers=0), "num_hidden_layers=0"),
        (lambda c: c["cfg"].update(deep_norm="yes"), "describes no BEATs"),
        (lambda c: c["model"].update({"layer_norm.bias": "text"}), "holds no 'layer_norm.bias'"),
        (
            lambda c: c["model"].update({TABLE: c["model"][TABLE] + 1}),
            "differs from the first layer's",
        ),
    ],
)
def test_what_is_no_beats_is_one_sentence(change, reason, tmp_path, capsys):
    file = changed(tmp_path, change)
    with pytest.raises(ValueError, match=reason) as caught:
        from_pretrained_parts(parts()["language_model"], audio_tower=file)
    assert len(str(caught.value).splitlines()) == 1
    assert main(["beats", file, str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert re.search(reason, said) and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_damaged_or_missing_file_and_a_full_folder_are_one_sentence(tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(FILE.read_bytes()[:4000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for arguments, reason in (
        ((tmp_path / "cut.pt", tmp_path / "out"), "truncated or no checkpoint"),
        ((tmp_path / "none.pt", tmp_path / "out"), "There is no file"),
        ((FILE, tmp_path / "full"), "full' "),
    ):
        assert main(["beats", *map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert reason in said and len(said.splitlines()) == 1, said
    with pytest.raises(ValueError, match="There is no file"):
        from_pretrained_parts(parts()["language_model"], audio_tower=str(tmp_path / "none.pt"))
