"""The engine as a whole: whom it may know, a copy of it in another project, and what it leaves of the process."""

import ast
import contextlib
import gc
import importlib
import inspect
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import process_state
import pytest
import torch
from conftest import SILENT, Fork
from engine.test_loop import Foreign, classifier, digits, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import mnist_lightning
from mnist_lightning import Trainer
from mnist_lightning.engine.checkpoints import BestAndLast
from mnist_lightning.engine.checks import Checks
from mnist_lightning.engine.console import Stopped
from mnist_lightning.engine.runs import RunLock

PACKAGE = Path(mnist_lightning.__file__).parent
WITH_PRIVATE_NAMES = {"loop.py", "hooks.py", "resumption.py"}
NOTHING = SILENT | {"accelerator": "cpu"}

# In another project


class Dies(Foreign):
    """A module of another project, which is killed in its first life."""

    dies_at: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def a_life(directory: Path, trainer_class: Any, dies_at: int | None = None) -> dict[str, Any]:
    torch.manual_seed(5)
    module = Dies()
    module.dies_at = dies_at
    saves = ModelCheckpoint(directory / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step:03d}")
    newest = max((directory / "saved").glob("*.ckpt"), default=None)
    if newest:
        torch.manual_seed(77)  # as another process would have it
    trainer_class(max_epochs=3, callbacks=[saves], **NOTHING).fit(module, loader(), ckpt_path=newest, weights_only=True)
    return module.state_dict()


def a_life_elsewhere(directory: Path, dies_at: int | None) -> None:
    sys.path.insert(0, str(directory))
    for name in [name for name in sys.modules if name.startswith("mnist_lightning")]:
        del sys.modules[name]
    sys.modules["mnist_lightning"] = None  # type: ignore[assignment]  # to import it is an error
    trainer_class = importlib.import_module("other.engine.loop").Trainer
    assert Path(inspect.getfile(trainer_class)).is_relative_to(directory)
    torch.save(a_life(directory, trainer_class, dies_at), directory / "weights")


def test_engine_in_another_project(tmp_path: Path, fork: Fork) -> None:
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
    expected = a_life(tmp_path / "whole", pl.Trainer)
    weights = torch.load(tmp_path / "weights")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# What is left of the process


def test_no_trainer_is_kept(root: Path) -> None:
    alive = []
    for fused in [False, True] * 4:
        trainer = Trainer(max_epochs=1, enable_checkpointing=False, **NOTHING)
        trainer.fit(classifier(fused=fused), datamodule=digits(root))
        alive.append(weakref.ref(trainer))
        del trainer
    gc.collect()
    assert sum(each() is not None for each in alive) <= 2


@pytest.mark.slow
def test_importing_changes_nothing(tmp_path: Path) -> None:
    """In a new process, where what the modules import from elsewhere is imported before."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, process_state.__file__]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


class Ends(Foreign):
    how = ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"])
        if self.global_step == 3 and self.how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.global_step == 3 and self.how:
            raise {"error": KeyError, "Ctrl-C": KeyboardInterrupt}[self.how]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["", "error", "Ctrl-C", "signal"])
def test_a_fit_leaves_the_process_as_it_was(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as `import lightning` sets it
    monkeypatch.setattr(Ends, "how", how)
    ended: dict[str, tuple[type[BaseException] | None, int]] = {
        "error": (KeyError, 4),
        "Ctrl-C": (SystemExit, 4),
        "signal": (Stopped, 5),
        "": (None, 22),
    }

    def fit(trainer_class: Any, callbacks: list[pl.Callback], module: Foreign) -> None:
        trainer_class(max_epochs=2, default_root_dir=tmp_path, callbacks=callbacks, **NOTHING).fit(module, loader())

    fit(pl.Trainer, [], Foreign())  # what Lightning and PyTorch keep for later
    before, module = process_state.state(), Ends()
    error, steps = ended[how]
    with pytest.raises(error) if error else contextlib.nullcontext():
        fit(Trainer, [Checks(RunLock()), BestAndLast(monitor="val_loss", mode="min")], module)
    assert len(module.seen) == steps
    assert torch.cuda.is_available() or {*module.seen} == {"0"}
    assert process_state.changes(before, process_state.state()) == []


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
    files = [file for part in ("pytorch", "fabric") for file in (Path(lightning.__file__).parent / part).rglob("*.py")]
    names = set().union(*(names_defined(ast.parse(file.read_text())) for file in files))
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


def overridden(file: Path) -> list[str]:
    """Private names that a class here shares with a class of Lightning's above it."""
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    found = []
    for node in ast.parse(file.read_text()).body:
        cls = getattr(importlib.import_module(name), node.name) if isinstance(node, ast.ClassDef) else object
        bases = [inspect.getmodule(base) for base in cls.__mro__ if base.__module__.startswith("lightning.")]
        theirs = set().union(*(names_defined(ast.parse(inspect.getsource(base))) for base in bases if base))
        found += [f"{node.lineno}: {cls.__name__}.{shared}" for shared in sorted(names_defined(node) & theirs)]
    return found


def test_private_names_of_lightning_stand_in_three_files(lightnings: set[str]) -> None:
    for source in (
        "from lightning.pytorch.utilities._pytree import tree_flatten",
        "trainer.fit_loop.epoch_loop._batches_that_stepped += 1",
        "getattr(trainer, '_logger_connector')",
        "class A(B):\n    def f(self):\n        return self._should_accumulate()",
    ):
        assert violations(ast.parse(source), lightnings) != []
    wrong = {}
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "engine" or file.name not in WITH_PRIVATE_NAMES:
            found = violations(ast.parse(file.read_text()), lightnings)
            wrong[file.name] = found + (overridden(file) if file.name != "__main__.py" else [])
    assert {name: found for name, found in wrong.items() if found} == {}
