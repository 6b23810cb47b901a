"""
A model's answers to questions, batch by batch: media are read ahead while it answers, questions of the same kind and
length share a batch, and what cannot be read is told and left out.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..hub.files_uni_moe import reason
from ..mixtures.evaluating import evaluating
from ..training.data import UniMoEDataCollator
from ..training.rows import parts_of
from .questions import Question
from .tasks import Task


SEEDS_APART = 1_000_003  # so that no batch of one seed draws as a batch of the next
# Record of a question's answer: `prediction`, `losses`, or `unreadable`, as JSON holds them.
Record = dict[str, Any]


def answer_questions(
    model: Any,
    processor: Any,
    task: Task,
    questions: Sequence[Question],
    others: Sequence[Question] | None = None,
    batch_size: int = 8,
    workers: int | None = None,
    seed: int = 0,
    known: Mapping[int, Record] | None = None,
    in_order: bool = False,
) -> Iterator[dict[int, Record]]:
    r"""
    Args:
        model, processor: That belong together.
        task ([`Task`]): Its `method` and `decoding` say what is done.
        questions (`list[Question]`): To answer.
        others (`list[Question]`, *optional*): For `prefer`: the same with another row's media.
        batch_size (`int`, *optional*, defaults to 8): Questions at once.
        workers (`int`, *optional*): Processes that read media ahead; one where there is more than one core.
        seed (`int`, *optional*, defaults to 0): Of sampling. What is drawn depends on the questions of a batch: a run
            that goes on with the same questions and batches draws as one that was never stopped.
        known (`dict[int, dict]`, *optional*): Row number -> record of an earlier run: batches of these are left out.
        in_order (`bool`, *optional*, defaults to `False`): Whether questions are taken as they come, not by kind and
            length.

    Yields:
        `dict[int, dict]`: row number -> record, for each batch: `prediction` (text or letter), `losses` (nats a token:
        of the options by letter, or `own` and `other`), or `unreadable`, why.
    """
    samples = bool(task.decoding.get("do_sample"))
    # What is drawn must not depend on the size of a file, which may be mended before a run goes on.
    order = list(range(len(questions))) if in_order else _by_kind_and_length(questions, with_sizes=not samples)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # A batch is answered whole, with the seed of its place, also where an earlier run had begun it.
    left = [
        (place, batch)
        for place, batch in enumerate(batches)
        if any(questions[index].number not in (known or {}) for index in batch)
    ]
    prompts = _Prompts(processor, task, questions, others, [batch for _, batch in left])
    workers = min(1, (os.cpu_count() or 1) - 1) if workers is None else workers
    # A batch is made whole by one worker; two wait ready.
    ahead = {"num_workers": workers, "prefetch_factor": 2} if workers else {}
    with _answering(model):
        # A generator of its own: who trains meanwhile draws as if nobody had asked.
        loader = DataLoader(prompts, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator(), **ahead)
        for (place, _), (inputs, kept, unread) in zip(left, _guarded(loader), strict=True):
            found: dict[int, Record] = {questions[index].number: {"unreadable": why} for index, why in unread.items()}
            if kept:
                with _drawing(seed * SEEDS_APART + place if samples else None):
                    made = _run(model, processor, task, inputs)
                found |= {questions[index].number: record for index, record in zip(kept, made, strict=True)}
            yield found


def _guarded(loader: DataLoader) -> Iterator[Any]:
    """Batches; a worker that the system killed is said in a sentence."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) and "/torch_" not in str(error):
            raise
        raise OSError(
            "A process that reads media was killed or found no room in shared memory; take fewer rows at once, or no "
            "workers."
        ) from error


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """In evaluation mode, without gradients; afterwards as it was."""
    with evaluating(model), torch.no_grad():
        yield


