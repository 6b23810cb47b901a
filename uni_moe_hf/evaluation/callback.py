"""A task's questions asked while a model is trained."""

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training.spreading import is_sharded
from .answering import answer_questions
from .evaluation import Evaluation, check_metrics, check_modalities
from .metrics import METRICS, PREFERENCE
from .questions import load_questions, partnered
from .tasks import Task, load_task


class GenerationCallback(TrainerCallback):
    r"""
    Asks a task's questions every so many steps and adds its figures to what the evaluation found: `eval_exact_match`,
    and `eval_exact_match/<group>` where rows have groups. They are logged wherever the trainer logs (TensorBoard,
    Trackio), and `metric_for_best_model` may name one. With `load_best_model_at_end` questions are asked at the
    evaluations that there are, since the best checkpoint is one that was saved.

    Args:
        trainer (`Trainer`): With a processor as `processing_class` and an `eval_dataset`.
        task (`str`, `Path` or [`Task`]): What is asked; none that needs a judge.
        every (`int`): Steps between two times; each is an evaluation. With `load_best_model_at_end` a multiple of
            `eval_steps`, and of no effect where epochs are evaluated.
        rows (*optional*): Rows to ask about; the trainer's `eval_dataset` by default.
        limit (`int`, *optional*): Of them the first so many; all by default.
        batch_size (`int`, *optional*): `per_device_eval_batch_size` by default.

    Raises:
        ValueError: the task does not fit the rows, the model or the way it is trained.
    """

    def __init__(
        self,
        trainer: Any,
        task: str | Task,
        every: int,
        rows: Any = None,
        limit: int | None = None,
        batch_size: int | None = None,
    ):
        self.trainer, self.task, self.every = trainer, load_task(task), every
        if self.task.needs_judge:
            raise ValueError(f"Task '{self.task.name}' is scored by a judge, which is not asked while training.")
        if every < 1:
            raise ValueError(f"Questions are asked every {every} steps; give 1 or more.")
        if rows is None and (rows := trainer.eval_dataset) is None:
            raise ValueError(
                "There are no rows to ask about: give an `eval_dataset` (--eval_rows N holds out rows, "
                "--dataset_test_split names a file or split)."
            )
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_sharded(trainer.model):
            raise ValueError("Answers are generated while training only where every process holds the whole model.")
        collator = trainer.data_collator
        root = getattr(collator, "media_root", None)
        self.questions = load_questions(self.task, rows, media_root=root, limit=limit)
        check_modalities(trainer.processing_class, self.questions)
        self.others = None
        if self.task.method == "prefer":
            self.questions, self.others = partnered(self.questions)
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size
        check_metrics(self.task, self.questions)
        args = trainer.args
        self.chooses = self._chooses(args)
        self.waits = bool(args.load_best_model_at_end)  # an evaluation between saves would have no checkpoint
        self.by_epoch = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "epoch"
        # Below 1 it is a share of all steps, which are not known yet.
        if self.waits and not self.by_epoch and args.eval_steps >= 1 and every % args.eval_steps:
            raise ValueError(
                f"With `load_best_model_at_end` questions are asked when checkpoints are evaluated: {every} steps "
                f"are no multiple of `eval_steps={args.eval_steps:g}`."
            )

    @classmethod
    def add_to(cls, trainer: Any, wanted: str | None) -> None:
        """
        Args:
            trainer (`Trainer`): That gets the callback.
            wanted (`str`, *optional*): `task,every_n_steps`, as `--eval_generate` has it; without it nothing is done.
        """
        if wanted is None:
            best = (trainer.args.metric_for_best_model or "").removeprefix("eval_").split("/")[0]
            if best in {figure for metric in METRICS.values() for figure in metric.figures} | {*PREFERENCE}:
                raise ValueError(f"`metric_for_best_model={best}` is a task's figure; ask it with `eval_generate`.")
            return
        task, _, every = wanted.rpartition(",")
        if not task or not every.strip().isdigit():
            raise ValueError(
                f"`eval_generate` is {wanted!r}; it must be a task and a number of steps, as in 'captions,500'."
            )
        trainer.add_callback(cls(trainer, task.strip(), int(every)))

    def _chooses(self, args: TrainingArguments) -> bool:
        """Whether the best checkpoint is known by one of these figures."""
        better = {figure: more for name in self.task.metrics for figure, more in METRICS[name].figures.items()}
        better = better or PREFERENCE
        name = (args.metric_for_best_model or "").removeprefix("eval_").split("/")[0]
        if name not in better:
            return False
        if better[name] is not None and bool(args.greater_is_better) != better[name]:
            raise ValueError(
                f"Of `metric_for_best_model={name}` {'more' if better[name] else 'less'} is better; set "
                f"`greater_is_better={better[name]}`."
            )
        return True

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Goes before callbacks that look for its figures, such as early stopping."""
        others = self.trainer.callback_handler.callbacks
        if self in others:
            others.remove(self)
            others.insert(0, self)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for an evaluation where it is time."""
        if state.global_step % self.every == 0 and not self.waits:
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Adds the figures, before the best checkpoint is chosen."""
        if state.global_step % self.every and not (self.chooses or self.waits and self.by_epoch):
            return
        evaluation = self.ask()
        if evaluation.main is None:
            number, why = next(iter(evaluation.unreadable.items()))
            raise ValueError(f"No row to ask about can be read; the first is row {number}: {why}")
        figures = evaluation.figures
        found = {
            f"eval_{name}" + (f"/{group}" if group != "all" else ""): figure.value
            for group, each in reversed(figures.items())
            for name, figure in each.items()
            if name != "chance"  # does not change while training
        }
        metrics.update(found)
        self.trainer.log(dict(found))

    def ask(self) -> Evaluation:
        """Each process answers its share of the questions; all know all answers."""
        accelerator = self.trainer.accelerator
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        records: dict[int, dict] = {}
        with accelerator.autocast():
            for some in answer_questions(
                accelerator.unwrap_model(self.trainer.model),
                self.trainer.processing_class,
                self.task,
                self.questions[share],
                None if self.others is None else self.others[share],
                self.batch_size,
                min(1, self.trainer.args.dataloader_num_workers),
            ):
                records |= some
        if accelerator.num_processes > 1:
            records = {number: record for each in gather_object([records]) for number, record in each.items()}
        return Evaluation(self.task, self.questions, records)


__all__ = ["GenerationCallback"]
