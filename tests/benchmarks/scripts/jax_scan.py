"""The tutorial in JAX, an epoch as one compiled `lax.scan`: `python jax_scan.py ROOT EPOCHS`."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

raw, epochs = Path(sys.argv[1], "MNIST", "raw"), int(sys.argv[2])


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (
        np.fromfile(raw / f"{split}-{name}-ubyte", np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 784).astype(np.float32) / 255, labels.astype(np.int32)


(images, labels), (test_images, test_labels) = (
    (jnp.asarray(images), jnp.asarray(labels)) for images, labels in (read("train"), read("t10k"))
)
images, labels = images[5000:], labels[5000:]
keys = jax.random.split(jax.random.key(0), 3)
parameters = (
    0.01 * jax.random.truncated_normal(keys[0], -2, 2, (784, 200)),
    jnp.zeros(200),
    0.01 * jax.random.truncated_normal(keys[1], -2, 2, (200, 10)),
    jnp.zeros(10),
)


def forward(p: Any, x: Any) -> Any:
    return jax.nn.relu(x @ p[0] + p[1]) @ p[2] + p[3]


def loss(p: Any, x: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(forward(p, x)), y[:, None], 1).mean()


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
for epoch in range(epochs):
    state = run_epoch(state, jax.random.fold_in(keys[2], epoch))
print((forward(state[0], test_images).argmax(1) == test_labels).mean())
