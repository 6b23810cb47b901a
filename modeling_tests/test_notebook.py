"""The notebook runs from its first cell to its last, on a stand-in for what `make demo` leaves."""

import json
from pathlib import Path

import pytest
import soundfile
from PIL import Image
from tiny import DENSE, ROOT, film, picture, tiny_model, tiny_processor, tone, user

from uni_moe_hf import export_expert, grow_experts


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


@pytest.fixture
def demo(tmp_path) -> Path:
    """Folders and files as `make demo` leaves them, tiny and random."""
    dense = tiny_model(DENSE)
    mixture = grow_experts(
        tiny_model(DENSE), {"text": None, "vision": None, "speech": None}, shared_base=True, lora_rank=4
    )
    for folder, model in (("model", mixture), ("stage1", dense)):
        model.save_pretrained(tmp_path / folder)
        tiny_processor(model.config).save_pretrained(tmp_path / folder)
    for name in ("vision", "speech"):
        export_expert(mixture, tmp_path / f"stage2/{name}/expert", name)
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(picture()).save(data / "a.png")
    soundfile.write(data / "a.wav", tone(), 16000)
    Image.fromarray(film()[0]).save(data / "b.png")
    clips = [
        {"type": "image", "path": "a.png"},
        {"type": "audio", "path": "a.wav"},
        {"type": "speech", "path": "a.wav"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}
    rows = [user(clip, "what is this") for clip in (*clips, {"type": "image", "path": "b.png"})] * 4
    lines = [json.dumps({"messages": [*row, answer], "task": row[0]["content"][0]["type"]}) for row in rows]
    for name in ("test.jsonl", "stage3.jsonl"):
        (data / name).write_text("\n".join(lines))
    return tmp_path


def test_every_cell_of_the_notebook_runs(demo, monkeypatch):
    monkeypatch.setenv("UNI_MOE_DEMO", str(demo))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    printed = "".join(o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream")
    assert "experts: text, vision, speech" in printed and "exact_match" in printed and "loss" in printed
    assert any("image/png" in o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", []))


def test_the_notebook_as_it_is_kept_shows_results_and_stays_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code), "run it, and keep what it says"
    assert NOTEBOOK.stat().st_size < 100_000
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for cell in code for o in cell.outputs)
