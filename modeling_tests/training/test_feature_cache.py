"""Features kept in a folder: the same numbers as from the media, and one sentence where they are another's."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError
from tiny import EXACT, picture, tiny_model, tiny_processor, tone
from tiny_caches import DENSE, SQUARE, STAGES, losses, trained
from tiny_training import make_own_trainer, rows
from transformers import AutoModel, CLIPImageProcessorPil, SiglipImageProcessorPil

from uni_moe_hf import (
    FeatureCache,
    StageArguments,
    UniMoEDataCollator,
    UniMoESFTTrainer,
    encode_rows,
    prepare_stage,
    sft_config,
)
from uni_moe_hf.hub.media_uni_moe import Clip
from uni_moe_hf.training import feature_cache, options
from uni_moe_hf.training.feature_cache import FeatureCacheError


@pytest.mark.parametrize("stage", list(STAGES))
def test_training_from_a_cache_loses_what_training_from_media_loses_bit_for_bit(stage, media, tmp_path):
    expected, plain = trained(stage, media, tmp_path / "plain", None)
    filling, _ = trained(stage, media, tmp_path / "filling", tmp_path / "cache", fill=True)
    warm, own = trained(stage, media, tmp_path / "warm", tmp_path / "cache", towers=False, dataloader_num_workers=1)
    assert expected == filling == warm
    for name, tensor in plain.model.state_dict().items():
        if "_tower." not in name:
            torch.testing.assert_close(own.model.state_dict()[name], tensor, **EXACT)


def test_a_model_without_its_towers_saves_whole_and_says_what_it_lacks(media, tmp_path):
    _, trainer = trained("connectors", media, tmp_path / "a", tmp_path / "cache", fill=True)
    whole = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.model.unload_towers(str(tmp_path / "towers.pt"))
    assert not any("_tower." in name for name in trainer.model.state_dict())
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    for name, tensor in whole.items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, **EXACT)
    assert not any("_tower." in name for name in trainer.model.state_dict())
    with pytest.raises(ValueError, match="the vision tower of this model is not in memory"):
        trainer.model.get_image_features(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="have been unloaded already"):
        trainer.model.model.unload_towers(str(tmp_path / "other.pt"))
    content = (tmp_path / "towers.pt").read_bytes()
    (tmp_path / "towers.pt").write_bytes(b"no weights")
    with pytest.raises(OSError, match="towers' weights in .* cannot be read"):
        trainer.model.save_pretrained(tmp_path / "again")
    (tmp_path / "towers.pt").write_bytes(content)
    trainer.model.model.load_towers()
    trainer.model.get_image_features(torch.zeros(1, 3, 16, 16))
    (tmp_path / "towers.pt").write_bytes(b"of another model")  # is replaced, not believed
    trainer.model.model.unload_towers(str(tmp_path / "towers.pt"))
    trainer.model.model.load_towers()
    torch.testing.assert_close(trainer.model.state_dict(), whole, **EXACT)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_tower_without_a_cls_token_and_of_real_width_gives_the_same_bits(batch_size, media, tmp_path):
    """Its states are a view whose rows do not follow each other, as `safetensors` and some kernels want them."""

    def losses_of(cache: Path | None, fill: bool = False) -> list[float]:
        torch.manual_seed(0)
        config = {"model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 768}
        config |= {"num_hidden_layers": 1, "num_attention_heads": 12, "image_size": 16, "patch_size": 8}
        tower = {"vision_prefix_length": 0, "vision_feature_layer": -1}
        model = tiny_model(DENSE, without=("vision", "audio", "speech"), vision_config=config, **tower)
        processor = tiny_processor(model.config, image_processor=CLIPImageProcessorPil(**SQUARE))
        if cache is not None:
            processor.feature_cache = FeatureCache(cache, model, processor, fill=fill)
        pictures = [row for row in rows(24) if row["messages"][0]["content"][0].get("type") == "image"]
        pictures = [row for row in pictures if len(row["messages"][0]["content"]) == 2]
        settings = {"per_device_train_batch_size": batch_size, "max_steps": 3, "data": pictures}
        return losses(make_own_trainer(media, tmp_path, model, "connectors", processor=processor, **settings))

    plain = losses_of(None)
    assert losses_of(tmp_path / "c", fill=True) == plain == losses_of(tmp_path / "c")


def test_a_batch_from_the_cache_generates_the_same(parts, with_cache, media):
    model, processor = parts
    chat = [[row["messages"][0]] for row in rows(6)]
    for messages in chat:
        for part in messages[0]["content"]:
            if "path" in part:
                part["path"] = str(media / part["path"])
            if "video" in part:
                part["video"] = [str(media / name) for name in part["video"]]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    settings["processor_kwargs"] = {"padding": True}
    cached = processor.apply_chat_template(chat, **settings)
    cache, processor.feature_cache = processor.feature_cache, None
    plain = processor.apply_chat_template(chat, **settings)
    processor.feature_cache = cache
    assert "tower_states" in cached
    assert not {"pixel_values", "input_values", "input_features", "pixel_values_videos"} & set(cached)
    answers = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for inputs in (cached, plain)]
    assert torch.equal(*answers)


def test_copies_are_stored_once_whatever_they_are_called(parts, media, tmp_path):
    model, processor = parts
    shutil.copy(media / "0.png", tmp_path / "copy.png")
    files = [media / "0.png", tmp_path / "copy.png"]
    answer = {"role": "assistant", "content": "a bird"}
    sources = [*map(str, files), files[0].read_bytes(), {"bytes": files[0].read_bytes(), "path": "x.png"}]
    data = [{"messages": [{"role": "user", "content": [{"type": "image", "image": s}]}, answer]} for s in sources]
    collator = UniMoEDataCollator(processor)
    planned = encode_rows(
        data, model, collator, FeatureCache(tmp_path / "c", model, processor, fill=True), dry_run=True
    )
    assert len(FeatureCache(tmp_path / "c", model, processor)) == 0
    done = encode_rows(data, model, collator, FeatureCache(tmp_path / "c", model, processor, fill=True))
    again = encode_rows(data, model, collator, FeatureCache(tmp_path / "c", model, processor, fill=True))
    assert planned.modalities == done.modalities
    assert (done.modalities["image"].clips, done.modalities["image"].known, done.modalities["image"].new) == (4, 3, 1)
    assert (again.modalities["image"].known, again.modalities["image"].new) == (4, 0)
    stored = FeatureCache(tmp_path / "c", model, processor).summary()["image"]
    assert stored == {"clips": 1, "bytes": done.modalities["image"].bytes}


def test_keys_tell_content_and_cut_apart(parts, filled, media):
    processor = parts[1]

    def key(modality, source, **kwargs):
        return filled.key_of(processor, modality, source, kwargs).key

    wav, png = str(media / "0.wav"), str(media / "0.png")
    pixels, sound = picture(0), tone()
    keys = [
        key("audio", wav),
        key("speech", wav),
        key("audio", Clip(wav, start=0.1)),
        key("audio", Clip(wav, end=0.1)),
        key("audio", str(media / "1.wav")),
        key("audio", sound),
        key("audio", sound * 0.5),
        key("audio", {"array": sound, "sampling_rate": 8000}),
        key("audio", (sound, 16000)),
        key("image", png),
        key("image", pixels),
        key("image", pixels[:, ::-1]),
        key("image", Image.fromarray(pixels)),
        key("image", Image.fromarray(pixels).convert("L")),
        key("image", png, images_kwargs={"do_resize": False}),
        key("video", [png, png]),
        key("video", [png]),
        key("video", Clip([png, png], num_frames=1)),
        key("video", Clip([png, png], num_frames=2), videos_kwargs={"num_frames": 1}),
    ]
    same = [{10, 12}]  # an array and the picture of it hold the same
    for first in range(len(keys)):
        for second in range(first):
            if {first, second} not in same:
                assert keys[first] != keys[second], (first, second)
    whole = key("video", Clip([png, png], num_frames=2), videos_kwargs={"num_frames": 1})
    assert whole == key("video", Clip([png, png], num_frames=2))  # what a clip says of itself wins
    assert key("audio", Clip(wav, start=0)) == key("audio", wav)
    assert key("audio", Clip(wav, end=1)) == key("audio", Clip(wav, end=1.0))
    assert key("image", torch.ones(3, 4, 4, dtype=torch.bfloat16)) != key("image", torch.zeros(3, 4, 4).bfloat16())
    assert key("audio", wav) == key("audio", Path(wav)) == key("audio", Path(wav).read_bytes())
    assert key("audio", sound) == key("audio", sound.tolist() if sound.dtype == np.float64 else sound.copy())


def test_what_is_not_stored_is_named(parts, filled, with_cache, media, tmp_path):
    def batch(**part):
        return with_cache([{"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]}])

    batch(type="image", path=str(media / "0.png"))
    Image.fromarray(picture(7)).save(tmp_path / "new.png")
    with pytest.raises(FeatureCacheError, match="does not hold '.*new.png' as image; encode the rows once more"):
        batch(type="image", path=str(tmp_path / "new.png"))
    with_cache.skip_bad_rows = True  # no fault of the row, so it is not passed over
    with pytest.raises(FeatureCacheError, match="does not hold"):
        batch(type="image", path=str(tmp_path / "new.png"))


def test_a_clip_that_has_changed_since_is_refused_and_one_of_a_missing_modality_too(parts, media, tmp_path):
    model, processor = parts
    shutil.copy(media / "0.wav", tmp_path / "bell.wav")
    row = {"messages": [{"role": "user", "content": [{"type": "audio", "path": str(tmp_path / "bell.wav")}]}]}
    row["messages"].append({"role": "assistant", "content": "a"})
    collator = UniMoEDataCollator(processor)
    encode_rows([row], model, collator, FeatureCache(tmp_path / "c", model, processor, fill=True))
    processor.feature_cache = FeatureCache(tmp_path / "c", model, processor)
    try:
        collator([row])
        before = os.stat(tmp_path / "bell.wav")
        samples = tone()
        samples[0] += 0.01
        soundfile.write(tmp_path / "bell.wav", samples, 16000)
        os.utime(tmp_path / "bell.wav", ns=(before.st_atime_ns, before.st_mtime_ns))  # content decides, not dates
        with pytest.raises(FeatureCacheError, match="bell.wav' as it was before, or cut otherwise: it has changed"):
            collator([row])
        with pytest.raises(FeatureCacheError, match="holds no image"):
            collator([rows(1)[0] | {"_root": str(media)}])
    finally:
        processor.feature_cache = None


def _other_weights(model, processor):
    with torch.no_grad():
        next(model.model.vision_tower.parameters())[0] += 1e-6


def _other_layer(model, processor):
    model.config.vision_feature_layer = -1


def _other_mode(model, processor):
    processor.image_mode = "pad"


def _other_size(model, processor):
    processor.image_processor.size = {"height": 16, "width": 16}


def _other_kind(model, processor):
    settings = processor.image_processor.to_dict()
    processor.image_processor = SiglipImageProcessorPil.from_dict(settings)


def _other_window(model, processor):
    processor.feature_extractor.cut_speech_windows = True


def _other_precision(model, processor):
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_weights, "another vision tower or front end: its weights differ"),
        (_other_layer, "`reads.vision_feature_layer` is -2 there and -1 here"),
        (_other_mode, "`front_end.image_mode` is 'crop' there and 'pad' here"),
        (_other_size, "`front_end.size` is "),
        (
            _other_kind,
            "`front_end.image_processor_type` is 'CLIPImageProcessor' there and 'SiglipImageProcessor' here",
        ),
        (_other_window, "another speech tower or front end: `front_end.cut_speech_windows` is False there"),
        (_other_precision, "another .* tower or front end"),
    ],
)
def test_a_cache_of_another_tower_or_front_end_is_refused(change, message, filled):
    model = tiny_model(DENSE)
    processor = tiny_processor(model.config)
    FeatureCache(filled.folder, model, processor)
    processor.feature_cache = FeatureCache(filled.folder, model, processor)
    change(model, processor)
    prepare_stage(model, "connectors")
    args = sft_config("connectors", filled.folder / "x", use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_list(rows(2), on_mixed_types="use_json")
    with pytest.raises(ValueError, match=message):  # changed after it was opened
        UniMoESFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    for fill in (False, True):
        with pytest.raises(ValueError, match=message):
            FeatureCache(filled.folder, model, processor, fill=fill)


def test_a_folder_that_is_no_cache_or_of_another_precision_is_refused(parts, filled, tmp_path):
    with pytest.raises(ValueError, match="holds no feature cache; make one with `uni-moe data encode`"):
        FeatureCache(tmp_path / "nothing", *parts)
    with pytest.raises(ValueError, match="holds float32, not float16; name another folder"):
        FeatureCache(filled.folder, *parts, dtype="float16", fill=True)
    with pytest.raises(ValueError, match="not in 'int8'"):
        FeatureCache(filled.folder, *parts, dtype="int8")
    (filled.folder / "features.json").write_text("[]")
    with pytest.raises(ValueError, match="is no header of a feature cache"):
        FeatureCache(filled.folder, *parts)


def test_half_precision_takes_half_the_room_and_every_epoch_has_the_same_numbers(parts, media, tmp_path, filled):
    model, processor = parts
    cache = FeatureCache(tmp_path / "half", model, processor, dtype="float16", fill=True)
    encode_rows(rows(), model, UniMoEDataCollator(processor, media_root=media), cache)
    whole, half = filled.summary(), cache.summary()
    assert half["image"]["bytes"] * 2 == whole["image"]["bytes"]
    expected, _ = trained("connectors", media, tmp_path / "a", tmp_path / "half")
    shutil.rmtree(tmp_path / "half")
    FeatureCache(tmp_path / "half", model, processor, dtype="float16", fill=True)
    filling, _ = trained("connectors", media, tmp_path / "b", tmp_path / "half", fill=True)
    assert filling == expected


def test_a_tower_that_is_trained_has_no_cache(filled, media, tmp_path):
    model = tiny_model(DENSE)
    prepare_stage(model, "connectors")
    model.model.audio_tower.requires_grad_(True)
    processor = tiny_processor(model.config)
    processor.feature_cache = FeatureCache(filled.folder, model, processor)
    args = sft_config("connectors", tmp_path, use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_list(rows(2), on_mixed_types="use_json")
    with pytest.raises(ValueError, match="The audio tower is trained, so its features change and cannot be kept"):
        UniMoESFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    with pytest.raises(ValueError, match="audio_tower: is trained, so it must stay; freeze it"):
        model.model.unload_towers(str(tmp_path / "towers.pt"))


def test_a_damaged_shard_is_named_and_unfinished_files_are_passed_over(parts, filled):
    folder = filled.folder
    (folder / ".features-0.safetensors.123").write_bytes(b"half")  # of a writer that was killed
    (folder / "features-0.safetensors").write_bytes(b"without its index")
    count = len(FeatureCache(folder, *parts))
    assert count == len(filled) > 0
    shard = next(path for path in folder.glob("features-*.safetensors") if path.name != "features-0.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(
        FeatureCacheError, match=r"cannot be used \(.* has .* bytes in place of .*\); remove it and its"
    ):
        FeatureCache(folder, *parts)


@pytest.mark.parametrize("towers", [[["vision", 1]], {"vision": 3}, None])
def test_a_header_that_says_nothing_of_towers_is_none(towers, parts, filled):
    header = json.loads((filled.folder / "features.json").read_text())
    (filled.folder / "features.json").write_text(json.dumps({**header, "towers": towers}))
    with pytest.raises(ValueError, match="is no header of a feature cache"):
        FeatureCache(filled.folder, *parts)


def test_features_without_a_header_are_nobodys(parts, filled):
    (filled.folder / "features.json").unlink()
    with pytest.raises(ValueError, match="holds features but no features.json, which says whose they are"):
        FeatureCache(filled.folder, *parts, fill=True)


def test_towers_of_a_process_that_was_killed_are_removed_by_the_next(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mine = options._own_file(tmp_path / "out")
    old = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{int(gone.stdout)}-"))
    old.write_bytes(b"towers")
    assert options._own_file(tmp_path / "out").exists() and mine.exists() and not old.exists()


def test_a_training_never_fills_a_cache_unasked(media, filled, tmp_path):
    """Neither its steps nor the sample on which routers are balanced."""
    Image.new("RGB", (30, 20), "green").save(tmp_path / "new.png")
    answer = {"role": "assistant", "content": "a"}
    row = {"messages": [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "new.png")}]}, answer]}
    model = tiny_model(DENSE)
    processor = tiny_processor(model.config)
    processor.feature_cache = FeatureCache(filled.folder, model, processor)
    trainer = make_own_trainer(media, tmp_path / "x", model, "connectors", processor=processor)
    trainer.train_dataset = Dataset.from_list([row] * 4, on_mixed_types="use_json")
    files = set(filled.folder.iterdir())
    with pytest.raises(FeatureCacheError, match="does not hold .*new.png"):
        trainer.train()
    arguments = StageArguments(dataset_name="rows.jsonl")
    with pytest.raises(FeatureCacheError, match="does not hold .*new.png"):
        list(arguments.sample(trainer.train_dataset, model, processor, 4))
    assert set(filled.folder.iterdir()) == files


def test_a_disk_that_is_full_does_not_end_a_training(media, tmp_path, monkeypatch, caplog):
    expected, _ = trained("connectors", media, tmp_path / "plain", None)

    def save(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(feature_cache, "save_file", save)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    filling, trainer = trained("connectors", media, tmp_path / "filling", tmp_path / "c", fill=True)
    assert filling == expected
    assert "Nothing more is stored in this run. The feature cache" in caplog.text and "No space left" in caplog.text
    assert not trainer.feature_cache.is_collecting


def test_towers_run_once_for_a_clip_though_its_features_wait(parts, media, tmp_path, monkeypatch):
    """As where a worker, who does not see what waits, has read it again."""
    model, processor = parts
    cache = FeatureCache(tmp_path / "c", model, processor, fill=True)
    collator = UniMoEDataCollator(processor, media_root=media)
    try:
        processor.feature_cache = cache
        with cache.collecting():
            first, again = collator(rows()), collator(rows())
            stored = cache.store(model, first)["tower_states"]
            monkeypatch.setattr(cache, "states_of", None)
            found = cache.store(model, again)["tower_states"]
    finally:
        processor.feature_cache = None
    assert found.keys() == stored.keys() and "pixel_values" not in again
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name].to(tensor.dtype), tensor, **EXACT)


def test_what_cannot_be_read_is_skipped_as_without_a_cache(parts, media, filled, tmp_path):
    processor = parts[1]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = {"type": "image", "path": str(tmp_path / "bad.png")}
    answer = {"role": "assistant", "content": "a"}
    row = {"messages": [{"role": "user", "content": [bad]}, answer]}
    processor.feature_cache = filled
    try:
        collator = UniMoEDataCollator(processor, media_root=media, skip_bad_rows=True)
        assert len(collator([row, *rows(2)])["input_ids"]) == 2 and collator.skipped["unreadable"] == 1
        Image.new("RGB", (20, 20)).save(tmp_path / "bad.png")  # now it can be read, and is not in the cache
        with pytest.raises(FeatureCacheError, match="does not hold .*bad.png"):
            collator([row, *rows(2)])
        assert processor.feature_cache is filled
    finally:
        processor.feature_cache = None


def test_features_without_finite_numbers_are_not_kept(media, tmp_path):
    model = tiny_model(DENSE)
    processor = tiny_processor(model.config)
    with torch.no_grad():
        for parameter in model.model.audio_tower.parameters():
            parameter.fill_(torch.nan)
    cache = FeatureCache(tmp_path / "c", model, processor, fill=True)
    with pytest.raises(FeatureCacheError, match="The features of .*wav. are not finite in float32, in which"):
        encode_rows(rows(), model, UniMoEDataCollator(processor, media_root=media), cache)


def test_what_killed_writers_left_goes_after_a_day(parts, filled):
    day_before = time.time() - 2 * feature_cache.DAY
    names = (".features-0.safetensors.7", "features-0.safetensors", ".features-1.safetensors.8")
    for name in names:
        (filled.folder / name).write_bytes(b"half")
    for name in names[:2]:
        os.utime(filled.folder / name, (day_before, day_before))
    for path in filled.folder.glob("features-*.safetensors"):
        os.utime(path, (day_before, day_before))  # whole ones stay, however old they are
    assert len(FeatureCache(filled.folder, *parts, fill=True)) == len(filled)
    assert [name for name in names if (filled.folder / name).exists()] == [names[2]]


def test_a_bit_that_has_flipped_is_found_where_its_clip_is_read(parts, filled, with_cache, media):
    batch = with_cache(rows())["tower_states"]
    shard = next(filled.folder.glob("features-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1  # of the last tensor
    shard.write_bytes(content)
    with_cache.processor.feature_cache = FeatureCache(filled.folder, *parts)
    with pytest.raises(FeatureCacheError, match=r"the features of .* are not those that were stored\); remove it"):
        with_cache(rows())
    assert batch


@pytest.mark.parametrize("fill", [False, True])
def test_a_folder_that_cannot_be_one_is_named(fill, parts, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in ("file", "file/below", "loop"):
        with pytest.raises(ValueError, match="cannot be the folder of a feature cache: '.*(file|loop)' is none"):
            FeatureCache(tmp_path / folder, *parts, fill=fill)
    with pytest.raises(ValueError, match="its name is empty"):
        FeatureCache("", *parts, fill=fill)


def test_outside_a_training_a_cache_that_is_being_filled_reads_what_is_missing(parts, media, tmp_path):
    """And hands nothing to the model that only a trainer would store."""
    model, processor = parts
    collator = UniMoEDataCollator(processor, media_root=media)
    expected = collator(rows())
    processor.feature_cache = FeatureCache(tmp_path / "c", model, processor, fill=True)
    try:
        found = collator(rows())
    finally:
        processor.feature_cache = None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in ("pixel_values", "input_features"))
