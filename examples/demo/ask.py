"""Asks the demo's model a few questions the way a stranger would: the folder, Transformers, and nothing else."""

import json
import sys
from pathlib import Path


class NoPackage:
    """Makes `uni_moe_hf` unimportable, so that only the code inside the checkpoint can answer."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "uni_moe_hf":
            raise ModuleNotFoundError(f"{name} is hidden on purpose")


sys.meta_path.insert(0, NoPackage())

from transformers import logging, pipeline  # noqa: E402


logging.set_verbosity_error()
root, max_new_tokens = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8
pipe = pipeline("any-to-text", model=str(root / "model"), trust_remote_code=True)
asked = set()
for line in (root / "data/test.jsonl").read_text().splitlines():
    row = json.loads(line)
    if row["task"] in asked:
        continue
    asked.add(row["task"])
    chat = row["messages"][:1]
    for part in chat[0]["content"]:
        if "path" in part:
            part["path"] = str(root / "data" / part["path"])
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    answer = pipe(chat, generate_kwargs=settings, return_full_text=False)[0]["generated_text"].strip()
    media = ", ".join(Path(part["path"]).name for part in chat[0]["content"] if "path" in part)
    question = next(
        (part["text"] for part in chat[0]["content"] if part["type"] == "text"), "(asked in the recording)"
    )
    expected = row["messages"][1]["content"][0]["text"]
    print(f"{row['task']:<14} {media:<24} {question:<34} -> {answer:<20} (expected: {expected})")
