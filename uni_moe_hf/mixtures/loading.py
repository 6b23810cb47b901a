"""
Loading pretrained weights: all of them or none. The library reports weights that are missing and goes on with random
ones; here that is an error. What a folder holds is looked at before a weight is read.
"""

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..hub.files_uni_moe import cause_of, reason
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration


MISSING, SURPLUS = "are missing from its weights", "are in its weights and in no place of the model"
# What a vision backbone's checkpoint may lack: poolers, heads and norms behind the layer that is read.
UNREAD = r"(^|\.)(pooler|head|classifier|layernorm|visual_projection|text_projection|logit_scale)(\.|$)"


def load_whole(kind: Any, checkpoint: str | Path, may_lack: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    Args:
        kind (`type`): A model class or Auto class with `from_pretrained`.
        checkpoint (`str` or `Path`): A folder or Hub id.
        may_lack (`str`, *optional*): Given where it may be one half of a larger model, whose other weights are left:
            a regular expression of what it may lack, since nothing of it is read; "" for nothing.
        kwargs: For `from_pretrained`.

    Returns:
        [`PreTrainedModel`], with every weight from the checkpoint.

    Raises:
        ValueError: there is no such checkpoint, it cannot be read, or weights are missing, unexpected or of another
            shape.
    """
    check_there(checkpoint)
    if may_lack is None and Path(checkpoint).is_dir():
        config = loaded(AutoConfig.from_pretrained, checkpoint)
        if config.model_type == "uni_moe":
            empty_model(checkpoint, config)
    with _quiet() if may_lack is not None else nullcontext():  # of the other half's weights
        settings = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told below, by name
        model, report = loaded(kind.from_pretrained, checkpoint, **settings, **kwargs)
    missing = [name for name in report["missing_keys"] if not (may_lack and re.search(may_lack, name))]
    unexpected = [] if may_lack is not None else list(report["unexpected_keys"])
    shapes = [entry[0] if isinstance(entry, tuple) else entry for entry in report.get("mismatched_keys") or ()]
    _refuse(checkpoint, missing, MISSING)
    _refuse(checkpoint, unexpected, SURPLUS)
    _refuse(checkpoint, shapes, "have another shape in its weights than in the model")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The library reports weights that are not read at length."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def loaded(load: Callable, checkpoint: str | Path, **kwargs: Any) -> Any:
    """
    Args:
        load (`Callable`): A `from_pretrained`.
        checkpoint, kwargs: For it.

    Returns:
        What it returns.

    Raises:
        ValueError: what a damaged folder makes it raise, of whatever kind.
    """
    try:
        return load(checkpoint, **kwargs)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ValueError(f"'{checkpoint}' could not be loaded ({reason(cause_of(error))}).") from error


def empty_model(checkpoint: str | Path, config: PreTrainedConfig) -> UniMoEForConditionalGeneration:
    """
    The model that a config describes, without weights. A folder's weights must be those, by names and shapes: the
    library would make room for whatever is missing, however large a damaged config says that it is.

    Args:
        checkpoint (`str` or `Path`): A folder or Hub id; of the weights of the latter, and of quantised ones, nothing
            is said.
        config ([`UniMoEConfig`]): That lies there.

    Returns:
        [`UniMoEForConditionalGeneration`] on the meta device.

    Raises:
        ValueError: it describes no model, or another one than the weights.
    """
    with torch.device("meta"):
        model = loaded(lambda _: UniMoEForConditionalGeneration(config), checkpoint)
    files = sorted(Path(checkpoint).glob("model*.safetensors")) if Path(checkpoint).is_dir() else []
    if not files or getattr(config, "quantization_config", None) is not None:
        return model
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"'{file}' is truncated or no safetensors file ({reason(error)}).") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    missing = wanted.keys() - found.keys() - tied
    surplus = found.keys() - wanted.keys()
    for names, what in ((missing, MISSING), (surplus, SURPLUS)):
        _refuse(checkpoint, [name for name in names if not _is_renamed(name, wanted, found)], what)
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"'{checkpoint}' holds '{name}' of shape {found[name]}, but its config.json describes {wanted[name]}"
            f"{f', and {len(wrong) - 1} more like it' if len(wrong) > 1 else ''}; do the two belong together?"
        )
    return model


def _is_renamed(name: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> bool:
    """
    Whether a tower's tensor may stand under another name, which the library writes and reads of some kinds: what is
    missing of that tower and what is not known of it then hold as many numbers.
    """
    tower = re.match(r"model\.\w+_tower\.", name)
    if tower is None:
        return False
    sizes = [
        sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(tower[0]) and key not in others)
        for shapes, others in ((wanted, found), (found, wanted))
    ]
    return sizes[0] == sizes[1]


def _refuse(checkpoint: str | Path, names: list[str], what: str) -> None:
    if names:
        raise ValueError(
            f"'{checkpoint}' does not hold the model that its config.json describes: {len(names)} tensors {what}, "
            f"such as '{sorted(names)[0]}'; save it again, or download it anew."
        )


def load_part_config(checkpoint: str | Path, argument: str) -> PreTrainedConfig:
    """
    Args:
        checkpoint (`str` or `Path`): A folder or Hub id.
        argument (`str`): That named it, for messages.

    Returns:
        [`PreTrainedConfig`]: what it is, without its weights.

    Raises:
        ValueError: there is no such checkpoint, or nothing that the library knows.
    """
    check_there(checkpoint, f"{argument}: ")
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except Exception as error:
        cause = reason(cause_of(error))
        raise ValueError(f"{argument} '{checkpoint}' is no model that is known here ({cause}).") from error


def check_there(checkpoint: str | Path, who: str = "") -> None:
    """
    Args:
        checkpoint (`str` or `Path`): A folder or Hub id.
        who (`str`, *optional*): What the message begins with.

    Raises:
        ValueError: it looks like a folder and is none, so that asking the Hub for it would be in vain.
    """
    name = str(checkpoint)
    if not Path(name).exists() and (name.count("/") > 1 or name.startswith((".", "/", "~")) or not name):
        raise ValueError(f"{who}There is no checkpoint '{name}'; give a folder or a Hub id.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        is_adapter = (Path(name) / "adapter_config.json").is_file()
        found = (
            "an adapter: merge it into its base, or name that" if is_adapter else "only other files (no config.json)"
        )
        raise ValueError(f"{who}The folder '{name}' holds no model but {found}.")


def load_pickle(file: str | Path) -> dict:
    """
    Args:
        file (`str` or `Path`): Saved by `torch.save`.

    Returns:
        `dict` on the CPU; its tensors are mapped from the file, not read, where the format allows it.

    Raises:
        ValueError: the file is damaged, holds anything but tensors and plain values, or is no dict.
    """
    check_readable(Path(file))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle protocol: either it can be read or it cannot
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"'{file}' is refused: {f'it would run {what.group(1)}' if what else 'it holds more than tensors'}; only "
            "pure tensors are read."
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(
            f"'{file}' is truncated or no checkpoint ({first_line(error)}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' holds a {type(content).__name__}, not a dict of tensors.")
    return content


def first_line(error: Exception) -> str:
    """The first sentence of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(". ")


def check_readable(file: Path) -> None:
    """What the readers would describe in their own, less helpful words."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(40)
    except FileNotFoundError as error:
        raise ValueError(f"There is no file '{file}'; check the path.") from error
    except OSError as error:
        raise ValueError(f"'{file}' cannot be read ({error.strerror or error}).") from error
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"'{file}' is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.")


__all__ = [
    "UNREAD",
    "check_readable",
    "check_there",
    "empty_model",
    "first_line",
    "load_part_config",
    "load_pickle",
    "load_whole",
    "loaded",
]
