"""How a command ends: one line or Python's traceback, the exit code, and a process that is left as it was."""

import io
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import process_state
import pytest
import torch
from conftest import SHORT, VAL_SIZE, RunCLI
from PIL import Image

from mnist_lightning.engine.console import JobError, Stopped, UsageError, command_line, run_command
from mnist_lightning.engine.runs import CheckpointError


@pytest.fixture
def run_raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run a command that raises an error."""

    def run(error: BaseException) -> int:
        def train() -> None:
            raise error

        monkeypatch.setattr(sys, "argv", ["program", "fit"])
        return run_command(train, {}, "")

    return run


interrupted = SystemExit(1)  # Lightning's answer to Ctrl-C
interrupted.__context__ = KeyboardInterrupt()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SystemExit(0), 0, ""),
        (SystemExit(3), 3, ""),
        (UsageError("data.root: x\n  is\twrong"), 2, "data.root: x is wrong"),
        (JobError("a\x1b[31mb"), 1, "a?[31mb"),
        (CheckpointError(""), 1, "CheckpointError"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "[Errno 2] No such file: 'a.txt'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (interrupted, 130, "interrupted"),
        (Stopped(signal.SIGTERM, "saved"), 143, ""),
    ],
    ids=repr,
)
def test_exit_codes(
    run_raising: Callable[..., int], capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert run_raising(error) == code
    out, err = capsys.readouterr()
    assert err == (f"mnist_lightning: {line}\n" if line else "")
    assert out == ("saved\n" if code == 143 else "")


@pytest.mark.parametrize("error", [OSError("of no file"), ValueError("x"), NameError("x"), AssertionError()], ids=repr)
def test_a_bug_leaves_as_it_is(run_raising: Callable[..., int], error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        run_raising(error)
    assert raised.value is error


MINE = """
import lightning.pytorch as pl
import torch
from mnist_lightning import MNISTClassifier, MNISTDataModule

class Model(MNISTClassifier):
    def __init__(self, **settings):
        super().__init__(**settings)
        {init}
    def training_step(self, batch, batch_idx):
        {training_step}
    def configure_optimizers(self):
        {configure_optimizers}
        return super().configure_optimizers()

class Data(MNISTDataModule):
    def setup(self, stage):
        super().setup(stage)
        {setup}

class Callback(pl.Callback):
    def __init__(self):
        {callback}
"""
BUGS = {
    "init": "raise ValueError('mine')  # bug",
    "training_step": "probabilites.mean()  # bug",
    "configure_optimizers": "torch.optim.SGD(self.parameters(), lr=-1)  # bug, found by PyTorch",
    "setup": "raise ValueError('mine')  # bug",
    "callback": "len(None)  # bug",
}


@pytest.mark.parametrize("place", BUGS)
def test_a_users_bug_keeps_its_place(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE.format_map(dict.fromkeys(BUGS, "pass") | {place: BUGS[place]}))
    mine = runpy.run_path(str(path))
    monkeypatch.syspath_prepend(tmp_path)
    callback = ["--trainer.callbacks=mine.Callback"] if place == "callback" else []
    with pytest.raises((ValueError, NameError, TypeError)) as raised:
        run_cli("fit", *SHORT, *callback, classes=(mine["Model"], mine["Data"]))
    trace = "".join(traceback.format_exception(raised.value))
    assert "mine.py" in trace
    assert BUGS[place] in trace


# What a command leaves of its process


def in_a_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("where", ["main thread", "thread", "notebook"])
def test_commands_leave_the_process_as_it_was(run_cli: RunCLI, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if where == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as `import lightning` sets it
    torch.set_num_threads(2)
    argv, codes = sys.argv, []

    def call() -> None:
        codes.append(run_cli("fit", *SHORT, "--threads=3"))
        codes.append(run_cli("test", "--ckpt_path=last"))
        codes.append(run_cli("fit", "--model.hidden_dim=many"))
        codes.append(run_cli("fit", *SHORT, "--model.learning_rate=1e38"))
        monkeypatch.setattr(sys, "argv", argv)

    states = [process_state.state()]
    for _ in range(2):
        in_a_thread(call) if where == "thread" else call()
        states.append(process_state.state())
    assert codes == [0, 0, 2, 1] * 2
    changed = process_state.changes(*states[:2])
    # The first time, Pillow and others register what they can do.
    assert [name for name in changed if name.partition(".")[0] not in process_state.LIBRARIES] == []
    assert "PIL.Image.MAX_IMAGE_PIXELS" not in changed
    assert process_state.changes(*states[1:]) == []


# Lines


@pytest.mark.parametrize("kind", ["none", "closed"])
def test_without_a_console_every_command_runs(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As with `pythonw`, as a service, or after `>&-`."""
    closed = io.StringIO()
    closed.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, closed if kind == "closed" else None)
    assert run_cli("fit", *SHORT) == 0
    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    for command in (["validate"], ["test"], ["predict"], ["export", "--format=safetensors"]):
        assert run_cli(*command, "--ckpt_path=last") == 0, command
    for command in (["data"], ["read", "digit.png"], ["demo"]):
        assert run_cli(*command, data=command == ["data"]) == 0, command
    assert run_cli("fit", "--help", data=False) == 0
    assert run_cli("fti", data=False) == 2


@pytest.mark.parametrize(
    ("script", "platform", "line"),
    [
        ("/lib/mnist_lightning/__main__.py", "linux", "python -m mnist_lightning fit 'a b'"),
        ("/home/me/.local/bin/mnist_lightning", "linux", "mnist_lightning fit 'a b'"),
        ("mine.py", "linux", "python mine.py fit 'a b'"),
        ("C:/tools/mnist_lightning.exe", "win32", 'mnist_lightning fit "a b"'),
        ("C:/lib/mnist_lightning/__main__.py", "win32", 'python -m mnist_lightning fit "a b"'),
    ],
)
def test_a_command_is_said_as_it_was_started(
    monkeypatch: pytest.MonkeyPatch, script: str, platform: str, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "fit"])
    monkeypatch.setattr(sys, "platform", platform)
    assert command_line("fit", "a b") == line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["data"], ["fit", "--help"]], ids=["data", "help"])
def test_the_reader_of_the_output_may_leave(root: Path, tmp_path: Path, arguments: list[str]) -> None:
    small = ["--data.dataset=synthetic", f"--data.root={root}", f"--data.val_size={VAL_SIZE}"]
    command = [sys.executable, "-m", "mnist_lightning", *arguments, *([] if "--help" in arguments else small)]
    pipe = ["bash", "-c", f"{shlex.join(command)} | head -1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(pipe, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(("ends", "code"), [("return 3", 3), ("raise OSError('a bug')", 1)])
def test_a_program_exits_early_after_its_exit_functions(ends: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import atexit\n"
        "from mnist_lightning.engine.console import exit_early\n"
        "class Freed:\n"
        "    def __del__(self): print('freed')\n"
        "def main():\n"
        "    atexit.register(print, 'an exit function', end='')\n"
        "    globals()['kept'] = Freed()\n"
        f"    {ends}\n"
        "exit_early(main)\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "an exit function")
    assert ("OSError: a bug" in done.stderr) is (code == 1)
