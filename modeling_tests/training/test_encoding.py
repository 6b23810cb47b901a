"""A feature cache is filled before a training: by several, interrupted or killed, and nothing is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import EXACT, ROOT, TESTS, child_environment, tiny_model, tiny_processor
from tiny_caches import DENSE, trained
from tiny_training import rows

from uni_moe_hf import (
    FeatureCache,
    UniMoEDataCollator,
    encode_rows,
)
from uni_moe_hf.cli import main
from uni_moe_hf.training import encoding, feature_cache


def test_two_encoders_may_read_the_same_rows(parts, media, tmp_path, monkeypatch):
    """The second finds, batch by batch, that the first has just stored what it was about to read."""
    model, processor = parts
    collator = UniMoEDataCollator(processor, media_root=media)
    mine, other = (FeatureCache(tmp_path / "c", model, processor, fill=True) for _ in range(2))
    batches = encoding._batches

    def overtaken(*args):
        monkeypatch.setattr(encoding, "_batches", batches)
        encode_rows(rows(), model, collator, other)
        processor.feature_cache = mine
        return batches(*args)

    monkeypatch.setattr(encoding, "_batches", overtaken)
    done = encode_rows(rows(), model, collator, mine)
    assert all(each.new == each.bytes == 0 and each.known == each.clips for each in done.modalities.values())
    assert len(FeatureCache(tmp_path / "c", model, processor)) == len(other)


def test_an_encoder_that_is_interrupted_keeps_what_it_has(parts, media, tmp_path):
    model, processor = parts

    def interrupted():
        yield from rows(4)
        raise KeyboardInterrupt

    cache = FeatureCache(tmp_path / "c", model, processor, fill=True)
    encoding_at_once = encoding.BATCHES_AT_ONCE
    try:
        encoding.BATCHES_AT_ONCE = 1
        with pytest.raises(KeyboardInterrupt):
            encode_rows(interrupted(), model, UniMoEDataCollator(processor, media_root=media), cache, batch_size=1)
    finally:
        encoding.BATCHES_AT_ONCE = encoding_at_once
    assert len(FeatureCache(tmp_path / "c", model, processor)) == 4
    assert not cache.is_collecting and processor.feature_cache is None


def test_clips_are_in_memory_a_few_at_a_time(parts, media, tmp_path, monkeypatch):
    """And what is encoded between two parts of the rows is known in the second."""
    model, processor = parts
    monkeypatch.setattr(encoding, "BATCHES_AT_ONCE", 1)
    held, batches = [], encoding._batches
    monkeypatch.setattr(
        encoding, "_batches", lambda p, m, clips, *others: held.append(len(clips)) or batches(p, m, clips, *others)
    )
    counts = []
    for name, size, dry_run in (("a", 1, False), ("b", 100, False), ("c", 1, True)):
        cache = FeatureCache(tmp_path / name, model, processor, fill=True)
        collator = UniMoEDataCollator(processor, media_root=media)
        done = encode_rows(rows() * 2, model, collator, cache, size, dry_run=dry_run)
        counts.append({modality: (each.new, each.known) for modality, each in done.modalities.items()})
        assert max(held) == min(size, 2)  # of two different pictures
        held.clear()
    assert counts[0] == counts[1] == counts[2]
    assert all(known >= new > 0 for new, known in counts[0].values())


def test_a_full_disk_loses_nothing_that_was_stored(parts, media, tmp_path, monkeypatch):
    model, processor = parts
    collator = UniMoEDataCollator(processor, media_root=media)
    cache = FeatureCache(tmp_path / "c", model, processor, fill=True)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)  # a shard for each batch
    real, written = feature_cache.save_file, []

    def save(tensors, path):
        if len(written) == 3:
            Path(path).write_bytes(b"some of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(path)
        real(tensors, path)

    monkeypatch.setattr(feature_cache, "save_file", save)
    with pytest.raises(OSError, match=r"could not be written to \(.*No space left.*\); make room and start again"):
        encode_rows(rows(), model, collator, cache, batch_size=1)
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".features")]
    monkeypatch.setattr(feature_cache, "save_file", real)
    assert len(FeatureCache(tmp_path / "c", model, processor)) == 3
    done = encode_rows(rows(), model, collator, FeatureCache(tmp_path / "c", model, processor, fill=True))
    assert sum(each.known for each in done.modalities.values()) >= 3
    names = [json.loads(path.read_text())["clips"] for path in (tmp_path / "c").glob("features-*.json")]
    keys = [key for clips in names for key in clips]
    assert len(keys) == len(set(keys))


def test_rows_that_cannot_be_read_are_told_and_the_others_encoded(parts, media, tmp_path):
    model, processor = parts
    (tmp_path / "bad.png").write_bytes(b"no picture")
    answer = {"role": "assistant", "content": "a"}
    sources = [str(tmp_path / "bad.png"), str(media / "0.png"), str(tmp_path / "gone.png")]
    data = [{"messages": [{"role": "user", "content": [{"type": "image", "path": s}]}, answer]} for s in sources]
    cache = FeatureCache(tmp_path / "c", model, processor, fill=True)
    done = encode_rows(data, model, UniMoEDataCollator(processor), cache)
    assert done.modalities["image"].new == 1
    assert len(done.refused) == 2
    assert "bad.png" in "".join(done.refused) and "gone.png" in "".join(done.refused)
    assert processor.feature_cache is None


def test_several_processes_may_fill_one_cache(parts, media, tmp_path):
    model, processor = parts
    caches = [FeatureCache(tmp_path / "c", model, processor, fill=True) for _ in range(2)]
    collator = UniMoEDataCollator(processor, media_root=media)
    processor.feature_cache = caches[0]
    batches = []
    for cache in caches:
        processor.feature_cache = cache
        with cache.collecting():
            batches.append(cache.store(model, collator(rows(6))))
    for cache in caches:
        cache.flush()
    processor.feature_cache = None
    names = [json.loads(path.read_text())["clips"] for path in (tmp_path / "c").glob("features-*.json")]
    assert len(names) == 1  # the second found all that it had stored by the first
    for name, tensor in batches[0]["tower_states"].items():
        torch.testing.assert_close(batches[1]["tower_states"][name], tensor, **EXACT)


def test_a_writer_that_is_killed_leaves_a_cache_that_goes_on(media, tmp_path):
    """SIGKILL while a shard is being written: what was whole stays, what was not is not seen."""
    code = """
