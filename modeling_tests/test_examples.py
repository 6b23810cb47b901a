"""The example scripts run from parts to a merged model on tiny files, and the demo's data keep their promises."""

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from tiny import ROOT, child_environment, picture, tiny_processor, tone, user
from tiny_parts import save_dino, write_parts
from transformers import AutoModel, AutoProcessor

from uni_moe_hf import YamnetConfig, YamnetFeatureExtractor, YamnetModel, check_rows, sft_config
from uni_moe_hf.training.options import in_one_sentence
from uni_moe_hf.training.trainer import REQUIRED


EXAMPLES = ROOT / "examples"
TINY = (  # neither `--use_cpu` nor `--bf16 false`: the scripts see that there is no GPU
    "--gradient_checkpointing false --max_steps 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --save_strategy no --report_to none --disable_tqdm true"
).split()


@pytest.fixture(scope="module", autouse=True)
def import_paths():
    """Examples are scripts, not a package."""
    added = [str(EXAMPLES), str(EXAMPLES / "demo")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Tiny parts as folders, and a data set of files."""
    root = tmp_path_factory.mktemp("examples")
    write_parts(root)
    return root


def run(script: str, config: str, *args: str) -> None:
    module = importlib.import_module(script)
    module.main(*module.parse(["--config", str(EXAMPLES / "configs" / config), *args, *TINY]))


def test_the_three_scripts_lead_from_parts_to_a_merged_model(workplace):
    data = ["--dataset_name", str(workplace / "rows.jsonl"), "--feature_cache", str(workplace / "features")]
    towers = [
        word
        for name in ("vision_tower", "speech_tower", "audio_tower")
        for word in (f"--{name}", str(workplace / name))
    ]
    run(
        "train_stage1_connectors",
        "stage1_connectors.yaml",
        *(*data, "--fill_feature_cache"),
        *towers,
        *("--llm", str(workplace / "language_model"), "--output_dir", str(workplace / "stage1")),
        *("--num_speech_query_tokens", "3", "--num_audio_query_tokens", "5"),
        *("--audio_connector_config", (workplace / "qformer.json").read_text()),
    )
    stage1 = ["--model_name_or_path", str(workplace / "stage1")]
    for expert in ("image", "speech"):
        folder = str(workplace / "stage2" / expert)
        run(
            "train_stage2_experts",
            "stage2_experts.yaml",
            *(*data, "--without_towers"),
            *stage1,
            "--modalities",
            expert,
            "--output_dir",
            folder,
        )
    experts = [f"{name}={workplace / 'stage2' / name / 'expert'}" for name in ("image", "speech")]
    run(
        "train_stage3_moe",
        "stage3_moe.yaml",
        *(*data, "--without_towers"),
        *stage1,
        *("--experts", "text=", *experts, "--output_dir", str(workplace / "stage3")),
        *("--learning_rates", '{"expert LoRA": 1e-4}', "--group_by_modality", "true", "--skip_bad_rows", "true"),
        *("--resume_from_checkpoint", "last"),  # there is none yet
    )
    merged = workplace / "stage3/merged"
    model = AutoModel.from_pretrained(merged, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(merged, trust_remote_code=True)
    assert model.config.text_config.expert_names == ["text", "image", "speech"]
    chat = user({"type": "image", "path": str(workplace / "media/a.png")}, "what")
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    assert (workplace / "stage3/adapter_model.safetensors").is_file()
    assert (workplace / "stage3/grown/model.safetensors").is_file()


@pytest.mark.parametrize("options", [["--dataset_name", "nowhere.jsonl"], ["--dataset_name", "rows.jsonl"]])
def test_what_a_script_refuses_is_one_sentence(options, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    command = [sys.executable, str(EXAMPLES / "train_stage1_connectors.py"), "--llm", "nowhere", "--use_cpu"]
    environment = child_environment(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [*command, "--output_dir", "out", *options],
        capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("train_stage1_connectors.py: ") and "nowhere" in done.stderr


def test_what_others_raise_in_a_script_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="invalid literal"), in_one_sentence():
        int("no number")
    with pytest.raises(SystemExit, match="There is no stage 'fourth'"), in_one_sentence():
        sft_config("fourth", "out")
    monkeypatch.setenv("UNI_MOE_DEBUG", "1")
    with pytest.raises(ValueError, match="There is no stage"), in_one_sentence():
        sft_config("fourth", "out")


@pytest.mark.slow
def test_the_third_script_spreads_experts_over_processes(workplace):
    """Under `torchrun`; what two processes leave is merged by one, and loads alone."""
    test_the_three_scripts_lead_from_parts_to_a_merged_model(workplace)
    output = workplace / "spread"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [EXAMPLES / "train_stage3_moe.py", "--config", EXAMPLES / "configs/stage3_moe.yaml", *TINY, "--use_cpu"]
    command += ["--dataset_name", workplace / "rows.jsonl", "--model_name_or_path", workplace / "stage1"]
    command += ["--experts", "text=", f"image={workplace / 'stage2/image/expert'}", "--shared_base", "false"]
    command += ["--output_dir", output, "--expert_parallel_size", "2", "--fsdp_size", "2"]
    environment = child_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModel.from_pretrained(output / "merged", trust_remote_code=True).eval()
    assert not model.config.text_config.shared_expert_base
    inputs = tiny_processor(model.config)(text="what is it", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(
    ("name", "rate", "batch"),
    [("stage1_connectors", 2e-5, 32), ("stage2_experts", 4e-5, 16), ("stage3_moe", 4e-5, 8)],
)
def test_the_configs_hold_the_papers_numbers_and_what_our_collator_needs(name, rate, batch):
    config = yaml.safe_load((EXAMPLES / "configs" / f"{name}.yaml").read_text())
    assert config["learning_rate"] == rate
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == batch
    assert config["lr_scheduler_type"] == "cosine"
    assert config["warmup_steps"] == 0.03
    assert config["weight_decay"] == 0.0
    assert config["remove_unused_columns"] is False
    assert config["dataset_kwargs"] == {"skip_prepare_dataset": True}
    assert config["max_length"] is None
    assert {name: config[name] for name in REQUIRED} == REQUIRED


def test_every_config_belongs_to_a_script_and_says_how_it_is_run():
    for config in (EXAMPLES / "configs").glob("*.yaml"):
        script = EXAMPLES / f"train_{config.stem}.py"
        assert f"--config examples/configs/{config.name}" in script.read_text(), config.name


def test_the_demos_test_set_shares_no_attribute_pair_voice_or_nuisance_with_training(tmp_path):
    make_data, world = importlib.import_module("make_data"), importlib.import_module("world")
    rows, jobs = make_data.plan(tmp_path, 0, make_data.DEMO)

    seen = {"train": set(), "test": set()}
    voices = {"train": set(), "test": set()}
    for kind, split, facts, *_ in jobs:
        if kind in ("image", "video"):
            seen[split].add((facts["colour"], facts["shape"]))
        if "voice" in facts:
            voices[split].add(facts["voice"])
    assert not seen["train"] & seen["test"]
    assert not voices["train"] & voices["test"]
    timbres = {split: {voice.partition("+")[2] for voice in names} for split, names in voices.items()}
    assert not timbres["train"] & timbres["test"]
    assert not set(world.TRAIN_SPEEDS) & set(world.TEST_SPEEDS)

    paths = {split: {path for _, at, _, path, *_ in jobs if at == split} for split in seen}
    assert not paths["train"] & paths["test"]
    tasks = [row["task"] for row in rows["test"]]
    for task in ("image", "video", "audio", "speech", *make_data.MIXED):
        answers = {row["messages"][1]["content"][0]["text"] for row in rows["test"] if row["task"] == task}
        assert tasks.count(task) >= 200
        assert len(answers) >= 8
    assert len({seed for *_, seed, _ in jobs}) > 0.99 * len(jobs)


def test_the_demos_generators_keep_training_positions_and_levels_apart():
    world = importlib.import_module("world")
    rng = np.random.default_rng(0)
    spots = {split: {world.position(split, rng) for _ in range(500)} for split in ("train", "test")}
    assert not spots["train"] & spots["test"]
    bands = {split: {int(world.level(split, rng) * 9) for _ in range(500)} for split in ("train", "test")}
    assert bands["test"] == {2, 6}
    assert not bands["train"] & bands["test"]


def test_noise_stays_in_range_and_none_changes_nothing():
    world = importlib.import_module("world")
    rng = np.random.default_rng(0)
    pixels, wave = picture(), tone(0.1)
    for values, low, high in ((pixels, 0, 255), (wave, -1, 1), ((wave * 30000).astype(np.int16), -32768, 32767)):
        assert world.noisy(values, 0.0, rng) is values
        made = world.noisy(values, 0.2, rng)
        assert made.dtype == values.dtype and made.min() >= low and made.max() <= high
        assert np.std(made.astype(float) - values) == pytest.approx(0.2 * high, rel=0.5)


@pytest.mark.slow
def test_the_study_in_small_runs_to_its_page_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(EXAMPLES / "study/run.py"), str(tmp_path), "--quick", "--workers", "2"]
    first = subprocess.run(
        [*command, "--seeds", "2", "--claims", "start"], capture_output=True, text=True, timeout=900
    )
    assert first.returncode == 0, first.stderr[-2000:]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2
    again = subprocess.run([*command, "--claims", "start", "control"], capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:6] == lines and "4 of 4 runs" in again.stdout
    page = (tmp_path / "study.md").read_text()
    assert "5 arms x 2 seeds, 10 of 10 runs done" in page and "not run yet" not in page
    for letter in ("start", "control"):
        assert (tmp_path / f"study/{letter}.png").stat().st_size > 10_000


def packages(folder: Path) -> None:
    """What Debian's packages of stamps and prompts look like when they are unpacked."""
    stamps = folder / "usr/share/tuxpaint/stamps"
    sounds = folder / "usr/share/asterisk/sounds/en"
    listed = folder / "usr/share/doc/asterisk-core-sounds-en"
    for made in (stamps / "animals", stamps / "symbols", sounds, listed):
        made.mkdir(parents=True)
    lines = ["; comment", "beep: [a tone]", "missing: Not there."]
    for index in range(40):
        for kind in ("animals", "symbols"):
            Image.fromarray(picture(index)).convert("RGBA").save(stamps / kind / f"{index}.png")
            (stamps / kind / f"{index}.txt").write_text(
                f"bird {index}\nes.utf8=p\u00e1jaro {index}\n", encoding="utf-8"
            )
        soundfile.write(stamps / f"animals/{index}.ogg", tone(0.5, pitch=300 + 10 * index), 16000)
        with av.open(str(sounds / f"prompt{index}.g722"), "w", format="g722") as container:
            stream = container.add_stream("g722", rate=16000, layout="mono")
            samples = (tone(0.5, pitch=200 + 10 * index) * 20000).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 16000
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
        lines.append(f"prompt{index}: bell {'abcdefghij'[index % 10] * (1 + index // 10)}")
    (listed / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def test_rows_of_the_real_parts_are_held_out_by_their_texts(tmp_path):
    packages(tmp_path / "unpacked")
    script = [
        sys.executable,
        str(EXAMPLES / "real_parts/make_data.py"),
        str(tmp_path / "unpacked"),
        str(tmp_path / "data"),
    ]
    subprocess.run(script, check=True, capture_output=True)
    rows = {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (tmp_path / "data").glob("*.jsonl")
    }
    assert {name: bool(lines) for name, lines in rows.items()} == dict.fromkeys(
        ("stage1", "stage2_vision", "stage2_sound", "stage2_speech", "stage3", "test"), True
    )
    texts = {
        name: {row["messages"][1]["content"][0]["text"] for row in lines if row["task"] in ("picture", "recording")}
        for name, lines in rows.items()
    }
    assert len(texts["stage1"] | texts["test"]) == 80 and not texts["stage1"] & texts["test"]
    assert texts["stage3"] == texts["stage1"]
    assert {row["task"] for row in rows["test"]} == {"picture", "kind", "sound", "recording", "both"}
    assert list(check_rows(tmp_path / "data/stage3.jsonl")) == []


@pytest.mark.slow
def test_the_real_parts_script_trains_measures_and_asks(workplace, tmp_path):
    packages(tmp_path / "unpacked")
    scripts = EXAMPLES / "real_parts"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    arguments = [str(tmp_path), "--max_steps", "12", "--llm", str(workplace / "language_model")]
    arguments += ["--vision_tower", save_dino(tmp_path / "dino"), "--speech_tower", str(workplace / "speech_tower")]
    YamnetModel(YamnetConfig()).save_pretrained(tmp_path / "yamnet")
    YamnetFeatureExtractor(chunk_length=2).save_pretrained(tmp_path / "yamnet")
    arguments += ["--audio_tower", str(tmp_path / "yamnet")]
    for script in (["make_data.py", str(tmp_path / "unpacked"), str(tmp_path / "data")], ["run.py", *arguments]):
        command = [sys.executable, str(scripts / script[0]), *script[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    report = (tmp_path / "report.md").read_text()
    assert report.count("\n| ") == 2 + 5 + 12  # heads, stages, five tasks and all of them after two stages
    assert "picture" in report.partition("asked in a process")[2]