@contextmanager
def _drawing(seed: int | None) -> Iterator[None]:
    """Draws from a seed; afterwards as before. Without one nothing is drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed % (1 << 63))
        yield


def _by_kind_and_length(questions: Sequence[Question], with_sizes: bool) -> list[int]:
    """Indices, neighbours alike: in modalities, then the size of their sounds, then words; the longest first."""

    def key(index: int) -> tuple:
        question = questions[index]
        kinds = tuple(str(part.get("type")) for part in question.media)
        clips = [part for part in question.media if part.get("type") in ("audio", "speech")]
        heard = sum(map(_size, clips)) if with_sizes else 0
        texts = (part.get("text", "") for part in parts_of(question.messages) if part.get("type") == "text")
        return kinds, -heard, -sum(len(text.split()) for text in texts)

    return sorted(range(len(questions)), key=key)


def _size(part: Mapping[str, Any]) -> int:
    """Bytes of a file, which tell long recordings from short ones; 0 where there is none."""
    name = part.get("path") or part.get(str(part.get("type")))
    try:
        return Path(name).stat().st_size if isinstance(name, str) and len(name) < 4096 else 0
    except (OSError, ValueError):
        return 0


class _Prompts(Dataset):
    """Batches as model inputs: `(inputs, indices that are in them, index -> why it could not be read)`."""

    def __init__(
        self,
        processor: Any,
        task: Task,
        questions: Sequence[Question],
        others: Sequence[Question] | None,
        batches: list[list[int]],
    ):
        self.processor, self.task = processor, task
        self.questions, self.others, self.batches = questions, others, batches
        self.collator = UniMoEDataCollator(processor)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> tuple[dict[str, Any], list[int], dict[int, str]]:
        batch = self.batches[place]
        try:
            return self._inputs(batch), batch, {}
        except (ValueError, OSError) as error:  # what a file or a row can cause is counted for that row
            if len(batch) == 1:
                return {}, [], {batch[0]: reason(error)}
        unread = {}
        for index in batch:
            try:
                self._inputs([index])
            except (ValueError, OSError) as error:
                unread[index] = reason(error)
        kept = [index for index in batch if index not in unread]
        return (self._inputs(kept) if kept else {}), kept, unread

    def _inputs(self, batch: list[int]) -> dict[str, Any]:
        if self.task.method == "generate":
            made = self.processor.apply_chat_template(
                [self.questions[index].messages for index in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            )
            return dict(made)
        completed = [self._completed(index) for index in batch]
        return {**self.collator([*chain(*completed)]), "per_question": [len(each) for each in completed]}

    def _completed(self, index: int) -> list[dict]:
        """Conversations whose likelihoods are compared."""
        question = self.questions[index]
        if self.task.method == "choose":
            return [_with_answer(question, text) for text in question.options.values()]
        return [_with_answer(question, question.answer), _with_answer(self.others[index], question.answer)]


def _with_answer(question: Question, answer: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"messages": [*question.messages, said]}


def _run(model: Any, processor: Any, task: Task, inputs: dict[str, Any]) -> list[Record]:
    per_question = inputs.pop("per_question", [])
    inputs = on_device(inputs, model)
    if task.method == "generate":
        return [{"prediction": text} for text in generate_texts(model, processor, inputs, task.decoding)]
    losses = iter(answer_losses(model, inputs)[0])
    return [{"losses": list(islice(losses, count))} for count in per_question]


def on_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Tensors where the model is, those of media in its precision."""
    device, dtype = model.device, model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }


def generate_texts(model: Any, processor: Any, inputs: dict[str, Any], decoding: Mapping[str, Any]) -> list[str]:
    """
    Args:
        model, processor: That belong together.
        inputs (`dict`): Of the processor, padded on the left, on the model's device.
        decoding (`dict`): For `generate`; greedy, 256 tokens by default.

    Returns:
        `list[str]`: what is written after each prompt, without special tokens and surrounding space.
    """
    settings = {"do_sample": False, "max_new_tokens": 256, **decoding}
    if not settings["do_sample"]:  # what a generation config says of sampling would be warned of
        settings |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p"))
    ids = model.generate(**inputs, **settings)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_losses(model: Any, inputs: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """
    Args:
        model: On whose device the inputs are.
        inputs (`dict`): A batch of [`UniMoEDataCollator`] with `labels` `(B, T)`.

    Returns:
        `tuple`: for each row the mean loss of its answer tokens, in nats, and whether all are the likeliest ones.
    """
    labels = inputs["labels"][:, 1:]  # (B, T - 1)
    is_label = labels != -100
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
    picked = logits[is_label].float()  # (labels, V): the answers alone, of long prompts with a large vocabulary
    wanted = labels[is_label]
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    losses[is_label] = F.cross_entropy(picked, wanted, reduction="none")
    is_best = torch.ones_like(is_label)
    is_best[is_label] = picked.argmax(dim=-1) == wanted
    means = losses.sum(dim=1) / is_label.sum(dim=1).clamp(min=1)
    return means.tolist(), is_best.all(dim=1).tolist()


__all__ = ["Record", "answer_losses", "answer_questions", "generate_texts", "on_device"]
