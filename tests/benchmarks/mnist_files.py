"""MNIST's files in NumPy, for scripts that use no PyTorch."""

from pathlib import Path

import numpy as np


def read(root: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, (N, 784) float32 in [0, 1], and labels, (N,) int32, of `train` or `t10k`."""
    images, labels = (
        np.fromfile(Path(root, "MNIST", "raw", f"{split}-{name}-ubyte"), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 784).astype(np.float32) / 255, labels.astype(np.int32)
