import errno
import fcntl
import threading
import time
from pathlib import Path

import pytest

from mnist_lightning.digits import disk


def test_one_at_a_time_and_who_waits_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "WAIT_IN_SILENCE", 0.1)
    is_held = threading.Event()

    def hold() -> None:
        with disk.locked(tmp_path / "new"):
            is_held.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    is_held.wait()
    start = time.monotonic()
    with disk.locked(tmp_path / "new"):
        assert time.monotonic() - start > 0.4
    assert capsys.readouterr().err == f"waiting for another process, which holds {tmp_path}/new/.lock\n"
    with disk.locked(tmp_path / "new"):
        pass
    assert capsys.readouterr().err == ""
    other.join()


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.ENOLCK])
def test_where_a_file_system_has_no_locks_it_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(error, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with disk.locked(tmp_path):
        pass


def test_a_rename_that_is_refused_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, refused = Path.replace, iter(range(3))

    def replace(source: Path, target: Path) -> Path:
        if next(refused, None) is not None:
            raise PermissionError(errno.EACCES, "a virus scanner has it open")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    (tmp_path / "a").touch()
    disk.replace(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    refused = iter(range(1000))
    monkeypatch.setattr(disk, "RENAME_TIMEOUT", 0.3)
    with pytest.raises(PermissionError):
        disk.replace(tmp_path / "b", tmp_path / "a")
