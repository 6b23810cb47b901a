"""Models, rows and trainings with a feature cache."""

from pathlib import Path

from tiny import tiny_model
from tiny_training import make_own_trainer

from uni_moe_hf import (
    FeatureCache,
    UniMoESFTTrainer,
)


DENSE = {"mlp_layer_types": ["dense", "dense"]}


SQUARE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


STAGES = {"connectors": DENSE, "experts": DENSE, "moe": {"shared_expert_base": True}}


def losses(trainer: UniMoESFTTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(stage: str, media: Path, folder: Path, cache: Path | None, fill=False, towers=True, **settings):
    """Losses of eight steps, two epochs, and the trainer."""
    model = tiny_model(STAGES[stage])
    trainer = make_own_trainer(media, folder, model, stage, max_steps=8, **settings)
    if cache is not None:
        processor = trainer.data_collator.processor
        processor.feature_cache = FeatureCache(cache, model, processor, fill=fill)
        trainer = make_own_trainer(media, folder, model, stage, max_steps=8, processor=processor, **settings)
        if not towers:
            model.model.unload_towers(str(folder / "towers.pt"))
    return losses(trainer), trainer
