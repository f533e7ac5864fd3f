"""The tutorial as a bare PyTorch script: `python plain.py ROOT EPOCHS`."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import MNIST

root, epochs = sys.argv[1], int(sys.argv[2])
train, test = MNIST(root), MNIST(root, train=False)
images, labels = train.data[5000:].reshape(-1, 784) / 255, train.targets[5000:]
hidden, output = nn.Linear(784, 200), nn.Linear(200, 10)
network = nn.Sequential(hidden, nn.ReLU(), output)
for layer in (hidden, output):
    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
    nn.init.zeros_(layer.bias)
optimizer = torch.optim.Adam(network.parameters(), fused=True)
for _ in range(epochs):
    for minibatch in torch.randperm(len(images)).split(100):
        optimizer.zero_grad()
        F.cross_entropy(network(images[minibatch]), labels[minibatch]).backward()
        optimizer.step()
with torch.no_grad():
    predictions = network(test.data.reshape(-1, 784) / 255).argmax(1)
print((predictions == test.targets).float().mean().item())
