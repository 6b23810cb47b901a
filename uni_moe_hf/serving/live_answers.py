"""
An answer while it is made: each word with what else could have been said, and the experts of every token.

Letters: L sparse layers, T tokens, M modalities with text first, E experts, K experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ..evaluation.answering import on_device
from ..insight.routing_tables import watching
from ..mixtures.expert_adapters import expert_names
from ..mixtures.routing import TOKEN_TYPES, routers_of, token_types


ALTERNATIVES = 5


@dataclass(frozen=True)
class Word:
    """
    A token of the answer.

    Args:
        text (`str`): What it adds to the answer; a character of several tokens comes with the last of them.
        probability (`float`): That the model gave it, whatever the temperature.
        alternatives (`list[tuple[str, float]]`): The likeliest tokens and their probabilities, itself among them.
    """

    text: str
    probability: float
    alternatives: list[tuple[str, float]]


@dataclass
class LiveAnswer:
    r"""
    What is known of an answer so far.

    Args:
        experts (`tuple[str]`): Their names; empty for a model without a mixture.
        layers (`tuple[int]`): Numbers of the sparse layers.
        pieces (`list[str]`): Text of each token that the decoder has read, `""` of a clip's.
        types (`list[int]`): The index of each in [`TOKEN_TYPES`].
        from_answer (`int`): How many of them, counted from the end, are the answer's own.
        weights (`np.ndarray` of shape `(L, T, E)`): What each router gave each expert for each token; rows sum to 1.
        words (`list[Word]`): The answer.
        is_done (`bool`): Whether nothing more will come.
    """

    experts: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    pieces: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    from_answer: int = 0
    weights: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.float32))
    words: list[Word] = field(default_factory=list)
    is_done: bool = False

    @property
    def text(self) -> str:
        """`str`: the answer."""
        return "".join(word.text for word in self.words).strip()

    def shares(self) -> dict[str, np.ndarray]:
        """`dict[str, np.ndarray]`: `(E,)` shares of router weight over all layers, by modality, and of the answer."""
        types = np.array(self.types[: self.weights.shape[1]])
        is_answer = np.arange(len(types)) >= len(types) - self.from_answer
        groups = {name: (types == number) & ~is_answer for number, name in enumerate(TOKEN_TYPES)}
        groups["answer"] = is_answer
        return {name: self.weights[:, chosen].mean(axis=(0, 1)) for name, chosen in groups.items() if chosen.any()}


class _Scores(LogitsProcessor):
    """Keeps the model's scores of the next token, before any temperature."""

    def __init__(self):
        self.last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.last = scores[0].float()
        return scores


class _Stop(StoppingCriteria):
    """Ends an answer that nobody waits for."""

    def __init__(self):
        self.asked = Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


class _Tokens(BaseStreamer):
    """Hands tokens over as they come, with their scores; the first call holds the prompt."""

    def __init__(self, queue: Queue, scores: _Scores):
        self.queue, self.scores, self.has_prompt = queue, scores, False

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.queue.put((int(value.reshape(-1)[-1]), self.scores.last))
        self.has_prompt = True

    def end(self) -> None:
        """The thread says when it is over."""


@contextmanager
def _router_weights(model: nn.Module) -> Iterator[tuple[tuple[int, ...], list[np.ndarray]]]:
    """Numbers of the layers, and `(L, T, E)` for each forward pass so far."""
    try:
        root, routers = routers_of(model)
    except ValueError:  # a dense model
        yield (), []
        return
    layers = tuple(dict.fromkeys(layer for layer, _ in routers))
    count = root.config.get_text_config().num_experts
    passes: list[np.ndarray] = []
    with watching(routers) as seen:

        def keep(*_: Any) -> None:
            weights, chosen = (
                torch.stack([of[layer].cpu() for layer in layers]) for of in (seen.weights, seen.chosen)
            )
            passes.append(torch.zeros(*weights.shape[:2], count).scatter_(2, chosen, weights).numpy())

        handle = root.register_forward_hook(keep)
        try:
            yield layers, passes
        finally:
            handle.remove()


