"""
Runs a stage again and again, killed each time at another moment, until it has come to its end.

    python resuming.py STAGE MEDIA RUNS

`RUNS` is a JSON object, folder -> list of moments, one for each start: `["none"]`, `["time", seconds]`, `["step", n]`
(in the n-th micro-batch of the run), `["weights", n]` or `["pickle", n]` (in the n-th file of that kind, when half is
written).
Writes the digest of the final weights to `digest` in each folder.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import peft.peft_model
import torch
import transformers.modeling_utils
from datasets import Dataset
from tiny import tiny_model, tiny_processor
from tiny_training import rows

from uni_moe_hf import UniMoEDataCollator, UniMoESFTTrainer, last_complete_checkpoint, prepare_stage, sft_config


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(file: str) -> None:
    """Leaves the first half of a file that has just been written."""
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])


def arm(trainer: UniMoESFTTrainer, moment: str, number: float) -> None:
    count = {"weights": 0, "pickle": 0, "step": 0}

    def tick(kind: str, file: str | None = None) -> None:
        count[kind] += 1
        if moment == kind and count[kind] == number:
            if file is not None:
                half(file)
            die()

    def watched(function, kind: str, position: int):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            file = args[position] if len(args) > position else kwargs.get("filename")
            if isinstance(file, str | Path):
                tick(kind, str(file))
            return result

        return call

    torch.save = watched(torch.save, "pickle", 1)
    for module in (transformers.modeling_utils, peft.peft_model):
        module.safe_save_file = watched(module.safe_save_file, "weights", 1)
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (tick("step"), step(*args, **kwargs))[1]


def train(stage: str, folder: Path, media: Path, moment: str, number: float) -> None:
    text = {"expert_lora_dropout": 0.1, "shared_expert_base": True}
    model = tiny_model(text if stage == "moe" else {"mlp_layer_types": ["dense", "dense"]})
    args = sft_config(
        stage,
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
        learning_rate=1e-2,
        num_train_epochs=6,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        seed=5,
    )
    processor = tiny_processor(model.config)
    trainer = UniMoESFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows(14), on_mixed_types="use_json"),
        processing_class=processor,
        data_collator=UniMoEDataCollator(processor, media_root=media),
        peft_config=prepare_stage(model, stage),
    )
    arm(trainer, moment, number)
    try:
        last = last_complete_checkpoint(folder)
    except ValueError:  # the first checkpoint was torn; what the message asks for
        last = [shutil.rmtree(torn) for torn in folder.glob("checkpoint-*")] and None
    trainer.train(resume_from_checkpoint=last)
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    (folder / "digest").write_text(digest.hexdigest())


def start(stage: str, folder: Path, media: Path, moment: str, number: float) -> int:
    """A run in a process of its own, to which everything is imported already; how it ended."""
    sys.stdout.flush()  # else the child has what waits there as well, and says it again
    child = os.fork()
    if child == 0:
        try:
            train(stage, folder, media, moment, number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if moment == "time":
        time.sleep(number)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(stage: str, media: str, runs: str) -> None:
    for folder, kills in json.loads(runs).items():
        Path(folder).mkdir()
        for moment, *number in kills:
            status = start(stage, Path(folder), Path(media), moment, number[0] if number else 0)
            sys.stdout.write(f"{moment} {number} -> {status}\n")
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
