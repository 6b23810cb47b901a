"""Uni-MoE as a model of lmms-eval (`--model uni_moe`): chats with media of every kind, in batches, and likelihoods."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api import instance
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from ..mixtures.loading import load_whole, loaded
from ..mixtures.progress import progress_bar
from ..training.data import UniMoEDataCollator
from .answering import answer_losses, answer_questions, on_device
from .questions import Question
from .tasks import DECODING, Task


logger = logging.get_logger(__name__)

MANIFEST = ModelManifest(
    "uni_moe",
    simple_class_path=f"{__name__}.UniMoESimple",
    chat_class_path=f"{__name__}.UniMoE",
)
# What `generation_kwargs` of tasks may hold beside what `generate` takes.
OURS = ("until", "image_aspect_ratio")


class Likelihood(tuple, getattr(instance, "GenerationResult", object)):
    """
    A loss and whether it is of the greedy choice: a tuple that lmms-eval 0.7 leaves as it is, where it turns others
    into text before it scores them.
    """

    token_counts = None

    def __init__(self, _: Any):
        pass  # the fields of its other parent are below

    @property
    def text(self) -> tuple[float, bool]:
        """What lmms-eval takes for the answer."""
        return tuple(self)


class UniMoE(lmms):
    r"""
    Args:
        pretrained (`str`): Checkpoint, a folder or a Hub id.
        device (`str`, *optional*): `cuda` where there is one by default, else `cpu`.
        dtype (`str`, *optional*, defaults to `"auto"`): As saved; or float32, bfloat16, float16.
        batch_size (`int`, *optional*, defaults to 1): Questions at once.
        audio (`str`, *optional*): What the harness' `audio` is: "audio" (sound) or "speech"; by default for the
            model's only ear, or its default one.
        system_prompt (`str`, *optional*): In place of the default system message.
        workers (`int`, *optional*): Processes that read media ahead; one where there is more than one core.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        audio: str | None = None,
        system_prompt: str | None = None,
        workers: int | None = None,
        trust_remote_code: bool = True,  # the package's own code is what runs
        **unknown: Any,
    ):
        super().__init__()
        if unknown := {name for name, value in unknown.items() if value is not None} - {"max_batch_size"}:
            raise ValueError(f"`uni_moe` has no argument {sorted(unknown)[0]!r}; see {__name__}.UniMoE.")
        if audio not in (None, "audio", "speech"):
            raise ValueError(f"`audio` is {audio!r}; it can be 'audio' (sound) or 'speech'.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self._device = torch.device(self.accelerator.device if several or device is None else device)
        self.processor = loaded(AutoProcessor.from_pretrained, pretrained)
        self.model = load_whole(AutoModel, pretrained, dtype=dtype).eval().to(self._device)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1
        self.audio, self.system_prompt, self.workers = audio, system_prompt, workers

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def tokenizer(self) -> Any:
        """Of the processor."""
        return self.processor.tokenizer

    # --- Answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers to chats, in the order of the requests."""
        asked = []
        for number, request in enumerate(requests):
            messages, settings = self._asked(request)
            asked.append((self._question(number, messages), settings))
        answers: dict[int, str] = {}
        unread: list[str] = []
        with progress_bar(total=len(requests), desc="uni_moe", shown=self.rank == 0) as bar:
            for settings, group in groupby(sorted(asked, key=lambda pair: repr(pair[1])), key=lambda pair: pair[1]):
                questions = [question for question, _ in group]
                stops = settings.get("until") or []
                task = Task("lmms-eval", metrics=("exact_match",), decoding=_decoding(settings))
                for records in answer_questions(
                    self.model, self.processor, task, questions, None, self.batch_size, self.workers
                ):
                    for number, record in records.items():
                        if "unreadable" in record:
                            unread.append(record["unreadable"])
                            logger.warning("A question counts as not answered: %s", record["unreadable"])
                        answers[number] = _until(
                            record.get("prediction", ""), [stops] if isinstance(stops, str) else stops
                        )
                    bar.update(len(records))
        if len(unread) == len(requests) > 0:
            raise ValueError(f"No question could be read; the first: {unread[0]}")
        return [answers[number] for number in range(len(requests))]

    def _asked(self, request: Instance) -> tuple[list[dict], dict[str, Any]]:
        *_, doc_to_messages, settings, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id]), dict(settings)

    def _question(self, number: int, messages: Iterable[Mapping[str, Any]]) -> Question:
        made = [{"role": m["role"], "content": [self._part(p) for p in _parts(m["content"])]} for m in messages]
        if self.system_prompt:
            made = [{"role": "system", "content": self.system_prompt}, *(m for m in made if m["role"] != "system")]
        return Question(number=number, messages=made, references=[""])

    def _part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """The harness' part as ours: `url` holds whatever the data set holds."""
        kind = part["type"]
        if kind == "text":
            return {"type": "text", "text": part["text"]}
        if kind == "audio":
            kind = part.get("modality") or self.audio or "audio"
        times = {"start": part.get("start_time"), "end": part.get("end_time")}
        made = {"type": kind, kind: part["url"]}
        return made | {name: value for name, value in times.items() if value is not None}

    # --- Likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Mean loss of each continuation, in nats a token, and whether greedy search would write it. A loss, since
        lmms-eval takes the lowest for the likeliest, as the models that come with it return one (`api/task.py`).
        """
        collate = UniMoEDataCollator(self.processor)
        found: list[tuple[float, bool]] = []
        with progress_bar(total=len(requests), desc="uni_moe", shown=self.rank == 0) as bar, torch.no_grad():
            for start in range(0, len(requests), self.batch_size):
                some = requests[start : start + self.batch_size]
                batch = on_device(collate([self._continued(request) for request in some]), self.model)
                found += [Likelihood(pair) for pair in zip(*answer_losses(self.model, batch), strict=True)]
                bar.update(len(some))
        return found

    def _continued(self, request: Instance) -> dict[str, Any]:
        """A chat whose answer is the continuation; its end counts, as the model would write it."""
        context, continuation, *rest = request.args
        content: list[dict] = []
        if rest:
            doc_to_visual, doc_id, task, split = rest
            doc = self.task_dict[task][split][doc_id]
            continuation = continuation(doc) if callable(continuation) else continuation
            content = [_visual(each) for each in doc_to_visual(doc) or []]
        content.append({"type": "text", "text": context})
        chat = self._question(0, [{"role": "user", "content": content}]).messages
        return {"messages": [*chat, {"role": "assistant", "content": str(continuation).strip()}]}

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(
            "`uni_moe` does not run tasks of several rounds; it runs generate_until and loglikelihood."
        )


class UniMoESimple(UniMoE):
    """For tasks without messages (`--force_simple`): multiple choice by likelihood, text with visuals."""

    is_simple = True

    def _asked(self, request: Instance) -> tuple[list[dict], dict[str, Any]]:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        content = [*map(_visual, visuals), {"type": "text", "text": context}]
        return [{"role": "user", "content": content}], dict(settings)


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _visual(source: Any) -> dict[str, Any]:
    """Kind by what it is, as the harness itself tells them apart: waveforms are dicts, videos paths."""
    if isinstance(source, Mapping) or type(source).__name__ == "AudioDecoder":
        return {"type": "audio", "url": source}
    if isinstance(source, str):
        suffix = source.rsplit(".", 1)[-1].lower()
        kind = "image" if suffix in ("png", "jpg", "jpeg", "webp", "bmp", "gif") else "video"
        return {"type": "audio" if suffix in ("wav", "mp3", "flac", "ogg", "m4a", "opus") else kind, "url": source}
    return {"type": "image", "url": source}


def _decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of `generate`: a temperature of 0 is greedy search, one above it samples unless `do_sample` says otherwise."""
    made = {}
    for name, value in settings.items():
        name = {"max_gen_toks": "max_new_tokens"}.get(name, name)
        if name in DECODING and value is not None:
            made[name] = value
        elif name not in DECODING and name not in OURS:
            logger.warning_once(f"Nothing is made of the generation setting '{name}'.")
    temperature = made.get("temperature")
    made["do_sample"] = bool(made.get("do_sample", temperature is not None and temperature > 0)) and temperature != 0
    return made


def _until(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()


__all__ = ["MANIFEST", "UniMoE", "UniMoESimple"]
