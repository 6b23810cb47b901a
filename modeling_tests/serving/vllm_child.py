"""
What a test of vLLM runs in a process of its own: conversations are answered by `generate` and by the engine.

Reads a JSON file that says what to do, writes another one: `python vllm_child.py TASK RESULT`.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np


os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

NEW_TOKENS = 24  # past the end of the answer
NAMES = {"image": "image_url", "video": "video_url", "audio": "audio_url", "speech": "audio_url"}


def for_engine(chat: list[dict]) -> list[dict]:
    """A conversation of ours as vLLM's clients write it."""
    messages = []
    for message in chat:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part)
                continue
            name = NAMES[part["type"]]
            ear = {"ear": "speech"} if part["type"] == "speech" else {}
            parts.append({"type": name, name: {"url": Path(part["path"]).as_uri()}, **ear})
        messages.append({**message, "content": parts})
    return messages


def by_generate(folder: str, chats: list[list[dict]]) -> list[list[int]]:
    """What the model itself answers, one conversation after the other."""
    import torch
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            # Not `min_new_tokens`, which forbids the end to one side only.
            said = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        answers.append(said[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def main(task: dict) -> dict:
    """Answers by what the task asks for."""
    result = {}
    if task.get("chats"):
        result["wanted"] = by_generate(task["folder"], task["chats"])
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True}
    options |= {"trust_remote_code": True, "allowed_local_media_path": "/", **task.get("options", {})}
    try:
        llm = LLM(task["folder"], **options)
    except Exception as error:
        return {**result, "refused": str(error)}
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    adapter = LoRARequest("adapter", 1, task["adapter"]) if task.get("adapter") else None

    def said(chats: list[list[dict]], sampling: SamplingParams = greedy) -> list[list[int]]:
        outputs = llm.chat([for_engine(chat) for chat in chats], sampling, use_tqdm=False, lora_request=adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]

    chats = task.get("chats", [])
    if "batch" in task["asks"]:
        result["batch"] = said(chats)
    if "single" in task["asks"]:  # once more: by now, what clips became is kept
        result["single"] = [said([chat])[0] for chat in chats]
    if "scores of prompts" in task["asks"]:
        result["scores"] = said(chats, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1))
    if "one name, two ears" in task["asks"]:  # the same clip under one name, heard as speech, sound and speech
        clip = next(part for chat in chats for part in chat[0]["content"] if part["type"] == "speech")
        heard = [[{"role": "user", "content": [{**clip, "type": ear}]}] for ear in ("speech", "audio", "speech")]
        result["ears"] = []
        for chat in heard:
            message = for_engine(chat)
            message[0]["content"][0]["uuid"] = "one"
            output = llm.chat(message, greedy, use_tqdm=False)
            result["ears"].append(list(output[0].outputs[0].token_ids))
    if "counts" in task["asks"]:
        wave = np.zeros(8000, dtype=np.float32)
        result["counts"] = []
        for prompt, clips in (("<audio>", [wave] * 2), ("<audio><audio>", [wave]), ("<audio><image>", [wave])):
            try:
                llm.generate({"prompt": prompt, "multi_modal_data": {"audio": clips}}, greedy, use_tqdm=False)
                result["counts"].append("answered")
            except ValueError as error:
                result["counts"].append(str(error))
    result["refusals"] = []
    for chat in task.get("bad", []):
        try:
            said([chat])
            result["refusals"].append(None)
        except Exception as error:
            result["refusals"].append(f"{type(error).__name__}: {error}")
    for prompt in task.get("prompts", []):  # as they are, with whatever placeholders are in them
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        result.setdefault("prompts", []).append(len(output[0].outputs[0].token_ids))
    return result


if __name__ == "__main__":
    task, result = sys.argv[1:]
    Path(result).write_text(json.dumps(main(json.loads(Path(task).read_text(encoding="utf-8")))), encoding="utf-8")
