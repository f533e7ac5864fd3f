"""A training step without autograd: the same numbers in 0.6 to 0.75 of the time. To learn Lightning, skip this file.

On a CPU about a third of this small network's step is not arithmetic but autograd's bookkeeping and new tensors. Here
each result has a buffer of its own, which every step overwrites. The kernels are those that autograd and
`torch.optim.AdamW(fused=True)` call, in the same order, so the weights are bit-identical.

The engine tries it beside the ordinary step and drops it where they differ. Delete this file and
`MNISTClassifier.fast_step` with its import, and only the speed changes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from mnist_lightning.model import MLP

aten = torch.ops.aten
FORWARD = MLP.forward  # to notice where somebody replaces it


def can_fuse(network: nn.Module, label_smoothing: float) -> bool:
    """Whether the step below fits this network and loss; a trial could miss a very small dropout or smoothing."""
    return (
        type(network) is MLP
        and MLP.forward is FORWARD
        and type(network.hidden) is type(network.output) is nn.Linear
        and network.dropout.p == 0
        and label_smoothing == 0
    )


class FusedStep:
    """A step of the tutorial's training: forward, mean softmax cross-entropy, backward, AdamW.

    Args:
        network: The network to train, in float32 or float64 on a CPU.
        optimizer: `AdamW(fused=True)` over the network's parameters, after its first step, which makes the moments.
        batch_size: Images in each minibatch.

    Raises:
        ValueError: The optimizer is another one.
    """

    def __init__(self, network: MLP, optimizer: torch.optim.Optimizer, batch_size: int) -> None:
        trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if type(optimizer) is not AdamW or trained != list(map(id, network.parameters())):
            raise ValueError("the fused step is AdamW's with one group, the network's parameters")
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
    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor | None:
        """Do one step with images, (B, 784), and labels, (B,); return the loss before it, a scalar.

        With another number of images than `batch_size` it does nothing and returns None.
        """
        images, labels = batch
        if len(labels) != self.batch_size:
            return None
        hidden_weight, hidden_bias, output_weight, output_bias = self.parameters
        hidden_weight_grad, hidden_bias_grad, output_weight_grad, output_bias_grad = self.gradients

        torch.addmm(hidden_bias, images, hidden_weight.t(), out=self.hidden).relu_()
        torch.addmm(output_bias, self.hidden, output_weight.t(), out=self.logits)
        torch._log_softmax(self.logits, 1, False, out=self.log_probs)
        loss = F.nll_loss(self.log_probs, labels)

        # 1 is reduction="mean", and -100 the label that is ignored.
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
        self.update()
        return loss

    def update(self) -> None:
        """Update the parameters by AdamW with the current gradients."""
        torch._foreach_add_(self.steps, self.one, alpha=1)
        beta1, beta2 = self.group["betas"]
        settings = {name: self.group[name] for name in ("lr", "weight_decay", "eps", "maximize")}
        tensors: list[list[Tensor]] = [self.parameters, self.gradients, self.means, self.squares, [], self.steps]
        torch._fused_adamw_(*tensors, beta1=beta1, beta2=beta2, amsgrad=False, **settings)
