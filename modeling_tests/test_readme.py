"""Every Python block of the README runs as printed, with tiny models where the demo would have left its own."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import plain_llm
from golden import FIXTURES
from originals import write_original
from peft import get_peft_model
from tiny import PACKAGE, ROOT, tiny_model, tiny_processor, tiny_tokenizer
from tiny_towers import WHISPER_V3, vision_tower
from transformers import SiglipImageProcessorPil, WhisperConfig, WhisperForConditionalGeneration

from uni_moe_hf import convert_checkpoint
from uni_moe_hf.cli import main
from uni_moe_hf.mixtures.expert_adapters import export_expert
from uni_moe_hf.training.stages import prepare_stage


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as it is after `make demo`, but tiny."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "examples/media", root / "examples/media")
    demo = root / "outputs/demo"
    dense = {"mlp_layer_types": ["dense", "dense"]}
    for name, text in (("model", None), ("stage1", dense)):
        model = tiny_model(text)
        model.save_pretrained(demo / name)
        tiny_processor(model.config).save_pretrained(demo / name)
    for name, modality in (("vision", "image"), ("speech", "speech")):
        model = tiny_model(dense)
        get_peft_model(model, prepare_stage(model, "experts", [modality])).save_pretrained(demo / "stage2" / name)
        export_expert(demo / "stage2" / name, demo / "stage2" / name / "expert")
    # The parts that the README names, tiny.
    llm, eyes, ears = root / "Qwen/Qwen3-0.6B", root / "google/siglip2-base-patch16-224", root / "openai"
    plain_llm("Qwen3").save_pretrained(llm)
    tiny_tokenizer().save_pretrained(llm)
    vision_tower("siglip_vision_model").save_pretrained(eyes)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(eyes)
    config = {**WHISPER_V3.to_dict(), "max_target_positions": 60}
    WhisperForConditionalGeneration(WhisperConfig(**config)).save_pretrained(ears / "whisper-large-v3-turbo")
    return root


@pytest.fixture
def originals(tmp_path) -> Path:
    """The folders that the commands name, with tiny checkpoints."""
    names = {
        "audio": ("Uni-MoE-audio-base", "Uni-MoE-audio-e2"),
        "speech": ("base", "e2"),
        "eight": ("Uni-MoE-speech-base", "Uni-MoE-8e-e2"),
    }
    for name, (base, finetuned) in names.items():
        variant = "audio" if name == "audio" else "speech"
        sizes = {"eight": True, "experts": 8} if name == "eight" else {"llm_seed": 7}
        arguments = write_original(tmp_path / "in" / name, variant=variant, layers=2, **sizes)
        arguments["vision_tower"] = FIXTURES / "audio" / "clip"
        if name != "eight":
            convert_checkpoint(output=tmp_path / "kept" / f"uni-moe-{name}", lora="keep", **arguments)
        arguments["base"].rename(tmp_path / base)
        arguments["finetuned"].rename(tmp_path / finetuned)
    arguments["experts"].rename(tmp_path / "Uni-MoE-8e-Experts")
    shutil.copytree(FIXTURES / "audio" / "clip", tmp_path / "clip-vit-large-patch14-336")
    shutil.copytree(FIXTURES / "speech" / "whisper", tmp_path / "whisper-small")
    shutil.copy(FIXTURES / "audio" / "beats.pt", tmp_path / "BEATs_iter3_plus_AS2M.pt")
    return tmp_path


def test_the_commands_for_published_checkpoints_run_as_printed(originals, monkeypatch):
    monkeypatch.chdir(originals)
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith(("uni-moe convert", "uni-moe merge-modalities"))]
    assert len(commands) == 3
    for command in [*commands, "uni-moe convert --reverse kept/uni-moe-audio --output original"]:
        assert main(shlex.split(command)[1:]) == 0, command
    made = {path.name for path in originals.iterdir()}
    assert made >= {"uni-moe-audio", "uni-moe-8e", "uni-moe-both", "original"}


def test_the_readme_has_blocks_to_run():
    assert len(BLOCKS) >= 3
    assert max(len(line) for block in BLOCKS for line in block.splitlines()) <= 130


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_readme_runs_as_printed(block, workplace):
    run = subprocess.run([sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)) - {"are"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"examples/[\w/.]+\.(?:py|yaml|png|wav)", README):
        assert (ROOT / path).is_file(), path


def test_the_tree_of_the_readme_names_every_module():
    for module in PACKAGE.rglob("*.py"):
        if not module.name.startswith("__"):
            assert re.search(rf"^ +(\w+\.py )*{module.name}\b", README, flags=re.MULTILINE), module.name


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text()
    assert "\nmake test\n" in script
