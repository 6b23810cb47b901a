"""
What each of several processes knows of questions asked while training, for `test_callback.py`:

    torchrun --nproc_per_node 2 asking.py MEDIA FOLDER
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from tiny import tiny_model
from tiny_training import make_own_trainer, rows

from uni_moe_hf import GenerationCallback


def main(media: Path, folder: Path) -> None:
    held = Dataset.from_list(rows(7), on_mixed_types="use_json")  # an odd number
    trainer = make_own_trainer(
        media, folder, tiny_model(), "moe", own={"eval_dataset": held}, learning_rate=0.0, max_steps=2
    )
    callback = GenerationCallback(trainer, "short-answers", every=2, limit=7)
    trainer.add_callback(callback)
    trainer.train()
    found = {name: figure.value for name, figure in callback.ask().figures["all"].items()}
    logged = [entry for entry in trainer.state.log_history if "eval_exact_match" in entry]
    found |= {"logged": logged[-1]["eval_exact_match"]}
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
