"""`uni-moe`: what it prints, its exit codes, and one sentence for whatever goes wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ROOT, picture, tiny_model, tiny_processor, tone

from uni_moe_hf import record_routing
from uni_moe_hf.cli import main
from uni_moe_hf.cli.common import encoded


COMMANDS = ("generate", "info", "routing", "connectors", "beats")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model of bf16 weights and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = ["text", "vision", "sound", "speech"]
    model = tiny_model({"shared_expert_base": True, "expert_names": names, "mlp_layer_types": ["dense", "sparse"]})
    processor = tiny_processor(model.config)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(picture(1)).save(folder / "one.png")
    Image.fromarray(picture(2)).save(folder / "two.png")
    soundfile.write(folder / "bell.wav", tone(), 16000)
    rows = [
        [{"type": "image", "path": "one.png"}, {"type": "text", "text": "what is it"}],
        [{"type": "speech", "path": "bell.wav"}],
        [{"type": "text", "text": "hello"}],
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}
    lines = [json.dumps({"messages": [{"role": "user", "content": row}, answer]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer_of(checkpoint, parts: list[dict], **settings) -> str:
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(dtype=model.dtype)
    ids = model.generate(**inputs, do_sample=False, **settings)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)], ids=str)
def test_help_is_answered_before_anything_heavy_is_imported(arguments):
    code = (
        f"import sys; sys.argv = ['uni-moe', *{arguments!r}, '--help']\n"
        "from uni_moe_hf.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "usage: uni-moe" in done.stdout


def test_the_installed_command_registers_the_model_when_it_works(checkpoint):
    command = Path(sys.executable).with_name("uni-moe")
    done = subprocess.run([command, "info", checkpoint], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 layers sparse" in done.stdout


def test_an_answer_is_that_of_generate_and_streams(checkpoint, media, capsys):
    arguments = ("--image", media / "one.png", "--speech", media / "bell.wav", "--text", "what is it")
    parts = [
        {"type": "image", "path": str(media / "one.png")},
        {"type": "speech", "path": str(media / "bell.wav")},
        {"type": "text", "text": "what is it"},
    ]
    expected = answer_of(checkpoint, parts, max_new_tokens=6)
    assert expected
    for extra in ((), ("--no-stream",)):
        code, out, _ = run(capsys, "generate", checkpoint, *arguments, "--max-new-tokens", 6, *extra)
        assert code == 0 and out.strip() == expected


def test_media_stand_in_the_order_of_the_command_line(checkpoint, media, capsys, monkeypatch):
    chats = []
    monkeypatch.setattr(
        "uni_moe_hf.cli.generate.encoded", lambda processor, chat: chats.append(chat) or encoded(processor, chat)
    )
    arguments = ("--image", media / "one.png", "--text", "a", "--image", media / "two.png", "--text", "b")
    assert run(capsys, "generate", checkpoint, *arguments, "--system", "s", "--max-new-tokens", 1)[0] == 0
    one, two = ({"type": "image", "path": str(media / f"{name}.png")} for name in ("one", "two"))
    words = [{"type": "text", "text": text} for text in "ab"]
    assert chats == [[{"role": "system", "content": "s"}, {"role": "user", "content": [one, words[0], two, words[1]]}]]


def test_what_the_checkpoint_says_of_generation_holds(checkpoint, tmp_path, capsys):
    """Its forbidden words and ends, that is; sampling settings are the command line's."""
    shutil.copytree(checkpoint, tmp_path / "own")
    arguments = ("--text", "hello", "--max-new-tokens", 6, "--no-stream", "--dtype", "float32")
    config = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "suppress_tokens": list(range(3, 260))}
    (tmp_path / "own/generation_config.json").write_text(json.dumps({**config, "do_sample": True, "temperature": 9.0}))
    code, out, err = run(capsys, "generate", tmp_path / "own", *arguments)
    assert code == 0 and out.strip() and out.strip().isascii()
    assert (code, out, err) == run(capsys, "generate", tmp_path / "own", *arguments)
    assert out != run(capsys, "generate", checkpoint, *arguments)[1]


