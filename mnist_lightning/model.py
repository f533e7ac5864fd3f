"""The network: 784 pixels -> hidden ReLU units -> 10 logits (scores before the softmax). Plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 28
PIXELS = SIDE**2
CLASSES = 10


class MLP(nn.Module):
    """A multilayer perceptron (MLP) with one hidden layer. An image is a row of pixels, not a square, since
    a layer multiplies its matrix W by a vector x.

    Weights come from a normal distribution truncated at two standard deviations, as TensorFlow truncates it; biases
    start at 0.

    Args:
        hidden_dim: Number of hidden ReLU units, at least 1. With 200 the network has 159,010 parameters.
        init_std: Standard deviation of the normal distribution before truncation, above 0.
        dropout: In training, the probability that a hidden unit is set to 0, from 0 to 1.
    """

    def __init__(self, hidden_dim: int = 200, init_std: float = 0.01, dropout: float = 0) -> None:
        super().__init__()
        if hidden_dim < 1 or init_std <= 0:
            raise ValueError(f"hidden_dim must be at least 1, and init_std above 0, not {hidden_dim} and {init_std}")
        self.hidden = nn.Linear(PIXELS, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_dim, CLASSES)
        for layer in (self.hidden, self.output):
            # Without bounds, PyTorch truncates at -2 and 2 whatever the standard deviation is.
            nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map pixels, (B, 784) floats in [0, 1], to logits, (B, 10)."""
        hidden = F.relu(self.hidden(images))  # max(0, W x + b): (B, 200)
        hidden = self.dropout(hidden)
        return self.output(hidden)  # no activation: the loss takes logits and applies the softmax itself
