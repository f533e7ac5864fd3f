"""The fast step is taken only where it is the ordinary one, the engine can be taken away, and who may know what."""

import ast
import hashlib
import importlib
import inspect
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from conftest import VAL_SIZE, fork
from lightning.pytorch.callbacks import ModelCheckpoint
from test_loop import Foreign, classifier, compare, fit, loader
from torch import Tensor, nn

import mnist_lightning
from mnist_lightning import MNISTClassifier, MNISTDataModule, Trainer
from mnist_lightning.model import MLP

PACKAGE = Path(mnist_lightning.__file__).parent
HOME_OF_TRAINER = Trainer.__module__.removeprefix("mnist_lightning.")
WITH_PRIVATE_NAMES = {"loop.py", "resume.py"}


def digest(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in module.state_dict().values())).hexdigest()


def only_from(directory: Path, package: str) -> None:
    """Import `package` from a directory, in a process that may have imported this project before."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("mnist_lightning", "other")]:
        del sys.modules[name]
    sys.path.insert(0, str(directory))
    if package != "mnist_lightning":
        sys.modules["mnist_lightning"] = None  # type: ignore[assignment]  # to import it is an error


@pytest.fixture
def digits(root: Path) -> Callable[[], MNISTDataModule]:
    return lambda: MNISTDataModule("synthetic", str(root), val_size=VAL_SIZE)


# The fast step


class OwnStep(MNISTClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 2


class OwnForward(MNISTClassifier):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).clamp(-1, 1)  # which only later makes a difference


class OwnMLP(MLP):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).clamp(-1, 1)


class OwnNetwork(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.mlp = OwnMLP(8)


class Clamped(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).clamp(-1, 1)


class OwnLayer(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.mlp.output = Clamped(8, 10)
        nn.init.zeros_(self.mlp.output.weight)


class Hooked(MNISTClassifier):
    """Someone hooks into a layer, and is called in each iteration."""

    def __init__(self) -> None:
        super().__init__(8)
        self.seen: list[int] = []
        self.mlp.hidden.register_forward_hook(lambda *_: self.seen.append(self.global_step))


class TensorHook(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.mlp.output.bias.register_hook(lambda gradient: gradient.clamp(-0.08, 0.08))


class AccumulateHook(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.seen: list[int] = []
        self.mlp.output.bias.register_post_accumulate_grad_hook(lambda _: self.seen.append(self.global_step))


class OwnClipping(MNISTClassifier):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.global_step > 5:  # after the trial
            self.clip_gradients(optimizer, 0.001, "norm")


class OwnLog(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.seen: list[int] = []

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.global_step)
        super().log(*args, **kwargs)


class Frozen(MNISTClassifier):
    def __init__(self) -> None:
        super().__init__(8)
        self.mlp.hidden.requires_grad_(False)


class StepHook(MNISTClassifier):
    seen: list[int]

    def configure_optimizers(self) -> Any:
        self.seen = []
        optimizer: Any = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.seen.append(self.global_step))
        return optimizer


class UsesSGD(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnAdamW(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.clamp_(-0.05, 0.05)
        return loss


class UsesOwnAdamW(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        return OwnAdamW(self.parameters(), lr=0.003, fused=True)


class UsesAMSGrad(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.003, fused=True, amsgrad=True)


class UsesSlowAdamW(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.003, foreach=False, fused=False)


class TwoGroups(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": self.mlp.hidden.parameters()},
            {"params": self.mlp.output.parameters(), "lr": 0.01},
        ]
        return torch.optim.AdamW(groups, lr=0.001, fused=True)


class OnlyTheOutput(MNISTClassifier):
    """The hidden layer stays as it is, but is not frozen: the optimizer does not know it."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.mlp.output.parameters(), lr=0.01, fused=True)


class OtherOrder(MNISTClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.parameters()][::-1], lr=0.003, fused=True)


class Wrong(MNISTClassifier):
    """Its fast step leaves another bit."""

    tries = 0

    def fast_step(self, optimizer: Any, batch: Any) -> Any:
        step = super().fast_step(optimizer, batch)
        assert step

        def wrong(batch: Any) -> Tensor | None:
            type(self).tries += 1
            loss = step(batch)
            with torch.no_grad():
                self.mlp.output.bias[3] += 1e-6
            return loss

        return wrong


class ChangesSmoothing(pl.Callback):
    """Another loss from the middle of an epoch on."""

    observe_every = 4

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            module.label_smoothing = 0.2


