"""Reading and writing checkpoints a tensor at a time: the library reads what is written, memory stays small."""

import json
import os
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uni_moe_hf.original.checkpoints import (
    TensorFiles,
    TensorInfo,
    load_pickle,
    new_folder,
    weight_files,
    write_safetensors,
)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 10).to(dtype)


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("shard", ["1GB", "1KB"])
def test_the_library_reads_what_is_written(shard, tmp_path):
    tensors = {str(dtype): some(dtype, 7, 5, 3) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "view": torch.randn(6, 8).T}
    write_safetensors(
        tmp_path, infos(tensors), lambda name: [tensors[name]], max_shard_size=shard, metadata={"a": "b"}
    )
    found = {}
    for file in weight_files(tmp_path):
        found |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "a": "b"}
    assert (
        (len(weight_files(tmp_path)) > 1) == (shard == "1KB") == (tmp_path / "model.safetensors.index.json").is_file()
    )
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_parts_are_joined_and_rounded(tmp_path):
    parts = [torch.randn(2, 3), torch.randn(1, 3, dtype=torch.float64), torch.randn(3)]
    target = {"x": TensorInfo((4, 3), torch.bfloat16)}
    write_safetensors(tmp_path, target, lambda name: iter(parts))
    expected = torch.cat([part.reshape(-1, 3).bfloat16() for part in parts])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], expected)
    with pytest.raises(ValueError, match="'x' got 12 bytes, its shape has 24"):
        write_safetensors(tmp_path, target, lambda name: parts[:1])


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_tensors_are_read_one_by_one_under_new_names(kind, tmp_path):
    tensors = {"a.x": torch.randn(4, 3), "a.y": torch.randn(2), "b": torch.ones(1)}
    file = tmp_path / ("f.safetensors" if kind == "safetensors" else "f.bin")
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "zip")
    files = TensorFiles([file], rename=lambda name: name.removeprefix("a."))
    assert files.info["x"] == TensorInfo((4, 3), torch.float32) and set(files.info) == {"x", "y", "b"}
    assert torch.equal(files.read("x"), tensors["a.x"]) and torch.equal(
        files.read_rows("x", 1, 3), tensors["a.x"][1:3]
    )
    assert "a.x" not in files and files.file_of("y") == file.name
    with pytest.raises(ValueError, match=r"holds 'a\.y', and 'a\.x' in .* means the same tensor"):
        TensorFiles([file], rename=lambda name: name[0])


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'.*model-1\.safetensors' is missing, though 'model\.safetensors\.index"):
        weight_files(tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match=r"Writing needs 0\.00 GB but '.*' has 0\.00 GB left"):
        write_safetensors(tmp_path, {"x": TensorInfo((4, 3), torch.float32)}, lambda name: [])
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep" / "new") as folder:
        (folder / "half").write_text("")
        assert not (tmp_path / "deep" / "new").exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "new") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), new_folder(tmp_path / "file" / "new"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("new_format", "limit"), [(True, 64), (False, 128 + 96)], ids=["mapped", "old"])
def test_memory_does_not_grow_with_the_files(new_format, limit, tmp_path):
    """
    64 tensors of 4 MB through two pickles of 128 MB: a few tensors in memory, or one file where it cannot be mapped,
    and what the allocator keeps for itself; never two files.
    """
    script = f"""
        import re, torch
        from pathlib import Path
        from uni_moe_hf.original.checkpoints import TensorFiles, load_pickle, write_safetensors
        # Not `getrusage`: a child begins with its parent's peak.
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
        folder = Path({str(tmp_path)!r})
        before = peak()
        files = TensorFiles([folder / "0.bin", folder / "1.bin"])
        write_safetensors(folder, files.info, lambda name: [files.read(name) + 1])
        print(peak() - before)
    """
    for half in range(2):
        tensors = {str(index): torch.full((1024, 1024), float(index)) for index in range(half * 32, half * 32 + 32)}
        torch.save(tensors, tmp_path / f"{half}.bin", _use_new_zipfile_serialization=new_format)
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0 < int(run.stdout) < limit  # MB
    state = load_file(tmp_path / "model.safetensors")
    assert all((state[str(index)] == index + 1).all() for index in range(64))


def damaged(data: bytes, seed: int) -> bytes:
    """A few bytes of a file changed, or its end lost."""
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        changed[draw.randrange(min(len(data), 1500))] = draw.randrange(256)
    return bytes(changed[: draw.randrange(len(data)) if seed % 4 == 0 else None])


@pytest.mark.parametrize("new_format", [True, False])
def test_a_damaged_pickle_is_read_or_refused_by_one_sentence(new_format, tmp_path):
    torch.save(
        {"a": some(torch.float32, 4, 4), "b": {"c": [1, 2]}},
        tmp_path / "whole",
        _use_new_zipfile_serialization=new_format,
    )
    data, refused = (tmp_path / "whole").read_bytes(), 0
    for seed in range(300):
        (tmp_path / "x").write_bytes(damaged(data, seed))
        try:
            load_pickle(tmp_path / "x")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error).strip() and " at 0x" not in str(error)
    assert refused > 50


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, others = tmp_path / f".new.{dead.pid}-abc.partial", tmp_path / f".other.{dead.pid}-abc.partial"
    living = tmp_path / f".new.{os.getpid()}-abc.partial"
    for folder in (left, others, living):
        folder.mkdir()
        (folder / "half").write_text("")
    with new_folder(tmp_path / "new"):
        pass
    assert not left.exists() and living.exists() and others.exists()
