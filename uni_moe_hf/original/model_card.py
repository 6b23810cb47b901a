"""Cards of converted models: where the weights come from, and which licences bind them."""

from collections.abc import Mapping

from ..hub.configuration_uni_moe import UniMoEConfig


CARD = """---
library_name: transformers
pipeline_tag: any-to-any
license: other
license_name: research-use-and-licences-of-the-parts
license_link: https://github.com/HITsz-TMG/UMOE-Scaling-Unified-Multimodal-LLMs
tags:
{tags}
---

# {title}

{summary} It reads {modalities}, and answers in text.

```python
from transformers import pipeline

pipe = pipeline("any-to-text", model="{title}", trust_remote_code=True)
chat = [{{"role": "user", "content": [{{"type": "text", "text": "Hello!"}}]}}]
print(pipe(chat, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```
{adapter}
## Where it comes from

{sources}

{experts}. Made by

```bash
{command}
```

## Licences that bind these weights

{licences}
"""
ADAPTER = """
LoRA was kept apart: that of the experts is inside the model, the rest is a PEFT adapter, without which this is not the
trained model.

```python
from peft import PeftModel
from transformers import AutoModel

model = AutoModel.from_pretrained("{title}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{title}/adapter")
```
"""
LICENCES = {
    "original": "Uni-MoE: its authors restrict weights and data to research use "
    "(https://github.com/HITsz-TMG/UMOE-Scaling-Unified-Multimodal-LLMs).",
    "llm": "The LLM: the LLaMA 2 community licence (https://huggingface.co/meta-llama/Llama-2-7b) and the terms of "
    "Vicuna (https://huggingface.co/lmsys/vicuna-7b-v1.5) and LLaVA, from which it was trained.",
    "vision": "The vision tower: CLIP, MIT (https://huggingface.co/openai/clip-vit-large-patch14-336).",
    "audio": "The audio tower: BEATs, MIT (https://github.com/microsoft/unilm/tree/master/beats).",
    "speech": "The speech tower: Whisper, Apache-2.0 (https://huggingface.co/openai/whisper-small).",
}
PLURALS = {"image": "pictures", "video": "video", "audio": "environmental sound", "speech": "speech"}


def model_card(
    config: UniMoEConfig, title: str, summary: str, sources: Mapping[str, str], command: str, adapter: bool
) -> str:
    """
    Args:
        config ([`UniMoEConfig`]): Of the model.
        title (`str`): Its name.
        summary (`str`): A sentence.
        sources (`dict[str, str]`): What it was made from, part -> name.
        command (`str`): How.
        adapter (`bool`): Whether a part of it stands in `adapter/`.

    Returns:
        `str`: Markdown with the Hub's metadata, for a model of the original's weights.
    """
    text = config.text_config
    *most, last = ["text", *(PLURALS[modality] for modality in config.modalities)]
    names = f" ({', '.join(text.expert_names)})" if text.expert_names else ""
    parts = ["vision"] + [ear for ear in ("audio", "speech") if ear in config.modalities]
    return CARD.format(
        title=title,
        summary=summary,
        tags="\n".join(f"- {tag}" for tag in ("uni-moe", "custom_code", "mixture-of-experts", *config.modalities)),
        modalities=f"{', '.join(most)} and {last} in any mix",
        adapter=ADAPTER.format(title=title) if adapter else "",
        sources="\n".join(f"* {part}: `{name}`" for part, name in sources.items()),
        experts=f"{text.num_experts} experts{names}, {text.num_experts_per_tok} per token, in "
        f"{text.mlp_layer_types.count('sparse')} of {text.num_hidden_layers} layers",
        command=command,
        licences="\n".join(f"* {LICENCES[part]}" for part in ("original", "llm", *parts)),
    )


__all__ = ["model_card"]
