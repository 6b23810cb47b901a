"""Rows are counted by what they hold, and some of every kind are shown."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny import picture, tone, user

from uni_moe_hf.cli import main
from uni_moe_hf.insight.contact_sheet import contact_sheet
from uni_moe_hf.training.checking import check_rows


@pytest.fixture
def rows(tmp_path):
    """Two pictures in three rows, two sounds, a text, and a file that is broken."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "b.png")
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    soundfile.write(tmp_path / "b.wav", tone(1.5), 16000)
    (tmp_path / "c.png").write_bytes(b"no picture")
    parts = [{"type": "image", "path": f"{name}.png"} for name in "aabc"]
    parts += [{"type": kind, "path": f"{name}.wav"} for kind, name in (("audio", "a"), ("speech", "b"))]
    parts += [{"type": "text", "text": "no media"}]
    lines = [
        {"messages": [*user(part, "what"), {"role": "assistant", "content": f"answer {index % 2}"}]}
        for index, part in enumerate(parts)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "rows.jsonl"


def test_clips_files_sizes_and_seconds_are_counted(rows):
    found = {}
    assert [number for number, _ in check_rows(rows, found=found)] == [4]
    assert {kind: (each.rows, each.clips, len(each.files)) for kind, each in found.items()} == {
        "image": (3, 3, 2), "audio": (1, 1, 1), "speech": (1, 1, 1),
    }  # fmt: skip
    assert (30, 20) in found["image"].sizes and found["speech"].seconds == [1.5]
    assert found["image"].answers == {"answer 0": 2, "answer 1": 1}


def test_the_command_prints_counts_and_draws_a_sheet(rows, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "check", str(rows), "--sheet", str(sheet)]) == 1
    said = capsys.readouterr().out
    assert "image" in said and "1.5 s" in said and "row 4" in said
    assert f"'{sheet}' shows 3 image, 1 audio, 1 speech clips" in said
    with Image.open(sheet) as drawn:
        assert drawn.width > 1000 and len(set(np.asarray(drawn.convert("L")).flat)) > 50


def test_a_sheet_shows_at_most_what_is_wanted_and_says_when_there_is_nothing(rows, tmp_path):
    lines = [json.loads(line) | {"_root": str(tmp_path)} for line in rows.read_text().splitlines()]
    assert contact_sheet(lines, tmp_path / "one.png", per_modality=1) == {"image": 1, "audio": 1, "speech": 1}
    with pytest.raises(ValueError, match="No row holds a clip"):
        contact_sheet(lines[-1:], tmp_path / "none.png")
    with pytest.raises(ValueError, match="show 1 clip or more"):
        contact_sheet(lines, tmp_path / "none.png", per_modality=0)
    assert not (tmp_path / "none.png").exists()
