"""Figures while a stage trains: as files in its folder, and of a mixture's routing for TensorBoard and Trackio."""

import os
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from ..mixtures.routing import RoutingReport
from ..training.trainer import UniMoESFTTrainer
from . import figures


logger = logging.get_logger(__name__)


# Between two drawings, in seconds: each takes a third of one.
PAUSE = 10.0


class LiveFiguresCallback(TrainerCallback):
    r"""
    Draws `losses.png`, and of a mixture `routing.png`, in `output_dir/figures`, at most every ten seconds and when the
    training ends. Files are replaced whole, so that they can be looked at meanwhile.

    Args:
        trainer ([`UniMoESFTTrainer`]): Of any stage.
    """

    def __init__(self, trainer: UniMoESFTTrainer):
        self.trainer, self._drawn = trainer, 0.0

    @classmethod
    def add_to(cls, trainer: UniMoESFTTrainer, wanted: bool) -> None:
        """
        Args:
            trainer ([`UniMoESFTTrainer`]): That gets the callback.
            wanted (`bool`): As `--live_figures` has it.
        """
        if not wanted:
            return
        try:
            figures.figure_module()
        except ImportError as error:
            logger.warning("No live figures. %s", error)
            return
        trainer.add_callback(cls(trainer))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draws where it is time."""
        if time.monotonic() - self._drawn >= PAUSE:
            self._draw(args, state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draws the whole."""
        self._draw(args, state)

    def _draw(self, args: Any, state: TrainerState) -> None:
        history = [each for each in state.log_history if "loss" in each]
        if not state.is_world_process_zero or not history:
            return
        report = self.trainer.last_routing
        drawn = {"losses": losses(history, Path(args.output_dir).name)}
        routed = [each for each in history if "load/max_over_min" in each]
        if report is not None and routed:
            drawn["routing"] = figures.over_steps(routed, report.expert_names)
        folder = Path(args.output_dir) / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figures.write_png(figure, folder / f".{name}.partial")
            os.replace(folder / f".{name}.partial", folder / f"{name}.png")
        self._drawn = time.monotonic()


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


def losses(history: Sequence[Mapping[str, float]], title: str) -> Any:
    """
    Args:
        history (`Sequence[dict]`): Logs of a trainer, each with its `step` and any of `loss` and `loss/<modalities>`.
        title (`str`): What is trained.

    Returns:
        `matplotlib.figure.Figure`: the loss over steps, and that of rows of each kind.
    """
    with figures.style():
        figure = figures.new(7.5, 2.8)
        axis = figure.subplots()
        names = [name for each in history for name in each if name == "loss" or name.startswith("loss/")]
        for name in sorted(dict.fromkeys(names), key=lambda name: (name != "loss", name)):
            points = [(each["step"], each[name]) for each in history if name in each]
            kind = name.partition("/")[2]
            colour = figures.TYPE_COLOURS.get(kind, figures.LINE) if kind else figures.INK
            width = 2.0 if name == "loss" else 1.2
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=kind or "all rows", marker=".")
        axis.set_xlabel("step")
        axis.set_ylabel("loss, nats a token")
        axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


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


__all__ = ["LiveFiguresCallback", "RoutingFiguresCallback", "losses"]
