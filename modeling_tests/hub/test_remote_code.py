"""Saved folders work alone: loaded by a process in which this package cannot be imported."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import soundfile
import torch
from PIL import Image
from tiny import film, picture, tiny_model, tiny_processor, tone, user
from transformers import pipeline


HUB_FILES = {
    "compat_uni_moe.py",
    "configuration_uni_moe.py",
    "connectors_uni_moe.py",
    "decoder_uni_moe.py",
    "expert_kernels_uni_moe.py",
    "expert_segments_uni_moe.py",
    "experts_uni_moe.py",
    "generation_uni_moe.py",
    "modeling_uni_moe.py",
    "towers_uni_moe.py",
}
PROCESSOR_FILES = {
    "compat_uni_moe.py",
    "configuration_uni_moe.py",
    "conversations_uni_moe.py",
    "feature_extraction_uni_moe.py",
    "files_uni_moe.py",
    "media_uni_moe.py",
    "processing_uni_moe.py",
    "templates_uni_moe.py",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Runs every check by name and notes what it gave, so that one process serves many tests.
CHILD = """
import json, sys, traceback

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "uni_moe_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
# Checkpoints must load where these are missing, from the Hub too, where every file's imports are checked.
sys.modules.update(dict.fromkeys(["decord", "av", "soxr", "trl", "peft", "datasets"]))

import torch
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
    AutoTokenizer, pipeline,
)

job = json.load(open(sys.argv[1]))
again = job["again"]
results = {}


def check(function):
    try:
        results[function.__name__] = function()
    except Exception:
        results[function.__name__] = traceback.format_exc()
    return function


