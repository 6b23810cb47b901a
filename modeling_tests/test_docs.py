"""What README and docs print runs as printed, with tiny models where the demo would have left its own."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import soundfile
from families import plain_llm
from golden import FIXTURES
from originals import write_original
from peft import get_peft_model
from PIL import Image
from tiny import PACKAGE, ROOT, picture, tiny_model, tiny_processor, tiny_tokenizer, tone, user
from tiny_towers import WHISPER_V3, vision_tower
from transformers import SiglipImageProcessorPil, WhisperConfig, WhisperForConditionalGeneration

from uni_moe_hf import convert_checkpoint
from uni_moe_hf.cli import main
from uni_moe_hf.cli.main import command_parser
from uni_moe_hf.mixtures.expert_adapters import export_expert
from uni_moe_hf.training.stages import prepare_stage


PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of every block in a language."""
    pattern = rf"```{language}\n(.*?)```"
    return [(name, block) for name, page in PAGES.items() for block in re.findall(pattern, page, flags=re.DOTALL)]


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of every command, without comments."""
    lines = [(n, line) for n, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [(name, words) for name, line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = commands()
OURS = [(name, words[1:]) for name, words in COMMANDS if words[0] == "uni-moe"]
# Of these what is printed is parsed alone: they stay open, take parts from the Hub, or are run by other tests.
PARSED_ALONE = ("web", "train", "init", "convert", "merge-modalities", "beats")
# Run from the demo's folder, as it is after `make demo`.
RUN = [words for name, words in OURS if words[0] not in PARSED_ALONE and "outputs/own" not in " ".join(words)]
RUN = [words for words in RUN if words[:2] not in (["data", "rows"],) and "rows/train.jsonl" not in words]
# Each once, whatever pages it stands on; `card` last, which shows the report.
RUN = sorted(map(list, dict.fromkeys(map(tuple, RUN))), key=lambda words: words[0] == "card")
# Programs of others that pages name.
OTHERS = ("accelerate", "torchrun", "vllm", "transformers", "lmms-eval", "hf", "pip", "make", "python")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as it is after `make demo`, but tiny."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "examples/media", root / "examples/media")
    demo = root / "outputs/demo"
    dense = {"mlp_layer_types": ["dense", "dense"]}
    named = {"num_experts": 4, "expert_names": ["text", "vision", "audio", "speech"]}
    for name, text in (("model", named), ("stage1", dense)):
        model = tiny_model(text)
        model.save_pretrained(demo / name)
        tiny_processor(model.config).save_pretrained(demo / name)
    for name, modality in (("vision", "image"), ("speech", "speech")):
        model = tiny_model(dense)
        get_peft_model(model, prepare_stage(model, "experts", [modality])).save_pretrained(demo / "stage2" / name)
        export_expert(demo / "stage2" / name, demo / "stage2" / name / "expert")
    write_rows(demo / "data")
    model = tiny_model(named)
    model.save_pretrained(demo / "stage3/grown")
    tiny_processor(model.config).save_pretrained(demo / "stage3/grown")
    (demo / "results.json").write_text(json.dumps({"task": "short-answers", "figures": {}}))
    # The parts that pages name, tiny.
    llm, eyes, ears = root / "Qwen/Qwen3-0.6B", root / "google/siglip2-base-patch16-224", root / "openai"
    plain_llm("Qwen3").save_pretrained(llm)
    tiny_tokenizer().save_pretrained(llm)
    vision_tower("siglip_vision_model").save_pretrained(eyes)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(eyes)
    config = {**WHISPER_V3.to_dict(), "max_target_positions": 60}
    WhisperForConditionalGeneration(WhisperConfig(**config)).save_pretrained(ears / "whisper-large-v3-turbo")
    return root


def write_rows(folder: Path) -> None:
    """Questions about every kind of file, as the demo leaves them."""
    folder.mkdir(parents=True)
    rows = []
    for index in range(16):
        kind = ("image", "audio", "speech", "text")[index % 4]
        name = f"{index}.{'png' if kind == 'image' else 'wav'}"
        if kind == "image":
            Image.fromarray(picture(index)).save(folder / name)
        else:
            soundfile.write(folder / name, tone(0.3, pitch=300 + 20 * index), 16000)
        part = {"type": "text", "text": "a bird"} if kind == "text" else {"type": kind, "path": name}
        answer = {"role": "assistant", "content": [{"type": "text", "text": ("red", "blue")[index // 4 % 2]}]}
        rows.append({"messages": [*user(part, "what is it"), answer], "task": kind})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))


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
    printed = [words for name, words in OURS if name == "docs/conversion.md"]
    assert [words[0] for words in printed] == ["convert", "convert", "merge-modalities", "beats"]
    for words in [*printed, ["convert", "--reverse", "kept/uni-moe-audio", "--output", "original"]]:
        assert main(words) == 0, words
    assert [words for name, words in OURS if words[0] == "convert" and name == "README.md"] == printed[:1]
    assert {path.name for path in originals.iterdir()} >= {"uni-moe-audio", "uni-moe-8e", "uni-moe-both", "original"}


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_a_python_block_runs_as_printed(page, block, workplace):
    assert max(map(len, block.splitlines())) <= 120
    run = subprocess.run([sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_a_command_runs_as_printed_after_the_demo(words, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    # `doctor` may find fault with a model that was never trained.
    assert main(words) <= (words[0] == "doctor"), capsys.readouterr().err


def test_every_command_is_one_that_there_is():
    for _, words in OURS:
        command_parser().parse_args(words)
    for page, words in COMMANDS:
        assert words[0] in (*OTHERS, "uni-moe"), (page, words)


def test_options_of_scripts_are_ones_that_there_are(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(ROOT)
    printed = [words for _, words in COMMANDS if words[0] == "accelerate"]
    assert len(printed) == 6
    for words in printed:
        script = next(word for word in words if word.endswith(".py"))
        importlib.import_module(Path(script).stem).parse(words[words.index(script) + 1 :])


def test_what_pages_name_exists():
    makefile, project = (ROOT / "Makefile").read_text(), tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for name, page in PAGES.items():
        for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", page, flags=re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (name, target)
        for extra in re.findall(r"uni-moe-hf\[(\w+)\]", page):
            assert extra in extras, (name, extra)
        files = re.findall(
            r"\b(?:examples|benchmarks|modeling_tests)/[\w/.-]+\.(?:py|yaml|png|wav|md|ipynb|html)\b", page
        )
        for file in files:
            assert (ROOT / file).is_file(), (name, file)
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page)
        for link, anchor in [*links, *re.findall(r'src(?:set)?="([^"]*)()"', page)]:
            target = (ROOT / name).parent / link if link else ROOT / name
            assert target.is_file(), (name, link)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_json_blocks_are_json():
    for page, block in blocks("json"):
        assert json.loads(block), page


def test_the_readme_is_read_in_ten_minutes_and_its_pictures_are_as_drawn(monkeypatch):
    assert len(PAGES["README.md"].encode()) < 18_000
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    draw_system = importlib.import_module("draw_system")
    for name, theme in draw_system.THEMES.items():
        assert (ROOT / f"docs/images/{name}.svg").read_text(encoding="utf-8") == draw_system.draw(theme)


def test_the_tree_names_every_module():
    for module in PACKAGE.rglob("*.py"):
        if not module.name.startswith("__"):
            tree = PAGES["docs/internals.md"]
            assert re.search(rf"^ +(\w+\.py )*{module.name}\b", tree, flags=re.MULTILINE), module.name


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text()
    assert "\nmake test\n" in script
