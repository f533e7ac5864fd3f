"""Random states in checkpoints, with which a run goes on exactly, and the loop over epochs that keeps them."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor

from .processes import gather


class Random:
    """The state of PyTorch's random numbers on the CPU: now, and when the epoch's batches began.

    With both, a run goes on exactly also where the loader cannot say how far it was: an iterator made and used from the
    same states yields the same batches, and those that were used are skipped.

    Attributes:
        before_epoch: From which the loader's iterator was made; None between two epochs.
        before_batch: From which its first batch was taken; None before that.
    """

    def __init__(self) -> None:
        self.before_epoch: Tensor | None = None
        self.before_batch: Tensor | None = None
        self._to_load: list[Tensor | None] | None = None

    def state_dict(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The states of all processes, each a row; all processes have to call it."""
        device = trainer.strategy.root_device
        states = (self.before_epoch, self.before_batch, torch.get_rng_state())
        rows = [None if state is None else gather(trainer, state[None].to(device)).cpu() for state in states]
        return {"random_states": rows}

    def load_state_dict(self, state_dict: dict[str, Any], rank: int) -> None:
        """Keep this process's states, if the checkpoint has them, until they are due."""
        states = state_dict.get("random_states")
        if states and rank < len(states[-1]):
            # Copies, since PyTorch crashes on a tensor that does not begin where its storage does.
            self._to_load = [None if state is None else state[rank].clone() for state in states]

    def forget(self) -> None:
        """Forget what was loaded."""
        self._to_load = None

    def restore_early(self, batches: Any) -> None:
        """Before the epoch's first hook: restore the state, if the checkpoint is from before the epoch's first batch.

        Args:
            batches: Lightning's fetcher; its iterator is made anew, if it was made before the checkpoint.
        """
        before_epoch, before_batch, now = self._to_load or (None, None, None)
        if before_batch is None and now is not None:
            if before_epoch is not None:
                torch.set_rng_state(before_epoch)
                iter(batches)
            torch.set_rng_state(now)

    def restore_loader(self, batches: Any, used: int) -> None:
        """After the epoch's first hook: let the loader go on, by its own state or by those it was made and used from.

        Args:
            batches: Lightning's fetcher.
            used: Batches of the epoch that are used, for a loader without a state to skip.
        """
        knows = any(hasattr(loader, "load_state_dict") for loader in batches.combined_loader.flattened)
        before_epoch, before_batch, now = self._to_load or (None, None, None)
        self._to_load, self.before_batch = None, before_batch
        if before_epoch is not None and before_batch is not None and now is not None:
            torch.set_rng_state(before_epoch)
            iter(batches)
            torch.set_rng_state(before_batch)
            for _ in range(0 if knows else used):
                next(batches)
            torch.set_rng_state(now)
        elif before_epoch is None and (knows or now is not None):
            before_epoch = torch.get_rng_state()
            iter(batches)
        self.before_epoch = before_epoch
        batches.fetched = 0  # Lightning adds those that were used


class LoadAsTrained(pl.Callback):
    """Gives the weights the Trainer's precision before a checkpoint is loaded, which Lightning does after it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.precision_plugin, DoublePrecision | HalfPrecision):
            trainer.precision_plugin.convert_module(pl_module)
            # A logger of the network's graph takes it before the first batch.
            if pl_module.example_input_array is not None:
                pl_module.example_input_array = trainer.precision_plugin.convert_input(pl_module.example_input_array)


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, whose checkpoints also keep the random states that an exact resumption needs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.random = Random()

    def _iteration_based_training(self) -> bool:
        # With `max_steps` Lightning takes each checkpoint for one from mid-epoch, and counts a finished epoch twice.
        return False

    def setup_data(self) -> None:
        """Remember the random state from which the loader's first iterator is made."""
        loader, state = self._combined_loader, torch.get_rng_state()
        super().setup_data()
        if self._combined_loader is not loader:
            self.random.before_epoch = state

    def on_advance_start(self) -> None:
        """Restore the random state of a checkpoint from before the epoch: its first hook may draw."""
        self.random.restore_early(self._data_fetcher)
        super().on_advance_start()

    def on_advance_end(self) -> None:
        """Forget the iterator of the epoch that is over."""
        self.random.before_epoch = self.random.before_batch = None
        super().on_advance_end()

    def teardown(self) -> None:
        """Forget a checkpoint's states that no epoch has taken: they are not for the next fit."""
        self.random.forget()
        super().teardown()

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, and the random states."""
        return super().on_save_checkpoint() | self.random.state_dict(self.trainer)

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Lightning's state, and the random states, which a checkpoint of Lightning's Trainer does not have."""
        super().on_load_checkpoint(state_dict)
        self.random.load_state_dict(state_dict, self.trainer.global_rank)

    def prepare_loader(self, begins: bool, used: int) -> None:
        """Let the loader of a checkpoint go on after `used` batches of its epoch, or note that a new one begins."""
        if self.is_resuming:
            # Lightning's issue 20550: it drops them where `estimated_stepping_batches` asked for the loader before.
            self._load_combined_loader_states()
            self.random.restore_loader(self._data_fetcher, used)
        elif begins:
            self.random.before_epoch = torch.get_rng_state()  # Lightning makes the iterator next