import json, os, signal, sys
from pathlib import Path
import torch
from uni_moe_hf import FeatureCache, UniMoEDataCollator, encode_rows
from uni_moe_hf.training import encoding, feature_cache
from tiny import tiny_model, tiny_processor
from tiny_training import rows

feature_cache.SHARD_BYTES = 1
real, written = feature_cache.save_file, []

def save(tensors, path):
    real(tensors, path)
    written.append(path)
    if len(written) == 3:
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)

feature_cache.save_file = save
model = tiny_model({"mlp_layer_types": ["dense", "dense"]})
processor = tiny_processor(model.config)
cache = FeatureCache(sys.argv[2], model, processor, fill=True)
encode_rows(rows(), model, UniMoEDataCollator(processor, media_root=sys.argv[1]), cache, batch_size=1)
"""
    environment = child_environment(PYTHONPATH=os.pathsep.join(map(str, (TESTS, ROOT))))
    command = [sys.executable, "-c", code, str(media), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    model = tiny_model(DENSE)
    processor = tiny_processor(model.config)
    assert len(FeatureCache(tmp_path / "c", model, processor)) == 2
    whole, _ = trained("connectors", media, tmp_path / "plain", None)
    filling, _ = trained("connectors", media, tmp_path / "filling", tmp_path / "c", fill=True)
    warm, _ = trained("connectors", media, tmp_path / "warm", tmp_path / "c")
    assert whole == filling == warm


def interrupted(*args):
    raise KeyboardInterrupt


def test_the_command_line_encodes_rows_and_tells_their_size(media, parts, tmp_path, capsys, monkeypatch):
    model, processor = parts
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    lines = [json.dumps(row) for row in rows(6)]
    (media / "rows.jsonl").write_text("\n".join(lines))

    arguments = [str(media / "rows.jsonl"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "c")]

    def run(*options: str) -> tuple[int, str]:
        code = main(["data", "encode", *arguments, *options])
        return code, capsys.readouterr().out

    planned, done, again = run("--dry-run"), run("--batch-size", "3"), run()
    assert [code for code, _ in (planned, done, again)] == [0, 0, 0]
    assert "would be added to" in planned[1] and not list((tmp_path).glob("c/features-*"))[2:]
    tables = [text.splitlines()[:-1] for _, text in (planned, done)]
    assert tables[0] == tables[1] and len(tables[0]) == 5  # a head, and four modalities
    assert again[1].splitlines()[-1].startswith("0.0 MB were added to")
    header = (tmp_path / "c/features.json").read_text()
    known = run("--dry-run")
    assert known[0] == 0 and (tmp_path / "c/features.json").read_text() == header
    assert known[1].splitlines()[:-1] == again[1].splitlines()[:-1]
    monkeypatch.setattr(encoding, "_missing", interrupted)
    assert main(["data", "encode", *arguments]) == 130
    assert re.search(r"Interrupted with \d+ clips in '.*'; the same command goes on", capsys.readouterr().err)
    monkeypatch.undo()
    with open(media / "rows.jsonl", "a") as file:
        file.write("\n" + json.dumps({"messages": [{"role": "user", "content": "no answer"}]}))
    code, text = run()
    assert code == 1 and "there is no assistant text to learn" in text and "1 could not be read" in text
