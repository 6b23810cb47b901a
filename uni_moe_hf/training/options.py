"""Options of the scripts: what all three stages share, what each has besides, and how they are read."""

import atexit
import glob
import json
import os
import platform
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available
from trl import ScriptArguments, SFTConfig, TrlParser

from ..hub.configuration_uni_moe import MODALITIES, UniMoEConfig
from ..hub.files_uni_moe import cause_of, sentence_of
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..hub.processing_uni_moe import UniMoEProcessor
from ..mixtures.composition import from_pretrained_parts
from ..mixtures.processors import build_processor
from ..mixtures.router_starts import ROUTER_STARTS
from .data import UniMoEDataCollator
from .feature_cache import FeatureCache
from .row_files import kind_of, load_rows, spread_over
from .rows import describe_row, row_modalities, row_to_messages


# Rows that are looked at to see what kinds of media there are.
SAMPLE = 200
# How many times as many rows are looked at as are wanted of each kind.
SPREAD = 32


@dataclass
class StageArguments(ScriptArguments):
    r"""
    TRL's `ScriptArguments`, and what training on rows with media needs besides.

    Args:
        dataset_name, dataset_config, dataset_streaming, dataset_train_split: As in [`load_rows`].
        dataset_test_split (`str`, *optional*, defaults to `"test"`): With an `eval_strategy`: a split of the same, or
            a file of its own.
        eval_rows (`int`, *optional*): In place of that: so many rows of the training data are held out, drawn by the
            seed; of a stream the first.
        eval_generate (`str`, *optional*): `task,every_n_steps`: a task's questions are asked of the rows to evaluate
            on, and its figures logged; see [`GenerationCallback`].
        live_figures (`bool`, *optional*, defaults to `False`): Figures of losses, and of a mixture's loads, as files
            in `output_dir/figures` while it trains; see [`LiveFiguresCallback`].
        routing_figures (`int`, *optional*, defaults to 10): With TensorBoard or Trackio: figures of routing with every
            so many logs; 0 for none.
        columns (`list[str]`, *optional*): Which column is what: `photo=image label=answer`.
        question (`list[str]`, *optional*): What is asked about plain media; of several each row draws one.
        dtype (`str`, *optional*): In which models are loaded; as saved by default.
        attn_implementation (`str`, *optional*): As in the library.
        media_root (`str`, *optional*): Folder that relative paths in the data start from.
        max_tokens (`int`, *optional*, defaults to 2048): Longest row, media included; `None` for no limit.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): As in [`UniMoEDataCollator`].
        group_by_modality, modality_per_process (`bool`, *optional*, defaults to `False`): As in [`UniMoESFTTrainer`].
        learning_rates (`dict[str, float]` or `str`, *optional*): As in [`UniMoESFTTrainer`]; text is read as JSON.
        feature_cache (`str`, *optional*): Folder of a [`FeatureCache`], as `uni-moe data encode` makes it.
        fill_feature_cache (`bool`, *optional*, defaults to `False`): Whether the first epoch fills it.
        without_towers (`bool`, *optional*, defaults to `False`): Whether towers leave the memory: all features are in
            the cache.

    Raises:
        ValueError: `learning_rates` is text that is not a JSON object, options contradict each other, or one is not
            known here.
    """

    eval_rows: int | None = field(default=None, metadata={"help": "Rows of the training data to hold out."})
    eval_generate: str | None = field(default=None, metadata={"help": "task,every_n_steps: ask its questions."})
    live_figures: bool = field(default=False, metadata={"help": "Figures in OUTPUT_DIR/figures while it trains."})
    routing_figures: int = field(default=10, metadata={"help": "Figures of routing with every so many logs."})
    columns: list[str] | None = field(default=None, metadata={"help": "Which column is what: photo=image."})
    question: list[str] | None = field(default=None, metadata={"help": "What is asked about plain media."})
    dtype: str | None = field(default=None, metadata={"help": "Of loaded models: float32, bfloat16, float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})

    media_root: str | None = field(default=None, metadata={"help": "Folder that paths in the data start from."})
    max_tokens: int | None = field(default=2048, metadata={"help": "Longest row, media included."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Count rows that cannot be used instead of stopping."}
    )
    group_by_modality: bool = field(default=False, metadata={"help": "Steps of rows with the same modalities."})
    modality_per_process: bool = field(default=False, metadata={"help": "Each process has rows of one kind."})
    learning_rates: dict | str | None = field(
        default=None, metadata={"help": "Of parts with another one, such as '{\"audio connector\": 3e-5}'."}
    )
    feature_cache: str | None = field(default=None, metadata={"help": "Folder with features of the frozen towers."})
    fill_feature_cache: bool = field(default=False, metadata={"help": "Fill it during the first epoch."})
    without_towers: bool = field(default=False, metadata={"help": "Leave the towers out of memory: all is cached."})

    def __post_init__(self) -> None:
        self.learning_rates = json_object("learning_rates", self.learning_rates)
        if self.dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` is {self.dtype!r}; it must be float32, bfloat16, float16 or auto.")
        if self.feature_cache is None and (self.fill_feature_cache or self.without_towers):
            option = "fill_feature_cache" if self.fill_feature_cache else "without_towers"
            raise ValueError(f"`{option}` needs `feature_cache`, the folder of the cache.")
        if self.fill_feature_cache and self.without_towers:
            raise ValueError("`fill_feature_cache` runs the towers, so they cannot be left out (`without_towers`).")
        if self.ignore_bias_buffers:
            raise ValueError("`ignore_bias_buffers` is for models with boolean masks as buffers; this one has none.")

    def rows(self) -> Dataset | IterableDataset:
        """All rows of the training data."""
        return self._load(self.dataset_name, self.dataset_train_split)

    def splits(self, training_args: SFTConfig) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
        """
        The rows to train on, and those to evaluate on where that is wanted.

        Raises:
            ValueError: rows to evaluate on are named and never used, or twice; too many are held out.
        """
        rows = self.rows()
        strategy = str(getattr(training_args.eval_strategy, "value", training_args.eval_strategy))
        if strategy == "no" and not self.eval_generate:
            given = "dataset_test_split" if self.dataset_test_split != "test" else "eval_rows"
            if given == "dataset_test_split" or self.eval_rows is not None:
                raise ValueError(f"`{given}` is given, but nothing is evaluated; add `--eval_strategy`.")
            return rows, None
        if self.eval_rows is not None:
            if self.dataset_test_split != "test":
                raise ValueError("`eval_rows` and `dataset_test_split` both say what to evaluate on; give one.")
            return self._held_out(rows, self.eval_rows, training_args.seed)
        if Path(self.dataset_test_split).is_file():
            return rows, self._load(self.dataset_test_split, "train")
        if kind_of(Path(self.dataset_test_split)) is not None:
            raise ValueError(f"`dataset_test_split` names the file '{self.dataset_test_split}', which does not exist.")
        if self.dataset_test_split == "test" and Path(str(self.dataset_name)).is_file():
            raise ValueError(
                "There are no rows to evaluate on: hold some out with `--eval_rows N`, or name a file with "
                "`--dataset_test_split`."
            )
        return rows, self._load(self.dataset_name, self.dataset_test_split)

    @staticmethod
    def _held_out(rows: Dataset | IterableDataset, count: int, seed: int) -> tuple[Any, Any]:
        if isinstance(rows, IterableDataset) and count > 0:
            return rows.skip(count), rows.take(count)
        if isinstance(rows, IterableDataset):
            raise ValueError(f"`eval_rows={count}` holds nothing out; give 1 or more.")
        if not 0 < count < len(rows):
            raise ValueError(f"`eval_rows={count}` cannot be held out of {len(rows)} rows; give 1 to {len(rows) - 1}.")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        held = sorted(order[:count])
        return rows.select(sorted(order[count:])), rows.select(held)

    def _load(self, source: str | None, split: str) -> Dataset | IterableDataset:
        if source is None:
            raise ValueError("There are no data; name a file, a folder or a data set with --dataset_name.")
        rows = load_rows(
            source,
            split,
            self.dataset_streaming,
            config=self.dataset_config,
            columns=self.columns,
            question=self.question,
        )
        if not self.skip_bad_rows:  # before models are loaded in vain
            for row in rows.take(1):
                try:
                    row_to_messages(row)
                except ValueError as error:
                    raise ValueError(f"{describe_row(row)} cannot be used: {error}.") from error
        return rows

    def check_modalities(
        self, rows: Dataset | IterableDataset, modalities: list[str], processor: UniMoEProcessor
    ) -> None:
        """
        Args:
            rows (`Dataset` or `IterableDataset`): To train on.
            modalities (`list[str]`): What an expert is for.
            processor ([`UniMoEProcessor`]): Of the model, which says where plain `audio` goes.

        Raises:
            ValueError: no row of a sample holds any of them.
        """
        if isinstance(rows, IterableDataset):
            sample = list(rows.take(SAMPLE))
        else:
            sample = rows.select(spread_over(len(rows), SAMPLE))
        found = set()
        for row in sample:
            with suppress(ValueError):  # the collator will name it
                found |= {processor._ear(kind) for kind in row_modalities(row)[0]}
        if not found & set(modalities):
            hint = " (speech in a plain column is said with --columns audio=speech)" if "speech" in modalities else ""
            raise ValueError(
                f"The expert is for {' and '.join(modalities)}, but of {len(sample)} rows none holds it; they hold "
                f"{', '.join(sorted(found)) or 'text'}{hint}."
            )

    def only_with(
        self, rows: Dataset | IterableDataset, modalities: list[str], processor: UniMoEProcessor
    ) -> Dataset | IterableDataset:
        """
        Args:
            rows, modalities, processor: As in [`check_modalities`].

        Returns:
            The rows that hold any of the modalities; what cannot be read stays, for the collator to name.
        """

        def is_wanted(row: dict[str, Any]) -> bool:
            try:
                return bool({processor._ear(kind) for kind in row_modalities(row)[0]} & set(modalities))
            except ValueError:
                return True

        if isinstance(rows, IterableDataset):
            return rows.filter(is_wanted)
        return rows.select([index for index in range(len(rows)) if is_wanted(rows[index])])

    def open_feature_cache(self, model: UniMoEForConditionalGeneration, processor: UniMoEProcessor) -> None:
        """
        Gives the processor the cache, where there is one.

        Raises:
            ValueError: it is of another tower, front end or precision.
        """
        if self.feature_cache is not None:
            processor.feature_cache = FeatureCache(self.feature_cache, model, processor, fill=self.fill_feature_cache)

    def use_feature_cache(
        self, model: UniMoEForConditionalGeneration, processor: UniMoEProcessor, training_args: SFTConfig
    ) -> None:
        """[`open_feature_cache`], and the towers leave the memory where that is wanted."""
        self.open_feature_cache(model, processor)
        if self.without_towers:
            file = _own_file(Path(training_args.output_dir).resolve())
            atexit.register(file.unlink, missing_ok=True)
            model.model.unload_towers(str(file))

    def loading(self) -> dict[str, Any]:
        """What is said about loading models."""
        given = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        return {name: value for name, value in given.items() if value is not None}

    def sample(
        self,
        rows: Dataset | IterableDataset,
        model: UniMoEForConditionalGeneration,
        processor: UniMoEProcessor,
        count: int,
        batch_size: int = 8,
    ) -> Iterator[dict[str, Any]]:
        """
        Batches of rows of one kind each: up to `count` of every combination of modalities among `SPREAD * count` rows
        from all over the data, which may be sorted; of a stream the first.
        """
        if isinstance(rows, IterableDataset):
            rows = list(rows.take(SPREAD * count))
        else:
            rows = rows.select(spread_over(len(rows), SPREAD * count))
        kinds: dict[frozenset[str], list[Any]] = {}
        for row in rows:
            with suppress(ValueError):  # the collator will name it when it is trained on
                kinds.setdefault(frozenset(map(processor._ear, row_modalities(row)[0])), []).append(row)
        collator, cache = self.collator(processor), processor.feature_cache
        with nullcontext() if cache is None else cache.collecting():
            for alike in kinds.values():
                for start in range(0, min(count, len(alike)), batch_size):
                    batch = collator(alike[start : min(start + batch_size, count)])
                    if not (batch["labels"] != -100).any():  # what stands where all rows were skipped
                        continue
                    batch = batch if cache is None else cache.store(model, batch)
                    yield _on_device(batch, model.device)
        if cache is not None:
            cache.flush()

    def collator(self, processor: UniMoEProcessor) -> UniMoEDataCollator:
        """What makes batches of them for a model with this processor."""
        return UniMoEDataCollator(
            processor, max_length=self.max_tokens, media_root=self.media_root, skip_bad_rows=self.skip_bad_rows
        )


def _on_device(value: Any, device: torch.device) -> Any:
    """A batch, features of a cache in it included, where the model is."""
    if isinstance(value, dict):
        return {name: _on_device(each, device) for name, each in value.items()}
    return value.to(device) if torch.is_tensor(value) else value


def _own_file(folder: Path) -> Path:
    """
    Where the towers of this process wait: beside the folder, which may be pushed to the Hub, or in it where nothing
    may be written beside it.
    """
    prefix = f".{folder.name}.towers-{platform.node()}-"
    for place in (folder.parent, folder):
        with suppress(OSError, ValueError):
            place.mkdir(parents=True, exist_ok=True)
            for old in place.glob(f"{glob.escape(prefix)}*.pt*"):  # of a process that was killed
                if not psutil.pid_exists(int(old.name.removeprefix(prefix).partition("-")[0])):
                    old.unlink(missing_ok=True)
            handle, name = tempfile.mkstemp(".pt", f"{prefix}{os.getpid()}-", place)
            os.close(handle)
            return Path(name)
    raise OSError(f"`without_towers` keeps them in a file beside '{folder}', which cannot be written.")


@dataclass
class PartsArguments:
    """What stage 1 builds a model from; see [`from_pretrained_parts`] and [`build_processor`]."""

    llm: str = field(metadata={"help": "LLM to start from, Hub id or folder: Llama, Qwen3, Gemma 3, ..."})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP, SigLIP, DINO or another backbone."})
    speech_tower: str | None = field(default=None, metadata={"help": "A Whisper of any size."})
    audio_tower: str | None = field(default=None, metadata={"help": "BEATs (also a .pt), AST, CLAP, Whisper, YAMNet."})
    image_size: int | None = field(default=None, metadata={"help": "Of pictures in pixels; else the tower's own."})
    num_speech_query_tokens: int | None = field(default=None, metadata={"help": "Tokens of a window of speech (50)."})
    num_audio_query_tokens: int = field(default=50, metadata={"help": "Tokens of a window of sound."})
    cut_speech_windows: bool = field(default=False, metadata={"help": "Hear short speech without padding: faster."})
    audio_connector_config: dict | str | None = field(default=None, metadata={"help": "Of the Q-Former, as JSON."})
    chat_template: str | None = field(default=None, metadata={"help": "Jinja file in place of the LLM's own."})

    def __post_init__(self) -> None:
        self.audio_connector_config = json_object("audio_connector_config", self.audio_connector_config)

    def build(self, **loading: Any) -> tuple[UniMoEForConditionalGeneration, UniMoEProcessor]:
        """
        Args:
            loading: `dtype` and `attn_implementation`, as [`StageArguments.loading`] gives them.

        Returns:
            `tuple`: the dense model that joins the parts, its connectors untrained, and the processor that fits it.

        Raises:
            ValueError: as in [`from_pretrained_parts`] and [`build_processor`].
        """
        model = from_pretrained_parts(
            self.llm,
            vision_tower=self.vision_tower,
            speech_tower=self.speech_tower,
            audio_tower=self.audio_tower,
            num_speech_query_tokens=self.num_speech_query_tokens,
            num_audio_query_tokens=self.num_audio_query_tokens,
            cut_speech_windows=self.cut_speech_windows,
            audio_connector_config=self.audio_connector_config,
            **loading,
        )
        return model, self.processor(model.config)

    def processor(self, config: UniMoEConfig) -> UniMoEProcessor:
        """The processor that fits the parts' config."""
        return build_processor(
            config,
            AutoTokenizer.from_pretrained(self.llm),
            image_processor=self.vision_tower,
            image_size=self.image_size,
            audio_feature_extractor=self.audio_tower,
            chat_template=self.chat_template and Path(self.chat_template).read_text(encoding="utf-8"),
        )


@dataclass
class ExpertArguments:
    """What stage 2 trains an expert for; see [`prepare_stage`]."""

    model_name_or_path: str = field(metadata={"help": "What stage 1 left."})
    modalities: list[str] = field(metadata={"help": "The expert's: image, video, audio, speech."})
    only_modalities: bool = field(default=False, metadata={"help": "Leave out rows that hold none of them."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the expert; products are scaled by alpha / rank."})

    def __post_init__(self) -> None:
        self.modalities = [self.modalities] if isinstance(self.modalities, str) else list(self.modalities)
        if unknown := [name for name in self.modalities if name not in MODALITIES]:
            raise ValueError(f"{', '.join(map(str, unknown))}: no modality; there are {', '.join(MODALITIES)}.")


@dataclass
class MixtureArguments:
    """What stage 3 grows a mixture from; see [`grow_experts`]."""

    model_name_or_path: str = field(metadata={"help": "What stage 1 left."})
    experts: list[str] = field(metadata={"help": "name=adapter folder, or name= for the plain LLM's network."})
    projectors: list[str] = field(default_factory=list, metadata={"help": "modality=expert whose projector to keep."})
    shared_base: bool = field(default=True, metadata={"help": "One frozen network for all experts."})
    layers: str = field(default="all", metadata={"help": "Which layers become sparse: all or even."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts per token."})
    router_start: str = field(default="informed", metadata={"help": "Of new routers: informed, balanced or random."})
    router_rows: int = field(default=64, metadata={"help": "Rows of each kind on which they are set."})
    expert_activations: str = field(default="save", metadata={"help": "Kept for backward: save, or recompute."})
    expert_parallel_size: int = field(default=1, metadata={"help": "Processes that share the experts; with torchrun."})
    fsdp_size: int | None = field(default=None, metadata={"help": "Processes that share all else; with torchrun."})

    def __post_init__(self) -> None:
        known = {"layers": ("all", "even"), "router_start": ROUTER_STARTS, "expert_activations": ("save", "recompute")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(values)}.")


def parse_options(kinds: tuple[type, ...], args: list[str] | None = None) -> tuple:
    """
    TRL's parser, with defaults that suit the machine: without a GPU a run takes the CPU and float32.

    Args:
        kinds (`tuple[type]`): Dataclasses of options.
        args (`list[str]`, *optional*): Arguments; those of the process by default.

    Returns:
        `tuple`: one of each.
    """
    parser = TrlParser(kinds)
    parser.set_defaults(
        use_cpu=not torch.accelerator.is_available(), bf16=None if is_torch_bf16_gpu_available() else False
    )
    options = parser.parse_args_and_config(args)
    # With ZeRO-3 the library would cut models up while it makes them: all processes together, where ours may be alone,
    # and Whisper's positions cannot be made of a piece. The trainer sets it again.
    unset_hf_deepspeed_config()
    return options


def json_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """
    An option that is an object, or its JSON.

    Raises:
        ValueError: it is other text.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f'`{name}` is {value!r}, which is no JSON ({error}); write {{"key": value}}.') from error
    if not isinstance(found, dict):
        raise ValueError(f'`{name}` is {value!r}, which is JSON but no object; write {{"key": value}}.')
    return found


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """
    Around a script: what this package refuses ends it with that sentence and exit code 1, and Ctrl-C with exit code
    130. Whatever else goes wrong keeps its traceback, and everything does with `UNI_MOE_DEBUG=1`.
    """
    if not os.environ.get("UNI_MOE_DEBUG"):  # about calls among the libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\b")
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("UNI_MOE_DEBUG"):
            raise
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: interrupted; `--resume_from_checkpoint last` resumes.\n")
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        frames = traceback.extract_tb(cause_of(error).__traceback__)
        is_ours = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
        if not is_ours or os.environ.get("UNI_MOE_DEBUG"):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {sentence_of(error)} (UNI_MOE_DEBUG=1 shows where it comes from)")


__all__ = [
    "ExpertArguments",
    "MixtureArguments",
    "PartsArguments",
    "StageArguments",
    "in_one_sentence",
    "json_object",
    "parse_options",
]
