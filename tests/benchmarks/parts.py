"""Where the microseconds of one optimizer step go: `speed.py --parts`."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mnist_lightning import MNISTClassifier, MNISTDataModule
from mnist_lightning.fused import FusedStep


def parts(options: argparse.Namespace) -> None:
    """Each part alone, and all of them together, in turns; the parts find more of their tensors in the cache."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = MNISTDataModule(options.dataset, options.root)
    data.prepare_data()
    data.setup("fit")
    network = MNISTClassifier().mlp
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0, fused=True)
    minibatches = iter(data.train_dataloader())
    images, labels = next(minibatches)
    weight, bias = network.hidden.weight.detach(), network.hidden.bias.detach()
    dz = torch.rand(len(images), len(bias))

    def with_autograd() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    def next_minibatch() -> None:
        nonlocal minibatches
        if next(minibatches, None) is None:
            minibatches = iter(data.train_dataloader())

    with_autograd()
    fused = FusedStep(network)
    timed: dict[str, Callable[[], object]] = {
        "the step with autograd": with_autograd,
        "the step of `fused.py`": lambda: fused(optimizer, (images, labels)),
        "of both: the hidden layer forward, (100, 784) by (784, 200)": lambda: torch.addmm(bias, images, weight.t()),
        "of both: the gradient of its weights, (200, 100) by (100, 784)": lambda: dz.t() @ images,
        "of both: AdamW": optimizer.step,
        "a minibatch from the loader": next_minibatch,
    }
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(10 * options.rounds):
        for name, function in timed.items():
            start = time.perf_counter()
            for _ in range(100):
                function()
            taken[name].append((time.perf_counter() - start) * 1e4)
    print("\n| | microseconds |\n| --- | --- |")
    for name, microseconds in taken.items():
        print(f"| {name} | {statistics.median(microseconds):.0f} |")
