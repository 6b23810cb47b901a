"""
Which checkpoint a run goes on from: the last that is whole, by what stands in it and by digests written when it was
saved. One run at a time in one folder.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers.utils import logging


logger = logging.get_logger(__name__)

DIGESTS = "digests.json"
# What the library's state file holds, and resuming reads.
STATE_FIELDS = ("epoch", "global_step", "max_steps", "num_train_epochs", "log_history")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    r"""
    The checkpoint to resume from. A process that is killed while it saves leaves a torn folder, which the library's
    own helper would take.

    Args:
        output_dir (`str` or `Path`): Of the trainer.

    Returns:
        `str`: the folder with the highest step of which every file is there and can be read; `None` where no
        checkpoint was ever begun.

    Raises:
        ValueError: there are checkpoints, but all are torn, or the last that is not torn is of a layout that cannot be
            judged.
    """
    found, passed = {}, ""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if folder.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)):
            found[int(match[1])] = folder
    for step in sorted(found, reverse=True):
        if layout := _unknown_layout(found[step]):
            raise ValueError(
                f"'{found[step]}' holds {layout}, whose completeness cannot be verified; name it in "
                "`resume_from_checkpoint` to resume from it, or remove it."
            )
        if reason := what_is_torn(found[step], step):
            logger.warning("Passing over '%s': %s.", found[step], reason)
            passed = passed or reason
        else:
            return str(found[step])
    if passed:
        raise ValueError(
            f"None of the {len(found)} checkpoints in '{output_dir}' can be resumed from (the last: {passed}); remove "
            "them to start again."
        )
    return None


def _unknown_layout(folder: Path) -> str:
    """What a checkpoint is that is not the trainer's own single-file layout; empty if it is that."""
    names = {path.name for path in folder.iterdir()}
    if "latest" in names or any(name.startswith("global_step") for name in names):
        return "a checkpoint of DeepSpeed"
    if any((folder / name).is_dir() and name.startswith(("pytorch_model_fsdp", "optimizer_")) for name in names):
        return "a sharded checkpoint of FSDP"
    has_weights = any(name.endswith((".safetensors", ".bin")) and name != "training_args.bin" for name in names)
    others = ("optimizer", "scheduler", "rng_state", "scaler")
    if has_weights and "trainer_state.json" in names and not any(name.startswith(others) for name in names):
        return "weights alone (`save_only_model`)"
    return ""


def what_is_torn(folder: Path, step: int) -> str:
    """
    Args:
        folder (`Path`): A checkpoint.
        step (`int`): That its name says.

    Returns:
        `str`: why it cannot be resumed from; empty if it can.
    """
    names = {path.name for path in folder.iterdir()}
    weights = [name for name in names if name.endswith(".safetensors")]
    for name in ("trainer_state.json", "scheduler.pt", "training_args.bin"):
        if name not in names:
            return f"{name} is missing"
    if not weights or not any(name.startswith("rng_state") for name in names):
        return "weights or random states are missing"
    if not any(name.startswith("optimizer") for name in names):
        return "optimizer.pt is missing"
    if (folder / "optimizer").is_dir() and not (folder / "optimizer/.metadata").is_file():
        return "optimizer/.metadata is missing"  # written last, when all processes have written their pieces
    try:
        for name in names:
            file = folder / name
            if name.endswith(".json"):
                content = json.loads(file.read_text(encoding="utf-8"))
                if name == "trainer_state.json":
                    if lacking := [field for field in STATE_FIELDS if field not in dict(content)]:
                        return f"trainer_state.json lacks '{lacking[0]}'"
                    if content["global_step"] != step:
                        return f"trainer_state.json is of step {content['global_step']}"
                if name.endswith(".safetensors.index.json"):
                    if missing := set(content["weight_map"].values()) - names:
                        return f"{sorted(missing)[0]} is missing"
            elif name.endswith(".safetensors"):
                with safe_open(file, "pt") as opened:
                    opened.keys()
            elif name.endswith((".pt", ".pth", ".bin")):
                with zipfile.ZipFile(file) as archive:
                    if broken := archive.testzip():
                        return f"{name} is damaged at {broken}"
        return what_changed(folder)
    except (ValueError, TypeError, OSError, KeyError, SafetensorError, zipfile.BadZipFile, RecursionError) as error:
        return f"{name} cannot be read ({' '.join(str(error).split())})"


def write_digests(folder: str | Path) -> None:
    """
    Args:
        folder (`str` or `Path`): Gets `digests.json`, with the size and digest of every other file in it.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    digests = {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def what_changed(folder: str | Path) -> str:
    """
    Args:
        folder (`str` or `Path`): In which [`write_digests`] may have written.

    Returns:
        `str`: which file is no more what it was then; empty if none, or where nothing was written.
    """
    folder = Path(folder)
    if not (folder / DIGESTS).is_file():
        return ""
    digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    if not isinstance(digests, dict) or not digests:
        return f"{DIGESTS} holds no digests"
    for name, (size, digest) in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _digest(file) != digest:
            return f"{name} is not what was saved (its content has changed)"
    return ""


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


@contextmanager
def only_run_in(output_dir: str | Path, is_main_process: bool = True) -> Iterator[None]:
    """
    While it is entered, no other process enters it for the same folder. May be nested.

    Args:
        output_dir (`str` or `Path`): Of a training run.
        is_main_process (`bool`, *optional*, defaults to `True`): Of several processes one alone takes the folder.

    Raises:
        ValueError: another run has it.
    """
    if not is_main_process:
        yield
        return
    folder = Path(output_dir).resolve()
    lock = None
    for place in (folder.parent / f".{folder.name}.lock", folder / ".lock"):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place, is_singleton=True)
            lock.acquire(blocking=False)
            break
        except Timeout as error:
            raise ValueError(f"Another run is training in '{output_dir}'; wait for it, or name another.") from error
        except OSError as error:  # a parent that is not ours, as where a volume is mounted; a disk without locks
            lock, reason = None, error
    if lock is None:
        logger.warning("'%s' cannot be locked (%s), so a second run there would not be noticed.", output_dir, reason)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


__all__ = ["last_complete_checkpoint", "only_run_in", "what_changed", "what_is_torn", "write_digests"]
