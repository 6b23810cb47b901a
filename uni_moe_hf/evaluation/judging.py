"""Answers judged by another LLM, as Video-ChatGPT judges: right or wrong, and 0 to 5. Off unless a judge is given."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .questions import Question


# In our words: who judged the paper's answers, and with which prompt, is not known.
SYSTEM = (
    "You grade short answers about a picture, a video or a sound that you cannot see or hear yourself. You are "
    "told the question, the right answer and a candidate's answer. Grade the meaning, not the wording: synonyms "
    "and longer sentences are fine as long as they say the same and contradict nothing."
)
PROMPT = (
    "Question: {question}\nRight answer: {reference}\nCandidate's answer: {prediction}\n\n"
    'Reply with one JSON object and nothing else: {{"correct": "yes" or "no", "score": a whole number}}. The score '
    "says "
    "how well the candidate's answer matches, from 0 (not at all) to 5 (completely). In a right answer <AND> joins "
    "what "
    "must all be said, and <OR> joins alternatives."
)
AT_ONCE = 8
MAX_REPLY = 1 << 20  # bytes

# Messages of a chat -> what is replied. Grades of one `name` are asked for once.
Judge = Callable[[list[dict[str, str]]], str]


def open_judge(url: str, model: str = "default", key: str | None = None, timeout: float = 120) -> Judge:
    """
    Args:
        url (`str`): Of an OpenAI-compatible server, such as `http://localhost:8000/v1`.
        model (`str`, *optional*, defaults to `"default"`): As the server names it.
        key (`str`, *optional*): Of the server.
        timeout (`float`, *optional*, defaults to 120): Seconds to wait for a reply.

    Returns:
        A judge for [`judged`].

    Raises:
        ValueError: that is no address.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"A judge is the address of an OpenAI-compatible server, such as http://localhost:8000/v1, not '{url}'."
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ValueError("The judge's key (OPENAI_API_KEY) holds characters that no header can; copy it anew.")
    address = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(messages: list[dict[str, str]]) -> str:
        asked = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 256}
        request = Request(address, json.dumps(asked).encode(), headers)
        try:
            with urlopen(request, timeout=timeout) as reply:
                content = json.loads(reply.read(MAX_REPLY))["choices"][0]["message"]["content"] or ""
            return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        except HTTPError as error:
            said = ""
            with suppress(HTTPException, OSError, ValueError):
                said = " ".join(error.read(MAX_REPLY).decode(errors="replace").split())[:200]
            raise OSError(f"The judge at {url} refused: {error.code} {error.reason} ({said or 'no text'}).") from error
        except (HTTPException, OSError) as error:
            raise OSError(f"The judge at {url} cannot be reached: {getattr(error, 'reason', error)}.") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise OSError(f"The judge at {url} answers, but not as an OpenAI-compatible server does.") from error

    ask.name = f"{model} at {url}"
    return ask


def judged(judge: Judge, asked: Mapping[int, tuple[Question, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Args:
        judge (`Callable`): Messages -> reply; called from several threads.
        asked (`dict`): Row number -> question and what the model answered.

    Yields:
        `tuple(int, dict)`: row number, and `correct` (`bool`) and `score` (0 to 5); or `ungraded`, how a reply begins
        that holds no grade, the second time too.
    """

    def grade(question: Question, prediction: str) -> dict[str, Any]:
        text = PROMPT.format(
            question=question.text or "(in the recording)",
            reference=" <OR> ".join(dict.fromkeys(question.references)),
            prediction=prediction or "(nothing)",
        )
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        for _ in range(2):
            reply = str(judge(messages) or "")
            if (found := parse_grade(reply)) is not None:
                return found
        return {"ungraded": reply[:80]}

    waiting: SimpleQueue = SimpleQueue()
    graded: SimpleQueue = SimpleQueue()
    for item in asked.items():
        waiting.put(item)

    def work() -> None:
        with suppress(Empty):
            while True:
                number, pair = waiting.get_nowait()
                try:
                    graded.put((number, grade(*pair), None))
                except Exception as error:
                    graded.put((number, {}, error))

    for _ in range(min(AT_ONCE, len(asked))):  # daemons: who is interrupted does not wait for a silent server
        Thread(target=work, daemon=True).start()
    failed = None
    for _ in asked:
        number, found, error = graded.get()
        if error is None:
            yield number, found
        elif failed is None:
            failed = error
            with suppress(Empty):  # nobody else is asked, and what comes meanwhile is kept
                while waiting.get_nowait():
                    graded.put((0, {}, error))
    if failed is not None:
        raise failed


def parse_grade(reply: str) -> dict[str, Any] | None:
    """`correct` and `score` of a reply: JSON or a Python dictionary, also with `pred` for `correct`; else `None`."""
    for text in reversed(re.findall(r"\{[^{}]*\}", reply)):  # what was thought before comes first
        found = None
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                found = found or read(text)
        if not isinstance(found, dict):
            continue
        said, score = str(found.get("correct", found.get("pred"))).lower(), found.get("score")
        with suppress(ValueError, TypeError, OverflowError):
            if said in ("yes", "no", "true", "false") and 0 <= float(score) <= 5:
                return {"correct": said in ("yes", "true"), "score": float(score)}
    return None


__all__ = ["Judge", "judged", "open_judge", "parse_grade"]
