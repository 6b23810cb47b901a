"""
How far converted models are from the numbers that the original code computed for the same weights and inputs.

    python benchmarks/bench_parity.py [--output benchmarks/results/parity.md]

Largest absolute difference over all cases of a variant (of the loss the relative one), beside the tolerance that the
tests hold: `modeling_tests/original/test_conversion.py`.
"""

import argparse
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from comparing import publish
from golden import FIXTURES, TOLERANCES, VARIANTS, case_names, differences, load_case, towers_of
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, CLIPImageProcessorPil

from uni_moe_hf import UniMoEFeatureExtractor, convert_checkpoint


ROUTES = ("eager", "segmented", "grouped_mm", "batched_mm")


def models(folder: Path, variant: str) -> dict[str, torch.nn.Module]:
    """Both LoRA modes by every route."""
    found = {}
    for lora in ("merge", "keep"):
        source, output = FIXTURES / variant, folder / f"{variant}-{lora}"
        convert_checkpoint(source / "base", output, finetuned=source / "finetuned", lora=lora, **towers_of(variant))
        for route in ROUTES:
            model = AutoModel.from_pretrained(output, experts_implementation=route).eval()
            if lora == "keep":
                model = PeftModel.from_pretrained(model, output / "adapter").eval()
            found[f"LoRA {'merged' if lora == 'merge' else 'kept'}, {route}"] = model
    return found


def front_ends(variant: str, audio_tower: torch.nn.Module | None) -> dict[str, tuple[float, float]]:
    """Largest difference and tolerance of what comes before the LLM."""
    golden = load_file(FIXTURES / variant / "frontends.safetensors")
    extractor, pictures = UniMoEFeatureExtractor(), CLIPImageProcessorPil.from_pretrained(FIXTURES / variant / "clip")
    worst: dict[str, tuple[float, float]] = {}

    def note(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        worst[name] = max(worst.get(name, (0.0, 0.0))[0], (found - expected).abs().max().item()), tolerance

    for clip in ("short", "second", "odd"):
        waveform = golden[f"{clip}/waveform_int16"].numpy() / 32768
        frames = golden[f"{clip}/fbank_normalized"]
        features = torch.as_tensor(extractor(audio=[waveform], sampling_rate=16000)["input_values"][0])
        note("fbank", features[: len(frames)], frames, 1e-4)
        if audio_tower is not None and f"{clip}/beats_last_hidden_state" in golden:
            with torch.no_grad():
                hidden = audio_tower(frames[None]).last_hidden_state
            note("BEATs", hidden, golden[f"{clip}/beats_last_hidden_state"], 1e-5)
    for picture in ("square", "wide", "tall"):
        pixels = pictures(Image.fromarray(golden[f"{picture}/rgb"].numpy()), return_tensors="pt")["pixel_values"][0]
        note("pixel_values", pixels, golden[f"{picture}/pixel_values"], 1e-5)
    return worst


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        f"Converted models against the original's numbers, {date.today()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, float32, CPU. Largest absolute difference over all cases (loss: relative).",
        "",
        f"| variant | how | {' | '.join(TOLERANCES)} |",
        f"|---|---|{'--:|' * len(TOLERANCES)}",
        f"| tolerance | | {' | '.join(f'{tolerance:.0e}' for tolerance in TOLERANCES.values())} |",
    ]
    ends = ["", "| front end | variant | difference | tolerance |", "|---|---|--:|--:|"]
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            made = models(Path(folder), variant)
            for how, model in made.items():
                worst = dict.fromkeys(TOLERANCES, 0.0)
                for case in case_names(variant):
                    found = differences(model, load_case(variant, case, model.config))
                    worst = {name: max(worst[name], found[name]) for name in worst}
                over = any(worst[name] > TOLERANCES[name] for name in worst)
                cells = " | ".join(f"{difference:.1e}" for difference in worst.values())
                lines.append(f"| {variant} | {how}{' DISAGREES' if over else ''} | {cells} |")
            tower = next(iter(made.values())).model.audio_tower if variant == "audio" else None
            for name, (difference, tolerance) in front_ends(variant, tower).items():
                over = " DISAGREES" if difference > tolerance else ""
                ends.append(f"| {name}{over} | {variant} | {difference:.1e} | {tolerance:.0e} |")
    publish(lines + ends, args.output)


if __name__ == "__main__":
    main()
