"""The READMEs: what "Make it yours" shows works, word for word; and what they quote and name is there."""

import re
import runpy
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VAL_SIZE, RunCLI, assert_the_same
from engine.test_loop import compare
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PACKAGE = ROOT / "mnist_lightning"
ENGINE = PACKAGE / "engine" / "README.md"
READMES = [README, ROOT / "configs" / "README.md", ENGINE]


def blocks(language: str, readme: Path = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE)


def block(words: str, readme: Path = README) -> str:
    """The fenced block of Python that has these words."""
    (found,) = (code for code in blocks("python", readme) if words in code)
    return found


# "Make it yours"


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


@pytest.mark.parametrize("name", ["MNISTClassifier", "CNN"])
def test_another_data_set_and_network_train_to_lightnings_bits(
    mine: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    run = compare(tmp_path, getattr(mine, name), lambda: mine.Fashion(val_size=VAL_SIZE), log_every_n_steps=50)
    assert run.with_hooks == [1, 11, 12, 22]  # the first and the last of each epoch
    (metrics,) = run.trainer.test(run.module, datamodule=mine.Fashion(val_size=VAL_SIZE), verbose=False)
    assert metrics["test/acc"] > 0.9


@pytest.fixture
def run(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `mine.py` in a directory; return its exit code."""

    def run(directory: str, command: str, *arguments: str) -> int:
        (tmp_path / directory).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / directory)
        monkeypatch.setattr(sys, "argv", [str(script), command, f"--data.root={tmp_path / 'data'}", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return int(ended.value.code or 0)

    return run


def test_the_script_trains_tests_and_resumes(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"--data.val_size={VAL_SIZE}", "--trainer.log_every_n_steps=5", "--checkpoint_every=4"]
    assert run("whole", "fit", *small, "--trainer.max_epochs=3", "--model.channels=4") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Training on FashionMNIST: 1,050 images, 200 for validation; 5,874 parameters on cpu")
    whole = tmp_path / "whole" / "lightning_logs" / "version_0"
    names = {"correct", "misclassified", "confusion_matrix", "training_curves"}
    assert {path.stem for path in (whole / "figures").iterdir()} >= names
    assert '"dataset": "FashionMNIST"' in (whole / "results.json").read_text()

    assert run("parts", "fit", *small, "--trainer.max_steps=15", "--model.channels=4", "--test_after_fit=false") == 0
    assert run("parts", "test", "--ckpt_path=best") == 0
    longer = "--trainer.max_steps=-1", "--trainer.max_epochs=3", "--test_after_fit=true"
    assert run("parts", "fit", "--ckpt_path=last", *longer) == 0
    assert capsys.readouterr().err == ""
    assert_the_same(tmp_path / "parts" / "lightning_logs" / "version_0", whole)


def test_the_engines_example_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = compile(block("BoringModel", ENGINE).replace("20_000", "1_500"), "exact.py", "exec")
    training_step = BoringModel.training_step

    def dies(module: BoringModel, batch: Any, batch_idx: int) -> Any:
        if module.global_step == 250:
            raise KeyError("dies in mid-epoch")
        return training_step(module, batch, batch_idx)

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "parts":
            monkeypatch.setattr(BoringModel, "training_step", dies)
            with pytest.raises(KeyError, match="dies in mid-epoch"):
                exec(example, {})
            monkeypatch.setattr(BoringModel, "training_step", training_step)
        exec(example, {})
    first, second = re.findall(r"^-?\d+\.\d+$", capsys.readouterr().out, re.MULTILINE)
    assert first == second


def test_the_engines_command_line_trains_on_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 40), ("test", 10)):
        for name, grey in (("dark", 0), ("light", 255)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 36), (grey, grey, 128)).save(folder / f"{number}.png")
    (tmp_path / "pictures.py").write_text(block("class Pictures", ENGINE))
    (config,) = (code for code in blocks("yaml", ENGINE) if "WandbLogger" in code)
    (tmp_path / "wandb.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    early = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/acc", "--trainer.callbacks.mode=max"]
    settings = ["--data.root=pictures", "--data.workers=0", "--model.classes=2"]
    for command, said in (
        (["fit", "--trainer.max_epochs=3", *early], "test accuracy: 100.0%"),
        (["test", "--ckpt_path=best"], "test accuracy: 100.0%"),
        (["predict", "--ckpt_path=best"], "Weights of iteration"),
        (["fit", "--config=wandb.yaml", "--print_config"], "sync_batchnorm: true"),
    ):
        monkeypatch.setattr(sys, "argv", ["pictures.py", *command, *settings])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("pictures.py", run_name="__main__")
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert said in out
        assert "No figures" not in out.replace("No figures of the network", "")
    assert {"project: pictures", "mode: max"} <= {line.strip() for line in out.splitlines()}
    run = tmp_path / "lightning_logs" / "version_0"
    assert {"correct.png", "confusion_matrix.png"} <= {path.name for path in (run / "figures").iterdir()}


# What they quote and name


def test_training_step_is_quoted_exactly() -> None:
    quoted = block("def training_step(self, batch: Batch")
    assert f"\n{quoted}\n" in (PACKAGE / "classifier.py").read_text()
    assert dedent(quoted) != quoted


# Files that a run, a reader or another machine has, and this project does not.
ELSEWHERE = {
    "config.yaml",
    "results.json",
    "predictions.csv",
    "demo.html",
    "mine.py",
    "exact.py",
    "pictures.py",
    "wandb.yaml",
}
ELSEWHERE |= {
    "best.ckpt",
    "last.ckpt",
    "digits.png",
    "training_curves.png",
    "network.png",
    "weights.png",
    "attributions.png",
}


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
    text = ENGINE.read_text()
    modules = {path.name for path in (PACKAGE / "engine").glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if f"[`{name}`]({name})" not in text] == []


COMMANDS = {
    command
    for readme in READMES
    for command in re.findall(r"-m mnist_lightning (\w+(?: [^\s`#]+)*)", readme.read_text().replace("\\\n", ""))
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_are_valid(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(ROOT)
    for variable, value in {'"$SLURM_NTASKS_PER_NODE"': "2", '"$SLURM_NNODES"': "1", '"$@"': ""}.items():
        command = command.replace(variable, value)
    # Settings only: there is no GPU to train on and no run whose checkpoint could be named.
    command = re.sub(r"--ckpt_path (best|last)", "", command)
    assert run_cli(*command.split(), "--print_config", data=False) == 0
