"""
Checkpoint files, a tensor at a time: converting a model never needs the memory to hold it.

Pickles are read with `weights_only=True`, and through a memory map where their format allows it.
"""

import glob
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from ..mixtures.loading import check_readable, first_line, load_pickle
from ..mixtures.progress import progress_bar


# In the order of preference where a folder holds several formats.
_NAMES = ("model.safetensors", "pytorch_model.bin")
# Bytes read from a memory-mapped file before it is opened anew.
MAPPED = 8 << 20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_files(folder: str | Path) -> list[Path]:
    """
    Args:
        folder (`str` or `Path`): Holds `model.safetensors` or `pytorch_model.bin`, or shards of either.

    Returns:
        `list[Path]`: the file, or all shards in order.

    Raises:
        ValueError: there are none, or a shard is missing.
    """
    folder = Path(folder)
    for name in _NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"'{index}' has no `weight_map` from tensors to files; download it again.")
            return [_existing(folder / file, index) for file in sorted(set(files.values()))]
        if (folder / name).is_file():
            return [folder / name]
        stem, suffix = name.rsplit(".", 1)
        for shard in folder.glob(f"{stem}-*[0-9]-of-[0-9]*[0-9].{suffix}"):
            count = shard.stem.rsplit("-", 1)[1]
            names = [f"{stem}-{i:0{len(count)}}-of-{count}.{suffix}" for i in range(1, int(count) + 1)]
            return [_existing(folder / file, shard) for file in names]
    raise ValueError(f"'{folder}' holds neither {' nor '.join(_NAMES)}, whole or in shards; check the path.")


def _existing(file: Path, named_by: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"'{file}' is missing, though '{named_by.name}' tells of it; download it again.")
    return file


def read_json(file: str | Path) -> dict:
    """
    Args:
        file (`str` or `Path`): A JSON object.

    Returns:
        `dict`.

    Raises:
        ValueError: there is no such file, or it is no JSON object.
    """
    if not Path(file).is_file():
        raise ValueError(f"There is no file '{file}'; check the path.")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is no valid JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' holds a {type(content).__name__}, not a JSON object.")
    return content