def encoded(where):
    processor = AutoProcessor.from_pretrained(where, trust_remote_code=True)
    return processor.apply_chat_template(
        job["chat"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def gap(model, inputs=None):
    inputs = inputs or torch.load(job["inputs"])
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    return (logits - torch.load(job["logits"])).abs().max().item()


def answer(where):
    pipe = pipeline("any-to-text", model=where, trust_remote_code=True)
    assert type(pipe).__module__.startswith("transformers_modules."), type(pipe).__module__
    return pipe(job["chat"], max_new_tokens=5, return_full_text=False)[0]["generated_text"]


def load(auto, where):
    return auto.from_pretrained(where, trust_remote_code=True)


@check
def the_package_is_out_of_reach():
    try:
        import uni_moe_hf
    except ModuleNotFoundError as error:
        return str(error)


@check
def config():
    config = load(AutoConfig, job["model"])
    return [config.model_type, config.text_config.num_experts, config.audio_config.model_type, list(config.modalities)]


@check
def model():
    return gap(load(AutoModel, job["model"]))


@check
def multimodal_model():
    return gap(load(AutoModelForMultimodalLM, job["model"]))


@check
def image_text_model():
    return gap(load(AutoModelForImageTextToText, job["model"]))


@check
def processor():
    expected = torch.load(job["inputs"])
    inputs = encoded(job["processor"])
    return sorted(inputs) == sorted(expected) and all(torch.equal(inputs[name], expected[name]) for name in expected)


@check
def parts_of_the_processor():
    return [
        type(load(auto, job["processor"])).__name__ for auto in (AutoFeatureExtractor, AutoTokenizer)
    ]


@check
def both_in_one_folder():
    return [gap(load(AutoModel, job["both"]), encoded(job["both"])), answer(job["both"])]


@check
def pipeline_folder():
    return [gap(load(AutoModel, job["pipeline"]), encoded(job["pipeline"])), answer(job["pipeline"])]


@check
def from_the_hub():
    return [gap(load(AutoModel, "org/name"), encoded("org/name")), answer("org/name")]


@check
def multimodal_model_from_the_hub():
    return gap(load(AutoModelForMultimodalLM, "org/name"))


@check
def saved_again():
    load(AutoModelForMultimodalLM, job["both"]).save_pretrained(again)
    load(AutoProcessor, job["both"]).save_pretrained(again)
    return [gap(load(AutoModel, again), encoded(again)), answer(again)]


@check
def pipeline_saved_again():
    pipeline("any-to-text", model="org/name", trust_remote_code=True).save_pretrained(again + "_pipeline")
    return [gap(load(AutoModel, again + "_pipeline"), encoded(again + "_pipeline")), answer(again + "_pipeline")]


@check
def a_model_of_few_parts():
    return [load(AutoModel, job["small"]).config.modalities, type(load(AutoConfig, job["small"])).__name__]


@check
def nothing_of_the_package_was_needed():
    return [name for name in sys.modules if name.split(".")[0] == "uni_moe_hf"]


json.dump(results, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> dict:
    """Saves everything here, loads it there; what the checks there gave, and the answer that is right."""
    root = tmp_path_factory.mktemp("remote")
    Image.fromarray(picture()).save(root / "picture.png")
    soundfile.write(root / "sound.wav", tone(1.5), 16000)
    for number, frame in enumerate(film()):
        Image.fromarray(frame).save(root / f"{number}.png")
    chat = user(
        {"type": "image", "path": str(root / "picture.png")},
        {"type": "video", "video": [str(root / f"{number}.png") for number in range(5)]},
        {"type": "audio", "path": str(root / "sound.wav")},
        {"type": "speech", "path": str(root / "sound.wav")},
        "say <image>",
    )
    model = tiny_model()
    processor = tiny_processor(model.config, video_frames=4)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        torch.save(model(**inputs).logits, root / "logits.pt")
    torch.save(dict(inputs), root / "inputs.pt")
    pipe = pipeline("any-to-text", model=model, processor=processor)

    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "processor")
    model.save_pretrained(root / "both")
    processor.save_pretrained(root / "both")
    pipe.save_pretrained(root / "pipeline")
    tiny_model(without=("vision", "audio"), text={"shared_expert_base": True}).save_pretrained(root / "small")
    repository = root / "hub" / "models--org--name"
    shutil.copytree(root / "both", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)

    names = ("model", "processor", "both", "pipeline", "small", "again")
    job = {"chat": chat, **{name: str(root / name) for name in names}}
    job |= {name: str(root / f"{name}.pt") for name in ("inputs", "logits")}
    (root / "job.json").write_text(json.dumps(job))
    (root / "child.py").write_text(CHILD)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "home"),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    run = subprocess.run(
        [sys.executable, "child.py", "job.json", "results.json"],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads((root / "results.json").read_text())
    answer = pipe(chat, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    return {"root": root, "answer": answer, **results}


def files(folder) -> set[str]:
    return {file.name for file in folder.iterdir() if file.suffix == ".py"}


def test_the_child_could_not_import_the_package(child):
    assert child["the_package_is_out_of_reach"] == "uni_moe_hf"
    assert child["nothing_of_the_package_was_needed"] == []


def test_a_saved_model_brings_all_its_code(child):
    assert files(child["root"] / "model") == HUB_FILES
    assert files(child["root"] / "small") == HUB_FILES
    config = json.loads((child["root"] / "model" / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }
    assert config["custom_pipelines"]["any-to-text"]["impl"] == "generation_uni_moe.AnyToTextPipeline"


def test_a_saved_processor_and_a_saved_pipeline_bring_all_their_code(child):
    assert files(child["root"] / "processor") == PROCESSOR_FILES
    assert files(child["root"] / "both") == files(child["root"] / "pipeline") == HUB_FILES | PROCESSOR_FILES


def test_the_config_loads_alone(child):
    assert child["config"] == ["uni_moe", 4, "beats", ["image", "video", "audio", "speech"]]


@pytest.mark.parametrize("check", ["model", "multimodal_model", "image_text_model", "multimodal_model_from_the_hub"])
def test_a_model_loads_alone_through_every_auto_class_with_the_same_logits(child, check):
    # 1e-5: the same arithmetic in another process, with other threads; logits are of order 1.
    assert isinstance(child[check], float), child[check]
    assert child[check] <= 1e-5


def test_a_processor_loads_alone_and_gives_the_same_inputs(child):
    assert child["processor"] is True, child["processor"]


def test_feature_extractor_and_tokenizer_load_alone(child):
    assert child["parts_of_the_processor"][0] == "UniMoEFeatureExtractor", child["parts_of_the_processor"]


@pytest.mark.parametrize(
    "check", ["both_in_one_folder", "pipeline_folder", "from_the_hub", "saved_again", "pipeline_saved_again"]
)
def test_model_processor_and_pipeline_work_alone_together(child, check):
    assert isinstance(child[check], list), child[check]
    gap, answer = child[check]
    assert gap <= 1e-5
    assert answer == child["answer"]


def test_a_folder_saved_from_remote_code_is_as_complete_as_the_first(child):
    for again in ("again", "again_pipeline"):
        first, second = ({f.name: f for f in (child["root"] / d).iterdir()} for d in ("both", again))
        assert set(second) == set(first)
        for name in files(child["root"] / "both"):
            assert second[name].read_text() == first[name].read_text(), name


def test_a_model_without_some_towers_loads_alone(child):
    assert child["a_model_of_few_parts"] == [["speech"], "UniMoEConfig"]


def test_the_answer_is_worth_comparing(child):
    assert torch.load(child["root"] / "logits.pt").std() > 0.1
    assert child["answer"]


OLD = """
import sys
from transformers import AutoConfig, AutoProcessor
sys.modules.update(dict.fromkeys(["uni_moe_hf"]))
for version in sys.argv[2:]:
    sys.modules["transformers"].__version__ = version
    for auto in (AutoConfig, AutoProcessor):
        try:
            auto.from_pretrained(sys.argv[1], trust_remote_code=True)
            print("loaded")
        except ImportError as error:
            print(error)
"""

WITHOUT = """
import sys
sys.modules["uni_moe_hf"] = None
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
for missing, modality in zip(sys.argv[3::2], sys.argv[4::2]):
    there = {name: sys.modules.pop(name, None) for name in missing.split(",")}
    sys.modules.update(dict.fromkeys(there))
    try:
        processor(**{"text": f"<{modality}>", {"video": "videos"}.get(modality, modality): sys.argv[2]})
    except ImportError as error:
        print(error)
    for name, module in there.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module
"""


def run_alone(code: str, *arguments: object) -> str:
    """What a process prints in which the package cannot be imported."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


def test_an_older_library_is_named_in_one_sentence(folder):
    lines = run_alone(OLD, folder, "5.16.0", "4.57.6", "5.16.1.dev0").splitlines()
    sentence = "Uni-MoE needs transformers 5.16.1 or newer, this is {}: `pip install -U transformers`."
    # What is being released counts as released.
    assert lines == [sentence.format("5.16.0")] * 2 + [sentence.format("4.57.6")] * 2 + ["loaded"] * 2


def test_a_missing_optional_library_is_named_in_one_sentence(folder, tmp_path):
    soundfile.write(tmp_path / "clip.wav", tone(), 8000)
    cases = {
        ("soundfile,av", "speech"): "Reading audio files needs soundfile or PyAV: `pip install soundfile soxr`",
        ("soundfile,av", "audio"): "Reading audio files needs soundfile or PyAV",
        ("decord,av", "video"): "Reading video files needs PyAV or decord: `pip install av`",
        ("soxr", "speech"): "resampling needs `pip install soxr`",
    }
    said = run_alone(WITHOUT, folder, tmp_path / "clip.wav", *(word for case in cases for word in case)).splitlines()
    assert len(said) == len(cases)
    for message, line in zip(cases.values(), said, strict=True):
        assert message in line
