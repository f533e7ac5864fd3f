"""The tutorial in JAX, an epoch as one compiled `lax.scan`: `python jax_scan.py ROOT EPOCHS`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEYS = jax.random.split(jax.random.key(0), 3)


def forward(p: Any, x: Any) -> Any:
    return jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3]


def loss(p: Any, x: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(forward(p, x)), y[:, None], 1).mean()


def training(images: Any, labels: Any) -> tuple[Any, Callable[[Any, int], Any]]:
    """Parameters and Adam's state before training; and a function that trains them for an epoch of this number."""
    parameters = (
        0.01 * jax.random.truncated_normal(KEYS[0], -2, 2, (784, 200)),
        jnp.zeros(200),
        0.01 * jax.random.truncated_normal(KEYS[1], -2, 2, (200, 10)),
        jnp.zeros(10),
    )

    def step(state: Any, index: Any) -> Any:
        p, m, v, t = state
        gradients, t = jax.grad(loss)(p, images[index], labels[index]), t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradients)
        rate = 0.001 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        p = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), p, m, v)
        return (p, m, v, t), None

    @jax.jit
    def run_epoch(state: Any, key: Any) -> Any:
        order = jax.random.permutation(key, len(labels)).reshape(-1, 100)
        return jax.lax.scan(step, state, order)[0]

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    state = (parameters, zeros, zeros, jnp.float32(0))
    return state, lambda state, epoch: run_epoch(state, jax.random.fold_in(KEYS[2], epoch))


def accuracy(state: Any, images: Any, labels: Any) -> float:
    return float((forward(state[0], images).argmax(1) == labels).mean())


def read(root: str, split: str) -> tuple[Any, Any]:
    """Images, (N, 784) float32 in [0, 1], and labels, (N,) int32, of `train` or `t10k`."""
    images, labels = (
        np.fromfile(Path(root, "MNIST", "raw", f"{split}-{name}-ubyte"), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return jnp.asarray(images.reshape(-1, 784), jnp.float32) / 255, jnp.asarray(labels, jnp.int32)


def main() -> None:
    root, epochs = sys.argv[1], int(sys.argv[2])
    (images, labels), test = read(root, "train"), read(root, "t10k")
    state, run_epoch = training(images[5000:], labels[5000:])
    for epoch in range(epochs):
        state = run_epoch(state, epoch)
    print(accuracy(state, *test))


if __name__ == "__main__":
    main()
