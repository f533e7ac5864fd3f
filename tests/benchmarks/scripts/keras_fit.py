"""The tutorial in Keras on TensorFlow: `python keras_fit.py ROOT EPOCHS`."""

import os
import sys
from pathlib import Path

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras
import numpy as np

raw, epochs = Path(sys.argv[1], "MNIST", "raw"), int(sys.argv[2])


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (
        np.fromfile(raw / f"{split}-{name}-ubyte", np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 784).astype(np.float32) / 255, labels.astype(np.int32)


(images, labels), test = read("train"), read("t10k")
initial = keras.initializers.TruncatedNormal(stddev=0.01)
layers = [
    keras.layers.Dense(200, activation="relu", kernel_initializer=initial),
    keras.layers.Dense(10, kernel_initializer=initial),
]
network = keras.Sequential(layers)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
network.compile(keras.optimizers.Adam(0.001), loss, ["accuracy"], steps_per_execution=50)
network.fit(images[5000:], labels[5000:], batch_size=100, epochs=epochs, verbose=0)
print(network.evaluate(*test, verbose=0)[1])
