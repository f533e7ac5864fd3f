"""One optimizer step as Lightning takes it, without the hooks that nobody has, or faster where the module knows how."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from . import fast, watchers


class QuietStep:
    """The step of a quiet iteration: the ordinary one, or the module's fast step once it has passed its trial.

    Args:
        trainer: With one optimizer, and nobody who watches each step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.module, (self.optimizer,) = trainer.lightning_module, trainer.optimizers
        self.counts = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
        self.agrees: bool | None = None  # the outcome of the trial

    def is_for(self, trainer: Any) -> bool:
        """Whether it is this Trainer's network and optimizer."""
        return self.module is trainer.lightning_module and [self.optimizer] == trainer.optimizers

    def prepare(self, may_be_fast: bool) -> None:
        """Look anew, after each visit: a callback may have changed the network, the loss or the optimizer.

        Args:
            may_be_fast: Whether the Trainer has no use for what `training_step` logs.
        """
        self.lean = watchers.is_lean(self.trainer)
        self.takes_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        self.fast: fast.FastStep | None = None
        self.may_be_fast = may_be_fast and self.agrees is not False and fast.allowed(self.trainer)

    def __call__(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Do one optimizer step; return its loss, (), or None where `training_step` has none."""
        self.counts.step.increment_ready()
        loss = None
        if self.may_be_fast:  # the first batch since `prepare`
            self.may_be_fast, self.fast = False, fast.make(self.trainer, batch)
        if self.fast and self.agrees is None:
            self.agrees, loss = fast.try_out(self.fast, self.trainer, batch, partial(self._ordinary, batch, batch_idx))
            self.fast = self.fast if self.agrees else None
        elif self.fast is None or (loss := self.fast(batch)) is None:
            loss = self._ordinary(batch, batch_idx)
        else:
            self.counts.zero_grad.increment_by(1)
        self.counts.step.increment_completed()
        return loss

    def _ordinary(self, batch: Any, batch_idx: int) -> Tensor | None:
        """What Lightning does in `automatic_optimization.run`."""
        trainer, optimizer, module = self.trainer, self.optimizer, self.module
        arguments = (batch, batch_idx) if self.takes_index else (batch,)
        loss: Tensor | None = None

        def closure() -> Tensor | None:
            nonlocal loss
            with torch.enable_grad():
                loss = (module if self.lean else trainer.strategy).training_step(*arguments)
                if not isinstance(loss, Tensor):
                    loss = ClosureResult.from_training_step_output(loss).closure_loss
                optimizer.zero_grad()
                self.counts.zero_grad.increment_by(1)
                if loss is not None:
                    loss.backward() if self.lean else trainer.strategy.backward(loss, optimizer)
                    loss = loss.detach()
                elif trainer.world_size > 1:
                    raise RuntimeError("with several processes, `training_step` must not return None")
            return loss

        if self.lean:
            optimizer.step(closure)
        else:
            trainer.strategy.optimizer_step(optimizer, closure, module)
        return loss
