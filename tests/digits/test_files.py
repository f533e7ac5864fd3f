"""Getting the files: damage, mirrors that misbehave, downloads that are killed or meet another."""

import errno
import gzip
import http.server
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Fork, prepare
from digits.test_idx import pack, rename
from torchvision.datasets import MNIST
from torchvision.datasets.utils import calculate_md5

from mnist_lightning.digits import disk, files
from mnist_lightning.digits.files import UnreachableError
from mnist_lightning.digits.idx import DataError

Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


@pytest.fixture
def gzipped(fake_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The four files gzipped, with their MD5 sums known as those of MNIST's."""
    contents = {f"{name}.gz": gzip.compress((fake_mnist / "MNIST/raw" / name).read_bytes()) for name in files.MNIST_MD5}
    for name, content in contents.items():
        (fake_mnist / name).write_bytes(content)
    monkeypatch.setattr(MNIST, "resources", [(name, calculate_md5(fake_mnist / name)) for name in contents])
    for name in contents:
        (fake_mnist / name).unlink()
    return contents


def good(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


def wrong_file(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    good(request, b"<html>Sign in to the hotel's network</html>")


def short(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    good(request, content[: len(content) // 2])


def missing(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_error(404)


def half(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])
    request.wfile.flush()


def reset(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    half(request, content)
    # Closing with a linger time of 0 sends a reset.
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    request.connection.close()


def stall(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    half(request, content)
    time.sleep(30)


@pytest.fixture
def serve(gzipped: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Make a mirror on this machine for each way of answering; return their addresses."""
    servers = []

    def start(*answers: Answer) -> list[str]:
        for answer in answers:

            class Handler(http.server.BaseHTTPRequestHandler):
                respond = staticmethod(answer)

                def do_GET(self) -> None:
                    self.respond(self, gzipped[self.path[1:]])

                def log_message(self, *arguments: Any) -> None:
                    """Say nothing."""

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.daemon_threads = True
            server.block_on_close = False
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.append(server)
        mirrors = [f"http://127.0.0.1:{server.server_port}/" for server in servers[-len(answers) :]]
        monkeypatch.setattr(MNIST, "mirrors", mirrors)
        return mirrors

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_without_network_auto_falls_back_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepare("auto", tmp_path)
    assert data.hparams["dataset"] == "synthetic"
    assert data.dataset_name == "synthetic digits (not MNIST)"
    assert len(data.test[1]) == SMALL["t10k"]
    warning = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "NOT MNIST" in warning
    assert "Connection refused" in warning
    assert "not MNIST results" in warning
    assert "--data.dataset mnist" in warning
    assert not list(tmp_path.rglob(".download*"))


def test_mnist_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="train-images-idx3-ubyte is missing, and the download failed"):
        prepare("mnist", tmp_path)
    assert not (tmp_path / "synthetic").exists()


@pytest.mark.parametrize("name", list(files.MNIST_MD5))
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_are_an_error_and_never_a_reason_to_fall_back(fake_mnist: Path, name: str, damage: str) -> None:
    path = fake_mnist / "MNIST" / "raw" / name
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError, match=f"{name} is (damaged|missing)") as raised:
        prepare("auto", fake_mnist)
    assert not isinstance(raised.value, UnreachableError)
    path.write_bytes(content)
    assert prepare("auto", fake_mnist).dataset_name == "MNIST"


def test_a_mirror_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MIRROR_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"] * 2)
        with pytest.raises(UnreachableError, match="timed out"):
            prepare("mnist", tmp_path)
    assert socket.getdefaulttimeout() is None


def test_a_whole_stand_in_is_only_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie where nothing can be written."""
    monkeypatch.setattr(files, "TemporaryDirectory", None)
    monkeypatch.setattr(disk, "locked", None)
    assert files.get("synthetic", root) == root / "synthetic" / "raw"


def test_damaged_synthetic_digits_are_made_again(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    labels = tmp_path / "synthetic/raw/t10k-labels-idx1-ubyte"
    expected = labels.read_bytes()
    labels.write_bytes(expected[:-1])
    prepare("synthetic", tmp_path)
    assert labels.read_bytes() == expected


def test_the_data_may_be_made_twice_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        for data in pool.map(prepare, ["synthetic"] * 3, [tmp_path] * 3):
            assert len(data.test[1]) == SMALL["t10k"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "html", "delete"])
def test_damaged_gzipped_files_are_named_and_replacing_them_mends_it(fake_mnist: Path, damage: str) -> None:
    raw = fake_mnist / "MNIST/raw"
    pack(raw)
    path = raw / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "delete":
        path.unlink()
    else:
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        path.write_bytes({"flip": flipped, "truncate": content[:half], "html": b"<html>404</html>"}[damage])
    named = "train-labels-idx1-ubyte is missing" if damage == "delete" else f"{path.name} is damaged"
    with pytest.raises(DataError, match=named):
        prepare("auto", fake_mnist)
    assert not list(raw.glob(".download*"))
    path.write_bytes(content)
    assert prepare("auto", fake_mnist).dataset_name == "MNIST"


def test_a_damaged_file_is_unpacked_again_from_its_own_gzipped_form(
    fake_mnist: Path, gzipped: dict[str, bytes]
) -> None:
    name = "t10k-labels-idx1-ubyte"
    path = fake_mnist / "MNIST/raw" / name
    expected = path.read_bytes()
    path.write_bytes(b"<html>")
    (fake_mnist / "MNIST/raw" / f"{name}.gz").write_bytes(gzipped[f"{name}.gz"])
    prepare("mnist", fake_mnist)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("answer", [wrong_file, short, missing, reset, stall])
def test_a_mirror_that_misbehaves_is_named_and_the_next_one_asked(
    tmp_path: Path, serve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(files, "MIRROR_TIMEOUT", 0.3)
    bad, _ = serve(answer, answer)
    with pytest.raises(UnreachableError, match=f"the download failed: {bad}train-images-idx3-ubyte.gz"):
        prepare("mnist", tmp_path / "alone")
    assert not list((tmp_path / "alone").rglob("*ubyte*"))
    serve(answer, good)
    assert prepare("mnist", tmp_path / "alone").dataset_name == "MNIST"


def get_mnist(root: Path, mirrors: list[str], resources: list[tuple[str, str]], md5: dict[str, str]) -> None:
    MNIST.mirrors, MNIST.resources, files.MNIST_MD5 = mirrors, resources, md5
    files.get("mnist", root)


def test_a_killed_download_is_never_taken_for_a_finished_one(
    tmp_path: Path, serve: Callable[..., list[str]], fork: Fork
) -> None:
    process = fork.Process(target=get_mnist, args=(tmp_path / "new", serve(stall), MNIST.resources, files.MNIST_MD5))
    process.start()
    raw = tmp_path / "new/MNIST/raw"
    while process.is_alive() and not any(path.stat().st_size for path in raw.glob(".download-*/*.gz")):
        time.sleep(0.05)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(raw.glob("*ubyte*"))
    serve(good)
    assert prepare("mnist", tmp_path / "new").dataset_name == "MNIST"


def test_of_two_processes_at_once_one_downloads(tmp_path: Path, serve: Callable[..., list[str]], fork: Fork) -> None:
    asked = []

    def slowly(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        asked.append(request.path)
        time.sleep(0.2)
        good(request, content)

    mirrors = serve(slowly)
    processes = [
        fork.Process(target=get_mnist, args=(tmp_path / "new", mirrors, MNIST.resources, files.MNIST_MD5))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(asked) == sorted(2 * [f"/{name}.gz" for name in files.MNIST_MD5])  # torchvision asks twice
    serve()
    assert prepare("mnist", tmp_path / "new").dataset_name == "MNIST"


def test_a_disk_that_fills_is_an_error_with_its_cause(
    tmp_path: Path, serve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(good)
    # The kernel refuses to let a file grow beyond the limit, with EFBIG for ENOSPC.
    monkeypatch.setattr(errno, "ENOSPC", errno.EFBIG)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        with pytest.raises(DataError, match="File too large; mend that"):
            prepare("mnist", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((tmp_path / "new").rglob("*ubyte*"))
    assert prepare("auto", tmp_path / "new").dataset_name == "MNIST"


def to_root(fake: Path) -> None:
    for path in (fake / "MNIST/raw").iterdir():
        path.rename(fake / path.name)


def rename_raw(fake: Path) -> None:
    rename(fake / "MNIST/raw")


@pytest.mark.parametrize("change", [lambda fake: None, to_root, rename_raw])
@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_mnist_is_found_in_any_layout(
    fake_mnist: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], dataset: str
) -> None:
    change(fake_mnist)
    monkeypatch.setattr(files, "_download", lambda *_: pytest.fail("downloads"))
    data = prepare(dataset, fake_mnist)
    assert (data.dataset_name, data.hparams["dataset"]) == ("MNIST", "mnist")
    assert "fingerprint" not in data.hparams


def test_mnist_packed_anew_is_mnist(fake_mnist: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(fake_mnist / "MNIST/raw", level=1)
    monkeypatch.setattr(files, "_download", lambda *_: pytest.fail("downloads"))
    for dataset in ("auto", "mnist"):
        data = prepare(dataset, fake_mnist)
        assert data.dataset_name == "MNIST"
        assert torch.equal(data.train[0], prepare("synthetic", root).train[0])
    assert not (fake_mnist / "MNIST/raw/train-images-idx3-ubyte").exists()  # it may lie where nothing can be written


@pytest.mark.parametrize("dataset", ["auto", "mnist", "files", "synthetic"])
@pytest.mark.parametrize("place", ["data", "data/MNIST", "data/MNIST/raw"])
def test_a_broken_link_or_a_file_in_the_way_is_named(tmp_path: Path, dataset: str, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if dataset == "synthetic":
        path = Path(str(path).replace("MNIST", "synthetic"))
        path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=f"^{path}: a link to {tmp_path}/gone, which does not exist; mend that or"):
        prepare(dataset, tmp_path / "data")
    path.unlink()
    path.write_text("")
    with pytest.raises(DataError, match=f"^{path}: a file, not a directory; mend that or"):
        prepare(dataset, tmp_path / "data")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("place", ["MNIST/raw", "."])
def test_somebodys_own_files_are_neither_overwritten_nor_taken_for_damaged(
    fake_mnist: Path, monkeypatch: pytest.MonkeyPatch, place: str, gzipped: bool
) -> None:
    if place == ".":
        to_root(fake_mnist)
    labels = fake_mnist / place / "train-labels-idx1-ubyte"
    images = fake_mnist / place / "train-images-idx3-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + bytes(SMALL["train"]))
    images.write_bytes(images.read_bytes()[:-1] + b"\x07")
    if gzipped:
        pack(fake_mnist / place)
    before = {path: path.read_bytes() for path in fake_mnist.rglob("*ubyte*")}
    monkeypatch.setattr(files, "_download", lambda *_: pytest.fail("downloads"))
    for dataset in ("auto", "mnist"):
        with pytest.raises(DataError, match=r"train-images.* holds images that are not MNIST's; .*dataset files"):
            prepare(dataset, fake_mnist)
    assert {path: path.read_bytes() for path in fake_mnist.rglob("*ubyte*")} == before
    assert prepare("files", fake_mnist).train[1].max() == 0


def test_a_file_that_a_download_replaces_is_set_aside(
    fake_mnist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fake_mnist / "MNIST/raw/t10k-labels-idx1-ubyte"
    good = path.read_bytes()

    def download(name: str, directory: str) -> str:
        Path(directory, name).write_bytes(good)
        return ""

    monkeypatch.setattr(files, "_download", download)
    for n, own in enumerate((b"my own", good[:-1] + b"\x03"), 1):
        path.write_bytes(own)
        prepare("mnist", fake_mnist)
        assert path.read_bytes() == good
        assert path.with_name(f"{path.name}.aside{n}").read_bytes() == own
        assert f"{path} was not MNIST's file, and is kept as {path.name}.aside{n}" in capsys.readouterr().err