def read_metadata(file: str | Path) -> dict[str, str]:
    """What a safetensors file says about itself."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


class TensorFiles:
    r"""
    Named tensors in one or several files, read one at a time.

    Args:
        files (`Iterable[Path]`): safetensors or `torch.save`d dicts.
        rename (`Callable[[str], str]`, *optional*): The name under which a tensor is offered.
        section (`str`, *optional*): The entry of each file that holds the tensors.

    Raises:
        ValueError: a file is missing, damaged, or holds anything but tensors, or a name occurs twice.
    """

    def __init__(
        self, files: Iterable[str | Path], rename: Callable[[str], str] = str, section: str | None = None
    ) -> None:
        self.files = [Path(file) for file in files]
        self.section = section
        self.info: dict[str, TensorInfo] = {}
        self.raw_names: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        self._kept: tuple[Path | None, Mapping] = (None, {})
        self._mapped = 0
        for file in self.files:
            for raw, tensor in self._open(file):
                name = rename(raw)
                if name in self.info:
                    raise ValueError(
                        f"'{file}' holds '{raw}', and '{self.raw_names[name]}' in '{self._file_of[name].name}' means "
                        "the same tensor; remove one of the two."
                    )
                self.info[name], self.raw_names[name], self._file_of[name] = tensor, raw, file

    def __contains__(self, name: str) -> bool:
        return name in self.info

    def file_of(self, name: str) -> str:
        """The file's name, for messages."""
        return self._file_of[name].name if name in self._file_of else self.files[0].name

    def _open(self, file: Path) -> Iterator[tuple[str, TensorInfo]]:
        if file.suffix == ".safetensors":
            check_readable(file)
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():
                        entry = opened.get_slice(name)
                        if entry.get_dtype() not in _DTYPES:
                            raise ValueError(f"'{file}' holds '{name}' in {entry.get_dtype()}, an unknown dtype.")
                        yield name, TensorInfo(tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
            except SafetensorError as error:
                raise ValueError(
                    f"'{file}' is truncated or no checkpoint ({first_line(error)}); download it again."
                ) from error
            return
        for name, tensor in self._pickled(file).items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not isinstance(name, str):
                kind = type(tensor).__name__ if not isinstance(tensor, torch.Tensor) else tensor.layout
                raise ValueError(f"'{file}' holds '{name}', which is a {kind} and no named dense tensor.")
            if tensor.dtype not in _DTYPE_NAMES:
                raise ValueError(f"'{file}' holds '{name}' in {tensor.dtype}, an unknown dtype.")
            yield name, TensorInfo(tuple(tensor.shape), tensor.dtype)

    def _pickled(self, file: Path) -> Mapping:
        if self._kept[0] == file:
            return self._kept[1]
        self._kept = (None, {})  # never two files at once
        content = load_pickle(file)
        if self.section is not None:
            if not isinstance(content.get(self.section), dict):
                raise ValueError(f"'{file}' has no entry '{self.section}', which should hold its tensors.")
            content = content[self.section]
        self._kept, self._mapped = (file, content), 0
        return content

    def _count_mapped(self, file: Path, num_bytes: int) -> None:
        """What has been read through a map counts as memory until it is closed; old pickles are read whole anyway."""
        self._mapped += num_bytes
        if self._mapped > MAPPED and zipfile.is_zipfile(file):
            self._kept = (None, {})

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, as it was saved."""
        file, raw = self._file_of[name], self.raw_names[name]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(raw)
        tensor = self._pickled(file)[raw]
        self._count_mapped(file, tensor.nbytes)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of the tensor of that name."""
        file, raw = self._file_of[name], self.raw_names[name]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return opened.get_slice(raw)[start:stop]
        return self.read(name)[start:stop]


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    parts_of: Callable[[str], Iterable[torch.Tensor]],
    name: str = "model.safetensors",
    max_shard_size: str | int = "5GB",
    metadata: dict[str, str] | None = None,
    progress: str | None = None,
) -> None:
    r"""
    Writes safetensors without ever holding more than one part of one tensor.

    Args:
        folder (`Path`): Gets `name`, or shards and an index.
        tensors (`dict[str, TensorInfo]`): What is written, in this order.
        parts_of (`Callable`): A tensor's name -> pieces that, flattened and joined, are its elements in order; they
            are rounded to its dtype.
        name (`str`, *optional*, defaults to `"model.safetensors"`): Of the file.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Of a shard.
        metadata (`dict[str, str]`, *optional*): Beside `{"format": "pt"}`.
        progress (`str`, *optional*): Title of a progress bar; no bar without one.

    Raises:
        ValueError: there is not enough room on the disk, or parts and shape disagree.
    """
    check_room(folder, tensors)
    shards = split_into_shards(folder / name, tensors, max_shard_size)
    size = sum(map(_bytes, tensors.values()))
    with progress_bar(total=size, unit="B", unit_scale=True, desc=progress, shown=progress is not None) as bar:
        for file, keys in shards.items():
            with open(folder / file, "wb") as output:
                output.write(_header({key: tensors[key] for key in keys}, metadata or {}))
                for key in keys:
                    written = 0
                    for part in parts_of(key):
                        # `view`, not `numpy()`: NumPy has no bfloat16.
                        part = part.detach().to(tensors[key].dtype).contiguous().view(-1).view(torch.uint8)
                        output.write(part.numpy().data)
                        written += part.numel()
                        bar.update(part.numel())
                    if written != _bytes(tensors[key]):
                        raise ValueError(f"'{key}' got {written} bytes, its shape has {_bytes(tensors[key])}.")


def split_into_shards(
    file: Path, tensors: Mapping[str, TensorInfo], max_shard_size: str | int
) -> dict[str, list[str]]:
    """
    Args:
        file (`Path`): Of the weights, if one is enough; where not, its index is written beside it.
        tensors (`dict[str, TensorInfo]`): What is to be written.
        max_shard_size (`str` or `int`): Of a file.

    Returns:
        `dict[str, list[str]]`: name of each file -> its tensors.
    """
    shards = split_torch_state_dict_into_shards(
        {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in tensors.items()},
        filename_pattern=f"{file.stem}{{suffix}}{file.suffix}",
        max_shard_size=max_shard_size,
    )
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return shards.filename_to_tensors or {file.name: []}


