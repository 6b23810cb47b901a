"""Cards of trained models and adapters: what a Hub page needs to know."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..hub.configuration_uni_moe import UniMoEConfig
from ..original.model_card import PLURALS


TRAINED = """# {title}

A [Uni-MoE](https://huggingface.co/papers/2405.11273) after stage "{stage}", trained with TRL's `SFTTrainer`. It reads
{modalities}, and answers in text.

```python
{snippet}
```

Weights inherit the licences of the parts that the model was built from.
"""
WHOLE = """from transformers import pipeline

pipe = pipeline("any-to-text", model="{name}", trust_remote_code=True)
chat = [{{"role": "user", "content": [{{"type": "text", "text": "Hello!"}}]}}]
print(pipe(chat, max_new_tokens=16, return_full_text=False)[0]["generated_text"])"""
ANSWERING = """chat = [{{"role": "user", "content": [{{"type": "text", "text": "Hello!"}}]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
words = model.generate(**inputs, max_new_tokens=16)
print(processor.decode(words[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
ADAPTED = f"""from peft import PeftModel
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{{base}}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{{name}}")
processor = AutoProcessor.from_pretrained("{{base}}", trust_remote_code=True)
{ANSWERING}"""


def trained_card(
    config: UniMoEConfig,
    name: str,
    is_adapter: bool,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str = "other",
) -> ModelCard:
    """
    Args:
        config ([`UniMoEConfig`]): Of the model.
        name (`str`): Its repository.
        is_adapter (`bool`): Whether the repository holds an adapter alone.
        base_model (`str`, *optional*): What training began with.
        dataset (`str`, *optional*): What it was trained on.
        license (`str`, *optional*, defaults to `"other"`): That of its parts.

    Returns:
        `ModelCard` with what the Hub needs to know.
    """
    # The Hub knows repositories; a folder on somebody's disk tells nobody anything.
    is_repository = base_model is not None and base_model.count("/") == 1 and not Path(base_model).exists()
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="any-to-any",
        license=license,
        license_name="licences-of-the-parts" if license == "other" else None,
        base_model=base_model if is_repository else None,
        datasets=[dataset] if dataset and not Path(dataset).exists() else None,
        tags=["uni-moe", "custom_code", "mixture-of-experts", "sft", "trl", *config.modalities],
        base_model_relation=("adapter" if is_adapter else "finetune") if is_repository else None,
    )
    *most, last = ["text", *(PLURALS[modality] for modality in config.modalities)]
    snippet = ADAPTED.format(base=base_model or "the base model", name=name) if is_adapter else WHOLE.format(name=name)
    text = TRAINED.format(
        title=name.split("/")[-1],
        stage=config.stage,
        modalities=f"{', '.join(most)} and {last} in any mix" if most else last,
        snippet=snippet,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


__all__ = ["trained_card"]
