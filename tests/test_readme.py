"""The READMEs: what "Make it yours" shows works, word for word; and what they quote and name is there."""

import re
import runpy
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import VAL_SIZE, RunCLI, assert_the_same
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import Trainer
from mnist_lightning.digits import plots
from mnist_lightning.figures import Figures
from mnist_lightning.fused import FusedStep

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
READMES = [README, ROOT / "configs" / "README.md", ROOT / "mnist_lightning" / "engine" / "README.md"]
PACKAGE = ROOT / "mnist_lightning"

PER_EPOCH, EPOCHS = 11, 2


def blocks(language: str, readme: Path = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE)


def block(words: str, readme: Path = README) -> str:
    """The fenced block of Python that has these words."""
    (found,) = (code for code in blocks("python", readme) if words in code)
    return found


@pytest.fixture(scope="session")
def fashion_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a few images in Fashion-MNIST's layout: a noisy pattern for each of ten classes."""
    root = tmp_path_factory.mktemp("fashion")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 784), generator=generator)
    for file, count in (("train", 1250), ("t10k", 230)):
        labels = torch.randint(0, 10, (count,), generator=generator)
        images = (patterns[labels] * torch.rand(count, 784, generator=generator)).to(torch.uint8)
        header = struct.pack(">4I", 0x803, count, 28, 28), struct.pack(">2I", 0x801, count)
        (raw / f"{file}-images-idx3-ubyte").write_bytes(header[0] + images.numpy().tobytes())
        (raw / f"{file}-labels-idx1-ubyte").write_bytes(header[1] + labels.to(torch.uint8).numpy().tobytes())
    return root


