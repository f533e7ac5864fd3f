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


@pytest.mark.usefixtures("no_locks")
def test_where_a_file_system_has_no_locks_it_goes_on_without(tmp_path: Path) -> None:
    with disk.locked(tmp_path):
        pass