REFUSED = [OwnStep, OwnForward, OwnNetwork, OwnLayer, Hooked, TensorHook, AccumulateHook, Frozen, StepHook]
REFUSED += [
    OwnClipping,
    OwnLog,
    UsesSGD,
    UsesOwnAdamW,
    UsesAMSGrad,
    UsesSlowAdamW,
    TwoGroups,
    OnlyTheOutput,
    OtherOrder,
]


@pytest.mark.parametrize("module", REFUSED, ids=lambda module: module.__name__)
def test_fast_step_is_refused(module: Any, digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    run = compare(tmp_path, module, digits, max_epochs=2)
    assert run.quiet > 10
    by_trial = module in (UsesAMSGrad, UsesSlowAdamW)
    assert run.fused <= (2 if by_trial else 0)


def test_fast_step_that_is_wrong_is_dropped(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    Wrong.tries = 0
    run = compare(tmp_path, lambda: Wrong(8), digits)
    assert Wrong.tries == run.fused == 1  # a trial in each fit


def test_fast_step_where_forward_was_replaced(
    digits: Callable[..., MNISTDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, images: forward(self, images).clamp(-1, 1))
    run = compare(tmp_path, classifier, digits, max_epochs=2)
    assert run.fused == 0


def test_fast_step_where_the_instance_was_changed(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    def module() -> MNISTClassifier:
        changed = classifier()
        forward = changed.forward
        changed.forward = lambda images: forward(images).clamp(-1, 1)  # type: ignore[method-assign]
        return changed

    assert compare(tmp_path, module, digits, max_epochs=2).fused == 0


def test_fast_step_under_hooks_on_all_modules(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    """Such as PyTorch's own counters of operations add them."""
    calls: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        fit(Trainer, tmp_path / "ours", classifier, digits, list, {})
        ours = len(calls)
        fit(pl.Trainer, tmp_path / "theirs", classifier, digits, list, {})
    finally:
        handle.remove()
    assert ours == len(calls) - ours


def test_change_within_an_epoch(digits: Callable[..., MNISTDataModule], tmp_path: Path) -> None:
    """A callback that makes the step another one, at an iteration that it looks at."""
    compare(tmp_path, classifier, digits, lambda: [ChangesSmoothing()], log_every_n_steps=50)


# Without the fused step


def fit_digits(directory: Path, root: str) -> None:
    only_from(directory, "mnist_lightning")
    ours = importlib.import_module("mnist_lightning")
    assert Path(str(ours.__file__)).parent.parent == directory
    (directory / "digest").write_text(
        digest(digits_after_fit(ours.Trainer, ours.MNISTClassifier, ours.MNISTDataModule, root))
    )
    assert not any("fused" in name for name in sys.modules if name.startswith("mnist_lightning"))


def digits_after_fit(trainer_class: Any, module_class: Any, data_class: Any, root: str) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    module = module_class(8, learning_rate_schedule="one_cycle", weight_decay=0.01)
    data = data_class("synthetic", root, val_size=VAL_SIZE)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer_class(accelerator="cpu", max_epochs=2, **quiet).fit(module, datamodule=data)
    return module


def test_without_the_fused_step(root: Path, tmp_path: Path) -> None:
    """Delete `fused.py`, `fast_step` and their import: the weights are the same."""
    copy = shutil.copytree(PACKAGE, tmp_path / "mnist_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "fused.py").unlink()
    source = (copy / "classifier.py").read_text()
    lines: list[str | None] = list(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        is_step = isinstance(node, ast.FunctionDef) and node.name == "fast_step"
        if is_step or (isinstance(node, ast.ImportFrom) and "fused" in str(node.module)):
            assert isinstance(node, ast.stmt)
            lines[node.lineno - 1 : node.end_lineno] = [None] * ((node.end_lineno or 0) - node.lineno + 1)
    assert 5 < lines.count(None) < 15
    (copy / "classifier.py").write_text("\n".join(line for line in lines if line is not None))

    process = fork.Process(target=fit_digits, args=(tmp_path, str(root)))
    process.start()
    threads = torch.get_num_threads()
    try:
        module = digits_after_fit(Trainer, MNISTClassifier, MNISTDataModule, str(root))
    finally:
        torch.set_num_threads(threads)
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "digest").read_text() == digest(module)


# In another project


class Dies(Foreign):
    """A module of another project, which is killed in its first life."""

    dies_at: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def a_life(directory: Path, trainer_class: Any, dies_at: int | None = None) -> Dies:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    module = Dies()
    module.dies_at = dies_at
    saves = ModelCheckpoint(directory / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step:03d}")
    trainer = trainer_class(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if dies_at is None and trainer_class is not pl.Trainer:
        torch.manual_seed(77)  # as another process would have it
    newest = max((directory / "saved").glob("*.ckpt"), default=None)
    trainer.fit(module, loader(), ckpt_path=newest, weights_only=True)
    torch.set_num_threads(threads)
    return module


def a_life_elsewhere(directory: Path, dies_at: int | None) -> None:
    only_from(directory, "other")
    trainer_class = importlib.import_module(f"other.{HOME_OF_TRAINER}").Trainer
    assert Path(inspect.getfile(trainer_class)).is_relative_to(directory)
    (directory / "digest").write_text(digest(a_life(directory, trainer_class, dies_at)))


def test_engine_in_another_project(tmp_path: Path) -> None:
    """Copied, it trains there, is killed, goes on, and ends as Lightning's Trainer does."""
    shutil.copytree(PACKAGE / "engine", tmp_path / "other" / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other" / "__init__.py").touch()
    for dies_at, exit_code in ((18, -signal.SIGKILL), (None, 0)):
        process = fork.Process(target=a_life_elsewhere, args=(tmp_path, dies_at))
        process.start()
        process.join()
        assert process.exitcode == exit_code
        assert (tmp_path / "saved" / "step=016.ckpt").exists()
        assert (tmp_path / "saved" / "step=032.ckpt").exists() == (dies_at is None)
    assert (tmp_path / "digest").read_text() == digest(a_life(tmp_path / "whole", pl.Trainer))


# By the syntax tree


def test_engine_imports_nothing_of_the_package() -> None:
    files = list((PACKAGE / "engine").rglob("*.py"))
    assert files
    for file in files:
        depth = len(file.relative_to(PACKAGE / "engine").parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{file.name}:{node.lineno}"
                assert not (node.module or "").startswith("mnist_lightning"), f"{file.name}:{node.lineno}"
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("mnist_lightning") for alias in node.names), file.name
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
                assert "mnist_lightning" not in ast.unparse(node), f"{file.name}:{node.lineno}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_defined(tree: ast.AST) -> set[str]:
    """Private functions, classes, variables and attributes that a file defines."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


@pytest.fixture(scope="module")
def lightnings() -> set[str]:
    root = Path(lightning.__file__).parent
    files = [file for part in ("pytorch", "fabric") for file in (root / part).rglob("*.py")]
    names = set().union(*(names_defined(ast.parse(file.read_text())) for file in files))
    assert {"_TrainingEpochLoop", "_results", "_should_check_val_fx", "_first_loop_iter"} <= names
    return names - {*dir(Tensor), *vars(nn.Module())}  # which are PyTorch's


def violations(tree: ast.AST, lightnings: set[str]) -> list[str]:
    """Places that import, read, call or override a private name of Lightning's."""
    found = []
    own_of_file = names_defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("lightning", "pytorch_lightning")):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{node.lineno}: import of {name}" for name in names if is_private(name)]
        elif isinstance(node, ast.Attribute) and node.attr in lightnings:
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own_of_file
            if not own:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "vars"):
            texts = [part.value for part in node.args if isinstance(part, ast.Constant)]
            found += [f"{node.lineno}: {text!r}" for text in texts if isinstance(text, str) and text in lightnings]
    return found


def overridden(file: Path, lightnings: set[str]) -> list[str]:
    """Private names that a class here shares with a class of Lightning's above it."""
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    found = []
    for node in ast.parse(file.read_text()).body:
        cls = getattr(importlib.import_module(name), node.name) if isinstance(node, ast.ClassDef) else object
        bases = [inspect.getmodule(base) for base in cls.__mro__ if base.__module__.startswith("lightning.")]
        theirs = set().union(*(names_defined(ast.parse(inspect.getsource(base))) for base in bases if base))
        found += [f"{node.lineno}: {cls.__name__}.{shared}" for shared in sorted(names_defined(node) & theirs)]
    return found


def test_private_names_of_lightning_stand_in_two_files(lightnings: set[str]) -> None:
    wrong = {}
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "engine" and file.name in WITH_PRIVATE_NAMES:
            continue
        found = violations(ast.parse(file.read_text()), lightnings)
        if file.name != "__main__.py":
            found += overridden(file, lightnings)
        if found:
            wrong[str(file.relative_to(PACKAGE))] = found
    assert wrong == {}


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "from lightning.pytorch.utilities._pytree import tree_flatten",
        "trainer.fit_loop.epoch_loop._batches_that_stepped += 1",
        "def f(loop):\n    return loop._should_accumulate()",
        "getattr(trainer, '_logger_connector')",
        "class A(B):\n    def f(self):\n        return self._should_accumulate()",
    ],
)
def test_private_names_are_found(source: str, lightnings: set[str]) -> None:
    assert violations(ast.parse(source), lightnings) != []