def write_adapter(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    parts_of: Callable[[str], Iterable[torch.Tensor]],
    settings: Mapping[str, Any],
    base_name: str,
) -> None:
    """
    Writes a PEFT adapter of plain LoRA.

    Args:
        folder (`Path`): New; gets `adapter_model.safetensors` and `adapter_config.json`.
        tensors, parts_of: As in [`write_safetensors`]; names as PEFT has them.
        settings (`dict`): An `adapter_config.json` from which rank, scale, dropout and the like are taken.
        base_name (`str`): Of the model that it is for.
    """
    folder.mkdir()
    write_safetensors(folder, tensors, parts_of, name="adapter_model.safetensors")
    modules = sorted({adapted_weight(name).removesuffix(".weight") for name in tensors})
    fields = ("r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights", "task_type")
    config = {field: settings[field] for field in fields if field in settings}
    config |= {"peft_type": "LORA", "base_model_name_or_path": base_name, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": True}, indent=2) + "\n")


def adapted_weight(name: str) -> str:
    """
    Args:
        name (`str`): Of a LoRA factor in a PEFT adapter.

    Returns:
        `str`: the weight of the model that it is for.
    """
    return f"{name.removeprefix('base_model.model.').rsplit('.lora_', 1)[0]}.weight"


def check_room(folder: Path, *tensors: Mapping[str, TensorInfo]) -> None:
    """
    Args:
        folder (`Path`): Where to write.
        tensors (`dict[str, TensorInfo]`): All that will be.

    Raises:
        ValueError: the disk is too full.
    """
    size = sum(_bytes(info) for group in tensors for info in group.values())
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"Writing needs {size / 1e9:.2f} GB but '{folder.parent}' has {free / 1e9:.2f} GB left.")


def _bytes(info: TensorInfo) -> int:
    return int(torch.Size(info.shape).numel()) * info.dtype.itemsize


def _header(tensors: Mapping[str, TensorInfo], metadata: dict[str, str]) -> bytes:
    """https://huggingface.co/docs/safetensors: the header's length, 8 bytes, then JSON filled up to 8 bytes."""
    header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
    for key, info in tensors.items():
        end = offset + _bytes(info)
        header[key] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """
    A folder that appears whole or not at all: written beside under another name, then renamed. What a process that
    was killed left of the same folder goes away.

    Args:
        output (`str` or `Path`): Must not exist, or be empty.

    Raises:
        ValueError: there is something in `output` already, or it cannot be written.
    """
    check_new(output)
    output = Path(output).resolve()
    parents = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f".{glob.escape(output.name)}.*.partial"):
            if not _is_running(left.name.split(".")[-2].partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        partial = output.with_name(f".{output.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        partial.mkdir()
    except OSError as error:
        raise ValueError(f"'{output}' cannot be written ({error.strerror}); choose another --output.") from error
    try:
        yield partial
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # not empty: all went well
                parent.rmdir()


def _is_running(process: str) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # no number; somebody else's
        return True
    return True


def check_new(output: str | Path) -> None:
    """
    Args:
        output (`str` or `Path`): Of a folder that is to be made.

    Raises:
        ValueError: it is a file, or holds something.
    """
    output = Path(output).resolve()
    if output.is_dir():
        if any(output.iterdir()):
            raise ValueError(f"'{output}' is not empty; choose a new folder, nothing is overwritten.")
    elif output.exists():
        raise ValueError(f"'{output}' is a file; choose a new folder.")


__all__ = [
    "TensorFiles",
    "TensorInfo",
    "adapted_weight",
    "check_new",
    "check_room",
    "new_folder",
    "read_json",
    "read_metadata",
    "split_into_shards",
    "weight_files",
    "write_adapter",
    "write_safetensors",
]
