"""How the network learns: loss, optimizer, and the training, validation, test and predict steps."""

import math
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from mnist_lightning.fused import FusedStep, can_fuse, try_fused_step
from mnist_lightning.loader import Minibatch, Minibatches
from mnist_lightning.model import MLP, PIXELS

# Iterations after which a loss that is not finite is noticed, at the latest.
CHECK_LOSSES_EVERY = 100


class MNISTClassifier(pl.LightningModule):
    """An `MLP` trained with the mean softmax cross-entropy and AdamW (betas 0.9 and 0.999, eps 1e-8).

    By default AdamW is Adam, the tutorial's: without weight decay they are the same.

    Metrics: `train/loss`, `train/acc`, `train/learning_rate` every `Trainer(log_every_n_steps)` iterations; `val/*`,
    `test/*` over the whole split. Losses are means in nats, accuracies lie in [0, 1], and the x-axis of every curve is
    iterations.

    Args:
        hidden_dim: Number of hidden ReLU units, at least 1.
        learning_rate: Adam's step size, above 0; its peak where a schedule changes it.
        learning_rate_schedule: `constant`, or `one_cycle`, which rises from a 25th of `learning_rate` to all of it in
            the first 30% of the iterations and falls to nearly 0 at the last one, along cosines (Smith and Topin 2017,
            by PyTorch's `OneCycleLR`). It is made for `max_epochs` or `max_steps`, and is not resumed with others.
        weight_decay: Before each iteration weights and biases shrink by the learning rate times this, 0 or above
            (AdamW, Loshchilov and Hutter 2017).
        dropout: In training, the probability that a hidden unit is left out, from 0 up to 1.
        label_smoothing: Share of each label that is spread evenly over the ten digits in `train/loss`, from 0 up to 1.
        init_std: Standard deviation of the initial weights before they are cut at two of it, above 0.
        fused_step: On a CPU, do optimizer steps without autograd where nothing hooks into them: the same numbers in two
            thirds of the time. Not with dropout or label smoothing.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        hidden_dim: int = 200,
        learning_rate: float = 0.001,
        learning_rate_schedule: Literal["constant", "one_cycle"] = "constant",
        weight_decay: float = 0,
        dropout: float = 0,
        label_smoothing: float = 0,
        init_std: float = 0.01,
        fused_step: bool = True,
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, not {hidden_dim}")
        if learning_rate_schedule not in ("constant", "one_cycle"):
            raise ValueError(f"learning_rate_schedule must be constant or one_cycle, not {learning_rate_schedule}")
        for name, value in {"learning_rate": learning_rate, "init_std": init_std}.items():
            if not (0 < value < math.inf):
                raise ValueError(f"{name} must be a finite number above 0, not {value}")
        if not (0 <= weight_decay < math.inf):
            raise ValueError(f"weight_decay must be a finite number, 0 or above, not {weight_decay}")
        for name, value in {"dropout": dropout, "label_smoothing": label_smoothing}.items():
            if not (0 <= value < 1):
                raise ValueError(f"{name} must be from 0 up to 1, not {value}")
        # How steps are computed is no property of the trained network.
        self.save_hyperparameters(ignore="fused_step")
        self.fused_step = fused_step
        self._loaded_iteration = 0
        self.learning_rate = learning_rate
        self.learning_rate_schedule = learning_rate_schedule
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.mlp = MLP(hidden_dim, init_std, dropout)
        # A Lightning batch is several minibatches here: `training_step` runs an optimizer step for each.
        self.automatic_optimization = False

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels, (B, 784) floats in [0, 1], to logits, (B, 10)."""
        logits: Tensor = self.mlp(images)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, which without weight decay is Adam, all parameters in one kernel; and the schedule of its rate."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        return [optimizer], self._schedules(optimizer)

    def _schedules(self, optimizer: torch.optim.Optimizer) -> list[OneCycleLR]:
        if self.learning_rate_schedule == "constant":
            return []
        return [OneCycleLR(optimizer, self.learning_rate, total_steps=self._iterations(), cycle_momentum=False)]

    def _iterations(self) -> int:
        """Iterations of the whole fit, over which a schedule stretches."""
        trainer = self.trainer
        epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
        in_epochs = epochs * trainer.datamodule.iterations_per_epoch  # type: ignore[attr-defined]
        limits = [limit for limit in (in_epochs, trainer.max_steps) if limit >= 0]
        if not limits:
            raise MisconfigurationException(
                f"the schedule {self.learning_rate_schedule} needs an end: give max_epochs or max_steps"
            )
        return max(1, min(limits))

    def setup(self, stage: str) -> None:
        """Take on the Trainer's precision: Lightning would first load a checkpoint's weights into float32 ones.

        Raises:
            TypeError: The Trainer is to train and has no data module.
        """
        if stage == "fit" and self.trainer.datamodule is None:  # type: ignore[attr-defined]
            raise TypeError(
                "train with `Trainer.fit(model, datamodule=MNISTDataModule())`: one batch is many minibatches"
            )
        self.trainer.precision_plugin.convert_module(self)
        self.example_input_array = torch.zeros(1, PIXELS).to(self.dtype)  # for TensorBoard's graph

    def on_fit_start(self) -> None:
        """Let each process draw random numbers of its own: with one seed, dropout would leave out the same units."""
        if self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def on_train_start(self) -> None:
        """Decide anew for each fit whether its steps can be fused."""
        self._fused: FusedStep | None = None
        self._try_fused = self.fused_step and can_fuse(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember how long the weights were trained, for the x-axis of their test.

        Raises:
            MisconfigurationException: The checkpoint's schedule is not this fit's.
        """
        self._loaded_iteration = checkpoint["global_step"]
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        schedules = self._schedules(torch.optim.AdamW(self.parameters()))
        lengths = [schedule.total_steps for schedule in schedules]
        trained_with = [schedule["total_steps"] for schedule in checkpoint.get("lr_schedulers", [])]
        if trained_with != lengths:
            ours, theirs = (
                ", ".join(f"{n:,} iterations" for n in total) or "none" for total in (lengths, trained_with)
            )
            raise MisconfigurationException(
                f"the schedule of the learning rate is for {ours}, that of the checkpoint for {theirs}; give the same "
                "learning_rate_schedule, max_epochs and max_steps to resume it"
            )
        # The iteration says all there is to know, and PyTorch would take over whatever attributes a stranger's names.
        checkpoint["lr_schedulers"] = [
            schedule.state_dict() | {"last_epoch": self._loaded_iteration, "_step_count": self._loaded_iteration + 1}
            for schedule in schedules
        ]

    @property
    def iteration(self) -> int:
        """Optimizer steps done, here or, in a process that only tests, by the run that the checkpoint is from."""
        return self.global_step or self._loaded_iteration

    def training_step(self, batch: Minibatches, batch_idx: int) -> dict[str, list[tuple[int, float, float]]]:
        """Run one iteration for each minibatch: `(images, labels)` of shapes (B, 784) and (B,).

        Returns:
            `points`: iteration, loss and accuracy of those iterations that `log_every_n_steps` asks for.

        Raises:
            FloatingPointError: The loss of an iteration is not finite.
        """
        trainer = self.trainer
        log_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        first = self.global_step
        # A negative `max_steps` means no limit.
        last = first + len(batch) if trainer.max_steps < 0 else min(first + len(batch), trainer.max_steps)
        optimizer, schedule = self._optimizer(), self.lr_schedulers()
        losses, measured, rates = [], {}, {}
        # Not strict: `max_steps` may end training before the last minibatch.
        for iteration, (images, labels), size in zip(range(first + 1, last + 1), batch, batch.sizes, strict=False):
            loss, logits = self._fused_or_step(images, labels, size)
            losses.append(loss)
            if log_every and iteration % log_every == 0:
                measured[iteration] = torch.stack([loss, _correct(logits, labels).sum() / size])
                rates[iteration] = optimizer.param_groups[0]["lr"]
            if schedule is not None:
                assert isinstance(schedule, LRScheduler)
                schedule.step()  # which Lightning does only under automatic optimization
            if len(losses) == CHECK_LOSSES_EVERY or iteration == last:
                _check_finite(self._over_processes(torch.stack(losses)), iteration)
                losses = []
        # For what subclasses and callbacks log: Lightning counts their x-axis in batches and will add 1 for this one.
        trainer.fit_loop.epoch_loop._batches_that_stepped += last - first - 1

        values = self._over_processes(torch.stack(list(measured.values()))).tolist() if measured else []
        points = [(iteration, *pair) for iteration, pair in zip(measured, values, strict=True)]
        for iteration, loss, acc in points:
            curves = {"train/loss": loss, "train/acc": acc}
            self._log_curves(curves | {"train/learning_rate": rates[iteration]}, iteration)
            # For the progress bar and for callbacks that monitor them.
            self.log_dict(curves, logger=False, prog_bar=True)
        return {"points": points}

    def _over_processes(self, values: Tensor) -> Tensor:
        """The mean over the processes; with one process, the values themselves."""
        mean: Tensor = self.trainer.strategy.reduce(values)
        return mean

    def _step(self, images: Tensor, labels: Tensor, size: float) -> tuple[Tensor, Tensor]:
        # What Lightning's automatic optimization does for each batch. Should you change it, delete fused.py.
        optimizer = self._optimizer()
        logits: Tensor = self(images)
        # The mean, and of several processes each one's share in it: Lightning takes the mean of their gradients, though
        # their parts of an epoch's last minibatch may differ in size.
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing) / size
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), logits.detach()

    def _fused_or_step(self, images: Tensor, labels: Tensor, size: float) -> tuple[Tensor, Tensor]:
        optimizer = self._optimizer()
        if self._fused and self._fused.batch_size == len(labels):
            optimizer._on_before_step()  # Lightning's count of steps
            done = self._fused(images, labels)
            optimizer._on_after_step()
            return done
        if self._try_fused and optimizer.state:  # Adam's is empty before its first step
            self._try_fused = False
            step = partial(self._step, size=size)
            self._fused, done = try_fused_step(self.mlp, optimizer.optimizer, images, labels, step)
            return done
        return self._step(images, labels, size)

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    def validation_step(self, batch: Minibatch, batch_idx: int) -> None:
        """Measure a minibatch of the validation split: images (B, 784), labels (B,)."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the split's metrics, before callbacks save a checkpoint."""
        if not self.trainer.sanity_checking:
            self._log_split("val")

    def test_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        """Measure a minibatch of the test split, images (B, 784) and labels (B,); return its logits, (B, 10)."""
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log the split's metrics."""
        self._log_split("test")

    def predict_step(self, batch: Minibatch, batch_idx: int) -> Tensor:
        """Return the probabilities, (B, 10), of a minibatch's images; its labels are not used."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def _evaluate(self, batch: Minibatch, split: str) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images)
        # Of several processes, one may have no part in a small minibatch; a mean over it would not be a number.
        count = max(1, len(labels))
        metrics = {
            f"{split}/loss": F.cross_entropy(logits, labels, reduction="sum") / count,
            f"{split}/acc": _correct(logits, labels).sum() / count,
        }
        # Lightning divides the processes' sum of batch sizes by their number and drops the fraction; so there is none.
        weight = len(labels) * self.trainer.world_size
        self.log_dict(metrics, batch_size=weight, on_step=False, on_epoch=True, logger=False, sync_dist=True)
        return logits

    def _log_split(self, split: str) -> None:
        metrics = self.trainer.callback_metrics
        self._log_curves({name: metrics[name].item() for name in (f"{split}/loss", f"{split}/acc")}, self.iteration)

    def _log_curves(self, curves: dict[str, float], iteration: int) -> None:
        # Through `self.log`, Lightning would count its batches on the x-axis, not iterations.
        for logger in self.loggers:
            logger.log_metrics(curves, step=iteration)


def _check_finite(losses: Tensor, iteration: int) -> None:
    """Raise where one of the losses of the iterations up to this one is not finite."""
    bad = losses.isfinite().logical_not().nonzero()
    if len(bad):
        first = int(bad[0])
        raise FloatingPointError(
            f"the loss is {losses[first].item()} at iteration {iteration - len(losses) + 1 + first}; "
            "try a smaller model.learning_rate"
        )


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) == labels
