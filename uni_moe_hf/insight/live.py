"""Figures of routing while a mixture trains, for TensorBoard and Trackio."""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..mixtures.routing import RoutingReport
from ..training.trainer import UniMoESFTTrainer
from . import figures


logger = logging.get_logger(__name__)


class RoutingFiguresCallback(TrainerCallback):
    r"""
    Sends two figures to whatever of TensorBoard and Trackio the trainer reports to: loads and specialisation over the
    steps so far, and utilisation by layer, expert and modality since the last log. They are drawn from what is logged
    anyway; scalars are logged without this.

    Args:
        trainer ([`UniMoESFTTrainer`]): Of a mixture.
        every (`int`, *optional*, defaults to 10): With every so many logs.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, trainer: UniMoESFTTrainer, every: int = 10):
        if every < 1:
            raise ValueError(f"`every` is {every}; figures are drawn with every so many logs, 1 or more.")
        self.trainer, self.every = trainer, every
        self._logs = 0

    @classmethod
    def add_to(cls, trainer: UniMoESFTTrainer, every: int) -> None:
        """
        Args:
            trainer ([`UniMoESFTTrainer`]): That gets the callback where it reports to TensorBoard or Trackio.
            every (`int`): As `--routing_figures` has it; 0 for none.

        Raises:
            ValueError: it is negative.
        """
        if every < 0:
            raise ValueError(f"`routing_figures` is {every}; give a number of logs, or 0 for no figures.")
        if not every or not {"tensorboard", "trackio"} & set(trainer.args.report_to):
            return
        try:
            figures.figure_module()
        except ImportError as error:
            logger.warning("No figures of routing. %s", error)
            return
        trainer.add_callback(cls(trainer, every))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Draws where it is time."""
        report = self.trainer.last_routing
        if not state.is_world_process_zero or report is None or "load/max_over_min" not in (logs or {}):
            return
        self._logs += 1
        if self._logs % self.every:
            return
        history = [each for each in state.log_history if "load/max_over_min" in each]
        drawn = {
            "routing/over_steps": figures.over_steps(history, report.expert_names),
            "routing/utilisation": _utilisation(report, state.global_step),
        }
        for name, figure in drawn.items():
            self._send(name, _pixels(figure), state.global_step)

    def _send(self, name: str, pixels: np.ndarray, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image(name, pixels, step, dataformats="HWC")
        if "trackio" in self.trainer.args.report_to:
            import trackio

            trackio.log({name: trackio.Image(pixels)}, step=step)


def _utilisation(report: RoutingReport, step: int) -> Any:
    """Of what was counted since the last log."""
    counts = report.counts.double().numpy()  # (L, M, E)
    panels = {"all": counts.sum(axis=1)}
    panels |= {name: counts[:, m] for m, name in enumerate(report.modalities) if counts[:, m].any()}
    even = {name: load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) for name, load in panels.items()}
    tokens = int(report.num_tokens[0].sum())
    return figures.utilisation(
        even, report.layers, [*map(figures.short, report.expert_names)], f"step {step}: {tokens:,} tokens", "choices"
    )


def _pixels(figure: Any) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    file = BytesIO()
    figures.write_png(figure, file)
    return np.asarray(Image.open(file).convert("RGB"))


__all__ = ["RoutingFiguresCallback"]
