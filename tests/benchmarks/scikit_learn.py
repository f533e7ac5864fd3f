"""The tutorial in scikit-learn: `python scikit_learn.py ROOT EPOCHS`."""

import sys
import warnings

from mnist_files import read
from sklearn.neural_network import MLPClassifier

root, epochs = sys.argv[1], int(sys.argv[2])
(images, labels), test = read(root, "train"), read(root, "t10k")
network = MLPClassifier(200, batch_size=100, max_iter=epochs, alpha=0, n_iter_no_change=epochs)
warnings.simplefilter("ignore")  # that it has not converged
network.fit(images[5000:], labels[5000:])
print(network.score(*test))