@pytest.mark.parametrize("device", ["nonsense", "cuda:7"])
def test_a_device_that_is_not_there_is_one_sentence(checkpoint, capsys, device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = run(capsys, "generate", checkpoint, "--text", "hi", "--device", device)
    assert code == 1 and f"There is no device '{device}' here" in err and len(err.strip().splitlines()) == 1


def test_cut_weights_are_one_sentence(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run(capsys, "generate", tmp_path / "cut", "--text", "hi")
    assert code == 1 and err.startswith("uni-moe: ") and len(err.strip().splitlines()) == 1


def test_sampling_follows_its_seed(checkpoint, capsys):
    settings = ("--text", "hello", "--temperature", 5, "--max-new-tokens", 12, "--no-stream")
    answers = [run(capsys, "generate", checkpoint, *settings, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_system_message_changes_the_answer(checkpoint, capsys):
    settings = ("--text", "hello", "--max-new-tokens", 8, "--no-stream", "--dtype", "float32")
    plain = run(capsys, "generate", checkpoint, *settings)[1]
    assert run(capsys, "generate", checkpoint, *settings, "--system", "it is a bird bell red")[1] != plain


def test_info_counts_what_the_model_holds(checkpoint, capsys):
    code, out, _ = run(capsys, "info", checkpoint, "--json")
    facts = json.loads(out)
    model = tiny_model({"shared_expert_base": True, "mlp_layer_types": ["dense", "sparse"]})
    total = sum(parameter.numel() for parameter in model.parameters())
    decoder = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    lora = sum(p.numel() for p in model.model.language_model.layers[1].mlp.experts.lora.parameters())
    assert code == 0 and facts["parameters"]["total"] == total == sum(facts["parameters"]["parts"].values())
    assert facts["parameters"]["active"] == sum(p.numel() for p in decoder) - lora // 2  # 2 of 4 experts
    assert facts["memory_gb"] == {"float32": 4e-9 * total, "bfloat16": 2e-9 * total, "float16": 2e-9 * total}
    assert facts["experts"] == ("4 (text, vision, sound, speech), 2 per token; one shared base, LoRA of rank 8")
    assert facts["takes"] == "text, image, video, audio, speech" and facts["dtype"] == "bfloat16"
    assert facts["kinds"] == "llama, clip_vision_model, whisper, beats"
    assert facts["stage"] == "mixture of experts" and "not stated" in facts["licence"]
    code, out, _ = run(capsys, "info", checkpoint)
    assert code == 0 and f"{total:,}" in out and "router" in out and "vision connector" in out


def test_info_tells_of_own_bases_dense_models_stage_and_licence(tmp_path, capsys):
    own = tiny_model({"num_experts": 3})
    own.config.stage = "moe"
    own.save_pretrained(tmp_path / "own")
    (tmp_path / "own/README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    facts = json.loads(run(capsys, "info", tmp_path / "own", "--json")[1])
    stack = [p.numel() for n, p in own.named_parameters() if ".mlp.experts." in n]
    rest = [p.numel() for n, p in own.named_parameters() if "_tower." not in n and "_connector." not in n]
    assert facts["parameters"]["active"] == sum(rest) - sum(stack) // 3
    assert facts["experts"].startswith("3 (0, 1, 2), 2 per token; own bases")
    assert (facts["stage"], facts["licence"]) == ("moe", "apache-2.0")

    tiny_model({"mlp_layer_types": ["dense"] * 2}, without=("audio",)).save_pretrained(tmp_path / "dense")
    facts = json.loads(run(capsys, "info", tmp_path / "dense", "--json")[1])
    assert facts["takes"] == "text, image, video, speech" and facts["stage"].startswith("before the mixture")
    assert facts["experts"].startswith("none")


def test_routing_of_a_conversation_and_of_rows(checkpoint, media, capsys):
    code, out, _ = run(capsys, "routing", checkpoint, "--image", media / "one.png", "--text", "what", "--json")
    layer = json.loads(out)["layers"][0]
    assert code == 0 and layer["layer"] == 1 and layer["modalities"]["image"]["tokens"] == 4
    code, out, _ = run(capsys, "routing", checkpoint, "--data", media / "rows.jsonl", "--batch-size", 2, "--json")
    rows = json.loads(out)["layers"][0]["modalities"]
    assert code == 0 and rows["image"]["tokens"] == 4 and rows["speech"]["tokens"] == 3
    code, out, _ = run(capsys, "routing", checkpoint, "--data", media / "rows.jsonl")
    assert "entropy" in out and f"{rows['text']['tokens']}" in out and "vision" in out


def test_connector_statistics_of_rows(checkpoint, media, capsys):
    code, out, _ = run(capsys, "connectors", checkpoint, "--data", media / "rows.jsonl", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["statistics"]) == {"text", "image", "speech"}
    assert found["statistics"]["speech"]["count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "/no/such/folder", "--text", "hi"), "There is no checkpoint '/no/such/folder'"),
        (("generate", "{checkpoint}"), "nothing to look at; give one or more of --text, --image"),
        (("generate", "{checkpoint}", "--image", "/none.png"), "no file '/none.png' for --image"),
        (
            ("generate", "{checkpoint}", "--image", "{media}/rows.jsonl"),
            "Picture '{media}/rows.jsonl' could not be read",
        ),
        (("routing", "{checkpoint}", "--data", "/none.jsonl"), "'/none.jsonl' does not exist"),
        (("routing", "{checkpoint}", "--data", "x", "--text", "y"), "give one of the two"),
        (("connectors", "{checkpoint}", "--text", "hi"), "holds no media"),
        (("info", "{media}"), "config.json"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_sentence_and_exit_code_1(checkpoint, media, capsys, arguments, message):
    places = {"checkpoint": checkpoint, "media": media}
    code, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("uni-moe: ") and len(err.strip().splitlines()) == 1
    assert message.format(**places) in err


def test_a_model_of_another_kind_an_adapter_and_a_broken_config_are_refused(checkpoint, tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_experts_per_tok"] = 9
    (tmp_path / "broken/config.json").write_text(json.dumps(config))
    for name, message in (
        ("llama", "of type 'llama', not 'uni_moe'"),
        ("adapter", "no model but an adapter"),
        ("broken", "`num_experts_per_tok=9` must lie between 1 and `num_experts=4`"),
    ):
        code, _, err = run(capsys, "info", tmp_path / name)
        assert code == 1 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("translate",),
        ("generate",),
        ("generate", "x", "--max-new-tokens", "0"),
        ("info", "x", "--y"),
        ("generate", "x", "--temperature", "-1"),
        ("generate", "x", "--temperature", "nan"),
        ("connectors", "x", "--batch-size", "2"),
    ],
)
def test_wrong_usage_has_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2 and "usage: uni-moe" in capsys.readouterr().err


def test_an_interrupt_has_exit_code_130(checkpoint, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("uni_moe_hf.cli.generate.load_checkpoint", interrupted)
    assert main(["generate", str(checkpoint), "--text", "hi"]) == 130


def test_a_fault_of_ours_is_not_hidden_behind_a_sentence(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("uni_moe_hf.cli.generate.load_checkpoint", lambda *_: 1 / 0)
    assert main(["generate", str(checkpoint), "--text", "hi"]) == 1
    assert capsys.readouterr().err.startswith("uni-moe: ZeroDivisionError: division by zero (UNI_MOE_DEBUG=1 shows")
    monkeypatch.setenv("UNI_MOE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["generate", str(checkpoint), "--text", "hi"])


def test_routing_of_the_command_equals_the_functions(checkpoint, media, capsys):
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": [{"type": "speech", "path": str(media / "bell.wav")}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(dtype=model.dtype)
    with record_routing(model) as routing, torch.no_grad():
        model(**inputs)
    out = run(capsys, "routing", checkpoint, "--speech", media / "bell.wav", "--json")[1]
    assert json.loads(out) == routing.report().to_dict()


# ---- what a file can cause ----

BROKEN = {
    "a lost connector": lambda f: lose(f, "model.vision_connector.projector.0.weight"),
    "a config of another size": lambda f: edited(f / "config.json", lambda c: c["text_config"].update(hidden_size=64)),
    "a thousand million experts": lambda f: edited(
        f / "config.json", lambda c: c["text_config"].update(num_experts=10**9)
    ),
    "a million layers": lambda f: edited(
        f / "config.json", lambda c: c["text_config"].update(num_hidden_layers=10**6)
    ),
    "a negative size": lambda f: edited(f / "config.json", lambda c: c["audio_config"].update(hidden_size=-4)),
    "a text for a number": lambda f: edited(f / "config.json", lambda c: c["text_config"].update(rms_norm_eps="x")),
    "a config that is a list": lambda f: (f / "config.json").write_text("[]"),
    "a config that is cut": lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:500]),
    "no processor": lambda f: (f / "processor_config.json").unlink(),
    "half a processor": lambda f: edited(f / "processor_config.json", lambda c: c.pop("feature_extractor")),
    "a setting out of range": lambda f: edited(f / "processor_config.json", lambda c: c.update(video_frames=10**9)),
    "a damaged template": lambda f: (f / "chat_template.jinja").write_text("{% for x in %}{{ y"),
    "a template that fails": lambda f: (f / "chat_template.jinja").write_text("{{ messages[9].role.x.y }}"),
    "a damaged tokenizer": lambda f: (f / "tokenizer.json").write_text('{"model": {}}'),
    "a tokenizer that is binary": lambda f: (f / "tokenizer.json").write_bytes(bytes(range(256))),
    "generation settings that are none": lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
    "weights that are text": lambda f: (f / "model.safetensors").write_text("hello"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
}


def edited(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def lose(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_sentence(checkpoint, tmp_path, capsys, name):
    shutil.copytree(checkpoint, tmp_path / "broken")
    BROKEN[name](tmp_path / "broken")
    code, out, err = run(capsys, "generate", tmp_path / "broken", "--text", "hi", "--max-new-tokens", 2)
    assert (code, out) == (1, "") and err.startswith("uni-moe: ") and err.count("\n") == 1, (code, out, err)
    assert len(err) < 700 and "Traceback" not in err and " at 0x" not in err


def test_a_person_who_asks_hears_nothing_of_optional_libraries(checkpoint):
    command = [
        sys.executable,
        "-m",
        "uni_moe_hf.cli",
        "generate",
        str(checkpoint),
        "--text",
        "hi",
        "--max-new-tokens",
        "2",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_empty_question_is_no_question(checkpoint, capsys):
    assert "The text is empty" in run(capsys, "generate", checkpoint, "--text", " ")[2]
