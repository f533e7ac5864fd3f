"""The progress bar on a console."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


class EpochBar(RichProgressBar):
    """Lightning's progress bar, with epochs counted from one, as the console's lines count them.

    While it trains it is drawn at most twice a second, and the run's number is not among its metrics.
    """

    _drawn = 0.0

    def refresh(self, hard: bool = False) -> None:
        """Draw. In training, seldom: it takes 10 ms, in which the network does not train."""
        if hard or not self.trainer.training or time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            super().refresh(hard)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's description, `Epoch 0/9`, or `Epoch 0/-2` without a number of epochs."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            of = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
            self.progress.update(self.train_progress_bar_id, description=f"Epoch {trainer.current_epoch + 1}{of}")
            self.refresh(hard=True)  # Lightning has just drawn its own

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What the module logs, without the run's number, `v_num`."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
