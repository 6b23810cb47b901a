"""
The original's code at work, for `against_original.py`, which starts it with the Python that the code wants
(transformers 4.31.0, peft 0.4.0, accelerate 0.21.0, numpy 1.26):

    python original_worker.py CODE CHECKPOINT DTYPE THREADS

CODE is the folder `Uni_MoE` of its repository at f5e82dd. It reads commands from standard input, a line each, and
answers with a line of JSON: "loss" (without dropout), "step" (forward, backward, AdamW) or "generate" (32 words).
"""

import atexit
import contextlib
import functools
import importlib.machinery
import json
import os
import shutil
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path


CODE, FOLDER, DTYPE, THREADS = sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3], sys.argv[4]
os.environ |= {"OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True
sys.path.insert(0, CODE)
warnings.filterwarnings("ignore")
for name in ("librosa", "soundfile"):  # for reading sound, which is not asked for here
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)

import torch  # noqa: E402
import torch.utils.checkpoint  # noqa: E402
import transformers  # noqa: E402


torch.set_num_threads(int(THREADS))
transformers.logging.set_verbosity_error()
# The default of torch 2.0.1, with which the original trains; newer ones want it said.
torch.utils.checkpoint.checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
torch.nn.Module.cuda = lambda self, device=None: self


class NoTokenizer:
    """The checkpoint has none; the original uses it to make data alone."""

    unk_token, pad_token, padding_side, model_input_names = "<unk>", None, "right", ["input_ids"]

    def __init__(self, folder):
        self.rows = transformers.AutoConfig.from_pretrained(folder).vocab_size

    def __len__(self):
        return self.rows

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        return cls(folder)


def whisper_processor(folder, **kwargs):
    return types.SimpleNamespace(feature_extractor=transformers.WhisperFeatureExtractor.from_pretrained(folder))


transformers.AutoTokenizer.from_pretrained = NoTokenizer.from_pretrained
transformers.WhisperProcessor.from_pretrained = staticmethod(whisper_processor)

from peft import set_peft_model_state_dict  # noqa: E402
from Uni_MoE_speech.model.all_builder import load_all_pretrained_model  # noqa: E402
from Uni_MoE_speech.train import train as original  # noqa: E402
from Uni_MoE_speech.train.llava_trainer import LLaVATrainer  # noqa: E402


TOWERS = {name: str(FOLDER / name) for name in ("clip", "whisper")}


class Ready(Exception):
    """What the original's `train` is stopped with, where its trainer would begin."""


class Trainer(LLaVATrainer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        raise Ready(self)


def trainer() -> Trainer:
    """As `finetune_speech.sh` makes it, with the sizes of this checkpoint, going on from its finetuned state."""
    work = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    (work / "base").mkdir()
    for file in (FOLDER / "base").iterdir():
        if file.name != "config.json":
            (work / "base" / file.name).symlink_to(file)
    config = json.loads((FOLDER / "base/config.json").read_text())
    config |= {"mm_vision_tower": TOWERS["clip"], "mm_audio_tower": TOWERS["whisper"]}
    (work / "base/config.json").write_text(json.dumps(config))
    lora = json.loads((FOLDER / "finetuned/adapter_config.json").read_text())
    flags = {
        "model_name_or_path": work / "base",
        "version": "v1",
        "vision_tower": TOWERS["clip"],
        "audio_tower": TOWERS["whisper"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bf16": DTYPE == "bfloat16",
        "output_dir": work / "output",
        "evaluation_strategy": "no",
        "learning_rate": 4e-5,
        "weight_decay": 0.0,
        "gradient_checkpointing": True,
        "report_to": "none",
        "tune_mm_mlp_adapter": True,
        "pretrain_mm_mlp_adapter": FOLDER / "finetuned/non_lora_trainables.bin",
        "tune_mm_audio_projector": True,
        "pretrain_audio_aligner": FOLDER / "finetuned/mm_audio_aligner.bin",
        "llm_lora_enable": True,
        "mix_va": True,
        "no_cuda": True,
        "lora_r": lora["r"],
        "lora_alpha": int(lora["lora_alpha"]),
        "query_tokens_size": config["query_tokens_size"],
    }
    sys.argv = ["train.py", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    original.LLaVATrainer = Trainer
    original.make_supervised_data_module = lambda **kwargs: {"train_dataset": None, "data_collator": lambda rows: rows}
    try:
        original.train()
    except Ready as ready:
        made = ready.args[0]
    set_peft_model_state_dict(made.model, torch.load(FOLDER / "finetuned/adapter_model.bin", weights_only=True))
    gates = torch.load(FOLDER / "finetuned/mlp_gates.bin", weights_only=True)
    made.model.get_base_model().load_state_dict(gates, strict=False)
    made.model.gradient_checkpointing_enable()  # as the trainer's loop does
    if DTYPE == "float32":  # without --bf16 it rounds the towers to fp16
        made.model.get_base_model().get_vision_tower().load_model()
        made.model.get_base_model().get_audio_tower().load_model()
    made.model.to(getattr(torch, DTYPE))  # with --bf16 DeepSpeed casts everything
    made.create_optimizer()
    return made


def generator() -> torch.nn.Module:
    """By the original's own loader, which merges LoRA."""
    _, model, *_ = load_all_pretrained_model(
        str(FOLDER / "finetuned"),
        str(FOLDER / "base"),
        "unimoe_lora",
        device="cpu",
        vison_tower_path=TOWERS["clip"],
        audio_tower_path=TOWERS["whisper"],
    )
    model.generation_config.eos_token_id = None
    return model.to(getattr(torch, DTYPE)).eval()


def main() -> None:
    """Answers commands until there are no more."""
    batch = torch.load(FOLDER / "batch.pt", weights_only=True)
    batch = {k: v.to(getattr(torch, DTYPE)) if v.is_floating_point() else v for k, v in batch.items()}
    made = speaker = None
    out = sys.stdout
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            if line.strip() == "generate":
                speaker = speaker or generator()
                prompt = {k: v[:1] for k, v in batch.items() if k != "labels"} | {"attention_mask": None}
                start = time.perf_counter()
                # Without its cache, as its `inference_all.py`: with it the original stops at an assertion.
                ids = speaker.generate(**prompt, do_sample=False, max_new_tokens=32, use_cache=False)
                answer = {"seconds": time.perf_counter() - start, "words": ids.shape[1] - prompt["input_ids"].shape[1]}
            else:
                made = made or trainer()
                if line.strip() == "loss":
                    made.model.eval()
                    with torch.no_grad():
                        answer = {"loss": made.model(**batch).loss.item()}
                    made.model.train()
                else:
                    start = time.perf_counter()
                    made.model(**batch).loss.backward()
                    made.optimizer.step()
                    made.optimizer.zero_grad()
                    answer = {"seconds": time.perf_counter() - start}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
