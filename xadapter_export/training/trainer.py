"""transformers' Trainer, told what an X-adapter needs: only the plug-in is saved, draws come in order."""

import math
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.errors import CheckpointError, OutputWriteError, XAdapterError
from xadapter_export.torchvision_cure import cure_torchvision
from xadapter_export.training.objective import TrainingModel

cure_torchvision()

from transformers import (  # noqa: E402  # torchvision must be cured first
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

WEIGHTS_NAME = "xadapter.safetensors"


class DivergedError(XAdapterError, ArithmeticError):
    """The loss is not a number any more."""


class XAdapterTrainer(Trainer):
    """Trains the plug-in of a ``TrainingModel``.

    Args:
        expert_sets: Switched on in turn, one for each optimizer step; evaluation takes the last.
        only_distill: Whether only the search of a static memory is taught.
        settings: Arguments of ``Trainer``.
    """

    model: TrainingModel

    def __init__(
        self, *, expert_sets: Sequence[ExpertSet], only_distill: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._only_distill = only_distill
        self._expert_sets = tuple(expert_sets)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        found: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(found)  # draws are in order already

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss with the expert set whose turn it is; the signature is Trainer's."""
        del num_items_in_batch
        turn = self.state.global_step % len(self._expert_sets) if model.training else -1
        outputs = model(**inputs, experts=self._expert_sets[turn], only_distill=self._only_distill)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        del state_dict
        if not self.args.should_save:  # every process comes here; one writes
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in self.model.model.trained_state().items()}, folder / WEIGHTS_NAME
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (
            OSError,
            SafetensorError,
            RuntimeError,
        ) as error:  # what open, safetensors and torch.save raise
            raise OutputWriteError(
                "the state of the run cannot be written",
                where=self.args.output_dir,
                got=" ".join(str(error).split())[:200],
                hint="free some space, then run the same command again to resume from the last state",
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        del model
        load_state(self.model.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_state(self.model.model, Path(str(self.state.best_model_checkpoint)))


def load_state(plugin: nn.Module, folder: Path) -> None:
    """Put the weights of a state of the training into a plug-in.

    Raises:
        CheckpointError: If they cannot be read, or are of another plug-in.
    """
    path = folder / WEIGHTS_NAME
    try:
        plugin.load_state_dict(load_file(path), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: of another shape
        raise CheckpointError(
            "a state of the training is damaged", where=path, got=error, hint=f"remove {folder} and resume"
        ) from error


class Progress(TrainerCallback):
    """Tells how far a run is; on Ctrl-C or SIGTERM it ends the step, keeps the state and stops.

    Args:
        on_step: Called with the step, the number of steps and a note, such as the loss.
    """

    def __init__(self, on_step: Callable[[int, int, str], None]) -> None:
        self._on_step = on_step
        self._note = ""
        self._stop_asked = False
        self.exit_code = 128 + signal.SIGINT
        self._handlers: dict[int, Any] = {}

    @property
    def stopped(self) -> bool:
        """Whether somebody asked to stop."""
        return self._stop_asked

    def __enter__(self) -> "Progress":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop_asked:  # asked twice: now
            handler = self._handlers[number]
            if callable(handler):
                handler(number, frame)
            raise KeyboardInterrupt
        self._stop_asked = True
        self.exit_code = 128 + number

    def _asked_anywhere(self) -> bool:
        """Whether any of the processes was asked: they must end after the same step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = torch.tensor(float(self._stop_asked))
            if torch.distributed.get_backend() == "nccl":
                flag = flag.cuda()
            torch.distributed.all_reduce(flag)
            self._stop_asked = bool(flag > 0)
        return self._stop_asked

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the step; ask for a state and the end where somebody asked to stop."""
        del args
        self._on_step(state.global_step, state.max_steps, self._note)
        if self._asked_anywhere() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the latest numbers for the note.

        Raises:
            DivergedError: If the loss is no number any more.
        """
        del args, control
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise DivergedError(
                "the training diverged",
                where=f"step {state.global_step}",
                got=f"loss {logs['loss']}",
                hint="lower learning_rate, or raise warmup_share; nothing was written",
            )
        shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_metric": "held-out metric"}
        found = [f"{title} {float(logs[name]):.3f}" for name, title in shown.items() if logs and name in logs]
        if found:
            self._note = ", ".join(found)
