"""The training step without autograd: backpropagation and Adam written out, a formula beside each line.

`MNISTClassifier(fused=True)`, or `--model.fused true`, takes it in place of `training_step`. A third of this small
network's step on a CPU is autograd's bookkeeping, which is left out here. The kernels are those that autograd and
`torch.optim.AdamW(fused=True)` call, in the same order, so that the weights are the same, bit for bit.

Notation: B images x of 784 pixels with labels y; weights W1, b1, W2, b2; dz is the derivative of the loss by z.
"""

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from mnist_lightning.model import MLP


class FusedStep:
    """One step of the tutorial's training: forward, mean softmax cross-entropy, backward, Adam.

    Args:
        mlp: The network, in float32 or float64 on a CPU.
    """

    def __init__(self, mlp: MLP) -> None:
        self.mlp = mlp

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
        """Take a step with images, (B, 784) floats, and labels, (B,) int64."""
        x, y = batch
        W1, b1, W2, b2 = self.mlp.parameters()  # noqa: N806 (as in the formulas)

        # Forward.
        h = torch.addmm(b1, x, W1.t()).relu_()  # h = max(0, x W1' + b1): (B, 200)
        z = torch.addmm(b2, h, W2.t())  # z = h W2' + b2, the logits: (B, 10)
        log_p = z.log_softmax(1)  # log p = z - log(sum of exp z)

        # Backward: the chain rule, from the loss to the weights.
        dlog_p = torch.zeros_like(log_p).scatter_(1, y[:, None], -1 / len(y))  # loss = -mean of log p at the labels
        dz = torch._log_softmax_backward_data(dlog_p, log_p, 1, z.dtype)  # dz = (p - one-hot y) / B
        dW2, db2 = dz.t() @ h, dz.sum(0)  # noqa: N806
        dh = dz @ W2
        dh = torch.ops.aten.threshold_backward(dh, h, 0)  # 0 where the ReLU was off
        dW1, db1 = dh.t() @ x, dh.sum(0)  # noqa: N806

        # Adam (Kingma and Ba 2015) with decoupled weight decay (AdamW, Loshchilov and Hutter 2017), for each weight w
        # and its derivative g in step t: w -= lr * weight_decay * w, then
        #   m = beta1 * m + (1 - beta1) * g
        #   v = beta2 * v + (1 - beta2) * g * g
        #   w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        (group,) = optimizer.param_groups
        m, v, t = ([optimizer.state[w][name] for w in group["params"]] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(t, 1)
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        beta1, beta2 = group["betas"]
        torch._fused_adamw_([W1, b1, W2, b2], [dW1, db1, dW2, db2], m, v, [], t, beta1=beta1, beta2=beta2, **settings)


def fused_step_of(module: pl.LightningModule, classifier: type[pl.LightningModule]) -> FusedStep:
    """The step above for a module, after a check that it is the module's own step.

    Args:
        module: It has an `MLP` as `mlp`, and is attached to its Trainer.
        classifier: The class whose `training_step`, `forward` and network it stands for.

    Raises:
        MisconfigurationException: It would do another step; the message says why.
    """
    trainer, settings, mlp = module.trainer, module.hparams, module.mlp
    names = ("training_step", "forward", "measure", "backward", "configure_optimizers", "configure_gradient_clipping")
    own = [name for name in names if getattr(type(module), name) is not getattr(classifier, name)]
    reasons = {
        f"{type(module).__name__} has its own {' and '.join(own)}": own,
        f"the network is a {type(mlp).__name__}": type(mlp) is not MLP,
        f"model.dropout is {settings['dropout']}": settings["dropout"],
        f"model.label_smoothing is {settings['label_smoothing']}": settings["label_smoothing"],
        "trainer.gradient_clip_val is set": trainer.gradient_clip_val,
        f"trainer.precision is {trainer.precision}": trainer.precision not in ("32-true", "64-true"),
        f"the device is {trainer.strategy.root_device}": trainer.strategy.root_device.type != "cpu",
        f"there are {trainer.world_size} processes": trainer.world_size > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise MisconfigurationException(f"model.fused: the step in fused.py does not fit: {reason}")
    assert isinstance(mlp, MLP)
    return FusedStep(mlp)
