"""
A checkpoint folder that knows its own answers: saved under one release of the library, checked under another.

    python saved_folder.py save FOLDER              # with this package: a tiny model, a conversation, what it gives
    python saved_folder.py check RESULTS FOLDER...  # without it: how far the same is given here

Of all modalities, with and without a cache, with a static one, with beams, over a filled one.
"""

import json
import logging
import sys
import warnings
from pathlib import Path


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 7},
}


def conversations(folder: Path) -> list:
    """Two conversations, of all modalities and of some; their files lie in the folder."""
    frames = [str(folder / f"frame{number}.png") for number in range(5)]
    first = [
        {"type": "image", "path": str(folder / "frame0.png")},
        {"type": "video", "video": frames},
        {"type": "audio", "path": str(folder / "sound.wav")},
        {"type": "speech", "path": str(folder / "sound.wav")},
        {"type": "text", "text": "say <image>"},
    ]
    second = [{"type": "text", "text": "what is it"}, {"type": "speech", "path": str(folder / "sound.wav")}]
    return [[{"role": "user", "content": content}] for content in (first, second)]


def answers(model, processor, folder: Path) -> dict:
    """Tensors by name: what processor and model make of the conversations."""
    import torch

    inputs = processor.apply_chat_template(
        conversations(folder),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    found = {f"inputs/{name}": tensor for name, tensor in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
        found |= {"logits": outputs.logits, "router logits": torch.stack(outputs.router_logits)}
        found["vision features"] = outputs.image_hidden_states
    for way, settings in WAYS.items():
        found[f"words/{way}"] = model.generate(**inputs, **GREEDY, **settings)
    shorter = {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    half = model.generate(**inputs, **shorter, return_dict_in_generate=True)
    longer = torch.ones_like(half.sequences[:, inputs["input_ids"].shape[1] :])
    again = {**inputs, "input_ids": half.sequences}
    again["attention_mask"] = torch.cat([inputs["attention_mask"], longer], dim=1)
    # Both names of the cache are understood everywhere.
    name = "cache" if hasattr(half, "cache") else "past_key_values"
    rest = model.generate(**again, **{name: half[name]}, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    found["words/filled cache"] = rest
    answer = torch.full_like(inputs["input_ids"], -100)
    answer[:, -1] = inputs["input_ids"][:, -1]
    found["loss"] = model(**inputs, labels=answer).loss.detach()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save(folder: Path) -> None:
    """Writes the model, its processor, media, and the answers."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import soundfile
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from tiny import film, tiny_model, tiny_processor, tone

    from uni_moe_hf import UniMoEForConditionalGeneration

    tiny_model().bfloat16().save_pretrained(folder)  # half the size; what is computed is float32
    model = UniMoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = tiny_processor(model.config, video_frames=4)
    processor.save_pretrained(folder)
    soundfile.write(folder / "sound.wav", tone(0.6), 16000)
    for number, frame in enumerate(film()):
        Image.fromarray(frame).save(folder / f"frame{number}.png")
    save_file(answers(model, processor, folder), folder / "answers.safetensors")


class Blocked:
    """Keeps this package from being imported."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "uni_moe_hf":
            raise ModuleNotFoundError(name)


class Complaints(logging.Handler):
    """What the library says of names that will go."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            self.said.append(record.getMessage())


def check(folder: Path) -> dict:
    """Largest difference of each tensor, and what was said of names that will go."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor

    complaints = Complaints()
    logging.getLogger("transformers").addHandler(complaints)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        found = answers(model, processor, folder)
    logging.getLogger("transformers").removeHandler(complaints)
    expected = load_file(folder / "answers.safetensors")
    if found.keys() != expected.keys():
        raise ValueError(f"{sorted(found.keys() ^ expected.keys())} are in one of the two alone")
    gaps = {}
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            gaps[name] = f"{list(found[name].shape)} in place of {list(tensor.shape)}"
        else:
            gaps[name] = (found[name].double() - tensor.double()).abs().max().item()
    kinds = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    said = [str(each.message) for each in caught if issubclass(each.category, kinds) and "uni_moe" in each.filename]
    return {
        "gaps": gaps,
        "scale": expected["logits"].std().item(),
        "deprecated": sorted({*complaints.said, *said}),
        "module": type(model).__module__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    command, target, *folders = sys.argv[1:]
    if command == "save":
        save(Path(target))
        return
    sys.meta_path.insert(0, Blocked())
    results = {}
    for folder in folders:
        try:
            results[folder] = check(Path(folder))
        except Exception as error:
            results[folder] = {"error": f"{type(error).__name__}: {error}"}
    Path(target).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
