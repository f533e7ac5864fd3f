"""The step of `fused.py`: the same bits as the ordinary one, and a line where it does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import RunCLI, newest_run
from engine.test_loop import GRID, NOT_FUSED, Settings, classifier, compare, digits
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from mnist_lightning import MNISTClassifier, Trainer
from mnist_lightning.fused import FusedStep
from mnist_lightning.model import MLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 50, 100])
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"amsgrad": False, "eps": 1e-3, "betas": (0.5, 0.9)}])
def test_leaves_the_bits_of_autograd_and_adam(dtype: torch.dtype, size: int, settings: Settings) -> None:
    """Weights and moments, after each of ten steps."""
    ordinary, fused = (MLP(20, init_std=0.1).to(dtype) for _ in range(2))
    fused.load_state_dict(ordinary.state_dict())
    adam, other = (torch.optim.AdamW(mlp.parameters(), lr=0.01, fused=True, **settings) for mlp in (ordinary, fused))
    take_step = FusedStep(fused)
    for number in range(10):
        x, y = torch.rand(size, 784, dtype=dtype), torch.randint(10, (size,))
        for mlp, optimizer in [(ordinary, adam), (fused, other)][: 2 if number == 0 else 1]:
            optimizer.zero_grad()
            F.cross_entropy(mlp(x), y).backward()
            optimizer.step()
        if number:
            take_step(other, (x, y))
        assert all(map(torch.equal, ordinary.parameters(), fused.parameters()))
        for state, expected in zip(other.state.values(), adam.state.values(), strict=True):
            assert all(torch.equal(state[name], expected[name]) for name in expected)


# What the step itself sees: minibatches, rates, types, and where it begins again; `test_loop.py` has the loop's others.
CASES = ["constant", "one_cycle", "val by number", "max_steps", "even", "one in the last", "64", "overfit", "reload"]


@pytest.mark.parametrize("case", CASES)
def test_trains_as_lightning_does(case: str, root: Path, tmp_path: Path) -> None:
    module, data, settings = GRID[case]
    run = compare(tmp_path, lambda: classifier(**module, fused=True), lambda: digits(root, **data), **settings)
    assert run.fused == run.without_hooks >= 0.3 * run.trainer.global_step
    assert run.infos == []


# What does not fit


class Step(MNISTClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


class Forward(MNISTClassifier):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).clamp(-1, 1)


class Optimizer(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnMLP(MLP):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).clamp(-1, 1)


class Network(MNISTClassifier):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.mlp = OwnMLP(8)


# By the reason that the message gives: the class, and the module's and the Trainer's settings.
REFUSED: dict[str, tuple[type[MNISTClassifier], Settings, Settings]] = {
    "Step has its own training_step": (Step, {}, {}),
    "Forward has its own forward": (Forward, {}, {}),
    "Optimizer has its own configure_optimizers": (Optimizer, {}, {}),
    "the network is a OwnMLP": (Network, {}, {}),
    "model.dropout is 1e-09": (MNISTClassifier, {"dropout": 1e-9}, {}),
    "model.label_smoothing is 1e-09": (MNISTClassifier, {"label_smoothing": 1e-9}, {}),
    "trainer.gradient_clip_val is set": (MNISTClassifier, *NOT_FUSED["clip norm"][1:]),
    "trainer.precision is bf16-mixed": (MNISTClassifier, *NOT_FUSED["bf16"][1:]),
    "the device is cuda": (MNISTClassifier, {}, {}),
    "there are 2 processes": (MNISTClassifier, {}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings, trainer_settings = REFUSED[reason]
    module = kind(**settings, fused=True)
    module.trainer = Trainer(accelerator="cpu", devices=1, logger=False, **trainer_settings)
    if "device" in reason:
        monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("cuda"))
    elif "processes" in reason:
        monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(MisconfigurationException) as refused:
        module.setup("fit")
    assert str(refused.value) == f"model.fused: the step in fused.py does not fit: {reason}"


class Layer(MNISTClassifier):
    """What only the trial can see: another kind of layer in an `MLP`."""

    def __init__(self) -> None:
        super().__init__(8, fused=True)
        self.mlp.output.register_forward_hook(lambda layer, inputs, logits: logits.clamp(-0.001, 0.001))


class Gradient(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8, fused=True)
        self.mlp.output.bias.register_hook(lambda gradient: gradient.clamp(-0.001, 0.001))


@pytest.mark.parametrize("kind", [Layer, Gradient])
def test_what_the_trial_sees_is_not_fused(kind: type[MNISTClassifier], root: Path, tmp_path: Path) -> None:
    run = compare(tmp_path, kind, lambda: digits(root))
    assert run.fused == 1 < run.without_hooks
    assert run.infos == ["fused.py's step leaves other weights: training_step is taken"]


# The command line


def test_the_command_line_says_whose_step_is_taken(
    run_cli: RunCLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, lines = [], []
    for fused in ("true", "false"):
        assert run_cli("fit", f"--model.fused={fused}", "--model.hidden_dim=8", "--trainer.max_epochs=1") == 0
        lines.append(capsys.readouterr().out.splitlines()[0])
        left.append(torch.load(newest_run(tmp_path) / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[1])
    assert ["fused.py's step, not training_step's" in line for line in lines] == [True, False]
    assert run_cli("fit", "--model.fused=true", "--model.dropout=0.1") == 2
    assert capsys.readouterr().err.count("\n") == 1