@pytest.fixture
def script(tmp_path: Path, fashion_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's `mine.py`, in a working directory that has the files in `data/`."""
    (tmp_path / "data").symlink_to(fashion_files)
    (tmp_path / "mine.py").write_text(block("class Fashion"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.py"


@pytest.fixture
def mine(script: Path) -> SimpleNamespace:
    """What `mine.py` defines, imported."""
    return SimpleNamespace(**runpy.run_path(str(script)))


class Visits(pl.Callback):
    """Counts the iterations that Lightning visits."""

    observe_every = 0

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


Fit = Callable[..., tuple[pl.Trainer, Tensor, int]]


@pytest.fixture
def fit(mine: SimpleNamespace, tmp_path: Path) -> Fit:
    """Fit a network of `mine.py` on its data; return the Trainer, the weights, and how many iterations were visited."""

    def fit(
        name: str, trainer_class: type[pl.Trainer] = Trainer, ckpt_path: Path | None = None, **settings: Any
    ) -> tuple[pl.Trainer, Tensor, int]:
        torch.manual_seed(0)
        model, visits = getattr(mine, name)(), Visits()
        settings["callbacks"] = [*settings.get("callbacks", []), visits]
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        quiet |= {"accelerator": "cpu", "max_epochs": EPOCHS, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
        trainer = trainer_class(**quiet | settings)
        data = mine.Fashion(val_size=VAL_SIZE)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return trainer, nn.utils.parameters_to_vector(model.parameters()).detach().clone(), visits.count

    return fit


NETWORKS = pytest.mark.parametrize("name", ["MNISTClassifier", "CNN", "Squared"])


@NETWORKS
def test_another_data_set_network_and_loss_train_quietly_to_lightnings_bits(
    fit: Fit, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, call = [], FusedStep.__call__

    def count(step: FusedStep, batch: tuple[Tensor, Tensor]) -> Tensor | None:
        calls.append(batch)
        return call(step, batch)

    monkeypatch.setattr(FusedStep, "__call__", count)
    trainer, ours, visited = fit(name)
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert visited == 2 * EPOCHS  # the first and the last of each epoch
    # Of the last minibatch, which is smaller, there is none; another network or loss is not the fused step's.
    assert len(calls) == (trainer.global_step - visited if name == "MNISTClassifier" else 0)
    stock, theirs, visited = fit(name, pl.Trainer)
    assert visited == PER_EPOCH * EPOCHS
    assert torch.equal(ours, theirs)
    for metric, value in stock.callback_metrics.items():
        assert trainer.callback_metrics[metric] == value
    (metrics,) = trainer.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)  # type: ignore
    assert metrics["test/acc"] > 0.9


@NETWORKS
def test_they_are_resumed_in_mid_epoch_to_the_bit(fit: Fit, name: str, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    _, expected, _ = fit(name, callbacks=[save], enable_checkpointing=True)
    for step in (5, 15):
        _, found, _ = fit(name, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(found, expected)


@pytest.mark.figures
def test_their_figures_are_drawn(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    headings, draw = [], plots.digit_grid

    def note(images: Tensor, titles: list[str], heading: str) -> Figure:
        headings.append(heading)
        return draw(images, titles, heading)

    monkeypatch.setattr(plots, "digit_grid", note)
    trainer, _, _ = fit("CNN", callbacks=[Figures()], logger=CSVLogger(tmp_path, "", "run"))
    trainer.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == {
        "correct.png",
        "misclassified.png",
        "confusion_matrix.png",
    }
    assert len(headings) == 2
    assert all(heading.startswith("Fashion-MNIST\n") for heading in headings)
    out = capsys.readouterr().out
    assert "No figure weights.png: the first layer" in out
    assert "No figure attributions.png: no digit was misclassified" in out


Run = Callable[..., int]


@pytest.fixture
def run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `mine.py` in a directory; return its exit code."""

    def run(directory: str, command: str, *arguments: str) -> int:
        (tmp_path / directory).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / directory)
        monkeypatch.setattr(sys, "argv", [str(script), command, f"--data.root={tmp_path / 'data'}", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return int(ended.value.code or 0)

    return run


def test_the_script_trains_tests_and_resumes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [f"--data.val_size={VAL_SIZE}", "--trainer.log_every_n_steps=5", "--checkpoint_every=4"]
    assert run("whole", "fit", *small, "--trainer.max_epochs=3", "--model.channels=4") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Training on Fashion-MNIST: 1,050 images, 200 for validation; 5,874 parameters on cpu")
    whole = tmp_path / "whole" / "lightning_logs" / "version_0"
    assert (whole / "figures" / "misclassified.png").exists()
    assert '"dataset": "fashionmnist"' in (whole / "results.json").read_text()

    assert run("parts", "fit", *small, "--trainer.max_steps=15", "--model.channels=4", "--test_after_fit=false") == 0
    assert run("parts", "test", "--ckpt_path=best", f"--data.val_size={VAL_SIZE}") == 0
    longer = "--trainer.max_steps=-1", "--trainer.max_epochs=3", "--test_after_fit=true"
    assert run("parts", "fit", "--ckpt_path=last", *longer) == 0
    assert capsys.readouterr().err == ""
    parts = tmp_path / "parts" / "lightning_logs" / "version_0"
    assert_the_same(parts, whole)


def test_make_it_yours_is_short() -> None:
    assert len(block("class Fashion").splitlines()) < 40


@pytest.fixture
def yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with nothing but the engine in it."""
    shutil.copytree(PACKAGE / "engine", tmp_path / "yours" / "engine")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "yours"]:
        del sys.modules[name]


class YourModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.network(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("readme", [README, PACKAGE / "engine" / "README.md"], ids=["README", "engine"])
def test_the_engine_can_be_copied(yours: Path, readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(yours)
    loader = DataLoader(TensorDataset(torch.randn(12, 3)), 2)
    names: dict[str, Any] = {"YourModule": YourModule, "your_dataloader": loader}
    exec(block("from yours.engine", readme), names)
    assert type(names["trainer"]).__module__ == "yours.engine.loop"
    assert names["trainer"].global_step == 60


def test_training_step_is_quoted_exactly() -> None:
    quoted = block("def training_step(self, batch: Batch")
    assert f"\n{quoted}\n" in (PACKAGE / "classifier.py").read_text()
    assert dedent(quoted) != quoted


def test_the_readme_takes_ten_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 156


# Files that a run, a reader or another machine has, and this project does not.
ELSEWHERE = {"config.yaml", "results.json", "unfinished.json", "predictions.csv", "demo.html", "mine.py"}
ELSEWHERE |= {"best.ckpt", "last.ckpt", "weights.png", "attributions.png"}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_files_that_are_named_exist(readme: Path) -> None:
    text = readme.read_text()
    linked = re.findall(r"\]\((?!https:)([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert linked
    assert [name for name in linked if not (readme.parent / name).exists()] == []
    named = set(re.findall(r"(?<![\w/.*])(?:\.?\w[\w-]*/)*[\w-]+\.(?:py|yaml|md|toml|png|ckpt|json|csv|html)\b", text))
    places = [ROOT, PACKAGE, readme.parent]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert [name for name in missing if Path(name).name not in ELSEWHERE] == []


def test_the_engines_readme_says_where_everything_is() -> None:
    text = (PACKAGE / "engine" / "README.md").read_text()
    modules = {path.name for path in (PACKAGE / "engine").glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if f"[`{name}`]({name})" not in text] == []


COMMANDS = {
    command.split("#")[0].strip()
    for readme in READMES[1:]
    for command in re.findall(r"-m mnist_lightning (\w+[^`\n]*)", readme.read_text().replace("\\\n", ""))
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_other_readmes_commands_are_valid(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(ROOT)
    for variable, value in {'"$SLURM_NTASKS_PER_NODE"': "2", '"$SLURM_NNODES"': "1", '"$@"': ""}.items():
        command = command.replace(variable, value)
    assert run_cli(*command.split(), "--print_config", data=False) == 0
