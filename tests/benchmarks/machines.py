"""What N machines would bring, on paper: gradient exchange against compute.

    python tests/benchmarks/machines.py

An iteration takes `fixed + image * minibatch / N + exchange` seconds. What is fixed, and an image, are measured on one
process of one thread; what DDP and its exchange take besides the network, on two processes of this machine. To this it
adds a ring's transfer of the gradients, 2 (N - 1) / N of their bytes, and 2 (N - 1) messages.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from speed import plain_network, processor, small_cnn
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "200 units": lambda: plain_network(200),
    "800 units": lambda: plain_network(800),
    "small CNN": small_cnn,
}
NETS = {"1 Gbit/s": (1e9, 50e-6), "25 Gbit/s": (25e9, 10e-6)}  # bits a second; seconds a message, assumed
MINIBATCHES = (100, 1_024, 8_192, 65_536)
PROCESSES = (2, 4, 16, 64)


def train(rank: int, world_size: int, name: str, minibatch: int, port: int, result: torch.Tensor) -> None:
    """Put the seconds of an iteration into `result`."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    network = NETWORKS[name]()
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        network = DistributedDataParallel(network)
    optimizer = optim.Adam(network.parameters(), fused=True)
    images, labels = torch.rand(minibatch // world_size, 784), torch.randint(10, (minibatch // world_size,))
    seconds: list[float] = []
    while len(seconds) < 8 or (sum(seconds) < 0.8 and len(seconds) < 300):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if world_size > 1:  # all stop at the same iteration
            go_on = torch.tensor(sum(seconds))
            torch.distributed.broadcast(go_on, 0)
            seconds[-1] += float(go_on) - sum(seconds)
    if rank == 0:
        result[0] = torch.tensor(seconds[3:]).median()


def measure(world_size: int, name: str, minibatch: int, port: int) -> float:
    result = torch.zeros(1).share_memory_()
    arguments = (world_size, name, minibatch, port, result)
    torch.multiprocessing.spawn(train, arguments, nprocs=world_size)  # type: ignore[attr-defined, no-untyped-call]
    return float(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=29555)
    port = parser.parse_args().port
    print(f"{os.cpu_count()} cores of {processor()}, torch {torch.__version__}, a thread for each process\n")
    constants = {}
    print(
        "| network | gradients | fixed, ms | an image, µs | DDP, ms | 1 process, ms (predicted) | 2, ms (predicted) |\n"
        + "| --- " * 7
        + "|"
    )
    for name, make in NETWORKS.items():
        size = sum(parameter.numel() for parameter in make().parameters())
        small, large = (measure(1, name, minibatch, port) for minibatch in (100, 1_024))
        image = (large - small) / (1_024 - 100)
        fixed = max(0, small - 100 * image)
        ddp = max(0, measure(2, name, 16, port) - measure(1, name, 8, port))  # few images, whose time varies
        constants[name] = 4 * size, fixed, image, ddp
        row = f"{size:,} | {1e3 * fixed:.2f} | {1e6 * image:.1f} | {1e3 * ddp:.1f}"
        compute = fixed + 512 * image
        for n, predicted in ((1, compute), (2, compute + ddp)):
            row += f" | {1e3 * measure(n, name, n * 512, port):.1f} ({1e3 * predicted:.1f})"
        print(f"| {name} | {row} |", flush=True)
    print("\n| network, between machines | pays from | minibatch |", " | ".join(f"N={n}" for n in PROCESSES), "|")
    print("| --- " * (3 + len(PROCESSES)) + "|")
    for name, (size, fixed, image, ddp) in constants.items():
        for net, (rate, message) in NETS.items():

            def exchange(n: int) -> float:
                return ddp + 2 * (n - 1) / n * 8 * size / rate + 2 * (n - 1) * message  # noqa: B023

            pays = 2 * exchange(2) / image
            for minibatch in MINIBATCHES:
                alone = fixed + image * minibatch
                gains = (f"{alone / (fixed + image * minibatch / n + exchange(n)):.2f}" for n in PROCESSES)
                print(f"| {name}, {net} | {pays:,.0f} | {minibatch:,} |", " | ".join(gains), "|")


if __name__ == "__main__":
    main()
