"""An optimizer step without autograd: the same numbers in two thirds of the time. To learn Lightning, skip this file.

On a CPU a third of this small network's step is not arithmetic but autograd's bookkeeping and new tensors. Here each
result has a place of its own that every step writes again. The kernels are those that autograd and
`torch.optim.Adam(fused=True)` call, in the same order, so the weights are bit-identical.
"""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from mnist_lightning.model import CLASSES, MLP

aten = torch.ops.aten

# Hooks of Lightning that the step would leave out.
HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


def can_fuse(module: pl.LightningModule, network: MLP, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused step would do all that the ordinary one does.

    It needs one process on a CPU in full precision, Adam after its first step, and no hook between the passes. Hooks
    on single layers and tensors are not looked for.
    """
    trainer = module.trainer
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return (
        module.device.type == "cpu"
        and trainer.world_size == 1
        and type(trainer.precision_plugin) in (Precision, DoublePrecision)
        and type(network) is MLP
        and type(optimizer) is torch.optim.Adam
        and not optimizer.param_groups[0]["amsgrad"]
        and all(parameter.requires_grad and parameter in optimizer.state for parameter in network.parameters())
        and not torch.is_anomaly_enabled()
        and not any(is_overridden(hook, module, pl.LightningModule) for hook in (*HOOKS, "optimizer_step"))
        and not any(is_overridden(hook, callback, pl.Callback) for hook in HOOKS for callback in callbacks)
    )


def fused_step(
    network: MLP, lightning_optimizer: LightningOptimizer, batch_size: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a function that does one optimizer step.

    It takes images, (B, 784), and labels, (B,), and returns the logits from before the step, (B, 10), which the next
    call overwrites. The learning rate is that of now: make a new one after changing it.

    Args:
        network: The network to train, in float32 or float64 on a CPU.
        lightning_optimizer: Adam over the network's parameters, with at least one step behind it.
        batch_size: B.
    """
    optimizer = lightning_optimizer.optimizer
    group = optimizer.param_groups[0]
    parameters = [parameter.detach() for parameter in network.parameters()]
    hidden_weight, hidden_bias, output_weight, output_bias = parameters
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    hidden_weight_grad, hidden_bias_grad, output_weight_grad, output_bias_grad = gradients
    states = [optimizer.state[parameter] for parameter in network.parameters()]
    means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))

    hidden, hidden_grad = (hidden_bias.new_empty(batch_size, len(hidden_bias)) for _ in range(2))
    logits, log_probs, log_probs_grad, logits_grad = (output_bias.new_empty(batch_size, CLASSES) for _ in range(4))
    one, count = output_bias.new_tensor(1.0), output_bias.new_tensor(batch_size)
    mean, ignore_index = 1, -100  # of `F.cross_entropy`: reduction="mean" by its number in C++, and no label ignored

    def step(images: Tensor, labels: Tensor) -> Tensor:
        lightning_optimizer._on_before_step()  # Lightning's count of steps

        torch.addmm(hidden_bias, images, hidden_weight.t(), out=hidden).relu_()
        torch.addmm(output_bias, hidden, output_weight.t(), out=logits)
        torch._log_softmax(logits, 1, False, out=log_probs)

        aten.nll_loss_backward.grad_input(
            one, log_probs, labels, None, mean, ignore_index, count, grad_input=log_probs_grad
        )
        aten._log_softmax_backward_data.out(log_probs_grad, log_probs, 1, logits.dtype, out=logits_grad)
        torch.mm(logits_grad.t(), hidden, out=output_weight_grad)
        torch.sum(logits_grad, 0, out=output_bias_grad)
        torch.mm(logits_grad, output_weight, out=hidden_grad)
        aten.threshold_backward.grad_input(hidden_grad, hidden, 0, grad_input=hidden_grad)
        torch.mm(hidden_grad.t(), images, out=hidden_weight_grad)
        torch.sum(hidden_grad, 0, out=hidden_bias_grad)

        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            grad_scale=None,
            found_inf=None,
        )
        lightning_optimizer._on_after_step()
        return logits

    return step
