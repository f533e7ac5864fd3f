"""Exact resumption: checkpoints keep all random states, and a loader that cannot say where it was is taken there."""

import itertools
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from .processes import all_gather_object

States = dict[str, Any]


class CheckpointConnector(_CheckpointConnector):
    """Lightning's making and loading of checkpoints, which also keep random states, those of each process."""

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's checkpoint, and the random states; all processes have to call it."""
        checkpoint: dict[str, Any] = super().dump_checkpoint(weights_only)
        if not weights_only and self.trainer.state.fn == TrainerFn.FITTING:
            fit_loop: Any = self.trainer.fit_loop
            checkpoint["random_states"] = all_gather_object(self.trainer, fit_loop.random_states())
        return checkpoint

    def restore(self, *args: Any, **kwargs: Any) -> None:
        """Load what a tuner of Lightning's has saved. It is no run to resume, and callbacks had no part in it."""
        ckpt_path, self.restore_callbacks = self._ckpt_path, lambda: None  # type: ignore[method-assign]
        super().restore(*args, **kwargs)
        del self.restore_callbacks
        self._ckpt_path = ckpt_path

    def restore_model(self) -> None:
        """Load the weights in the Trainer's precision: converted to it after, they would be rounded before."""
        plugin = self.trainer.precision_plugin
        if self._loaded_checkpoint and isinstance(plugin, DoublePrecision | HalfPrecision):
            plugin.convert_module(self.trainer.lightning_module)
        super().restore_model()

    def restore_loops(self) -> None:
        """Restore the loops' progress and this process's random states."""
        super().restore_loops()
        states, rank = self._loaded_checkpoint.get("random_states", []), self.trainer.global_rank
        if self.trainer.state.fn == TrainerFn.FITTING and rank < len(states):
            fit_loop: Any = self.trainer.fit_loop
            fit_loop.loaded = {name: states[rank][name] for name in ("before_epoch", "before_batch", "now")}


