"""The progress bar on a console."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


class EpochsFromOne(RichProgressBar):
    """Lightning's progress bar, with epochs counted from one, as the console's lines count them."""

    _drawn = 0.0

    def refresh(self, hard: bool = False) -> None:
        """Draw, at most twice a second: to draw takes 10 ms, in which the network does not train."""
        if hard or time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            super().refresh(hard)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's description is `Epoch 0/9`, or `Epoch 0/-2`."""
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            of = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
            self.progress.update(self.train_progress_bar_id, description=f"Epoch {trainer.current_epoch + 1}{of}")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What the module logs, without the number of the run, which Lightning shows as a metric."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}
