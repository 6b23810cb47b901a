"""
The model as vLLM runs it: towers, connectors and decoder are our own modules, in which vLLM's Transformers back end
has put its attention, its linear layers and, where they are faster, its experts.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.moe import MoEMixin
from vllm.model_executor.models.transformers.multimodal import MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from ..hub.configuration_uni_moe import MODALITIES, is_sparse
from ..hub.decoder_uni_moe import adjust_logits
from .vllm_experts import merged_experts, whole_experts
from .vllm_processing import DOORS, EARS, UniMoEDummyInputsBuilder, UniMoEMultiModalProcessor, UniMoEProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(
    UniMoEMultiModalProcessor, info=UniMoEProcessingInfo, dummy_inputs=UniMoEDummyInputsBuilder
)
class UniMoEForVLLM(MoEMixin, MultiModalMixin, CausalMixin):
    """
    Serves every checkpoint of ours. Experts run as they are stored, or merged through vLLM's fused kernel:
    `additional_config={"fuse_experts": True | False}` says which. By default experts with weights of their own are
    fused, which is faster and takes no more memory; fusing those of a shared base makes a copy of it for each.

    Raises:
        ValueError: `fuse_experts` is asked of experts that vLLM's kernel does not compute.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        text_config = vllm_config.model_config.hf_config.text_config
        text_config.served_by_plugin = True
        self_fuses = _fuses_experts(vllm_config, text_config)
        merged_lora = (text_config.expert_lora_alpha, text_config.expert_lora_rank) if self_fuses else (0, 0)
        if self_fuses:
            text_config.expert_lora_rank, text_config.shared_expert_base = 0, False
        # The back end replaces layers while it is made, so before there is a module to keep these in.
        object.__setattr__(self, "_fuses", self_fuses)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        alpha, rank = merged_lora
        self.lora_scaling = alpha / rank if rank else 0.0
        ids = [getattr(self.config, f"{modality}_token_id") for modality in MODALITIES]
        self.num_placeholders = max(0, max(ids) + 1 - text_config.vocab_size)
        if (lora_config := vllm_config.lora_config) is not None and lora_config.target_modules is None:
            # vLLM's adapters count on a row for each token; layers of a shared base see those that are routed to them.
            layers = (LinearBase, MoERunner, VocabParallelEmbedding)
            names = [name for name, module in self.named_modules() if isinstance(module, layers)]
            lora_config.target_modules = [name for name in names if ".experts.base." not in name]
        if hasattr(self, "logits_processor"):
            self.logits_processor = LogitsProcessor(text_config.vocab_size)  # scales and caps are ours

    def recursive_replace(self) -> None:
        """As in vLLM; experts stay ours where they are not to be fused."""
        if self._fuses:
            super().recursive_replace()
        else:
            super(MoEMixin, self).recursive_replace()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        As in vLLM; LoRA is folded into the experts that are fused.

        Raises:
            ValueError: weights of fused experts are missing, which vLLM would leave as memory happens to be.
        """
        weights = merged_experts(weights, self.lora_scaling) if self.lora_scaling else weights
        return super().load_weights(whole_experts(weights, self.text_config) if self._fuses else weights)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        `(tokens, vocab_size)`, as the LLM scales and caps them; -inf for placeholders, which lie behind the vocabulary
        and are asked for with `prompt_logprobs`.
        """
        logits = super().compute_logits(hidden_states)
        if logits is None:
            return None
        return F.pad(adjust_logits(logits, self.text_config), (0, self.num_placeholders), value=float("-inf"))

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a clip in a prompt."""
        return f"<{modality}>"

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in vLLM, which puts embeddings of clips in; placeholders lie behind the table, so they become padding."""
        is_word = input_ids < self.text_config.vocab_size
        return super().embed_input_ids(input_ids.where(is_word, 0), *args, **kwargs)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """`(tokens, H)` of each clip, in the order in which they are given."""
        embeddings = []
        for modality, door in DOORS.items():
            features = [kwargs[name] for name in door.features if kwargs.get(name) is not None]
            if features:
                embeddings += self._embed(modality, list(zip(*features, strict=True)))
        return embeddings

    def _embed(self, modality: str, clips: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        """Clips of one modality, those of one shape together."""
        is_sound = modality in EARS
        groups = defaultdict(list)
        for index, clip in enumerate(clips):
            groups[tuple(part.shape[is_sound:] for part in clip)].append(index)
        embedded: list[Any] = [None] * len(clips)
        for indices in groups.values():
            parts = [list(part) for part in zip(*(clips[index] for index in indices), strict=True)]
            given = parts if is_sound else [torch.stack(part) for part in parts]
            rows = getattr(self.model, f"get_{modality}_features")(*given, return_dict=True).pooler_output
            counts = [len(clip) for clip in parts[0]] if is_sound else [1] * len(indices)
            for index, tokens in zip(indices, rows.split(counts), strict=True):
                embedded[index] = tokens.flatten(0, 1)
        return embedded


def _fuses_experts(vllm_config: VllmConfig, text_config: PreTrainedConfig) -> bool:
    """Whether vLLM's kernel computes the experts."""
    wanted = (vllm_config.additional_config or {}).get("fuse_experts")
    wanted = True if vllm_config.parallel_config.enable_expert_parallel else wanted
    if not is_sparse(text_config):
        return False
    activation = getattr(text_config, "hidden_act", None) or getattr(text_config, "hidden_activation", None)
    if activation not in ("silu", "swish"):
        if wanted:
            raise ValueError(f"vLLM's kernel computes experts with SiLU, these have '{activation}'; do not fuse them.")
        return False
    takes_adapters = vllm_config.lora_config is None or not current_platform.is_cpu()
    if wanted and not takes_adapters:
        raise ValueError("vLLM's fused experts take adapters on GPUs only; leave out `fuse_experts`.")
    return takes_adapters and not text_config.shared_expert_base if wanted is None else bool(wanted)
