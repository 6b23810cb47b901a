"""The original's numbers for its tiny checkpoints, as inputs of ours and as what must come out."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn


FIXTURES = Path(__file__).parents[1] / "modeling_tests" / "fixtures"
VARIANTS = ("audio", "speech")
# Absolute; that of the loss is relative.
TOLERANCES = {"inputs_embeds": 1e-4, "hidden_states": 1e-4, "router_logits": 1e-4, "logits": 1e-4, "loss": 1e-5}


@dataclass
class Case:
    """
    Args:
        inputs (`dict`): For the model, `labels` among them.
        expected (`dict`): The original's tensors after splicing.
        lengths (`list[int]`): Tokens of each row; what lies behind is padding.
    """

    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    lengths: list[int]


def towers_of(variant: str) -> dict[str, Path]:
    """The tower arguments of `convert_checkpoint`."""
    folder = FIXTURES / variant
    ear = {"audio_tower": folder / "beats.pt"} if variant == "audio" else {"speech_tower": folder / "whisper"}
    return {"vision_tower": folder / "clip", **ear}


def case_names(variant: str) -> list[str]:
    """Of one variant."""
    return list(json.loads((FIXTURES / variant / "golden.json").read_text())["inputs"])


def load_case(variant: str, name: str, config) -> Case:
    """One case, its sentinels replaced by as many placeholders as the processor would give."""
    facts = json.loads((FIXTURES / variant / "golden.json").read_text())
    tensors = load_file(FIXTURES / variant / "golden.safetensors")
    tensors = {key.split("/", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
    windows = tensors.get("window_clip_index")
    queries = config.num_audio_query_tokens if variant == "audio" else config.num_speech_query_tokens
    ear_id = getattr(config, f"{variant}_token_id")

    ids, labels = [], []
    for row, mask in enumerate(tensors["attention_mask"]):
        ids.append([])
        labels.append([])
        clip = 0
        for token, label in zip(
            tensors["input_ids"][row, mask].tolist(), tensors["labels"][row, mask].tolist(), strict=True
        ):
            if token == facts["audio_token"]:
                clip += 1
                block = [ear_id] * queries * int((windows[row] == clip).sum())
            elif token in (facts["image_token"], facts["video_token"]):
                kind = "image" if token == facts["image_token"] else "video"
                block = [getattr(config, f"{kind}_token_id")] * config.image_seq_length
            else:
                block = [token]
            ids[-1] += block
            labels[-1] += [label] if block == [token] else [-100] * len(block)
    lengths = [len(row) for row in ids]

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (max(lengths) - len(row)) for row in rows])

    inputs = {"input_ids": padded(ids, 0), "labels": padded(labels, -100)}
    inputs["attention_mask"] = padded([[1] * length for length in lengths], 0)
    for key, how in facts["inputs"][name].items():
        noise = np.random.RandomState(how["seed"]).standard_normal(how["shape"]) * how["scale"]
        value = torch.from_numpy(noise.astype(np.float32))
        argument = {"images": "pixel_values", "videos": "pixel_values_videos", "fbank_windows": "input_values"}
        inputs[argument.get(key, "input_features")] = value.flatten(0, 1) if key.endswith("windows") else value
    if variant == "audio" and windows is not None:
        samples = tensors["window_num_samples"][windows > 0]
        inputs["input_values_mask"] = (torch.arange(2998) * 160 < samples[:, None]).long()
    return Case(inputs, tensors, lengths)


@torch.no_grad()
def differences(model: nn.Module, case: Case) -> dict[str, float]:
    """Largest absolute difference of each quantity, padding left out; of the loss the relative one."""
    outputs = model(**case.inputs, output_hidden_states=True, output_router_logits=True)
    expected, shape = case.expected, case.inputs["input_ids"].shape
    found = {"inputs_embeds": outputs.hidden_states[0], "logits": outputs.logits}
    found |= {f"hidden_states.{i}": hidden for i, hidden in enumerate(outputs.hidden_states[1:-1], start=1)}
    found["last_hidden_state"] = outputs.hidden_states[-1]
    sparse = [i for i, kind in enumerate(model.config.text_config.mlp_layer_types) if kind == "sparse"]
    for layer, logits in zip(sparse, outputs.router_logits, strict=True):
        found[f"router_logits.{layer}"] = logits.unflatten(0, shape)
    assert set(found) | {"loss"} == {
        key for key in expected if key not in ("input_ids", "labels", "attention_mask") and "window" not in key
    }
    worst = {"loss": abs(outputs.loss - expected["loss"]).item() / expected["loss"].item()}
    for key, value in found.items():
        reference = expected[key].reshape(*shape, -1)
        rows = [(value[i, :n] - reference[i, :n]).abs().max().item() for i, n in enumerate(case.lengths)]
        kind = "hidden_states" if "hidden" in key else key.split(".")[0]
        worst[kind] = max(worst.get(kind, 0.0), *rows)
    return worst
