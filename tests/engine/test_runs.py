"""The directories of runs: their lock, and how `best`, `last` and the newest unfinished run are found."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mnist_lightning.engine.console import JobError
from mnist_lightning.engine.runs import CheckpointError, RunLock, find_checkpoint, find_unfinished

SETTINGS: dict[str, Any] = {"model": {"hidden_dim": 7}, "data": {"batch_size": 5}, "seed_everything": 3}


def make(run: Path, *checkpoints: str, settings: Any = SETTINGS, is_done: bool = False) -> Path:
    """A run's directory, as `fit` leaves it; its `config.yaml` may hold any bytes, or be missing."""
    (run / "checkpoints").mkdir(parents=True)
    if settings is not None:
        content = settings if isinstance(settings, bytes) else yaml.safe_dump(settings).encode()
        (run / "config.yaml").write_bytes(content)
    for name in checkpoints:
        (run / "checkpoints" / name).touch()
    if not is_done:
        (run / "unfinished").touch()
    return run


# The lock


def test_a_run_has_one_lock(tmp_path: Path) -> None:
    first, second = RunLock(), RunLock()
    first.acquire(tmp_path)
    first.acquire(tmp_path)  # once more, as a second fit does
    with pytest.raises(JobError, match=f"another process is training in {tmp_path}"):
        second.acquire(tmp_path)
    second.release(is_done=True)  # it has nothing to give back
    assert (tmp_path / "unfinished").exists()
    first.release(is_done=False)
    assert (tmp_path / "unfinished").exists()
    second.acquire(tmp_path)
    second.release(is_done=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_locks")
def test_where_a_file_system_has_no_locks_a_run_does_without(tmp_path: Path) -> None:
    run, lock = make(tmp_path / "version_0", "last.ckpt", is_done=True), RunLock()
    lock.acquire(run)
    assert find_unfinished(tmp_path, SETTINGS) == run / "checkpoints/last.ckpt"
    lock.release(is_done=True)
    assert find_unfinished(tmp_path, SETTINGS) is None


# Best and last


def test_no_checkpoint_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"there is no last.ckpt of any run in \S+ yet; train one with `fit`"):
        find_checkpoint("last", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint here/mine\.ckpt"):
        find_checkpoint("here/mine.ckpt", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.ckpt").touch()
    assert find_checkpoint("~/mine.ckpt", tmp_path / "nowhere") == tmp_path / "mine.ckpt"


# Unfinished

# How the newest run differs, and whether it is found all the same.
NEWEST: dict[str, tuple[str, dict[str, Any], bool]] = {
    "other trainer": ("last.ckpt", {"settings": SETTINGS | {"trainer": {}}}, True),
    **{
        f"other {name}": ("last.ckpt", {"settings": SETTINGS | {name: 4}}, False)
        for name in ("model", "data", "seed_everything", "optimizer", "lr_scheduler")
    },
    "done": ("last.ckpt", {"is_done": True}, False),
    "nothing saved": ("best.ckpt", {}, False),
    "no config": ("last.ckpt", {"settings": None}, False),
    **{f"config {text!r}": ("last.ckpt", {"settings": text}, False) for text in (b"", b"\0", b"[]", b"model: \xff")},
}


@pytest.mark.parametrize("case", NEWEST)
def test_the_newest_unfinished_run_with_the_same_settings(case: str, tmp_path: Path) -> None:
    make(tmp_path / "version_8", "last.ckpt")
    older = make(tmp_path / "version_9", "last.ckpt")
    checkpoint, others, is_found = NEWEST[case]
    newest = make(tmp_path / "version_10", checkpoint, **others)
    assert find_unfinished(tmp_path, SETTINGS) == (newest if is_found else older) / "checkpoints/last.ckpt"


def test_a_run_that_is_held_is_left_alone(tmp_path: Path) -> None:
    run, lock = make(tmp_path / "version_0", "last.ckpt"), RunLock()
    lock.acquire(run)
    assert find_unfinished(tmp_path, SETTINGS) is find_unfinished(tmp_path / "nowhere", SETTINGS) is None
    lock.release(is_done=False)
    assert find_unfinished(tmp_path, SETTINGS) == run / "checkpoints/last.ckpt"
    RunLock().acquire(run)  # looking did not take it
