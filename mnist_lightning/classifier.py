"""How the network learns: loss, optimizer, and the training, validation, test and predict steps."""

from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics import MeanMetric

from mnist_lightning.fused import fused_step_of
from mnist_lightning.model import MLP, PIXELS

Batch = tuple[Tensor, Tensor]  # images, (B, 784), and labels, (B,)


class MNISTClassifier(pl.LightningModule):
    """An `MLP` trained with the mean softmax cross-entropy and AdamW (betas 0.9 and 0.999, eps 1e-8).

    By default, without weight decay, AdamW is the tutorial's Adam. The module logs `train/loss` and `train/acc` of
    minibatches, and `val/*` and `test/*` over the whole split. Losses are means in nats, accuracies lie in [0, 1].

    Args:
        hidden_dim: Number of hidden ReLU units, at least 1.
        learning_rate: Adam's step size, above 0; its peak where a schedule changes it.
        learning_rate_schedule: `constant`, or `one_cycle`, which rises from a 25th of `learning_rate` to all of it in
            the first 30% of the iterations and falls to nearly 0 at the last one, along cosines (Smith and Topin 2017,
            by PyTorch's `OneCycleLR`). It spans `max_epochs` or `max_steps`, and a run is resumed with the same.
        weight_decay: In each iteration, weights and biases first shrink by this times the learning rate; 0 or above
            (AdamW, Loshchilov and Hutter 2017).
        dropout: In training, the probability that a hidden unit is set to 0, from 0 to 1.
        label_smoothing: Share of each label spread evenly over the ten digits in `train/loss`, from 0 to 1.
        init_std: Standard deviation of the initial weights before truncation, above 0.
        fused: Take the step written out in `fused.py` in place of `training_step`: the same weights, in less time.
    """

    def __init__(
        self,
        hidden_dim: PositiveInt = 200,
        learning_rate: PositiveFloat = 0.001,
        learning_rate_schedule: Literal["constant", "one_cycle"] = "constant",
        weight_decay: NonNegativeFloat = 0,
        dropout: ClosedUnitInterval = 0,
        label_smoothing: ClosedUnitInterval = 0,
        init_std: PositiveFloat = 0.01,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # the arguments: to `self.hparams`, into each checkpoint, and to the logger
        self.mlp = MLP(hidden_dim, init_std, dropout)
        self.example_input_array = torch.zeros(1, PIXELS)  # for TensorBoard's graph
        # Means over a split, in which each image counts once: also in a smaller last minibatch, or in other processes.
        self.val_loss, self.val_acc, self.test_loss, self.test_acc = (MeanMetric() for _ in range(4))

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels, (B, 784) floats in [0, 1], to logits, (B, 10)."""
        return self.mlp(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a minibatch, a scalar; Lightning does the backward pass and the optimizer's step."""
        _, loss, correct = self.measure(batch, label_smoothing=self.hparams["label_smoothing"])
        self.log_dict({"train/loss": loss, "train/acc": correct.mean()}, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with a minibatch."""
        _, losses, correct = self.measure(batch, reduction="none")
        self.val_loss.update(losses)
        self.val_acc.update(correct)
        # The objects, not their values: at the epoch's end Lightning computes their means, and resets them.
        self.log_dict({"val/loss": self.val_loss, "val/acc": self.val_acc})

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Update the test metrics with a minibatch; return its logits, (B, 10), for the callback `Figures`."""
        logits, losses, correct = self.measure(batch, reduction="none")
        self.test_loss.update(losses)
        self.test_acc.update(correct)
        self.log_dict({"test/loss": self.test_loss, "test/acc": self.test_acc})
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities, (B, 10), of a minibatch's images; its labels are not used."""
        return self(batch[0]).softmax(dim=1)

    def measure(self, batch: Batch, **settings: str | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, (B, 10), the loss, by default a mean, and whether each label is predicted, (B,)."""
        images, labels = batch
        logits = self(images)
        # It takes logits, and applies the softmax itself. A label is a class index, such as 3, in place of a one-hot
        # row. `reduction="none"` gives a loss for each image, (B,), for the metrics to add up.
        loss = F.cross_entropy(logits, labels, **settings)  # type: ignore[arg-type]
        return logits, loss, (logits.argmax(dim=1) == labels).float()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a learning-rate schedule that steps in each iteration."""
        rate, schedule = self.hparams["learning_rate"], self.hparams["learning_rate_schedule"]
        # All parameters in one kernel, but where gradients are scaled (16-mixed): Lightning could not clip them.
        one_kernel = self.trainer.precision != "16-mixed"
        optimizer = AdamW(self.parameters(), rate, weight_decay=self.hparams["weight_decay"], fused=one_kernel)
        if schedule == "constant":
            return optimizer
        if schedule != "one_cycle":
            raise ValueError(f"learning_rate_schedule must be constant or one_cycle, not {schedule}")
        iterations = self.trainer.estimated_stepping_batches
        if iterations == float("inf"):
            raise MisconfigurationException("the schedule one_cycle needs an end: give max_epochs or max_steps")
        one_cycle = OneCycleLR(optimizer, rate, total_steps=int(iterations), cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}

    # Not needed to learn Lightning.

    def setup(self, stage: str) -> None:
        """Have the step of `fused.py`, where it is asked for; the engine's Trainer takes it."""
        self.fused_step = fused_step_of(self, MNISTClassifier) if self.hparams["fused"] and stage == "fit" else None

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: `validate` leaves them in inference mode, in which a later `fit` could not update them."""
        for metric in (self.val_loss, self.val_acc):
            metric.reset()
            # The sums' type follows the network's; else a float64 run would add up its first epoch in float32.
            metric.set_dtype(torch.promote_types(next(self.parameters()).dtype, torch.float32))
