"""
What frozen towers give for the clips of a data set, kept in a folder: the same in every step, epoch and stage.

    features.json              what the towers and their front ends are, and in which precision features are stored
    features-*.safetensors     the features, before the connectors
    features-*.json            which clips the file of the same name holds; a file without one is not there yet

Files are written aside, renamed, and never changed afterwards. So a process that is killed leaves a cache that is
whole, and any number of others may read, and write, meanwhile.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..hub.connectors_uni_moe import TOWERS
from ..hub.files_uni_moe import name_of, reason
from ..hub.media_uni_moe import Clip
from ..hub.towers_uni_moe import learns
from .feature_keys import content_digest, difference, encoder_of, tower_identities


HEADER = "features.json"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 512 * 2**20  # of features that wait to be written, and so of a file
MAX_OPEN_SHARDS = 64
DAY = 24 * 3600  # seconds
NOUNS = {"image": "Picture", "video": "Video", "audio": "Audio", "speech": "Audio"}
INPUTS = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos", "pixel_values_videos_mask"),
    "audio": ("input_values", "input_values_mask"),
    "speech": ("input_features", "input_features_mask"),
}


class FeatureCacheError(OSError):
    """Features cannot be had from a cache: a fault of the cache, not of the row."""


@dataclass(frozen=True)
class ClipKey:
    """A clip's key in the cache, and what it is called."""

    key: str
    source: str


@dataclass
class Found:
    """
    What a cache knows of the clips of one modality.

    Args:
        keys (`list[ClipKey]`): One key per clip; empty if missing features would not be stored.
        states (`dict[str, torch.Tensor]`, *optional*): A part of the model's `tower_states`; `None` where clips are
            missing and the cache may be filled.
        units (`list[int]`): Windows or frames of each clip, 1 for a picture.
    """

    keys: list[ClipKey]
    states: dict[str, torch.Tensor] | None = None
    units: list[int] | None = None


