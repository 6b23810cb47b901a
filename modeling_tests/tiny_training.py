"""A few steps of plain `SFTTrainer` on rows of every modality, for tests: seconds, offline."""

import copy
from pathlib import Path

import soundfile
from datasets import Dataset
from PIL import Image
from tiny import WORDS, film, picture, tiny_processor, tone
from trl import SFTConfig, SFTTrainer

from uni_moe_hf import UniMoEDataCollator, UniMoESFTTrainer, prepare_stage, sft_config


def write_media(folder: Path, clips: int = 2) -> Path:
    """Writes the files that [`rows`] names; with as many clips as rows those of [`rows_apart`]."""
    for index in range(clips):
        Image.fromarray(picture(index)).save(folder / f"{index}.png")
        soundfile.write(folder / f"{index}.wav", tone(pitch=200 + 100 * index), 16000)
    for index, frame in enumerate(film()):
        Image.fromarray(frame).save(folder / f"frame{index}.png")
    return folder


def rows(count: int = 8) -> list[dict]:
    """A row of each modality, of several, and of none, in turn."""
    files = [
        [{"type": "image", "path": "0.png"}],
        [{"type": "speech", "path": "0.wav"}],
        [{"type": "audio", "path": "1.wav"}],
        [{"type": "video", "video": [f"frame{index}.png" for index in range(5)]}],
        [],
        [{"type": "image", "path": "1.png"}, {"type": "audio", "path": "0.wav"}, {"type": "speech", "path": "1.wav"}],
    ]
    made = []
    for index in range(count):
        content = [*files[index % len(files)], {"type": "text", "text": "what is it"}]
        answer = [{"type": "text", "text": ("a bird", "bell", "red")[index % 3]}]
        made.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    return made


def rows_apart(count: int) -> list[dict]:
    """The same, each about files of its own, and with a question of its own."""
    made = [copy.deepcopy(row) for row in rows(count)]  # which share their parts
    for index, row in enumerate(made):
        content = row["messages"][0]["content"]
        content[-1]["text"] = f"what is {WORDS[index % len(WORDS)]}"
        for part in content[:-1]:
            if "path" in part:
                part["path"] = f"{index}.{part['path'][-3:]}"
            else:
                part["video"] = part["video"][index % 5 :] + part["video"][: index % 5]
    return made


def make_trainer(media: Path, model, folder: Path, peft_config=None, **overrides) -> SFTTrainer:
    """Four steps of two rows on a CPU in float32; checkpoints and all else as `overrides` say."""
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "seed": 3,
        "disable_tqdm": True,
    }
    args = SFTConfig(output_dir=str(folder), **settings | overrides)
    processor = tiny_processor(model.config)
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows(), on_mixed_types="use_json"),
        processing_class=processor,
        data_collator=UniMoEDataCollator(processor, media_root=media),
        peft_config=peft_config,
    )


def make_own_trainer(
    media,
    folder,
    model,
    stage,
    kind=UniMoESFTTrainer,
    data=None,
    own=None,
    peft_config=None,
    processor=None,
    **settings,
):
    """A trainer of four steps of two rows, float32 on a CPU."""
    defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 2}
    defaults |= {"learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "report_to": "none", "seed": 3}
    defaults |= {"save_strategy": "no", "disable_tqdm": True, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    processor = processor or tiny_processor(model.config)
    return kind(
        model=model,
        args=sft_config(stage, settings.pop("output_dir", folder), **{**defaults, **settings}),
        train_dataset=data
        if hasattr(data, "features")
        else Dataset.from_list(data or rows(), on_mixed_types="use_json"),
        processing_class=processor,
        data_collator=UniMoEDataCollator(processor, media_root=media),
        peft_config=prepare_stage(model, stage) if peft_config is None else peft_config,
        **(own or {}),
    )
