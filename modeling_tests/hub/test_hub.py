"""Pushing from the trainer: what is uploaded works from a Hub-style cache in a fresh process, as its card says."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from test_remote_code import HUB_FILES, PROCESSOR_FILES
from tiny import DENSE, make_inputs, tiny_model, tiny_processor
from tiny_training import make_own_trainer, write_media

from uni_moe_hf import UniMoEForConditionalGeneration


COMMIT = "0123456789012345678901234567890123456789"


class Hub:
    """Stands in for the Hub: keeps what is uploaded, in the layout of its cache."""

    def __init__(self, root: Path):
        self.root, self.uploads = root, []

    def repository(self, name: str) -> Path:
        return self.root / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT

    def create_repo(self, repo_id: str, **kwargs) -> SimpleNamespace:
        refs = self.repository(repo_id).parents[1] / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        (refs / "main").write_text(COMMIT)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns=(), **kwargs) -> None:
        for file in Path(folder_path).rglob("*"):
            name = str(file.relative_to(folder_path))
            ignored = any(fnmatch(each, pattern) for each in (name, file.name) for pattern in ignore_patterns or ())
            if file.is_file() and not ignored:
                target = self.repository(repo_id) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
                self.uploads.append(name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: made)
    return made


def run_card(card: ModelCard, hub: Hub, tmp_path: Path, more: str = "") -> None:
    """The card's snippet, and `more`, in a process that has only the cache."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment = {**clean, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub.root), "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = f"import sys; sys.modules['uni_moe_hf'] = None\n{snippet}\n{more}"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_pushed_model_is_whole_and_its_card_runs(hub, tmp_path):
    media = write_media(tmp_path)
    sft = make_own_trainer(
        media, tmp_path / "run", tiny_model(DENSE), "connectors", push_to_hub=True, hub_model_id="me/stage1"
    )
    sft.train()
    sft.push_to_hub(dataset_name="me/captions")
    repository = hub.repository("me/stage1")
    names = {file.name for file in repository.iterdir()}
    assert names >= HUB_FILES | PROCESSOR_FILES | {"config.json", "model.safetensors", "processor_config.json"}
    assert not any("checkpoint" in name or name.startswith(("optimizer", "rng")) for name in hub.uploads)
    card = ModelCard.load(repository / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "any-to-any",
        "other",
    )
    assert {"custom_code", "uni-moe", "image", "speech"} <= set(card.data.tags)
    assert card.data.datasets == ["me/captions"] and card.data.base_model is None
    run_card(card, hub, tmp_path)


def test_a_pushed_adapter_names_its_base_and_its_card_runs_with_the_trained_logits(hub, tmp_path):
    media = write_media(tmp_path)
    hub.create_repo("me/grown")
    grown = tiny_model({"shared_expert_base": True})
    grown.save_pretrained(hub.repository("me/grown"))
    tiny_processor(grown.config).save_pretrained(hub.repository("me/grown"))
    model = UniMoEForConditionalGeneration.from_pretrained("me/grown", cache_dir=hub.root)
    sft = make_own_trainer(media, tmp_path / "run", model, "moe", push_to_hub=True, hub_model_id="me/stage3")
    sft.train()
    sft.push_to_hub()
    repository = hub.repository("me/stage3")
    names = {file.name for file in repository.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= names
    assert "model.safetensors" not in names
    card = ModelCard.load(repository / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", "me/grown")
    assert card.data.to_dict()["base_model_relation"] == "adapter"

    inputs = make_inputs(model.config, ("image", 5, "audio"), ("speech", 3, "video"))
    with torch.no_grad():
        torch.save((inputs, sft.model.eval()(**inputs).logits), tmp_path / "trained.pt")
    same = """
import torch
inputs, logits = torch.load("trained.pt", weights_only=True)
with torch.no_grad():
    assert (model.eval()(**inputs).logits - logits).abs().max() <= 1e-5
"""
    run_card(card, hub, tmp_path, more=same)