class FeatureCache:
    r"""
    Features of clips, for the processor (`processor.feature_cache = cache`), which then gives the model
    `tower_states` in place of pictures, frames and sound, in training, evaluation and generation.

    Args:
        folder (`str` or `Path`): Where features lie; made where `fill` is set.
        model ([`UniMoEForConditionalGeneration`]): Whose towers the features are of; with its towers in memory.
        processor ([`UniMoEProcessor`]): Of the model.
        dtype (`str`, *optional*): In which features are stored: "float32", "bfloat16" or "float16"; that of the towers
            by default. What exists keeps its own.
        fill (`bool`, *optional*, defaults to `False`): Whether clips that are missing are read; else they are an
            error. They are stored by [`encode_rows`] and, while it trains, by [`UniMoESFTTrainer`].

    Raises:
        ValueError: there is no cache, or it is of another tower, front end or precision; the message says which
            setting differs.
        OSError: the folder cannot be written to.

    Example:

    ```python
    >>> cache = FeatureCache("outputs/features", model, processor, fill=True)
    >>> processor.feature_cache = cache
    >>> UniMoESFTTrainer(model=model, processing_class=processor, ...).train()
    ```
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, processor: Any, dtype: str | None = None, fill: bool = False
    ):
        self.folder, self.fill = checked_folder(folder), fill
        self.is_collecting = False  # whether missing clips are handed on to whoever has the towers, to be stored
        if dtype not in (None, *DTYPES):
            raise ValueError(f"Features are stored in {', '.join(DTYPES)}, not in {dtype!r}.")
        towers = tower_identities(model, processor)
        try:
            if fill:
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / ".lock"):
                    header = self._header(towers, dtype)
                    self._tidy()
            else:
                header = self._header(towers, dtype)
        except OSError as error:
            if isinstance(error, FeatureCacheError):
                raise
            raise FeatureCacheError(f"'{self.folder}' cannot be a feature cache ({reason(error)}).") from error
        self._header_towers: dict[str, dict] = header["towers"]
        self.dtype = DTYPES[header["dtype"]]
        self._index: dict[str, tuple[Path, dict]] = {}  # key -> file, and what is known of the clip
        self._sources: set[tuple[str, str]] = set()  # (modality, source) of the clips
        self._shards: set[str] = set()
        self._waiting: dict[str, tuple[dict, dict[str, torch.Tensor]]] = {}  # key -> what is known, tensors
        self._waiting_bytes = 0
        self.added: Counter[str] = Counter()  # modality -> bytes that this object has stored, or that wait
        self._opened: OrderedDict[Path, Any] = OrderedDict()
        self._checked: set[str] = set()  # keys of clips whose bytes were found to be those that were stored
        self._process = os.getpid()
        self._listed = -1
        self.refresh()

    def __deepcopy__(self, memo: dict) -> "FeatureCache":
        return self  # copies of a processor share it

    def __getstate__(self) -> dict[str, Any]:
        # For workers: what waits is written by this process.
        return self.__dict__ | {"_opened": OrderedDict(), "_waiting": {}, "_waiting_bytes": 0}

    @contextmanager
    def collecting(self, dry_run: bool = False) -> Iterator[None]:
        """
        While it is entered, a batch says of clips that are missing how [`store`] keeps their features. They are an
        error where the cache is not being filled, but for a dry run.
        """
        self.is_collecting = self.fill or dry_run
        try:
            yield
        finally:
            self.is_collecting = False

    def __len__(self) -> int:
        return len(self._index) + len(self._waiting.keys() - self._index.keys())

    def _header(self, towers: dict[str, dict], dtype: str | None) -> dict[str, Any]:
        """What the folder's header says, if it agrees; completed where the cache is filled."""
        path = self.folder / HEADER
        if not path.is_file() and not self.fill:
            raise ValueError(
                f"'{self.folder}' holds no feature cache; make one with `uni-moe data encode`, or fill it while "
                "training (`fill_feature_cache`)."
            )
        precisions = {tower["dtype"] for tower in towers.values()} & DTYPES.keys()
        header = {"format": FORMAT, "dtype": dtype or max(precisions, default="float32"), "towers": {}}
        if path.is_file():
            try:
                header = json.loads(path.read_text(encoding="utf-8"))
                known = header["format"] == FORMAT and header["dtype"] in DTYPES
                if not all(isinstance(tower, dict) for tower in dict(header["towers"]).values()):
                    raise TypeError("a tower has no settings")
                header["towers"] = dict(header["towers"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"'{path}' is no header of a feature cache ({reason(error)}).") from error
            if not known:
                raise ValueError(f"'{path}' is of a format that this release does not read; make the cache anew.")
            if dtype is not None and dtype != header["dtype"]:
                raise ValueError(
                    f"The feature cache '{self.folder}' holds {header['dtype']}, not {dtype}; name another folder."
                )
        elif any(self.folder.glob("features-*.json")):
            raise ValueError(
                f"'{self.folder}' holds features but no {HEADER}, which says whose they are; make the cache anew."
            )
        self._compare(header["towers"], towers)
        missing = towers.keys() - header["towers"].keys()
        if self.fill and (missing or not path.is_file()):
            header["towers"] |= {name: towers[name] for name in missing}
            self._write(HEADER, lambda aside: aside.write_text(json.dumps(header, indent=1), encoding="utf-8"))
        return header

    def _tidy(self) -> None:
        """Removes what writers left that were killed a day ago or earlier."""
        for path in self.folder.glob("*features-*.safetensors*"):
            is_whole = not path.name.startswith(".") and path.with_suffix(".json").exists()
            if not is_whole and time.time() - path.stat().st_mtime > DAY:
                path.unlink(missing_ok=True)

    def _compare(self, stored: dict[str, dict], towers: dict[str, dict]) -> None:
        for name, tower in towers.items():
            if name in stored and (what := difference(stored[name], tower)):
                raise ValueError(
                    f"The feature cache '{self.folder}' was made with another {name} tower or front end: "
                    f"{what}. Use the model that it was made with, or make a cache of its own for this one."
                )

    def check(self, model: nn.Module, processor: Any) -> None:
        """
        Before a training: the model and the processor may not be those that the cache was opened with.

        Raises:
            ValueError: the features are of others; or a tower is trained, so they change with every step.
        """
        encoder = encoder_of(model)
        if encoder.unloaded is None:
            self._compare(self._header_towers, tower_identities(model, processor))
        for name, tower in _towers_of(encoder).items():
            if learns(tower):
                raise ValueError(
                    f"The {name} tower is trained, so its features change and cannot be kept; freeze it, or train "
                    "without a feature cache."
                )

    # ---- reading ----

    def refresh(self, thoroughly: bool = False) -> None:
        """Takes up what has been written since; `thoroughly` even where the folder seems unchanged."""
        try:
            listed = os.stat(self.folder).st_mtime_ns
            if listed == self._listed and not thoroughly:
                return
            names = {entry.name for entry in os.scandir(self.folder)}
        except FileNotFoundError as error:
            raise FeatureCacheError(f"The feature cache '{self.folder}' is gone.") from error
        self._listed = listed
        for name in sorted(names - self._shards):
            if name == HEADER or not (name.startswith("features-") and name.endswith(".json")):
                continue
            shard = self.folder / name.replace(".json", ".safetensors")
            try:
                content = json.loads((self.folder / name).read_text(encoding="utf-8"))
                clips, size = dict(content["clips"]), content["bytes"]
                sources = {(about["modality"], about["source"]) for about in clips.values()}
                if any(not (about["units"] and about["tensors"] and "checksum" in about) for about in clips.values()):
                    raise ValueError("an entry is empty")
                if shard.stat().st_size != size:
                    raise ValueError(f"'{shard.name}' has {shard.stat().st_size} bytes in place of {size}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise FeatureCacheError(
                    f"'{self.folder / name}' of the feature cache cannot be used ({reason(error)}); remove it and its "
                    ".safetensors, and encode again."
                ) from error
            self._shards.add(name)
            self._index |= {key: (shard, about) for key, about in clips.items()}
            self._sources |= sources

    def key_of(self, processor: Any, modality: str, source: Any, kwargs: Mapping[str, Mapping]) -> ClipKey:
        """
        Args:
            processor ([`UniMoEProcessor`]): Which reads the clip.
            modality (`str`): What it is heard or seen as.
            source: The clip, in any form that the processor takes.
            kwargs (`dict[str, dict]`): What was asked in this call, as the processor groups it.

        Returns:
            [`ClipKey`]: of its content and its cut; a copy of a file has the same.

        Raises:
            ValueError: it is missing, or has no content that could be told from another.
        """
        clip = source if isinstance(source, Clip) else Clip(source)
        groups = {"image": ("images_kwargs",), "video": ("images_kwargs", "videos_kwargs")}
        asked: dict[str, Any] = {"at_most": processor.video_frames if modality == "video" else None}
        for group in groups.get(modality, ("audio_kwargs",)):
            asked |= kwargs.get(group, {})
        # What a clip says of itself wins, as where it is read.
        of_clip = {"start": clip.start or None, "end": clip.end, "num_frames": clip.num_frames, "fps": clip.fps}
        numbers = {name: float(value) for name, value in of_clip.items() if value is not None}
        asked |= numbers
        asked = {name: value for name, value in asked.items() if value is not None and name != "return_tensors"}
        content = content_digest(clip.source, NOUNS[modality], processor.uploads_only)
        told = json.dumps([modality, content, asked], sort_keys=True, default=str)
        shown = clip.source.get("path") if isinstance(clip.source, Mapping) else clip.source
        return ClipKey(hashlib.blake2b(told.encode(), digest_size=20).hexdigest(), name_of(shown))

    def find(self, processor: Any, modality: str, sources: list, kwargs: Mapping[str, Mapping]) -> Found:
        """
        Args:
            processor, modality, kwargs: As in [`key_of`].
            sources (`list`): Clips of one modality, in reading order.

        Returns:
            [`Found`].

        Raises:
            FeatureCacheError: one of them is not stored, and the cache is not being filled; a file of the cache is
                damaged.
            ValueError: as in [`key_of`].
        """
        keys = [self.key_of(processor, modality, source, kwargs) for source in sources]
        if not self.has(keys):
            # The date of a folder may lie behind what is in it.
            self.refresh(thoroughly=not self.fill)
        if not self.has(keys):
            if self.fill or self.is_collecting:
                return Found(keys if self.is_collecting else [])
            self._refuse(modality, next(key for key in keys if key.key not in self._index))
        clips = [self._read(key.key) for key in keys]
        units = [about["units"] for about, _ in clips]
        return Found(keys, _joined(modality, [tensors for _, tensors in clips]), units)

    def has(self, keys: Iterable[ClipKey]) -> bool:
        """Whether all of these are stored, or wait to be written."""
        return all(key.key in self._index or key.key in self._waiting for key in keys)

    def _refuse(self, modality: str, key: ClipKey) -> None:
        if TOWERS[modality] not in self._header_towers or not any(kind == modality for kind, _ in self._sources):
            what = f"holds no {modality}"
        elif key.source.startswith("'") and (modality, key.source) in self._sources:
            what = f"holds {key.source} as it was before, or cut otherwise: it has changed since"
        else:
            what = f"does not hold {key.source} as {modality}"
        raise FeatureCacheError(
            f"The feature cache '{self.folder}' {what}; encode the rows once more with `uni-moe data encode`, or fill "
            "the cache while training (`fill_feature_cache`)."
        )

    def _read(self, key: str) -> tuple[dict, dict[str, torch.Tensor]]:
        if key in self._waiting:
            return self._waiting[key]
        if self._process != os.getpid():  # a worker: what its parent opened is the parent's
            self._opened, self._process = OrderedDict(), os.getpid()
        shard, about = self._index[key]
        try:
            if shard not in self._opened:
                self._opened[shard] = safe_open(shard, "pt")
                if len(self._opened) > MAX_OPEN_SHARDS:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(shard)
            file = self._opened[shard]
            tensors = {name: file.get_tensor(f"{key}.{name}") for name in about["tensors"]}
            if key not in self._checked:
                if _checksum(tensors) != about["checksum"]:
                    raise OSError(f"the features of {about['source']} are not those that were stored")
                self._checked.add(key)
            return about, tensors
        except (OSError, SafetensorError) as error:
            raise FeatureCacheError(
                f"'{shard}' of the feature cache cannot be read ({reason(error)}); remove it and its .json, and "
                "encode again."
            ) from error

    # ---- writing ----

    def store(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """
        Runs the towers on the clips of a batch where some of their modality are not stored yet, and stores what they
        give while it is [`collecting`].

        Args:
            model ([`UniMoEForConditionalGeneration`]): With its towers, wrapped by PEFT or not.
            batch (`dict`): As the processor makes it while the cache is being filled; loses `clips_to_store`.

        Returns:
            `dict`: the batch itself, with `tower_states` in place of these clips.

        Raises:
            ValueError: the towers are not in memory, or are sharded.
            FeatureCacheError: the disk is full, what was written before is kept; or a tower gives no finite numbers in
                the precision in which they are stored. The batch has its features all the same.
        """
        wanted: dict[str, list[tuple[ClipKey, int]]] = batch.pop("clips_to_store", {})
        states = batch.setdefault("tower_states", {}) if wanted else {}
        for modality, clips in [*wanted.items()]:
            if self.has(key for key, _ in clips):  # since: of another row, or by another process
                try:
                    joined = _joined(modality, [self._read(key.key)[1] for key, _ in clips])
                except FeatureCacheError:  # damaged; its clips are at hand
                    continue
                states |= {name: tensor.to(encoder_of(model).device) for name, tensor in joined.items()}
                del wanted[modality]
                for name in INPUTS[modality]:
                    batch.pop(name, None)
        media = {name: batch.pop(name) for m in wanted for name in INPUTS[m] if name in batch}
        new = self.states_of(model, media) if wanted else {}
        states |= new
        if self.is_collecting:
            for modality, clips in wanted.items():
                for (key, units), tensors in zip(clips, parts_of(modality, [u for _, u in clips], new), strict=True):
                    self._add(key, {"modality": modality, "source": key.source, "units": units}, tensors)
            if self._waiting_bytes >= SHARD_BYTES:
                self.flush()
        return batch

    def states_of(self, model: nn.Module, media: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """`tower_states` of a batch's pictures, frames and sound, in the precision in which they are stored."""
        encoder = encoder_of(model)
        media = {name: media[name] for names in INPUTS.values() for name in names if name in media}
        towers = _towers_of(encoder).values()
        if any(isinstance(parameter, DTensor) for tower in towers for parameter in tower.parameters()):
            raise ValueError(
                "The towers are sharded over processes, so a feature cache cannot be filled; make it before with "
                "`uni-moe data encode`."
            )
        for tower in towers:
            tower.eval()  # nothing is drawn at random
        states = encoder.run_towers(**media)
        return {name: rows.to(self.dtype) if rows.is_floating_point() else rows for name, rows in states.items()}

    def _add(self, key: ClipKey, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if self.has([key]):
            return
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise FeatureCacheError(
                f"The features of {key.source} are not finite in {str(self.dtype).removeprefix('torch.')}, in which "
                f"'{self.folder}' holds them; make a cache of another precision (`dtype`)."
            )
        tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        about = about | {"tensors": list(tensors), "bytes": size, "checksum": _checksum(tensors)}
        self._waiting[key.key] = about, tensors
        self._waiting_bytes += size
        self.added[about["modality"]] += size

    def flush(self) -> None:
        """
        Writes what waits.

        Raises:
            OSError: the disk is full; what was written before is kept.
        """
        if not self._waiting:
            return
        self.refresh()  # another process may have stored the same
        waiting = {key: value for key, value in self._waiting.items() if key not in self._index}
        if waiting:
            self._write_shard(waiting)
        self._waiting, self._waiting_bytes = {}, 0

    def _write_shard(self, waiting: dict[str, tuple[dict, dict[str, torch.Tensor]]]) -> None:
        name = f"features-{uuid.uuid4().hex}"
        tensors = {f"{key}.{part}": t for key, (_, parts) in waiting.items() for part, t in parts.items()}
        shard = self._write(f"{name}.safetensors", lambda aside: save_file(tensors, aside))
        content = {"bytes": shard.stat().st_size, "clips": {key: about for key, (about, _) in waiting.items()}}
        self._write(f"{name}.json", lambda aside: aside.write_text(json.dumps(content), encoding="utf-8"))
        self.refresh()

    def _write(self, name: str, write: Any) -> Path:
        """A file that is there whole or not at all."""
        aside, path = self.folder / f".{name}.{os.getpid()}", self.folder / name
        try:
            write(aside)
            with open(aside, "rb") as file:  # on the disk before anything says that it is there
                os.fsync(file.fileno())
            aside.chmod(0o666 & ~_umask())
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                aside.unlink()
            raise FeatureCacheError(
                f"The feature cache '{self.folder}' could not be written to ({reason(error)}); make room and start "
                "again: what was stored before is kept."
            ) from error
        return path

    def summary(self) -> dict[str, dict[str, int]]:
        """`dict`: modality -> how many "clips" are stored and their "bytes"."""
        found: dict[str, dict[str, int]] = {}
        stored = [about for _, about in self._index.values()]
        for about in [*stored, *(about for about, _ in self._waiting.values())]:
            entry = found.setdefault(about["modality"], {"clips": 0, "bytes": 0})
            entry["clips"] += 1
            entry["bytes"] += about["bytes"]
        return found


def checked_folder(folder: str | Path) -> Path:
    """
    Raises:
        ValueError: it cannot be a folder: its name is empty, or it or what it lies in is something else.
    """
    if not str(folder):
        raise ValueError("A feature cache needs a folder, and its name is empty.")
    path = Path(folder)
    if there := next((place for place in (path, *path.parents) if os.path.lexists(place)), None):
        if not there.is_dir():
            raise ValueError(f"'{folder}' cannot be the folder of a feature cache: '{there}' is none.")
    return path


def _towers_of(encoder: nn.Module) -> dict[str, nn.Module]:
    """Those that are there and among its modules."""
    found = {name: getattr(encoder, f"{name}_tower", None) for name in dict.fromkeys(TOWERS.values())}
    return {name: tower for name, tower in found.items() if tower is not None}


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """Of the tensors' bytes."""
    found = 0
    for tensor in tensors.values():
        found = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), found)
    return found


def parts_of(modality: str, units: list[int], states: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """What is kept of each clip, which has so many windows or frames: without what fills it up to the longest."""
    start = 0
    for number, count in enumerate(units):
        rows = slice(start, start + count) if modality in ("audio", "speech") else number
        start += count
        tensors = {"states": states[modality][rows]}
        if (mask := states.get(f"{modality}_mask")) is not None:
            tensors["mask"] = mask[rows].to(torch.uint8)
        if modality == "video":
            tensors = {"states": tensors["states"][:count]}
        elif modality == "speech" and mask is not None:
            longest = max(1, int(tensors["mask"].sum(dim=1).max()))
            tensors = {name: tensor[:, :longest] for name, tensor in tensors.items()}
        yield tensors


def _joined(modality: str, clips: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`tower_states` of several clips."""
    states = [clip["states"] for clip in clips]
    if modality == "image":
        return {"image": torch.stack(states)}  # (N, P, D)
    longest = max(each.shape[-3 if modality == "video" else -2] for each in states)
    if modality == "video":
        filled = [F.pad(each, (0, 0, 0, 0, 0, longest - len(each))) for each in states]
        joined = {"video": torch.stack(filled)}  # (V, F, P, D)
        if any(len(each) < longest for each in states):
            frames = torch.tensor([len(each) for each in states])
            joined["video_mask"] = (torch.arange(longest) < frames[:, None]).long()
        return joined
    joined = {modality: torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in states])}  # (W, L, D)
    if "mask" in clips[0]:
        masks = [F.pad(clip["mask"], (0, longest - clip["mask"].shape[1])) for clip in clips]
        joined[f"{modality}_mask"] = torch.cat(masks).long()
    return joined


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["INPUTS", "ClipKey", "FeatureCache", "FeatureCacheError", "Found", "checked_folder", "parts_of"]
