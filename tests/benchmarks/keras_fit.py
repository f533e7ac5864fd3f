"""The tutorial in Keras on TensorFlow: `python keras_fit.py ROOT EPOCHS`."""

import os
import sys

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras
from mnist_files import read

root, epochs = sys.argv[1], int(sys.argv[2])
(images, labels), test = read(root, "train"), read(root, "t10k")
initial = keras.initializers.TruncatedNormal(stddev=0.01)
layers = [
    keras.layers.Dense(200, activation="relu", kernel_initializer=initial),
    keras.layers.Dense(10, kernel_initializer=initial),
]
network = keras.Sequential(layers)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
network.compile(keras.optimizers.Adam(0.001), loss, metrics=["accuracy"], steps_per_execution=50)
network.fit(images[5000:], labels[5000:], batch_size=100, epochs=epochs, verbose=0)
print(network.evaluate(*test, verbose=0)[1])
