"""The tutorial in scikit-learn: `python scikit_learn.py ROOT EPOCHS`."""

import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.neural_network import MLPClassifier

raw, epochs = Path(sys.argv[1], "MNIST", "raw"), int(sys.argv[2])


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (
        np.fromfile(raw / f"{split}-{name}-ubyte", np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 784).astype(np.float32) / 255, labels.astype(np.int32)


(images, labels), test = read("train"), read("t10k")
network = MLPClassifier(200, batch_size=100, max_iter=epochs, alpha=0, n_iter_no_change=epochs)
warnings.simplefilter("ignore")  # that it has not converged
network.fit(images[5000:], labels[5000:])
print(network.score(*test))