def answer_live(
    model: nn.Module, processor: Any, chat: Sequence[dict], max_new_tokens: int = 256, **decoding: Any
) -> Iterator[LiveAnswer]:
    """
    Args:
        model (`nn.Module`): A Uni-MoE in evaluation mode.
        processor ([`UniMoEProcessor`]): Of the model.
        chat (`Sequence[dict]`): A conversation that waits for an answer.
        max_new_tokens (`int`, *optional*, defaults to 256): Longest answer.
        decoding: Further arguments of `generate`.

    Yields:
        [`LiveAnswer`]: the same one again and again, after every token. A model gives one answer at a time.

    Raises:
        ValueError, OSError: the conversation cannot be read; or whatever `generate` raises.
    """
    inputs = processor.apply_chat_template(
        list(chat), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids, tokenizer, config = inputs["input_ids"][0], processor.tokenizer, model.config
    live = LiveAnswer(types=token_types(config, ids[None])[0].tolist())
    live.pieces = [
        "" if kind else tokenizer.decode([token]) for kind, token in zip(live.types, ids.tolist(), strict=True)
    ]
    queue: Queue = Queue()
    scores, stop, failure = _Scores(), _Stop(), []
    done = object()

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    **on_device(inputs, model),
                    max_new_tokens=max_new_tokens,
                    streamer=_Tokens(queue, scores),
                    logits_processor=LogitsProcessorList([scores]),
                    stopping_criteria=StoppingCriteriaList([stop]),
                    **decoding,
                )
        except Exception as error:  # is raised where the answer is read
            failure.append(error)
        queue.put(done)

    with _router_weights(model) as (layers, passes):
        live.layers = layers
        live.experts = tuple(expert_names(config.get_text_config())) if layers else ()
        thread = Thread(target=generate, daemon=True)
        thread.start()
        said: list[int] = []
        shown = ""
        try:
            while (made := queue.get()) is not done:
                token, of_token = made
                live.words.append(_word(tokenizer, said, shown, token, of_token))
                shown += live.words[-1].text
                said.append(token)
                _take_in(live, passes, said, tokenizer)
                yield live
        finally:
            stop.asked.set()
            thread.join()
    if failure:
        raise failure[0]
    _take_in(live, passes, said, tokenizer)
    if rest := tokenizer.decode(said, skip_special_tokens=True)[len(shown) :]:  # half a character to the end
        live.words[-1] = replace(live.words[-1], text=live.words[-1].text + rest)
    live.is_done = True
    yield live


def _word(tokenizer: Any, said: list[int], shown: str, token: int, scores: torch.Tensor) -> Word:
    """The next token: what it adds to the text, nothing while a character is half there, and what else was likely."""
    text = tokenizer.decode([*said, token], skip_special_tokens=True)
    added = "" if text.endswith("\ufffd") else text[len(shown) :]
    probabilities = torch.softmax(scores, dim=-1)
    best = torch.topk(probabilities, min(ALTERNATIVES, len(probabilities)))
    others = [(tokenizer.decode([index]), value) for value, index in zip(*(t.tolist() for t in best), strict=True)]
    return Word(added, float(probabilities[token]), others)


def _take_in(live: LiveAnswer, passes: list[np.ndarray], said: list[int], tokenizer: Any) -> None:
    """What routers have answered; a token's own is known once the next one is made, and they may be further ahead."""
    if not passes:
        return
    known = len(live.pieces) - live.from_answer
    weights = np.concatenate(passes, axis=1)
    live.from_answer = max(0, min(weights.shape[1] - known, len(said)))
    live.weights = weights[:, : known + live.from_answer]
    fresh = said[len(live.pieces) - known : live.from_answer]
    live.pieces += [tokenizer.decode([token]) for token in fresh]
    live.types += [0] * len(fresh)


__all__ = ["LiveAnswer", "Word", "answer_live"]
