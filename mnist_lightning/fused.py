"""An optimizer step without autograd: the same numbers in two thirds of the time. To learn Lightning, skip this file.

On a CPU a third of this small network's step is not arithmetic but autograd's bookkeeping and new tensors. Here each
result has a place of its own that every step writes again. The kernels are those that autograd and
`torch.optim.AdamW(fused=True)` call, in the same order, so the weights are bit-identical.

Change the network, the loss or the optimizer, and the trial in `try_fused_step` notices: training goes on as you wrote
it, without this file.
"""

import contextlib
from collections.abc import Callable

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from mnist_lightning.model import MLP

aten = torch.ops.aten

# Hooks that Lightning calls inside an optimizer step, which the fused one would leave out.
HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def can_fuse(module: pl.LightningModule) -> bool:
    """Whether nothing but the step itself is asked for: one process on a CPU, full precision, no hook inside the step.

    Dropout and label smoothing are looked for, since a trial could miss very small ones; hooks on single layers and
    tensors are not.
    """
    trainer = module.trainer
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return (
        module.device.type == "cpu"
        and trainer.world_size == 1
        and type(trainer.precision_plugin) in (Precision, DoublePrecision)
        and not any(module.hparams.get(name) for name in ("dropout", "label_smoothing"))
        and all(parameter.requires_grad for parameter in module.parameters())
        and not torch.is_anomaly_enabled()
        and not any(is_overridden(hook, module, pl.LightningModule) for hook in (*HOOKS, "optimizer_step"))
        and not any(is_overridden(hook, callback, pl.Callback) for hook in HOOKS for callback in callbacks)
    )


def try_fused_step(
    network: MLP,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple["FusedStep | None", tuple[Tensor, Tensor]]:
    """Do the ordinary step, after a trial of the fused one on the same minibatch.

    Args:
        network: The network to train, in float32 or float64 on a CPU.
        optimizer: AdamW over the network's parameters, with at least one step behind it.
        images: (B, 784) pixels.
        labels: (B,) classes.
        step: The ordinary step.

    Returns:
        The fused step for minibatches of this size, or None where the trial left other weights or moments; and what
        the ordinary step returned.
    """
    tensors = [*network.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    before = [tensor.detach().clone() for tensor in tensors]
    fused = None
    # Another network or optimizer may not even have what the fused step looks for.
    with contextlib.suppress(AttributeError, KeyError, RuntimeError, ValueError):
        fused = FusedStep(network, optimizer, len(labels))
        fused(images, labels)
    trial = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    done = step(images, labels)
    return fused if all(map(torch.equal, tensors, trial)) else None, done


class FusedStep:
    """A step of the tutorial's training: forward, mean softmax cross-entropy, backward, AdamW.

    Args:
        network: The network to train, in float32 or float64 on a CPU.
        optimizer: AdamW over the network's parameters, with at least one step behind it.
        batch_size: Images in each minibatch.
    """

    def __init__(self, network: MLP, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        self.batch_size = batch_size
        (self.group,) = optimizer.param_groups
        self.parameters = [parameter.detach() for parameter in network.parameters()]
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters]
        states = [optimizer.state[parameter] for parameter in network.parameters()]
        self.means, self.squares, self.steps = (
            [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
        )

        new = network.output.bias.new_empty
        self.hidden, self.hidden_grad = (new(batch_size, network.hidden.out_features) for _ in range(2))
        self.logits, self.log_probs, self.log_probs_grad, self.logits_grad = (
            new(batch_size, network.output.out_features) for _ in range(4)
        )
        self.one, self.count = new(()).fill_(1), new(()).fill_(batch_size)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step with images, (B, 784), and labels, (B,); return loss, (), and logits, (B, 10), from before it.

        The next call writes over the logits.
        """
        hidden_weight, hidden_bias, output_weight, output_bias = self.parameters
        hidden_weight_grad, hidden_bias_grad, output_weight_grad, output_bias_grad = self.gradients

        torch.addmm(hidden_bias, images, hidden_weight.t(), out=self.hidden).relu_()
        torch.addmm(output_bias, self.hidden, output_weight.t(), out=self.logits)
        torch._log_softmax(self.logits, 1, False, out=self.log_probs)
        loss = F.nll_loss(self.log_probs, labels)

        # 1 is reduction="mean" by its number in C++; no label is ignored.
        aten.nll_loss_backward.grad_input(
            self.one, self.log_probs, labels, None, 1, -100, self.count, grad_input=self.log_probs_grad
        )
        aten._log_softmax_backward_data.out(
            self.log_probs_grad, self.log_probs, 1, self.logits.dtype, out=self.logits_grad
        )
        torch.mm(self.logits_grad.t(), self.hidden, out=output_weight_grad)
        torch.sum(self.logits_grad, 0, out=output_bias_grad)
        torch.mm(self.logits_grad, output_weight, out=self.hidden_grad)
        aten.threshold_backward.grad_input(self.hidden_grad, self.hidden, 0, grad_input=self.hidden_grad)
        torch.mm(self.hidden_grad.t(), images, out=hidden_weight_grad)
        torch.sum(self.hidden_grad, 0, out=hidden_bias_grad)

        torch._foreach_add_(self.steps, 1)
        torch._fused_adamw_(
            self.parameters,
            self.gradients,
            self.means,
            self.squares,
            [],
            self.steps,
            lr=self.group["lr"],
            beta1=self.group["betas"][0],
            beta2=self.group["betas"][1],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            amsgrad=False,
            maximize=self.group["maximize"],
            grad_scale=None,
            found_inf=None,
        )
        return loss, self.logits
