"""The loop over epochs, whose checkpoints keep the random states with which a run goes on exactly."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor

from .processes import gather


class LoadAsTrained(pl.Callback):
    """Converts the network to the Trainer's precision before a checkpoint is loaded: after it, float64 is rounded."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.precision_plugin, DoublePrecision | HalfPrecision):
            trainer.precision_plugin.convert_module(pl_module)
            # A logger of the network's graph takes it before the first batch.
            if pl_module.example_input_array is not None:
                pl_module.example_input_array = trainer.precision_plugin.convert_input(pl_module.example_input_array)


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, whose checkpoints also keep the states of PyTorch's random numbers on the CPU.

    With them a run goes on exactly also where the loader cannot say how far it was: an iterator made and used from the
    same states yields the same batches, and those that were used are skipped.

    Attributes:
        before_epoch: The state from which the loader's iterator was made; None between two epochs.
        before_batch: That from which its first batch was taken; None before that.
    """

    before_epoch: Tensor | None = None
    before_batch: Tensor | None = None
    _loaded: tuple[Tensor | None, ...] = None, None, None
    """Those two and the state at the checkpoint, until they are due."""

    def _iteration_based_training(self) -> bool:
        # With `max_steps` Lightning takes each checkpoint for one from mid-epoch, and counts a finished epoch twice.
        return False

    def setup_data(self) -> None:
        """Remember the random state from which the loader's first iterator is made."""
        loader, state = self._combined_loader, torch.get_rng_state()
        super().setup_data()
        if self._combined_loader is not loader:
            self.before_epoch = state

    def on_advance_start(self) -> None:
        """Restore the state of a checkpoint from before the epoch's first batch: the epoch's first hook may draw."""
        if self.epoch_loop.restarted_on_train_batch_end and self.epoch_loop.batch_progress.is_last_batch:
            # Saved in an epoch's last iteration: Lightning goes on with the next epoch, without this one's validation.
            self._loaded = None, None, self._loaded[2]
        before_epoch, before_batch, now = self._loaded
        if before_batch is None and now is not None:
            if before_epoch is not None and self._data_fetcher:
                torch.set_rng_state(before_epoch)
                iter(self._data_fetcher)  # made anew, since it was made before the checkpoint
            torch.set_rng_state(now)
        super().on_advance_start()

    def prepare_loader(self) -> None:
        """After the epoch's first hook: let the loader go on, by its own state or by the random ones it began from."""
        if not self.is_resuming:
            if self.trainer.current_epoch > 0 and not self.epoch_loop.restarting:
                self.before_epoch = torch.get_rng_state()  # Lightning makes the iterator next
            return
        # Lightning's issue 20550: it drops them where `estimated_stepping_batches` asked for the loader before.
        self._load_combined_loader_states()
        batches = self._data_fetcher
        assert batches
        knows = any(hasattr(loader, "load_state_dict") for loader in batches.combined_loader.flattened)
        (self.before_epoch, self.before_batch, now), self._loaded = self._loaded, (None, None, None)
        if self.before_epoch is not None and self.before_batch is not None and now is not None:
            torch.set_rng_state(self.before_epoch)
            iter(batches)
            torch.set_rng_state(self.before_batch)
            for _ in range(0 if knows else self.epoch_loop.batch_progress.current.ready):
                next(batches)
            torch.set_rng_state(now)
        elif self.before_epoch is None and (knows or now is not None):
            self.before_epoch = torch.get_rng_state()
            iter(batches)
        batches.fetched = 0  # Lightning adds those that were used

    def on_advance_end(self) -> None:
        """Forget the iterator of the epoch that is over."""
        self.before_epoch = self.before_batch = None
        super().on_advance_end()

    def teardown(self) -> None:
        """Forget a checkpoint's states that no epoch has taken: they are not for the next fit."""
        self._loaded = None, None, None
        super().teardown()

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, and the random states of all processes, each a row; all processes have to call it."""
        states = (self.before_epoch, self.before_batch, torch.get_rng_state())
        device = self.trainer.strategy.root_device
        rows = [None if state is None else gather(self.trainer, state[None].to(device)).cpu() for state in states]
        return super().on_save_checkpoint() | {"random_states": rows}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Lightning's state, and this process's random states, if the checkpoint has them."""
        super().on_load_checkpoint(state_dict)
        states, rank = state_dict.get("random_states"), self.trainer.global_rank
        if states and rank < len(states[-1]):
            # Copies, since PyTorch crashes on a tensor that does not begin where its storage does.
            self._loaded = tuple(None if state is None else state[rank].clone() for state in states)
