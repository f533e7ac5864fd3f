"""How the network learns: loss, optimizer, and the training, validation, test and predict steps."""

import math
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics import MeanMetric

from mnist_lightning.fused import FusedStep, can_fuse
from mnist_lightning.model import MLP, PIXELS

Batch = tuple[Tensor, Tensor]  # images, (B, 784), and labels, (B,)


class MNISTClassifier(pl.LightningModule):
    """An `MLP` trained with the mean softmax cross-entropy and AdamW (betas 0.9 and 0.999, eps 1e-8).

    By default, without weight decay, AdamW is the tutorial's Adam. The module logs `train/loss` and
    `train/acc` of single minibatches, and `val/*` and `test/*` over the whole split. Losses are means in nats,
    accuracies lie in [0, 1].

    Args:
        hidden_dim: Number of hidden ReLU units, at least 1.
        learning_rate: Adam's step size, above 0; its peak where a schedule changes it.
        learning_rate_schedule: `constant`, or `one_cycle`, which rises from a 25th of `learning_rate` to all of it in
            the first 30% of the iterations and falls to nearly 0 at the last one, along cosines (Smith and Topin 2017,
            by PyTorch's `OneCycleLR`). It spans `max_epochs` or `max_steps`, and a run is resumed with the same.
        weight_decay: In each iteration, weights and biases first shrink by this times the learning rate; 0 or above
            (AdamW, Loshchilov and Hutter 2017).
        dropout: In training, the probability that a hidden unit is set to 0; at least 0, below 1.
        label_smoothing: Share of each label spread evenly over the ten digits in `train/loss`; at least 0, below 1.
        init_std: Standard deviation of the initial weights before truncation, above 0.

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
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, not {hidden_dim}")
        if learning_rate_schedule not in ("constant", "one_cycle"):
            raise ValueError(f"learning_rate_schedule must be constant or one_cycle, not {learning_rate_schedule}")
        for name, value in {"learning_rate": learning_rate, "init_std": init_std}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, not {value}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, 0 or above, not {weight_decay}")
        for name, value in {"dropout": dropout, "label_smoothing": label_smoothing}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 up to 1, not {value}")
        self.save_hyperparameters()  # the arguments: to `self.hparams`, into each checkpoint, and to the logger
        self.learning_rate = learning_rate
        self.learning_rate_schedule = learning_rate_schedule
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.mlp = MLP(hidden_dim, init_std, dropout)
        self.example_input_array = torch.zeros(1, PIXELS)  # for TensorBoard's graph
        self.val_loss, self.val_acc, self.test_loss, self.test_acc = (MeanMetric() for _ in range(4))  # submodules

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels, (B, 784) floats in [0, 1], to logits, (B, 10)."""
        logits: Tensor = self.mlp(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a minibatch, a scalar; Lightning does the backward pass and the optimizer's step."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.log_dict({"train/loss": loss, "train/acc": accuracy}, prog_bar=True, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: `validate` leaves them in inference mode, in which a later `fit` could not update them."""
        for metric in (self.val_loss, self.val_acc):
            metric.reset()
            # The sums' type follows the network's; else a float64 run would add up its first epoch in float32.
            metric.set_dtype(torch.promote_types(next(self.parameters()).dtype, torch.float32))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with a minibatch."""
        self._measure(batch, self.val_loss, self.val_acc)
        self.log_dict({"val/loss": self.val_loss, "val/acc": self.val_acc})

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Update the test metrics with a minibatch; return its logits, (B, 10), for the callback `Figures`."""
        logits = self._measure(batch, self.test_loss, self.test_acc)
        self.log_dict({"test/loss": self.test_loss, "test/acc": self.test_acc})
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities, (B, 10), of a minibatch's images; its labels are not used."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with one kernel for all parameters, and a learning-rate schedule that steps in each iteration."""
        optimizer = AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        if self.learning_rate_schedule == "constant":
            return optimizer
        iterations = self.trainer.estimated_stepping_batches
        if math.isinf(iterations):
            raise MisconfigurationException("the schedule one_cycle needs an end: give max_epochs or max_steps")
        schedule = OneCycleLR(optimizer, self.learning_rate, total_steps=int(iterations), cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fast_step(self, optimizer: Optimizer, batch: Batch) -> FusedStep | None:
        """Not a Lightning hook: the same step without autograd, for the engine's Trainer; it changes only the speed."""
        if can_fuse(self.mlp, self.label_smoothing):
            return FusedStep(self.mlp, optimizer, len(batch[1]))
        return None

    def _measure(self, batch: Batch, loss: MeanMetric, accuracy: MeanMetric) -> Tensor:
        # A MeanMetric counts each image equally, in a smaller last minibatch and over several processes, too. Lightning
        # computes and resets the metrics that are given to `log_dict` at the end of the epoch.
        images, labels = batch
        logits: Tensor = self(images)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
        accuracy.update((logits.argmax(dim=1) == labels).float())
        return logits
