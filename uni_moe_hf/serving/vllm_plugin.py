"""The entry point that vLLM calls in each of its processes: `pip install uni-moe-hf` beside vLLM is all it takes."""

ARCHITECTURE = "UniMoEForConditionalGeneration"


def register() -> None:
    """Tells vLLM which class serves our checkpoints; cheap, and may be called again."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "uni_moe_hf.serving.vllm_model:UniMoEForVLLM")