class FitLoop(_FitLoop):
    """Lightning's loop over epochs, which knows the random states that an epoch's batches came from.

    An iterator made and used from the same states yields the same batches. So a run goes on exactly also where the
    loader cannot say how far it was: its iterator is made from them, and the batches that were used are skipped.

    Attributes:
        before_epoch: The states from which the loader's iterator was made; None between two epochs.
        before_batch: Those from which its first batch was taken; None before that.
        loaded: Those of a checkpoint, until they are due: the two above, and `now`, at the checkpoint.
    """

    before_epoch: States | None = None
    before_batch: States | None = None
    _after_iter: States | None = None
    loaded: dict[str, States | None] | None = None

    def random_states(self) -> dict[str, States | None]:
        """What a checkpoint keeps for this process."""
        return {"before_epoch": self.before_epoch, "before_batch": self.before_batch, "now": self._states()}

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Load Lightning's state; an epoch that `max_steps` or a callback has ended early goes on."""
        super().load_state_dict(state_dict, prefix)
        batches, progress = self.epoch_loop.batch_progress, self.epoch_progress
        total: Any = progress.total
        epoch: Any = progress.current
        # Lightning takes it for a whole one, and would begin the next.
        if batches.current.ready and not batches.is_last_batch and epoch.processed == epoch.ready:
            total.processed = total.completed = total.processed - 1
            epoch.processed = epoch.completed = epoch.processed - 1
            self.restarting = True

    def setup_data(self) -> None:
        """Make the loader's first iterator from the states of a checkpoint, if there is one."""
        loader = self._combined_loader
        if self.loaded and loader is None:
            self._restore_states(self.loaded["before_epoch"] or self.loaded["now"])
        states = self._states()
        super().setup_data()
        if self._combined_loader is not loader:
            self.before_epoch, self._after_iter = states, self._states()

    def on_advance_start(self) -> None:
        """Restore the states of a checkpoint from before the epoch's first batch: the epoch's first hook may draw."""
        loop = self.epoch_loop
        if self.loaded and loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
            # Saved in an epoch's last iteration: Lightning goes on with the next epoch, without this one's validation.
            self.loaded = {"before_epoch": None, "before_batch": None, "now": self.loaded["now"]}
        if self.loaded and self.loaded["before_batch"] is None:
            self._restore_states(self.loaded["now"])
        super().on_advance_start()

    def restore_loader(self) -> None:
        """After the epoch's first hook: let the loader go on, by its own state or by the random ones it began from."""
        if not self.is_resuming:
            if self.trainer.current_epoch > 0 and not self.epoch_loop.restarting:
                self.before_epoch = self._states()  # Lightning makes the iterator next
            return
        batches = self._data_fetcher
        assert batches
        is_stateful = any(hasattr(loader, "load_state_dict") for loader in batches.combined_loader.flattened)
        now, done = self._states(), self.epoch_loop.batch_progress.current.ready
        loaded, self.loaded = self.loaded or {}, None
        if done and not loaded:  # of Lightning's Trainer, or of fewer processes: what was drawn before is not known
            loaded = dict.fromkeys(("before_epoch", "before_batch", "now"), now)
        if self.restarting or loaded.get("before_epoch"):  # not between two epochs
            batches.combined_loader._load_state_dicts(self._combined_loader_states_to_load)
            self._combined_loader_states_to_load = []
        made_from = loaded.get("before_epoch") or now
        # The first one was made before Lightning told the sampler its epoch: its issue 21938.
        if is_stateful or (loaded and self.trainer.current_epoch > 0):
            self._restore_states(made_from)
            iter(batches)
            self._after_iter = self._states()
        self.before_epoch, self.before_batch = made_from, loaded.get("before_batch")
        if self.before_batch:
            self._restore_states(self.before_batch)
            self._skip(batches, done)
            self._restore_states(loaded["now"])
        elif loaded:
            self._restore_states(now if loaded["before_epoch"] else self._after_iter)
        batches.fetched = 0  # Lightning adds those that were used

    def _load_combined_loader_states(self) -> None:
        """Leave it to `restore_loader`: here Lightning loads them before its own iterator, which is not the one used.

        Lightning's issue 20550: it also drops them where `estimated_stepping_batches` asked for the loader before.
        """

    def _skip(self, batches: _DataFetcher, count: int) -> None:
        """Take so many batches once more, but those of loaders that go on by a state of their own."""
        assert batches.combined_loader._iterator is not None
        loaders, iterators = batches.combined_loader.flattened, batches.combined_loader._iterator.iterators
        kept = {i: iterators[i] for i, loader in enumerate(loaders) if hasattr(loader, "load_state_dict")}
        if len(kept) == len(loaders):
            return
        if any(isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders):
            rank_zero_info(f"Reads {count:,} batches of an iterable again: exact if it yields the same ones")
        for i in kept:
            iterators[i] = itertools.repeat(None)
        hidden = self.trainer.global_rank > 0
        for _ in tqdm(range(count), "Skipping batches that were used", delay=1, leave=False, disable=hidden):
            next(batches)
        for i, iterator in kept.items():
            iterators[i] = iterator

    def before_next_batch(self, ready: int) -> None:
        """Remember the states from which the epoch's first batch is taken; `ready` batches came before."""
        if ready == 0:
            self.before_batch = self._states()

    def on_advance_end(self) -> None:
        """Forget the iterator of an epoch that is over."""
        if self.epoch_loop.batch_progress.is_last_batch:
            self.before_epoch = self.before_batch = None
        super().on_advance_end()

    def teardown(self) -> None:
        """Forget a checkpoint's states that no epoch has taken: they are not for the next fit."""
        self.loaded = None
        super().teardown()

    def _iteration_based_training(self) -> bool:
        # With `max_steps` Lightning takes each checkpoint for one from mid-epoch, and counts a finished epoch twice.
        return False

    def _states(self) -> States:
        """The states of PyTorch's, NumPy's and Python's global random numbers, the device's and the loaders'."""
        states: States = _collect_rng_states(include_cuda=False)
        # Plain values: checkpoints load no arrays, and comparing two states is a plain comparison.
        states["numpy"] = tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in states["numpy"])
        states["torch"] = _to_bytes(states["torch"])
        if (device := self.trainer.strategy.root_device).type != "cpu":
            states["device"] = _to_bytes(torch.get_device_module(device).get_rng_state())
        return states | {"generators": [_to_bytes(generator.get_state()) for generator in self._generators()]}

    def _restore_states(self, states: States | None) -> None:
        assert states
        _set_rng_states(states | {"torch": _to_tensor(states["torch"])})
        if "device" in states and (device := self.trainer.strategy.root_device).type != "cpu":
            torch.get_device_module(device).set_rng_state(_to_tensor(states["device"]))
        for generator, state in zip(self._generators(), states["generators"], strict=False):
            generator.set_state(_to_tensor(state))

    def _generators(self) -> list[torch.Generator]:
        """The loaders' own random number generators."""
        loaders = [] if self._combined_loader is None else self._combined_loader.flattened
        names = ("sampler", "batch_sampler")
        parts = [part for each in loaders for part in (each, *(getattr(each, name, None) for name in names))]
        parts += [getattr(part, "sampler", None) for part in parts]
        found = {id(generator): generator for part in parts if (generator := getattr(part, "generator", None))}
        return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def _to_bytes(state: Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _to_tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
