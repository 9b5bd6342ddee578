"""Tests of downloads from a local HTTP server: complete, resumed, with wrong contents and interrupted."""

import contextlib
import dataclasses
import hashlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data import cifar
from fastcifar.errors import DataError, DiskError

BODY = np.random.default_rng(0).bytes(1_000_000)
MD5 = hashlib.md5(BODY).hexdigest()


@dataclasses.dataclass
class Server:
    """Content, status and range support of the server, bytes sent before it disconnects, and requested ranges."""

    url: str = ""
    body: bytes = BODY
    status: int = 200
    resumes: bool = True
    max_sent_bytes: int | None = None
    requested_ranges: list[str | None] = dataclasses.field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested = self.headers.get("Range")
            state.requested_ranges.append(requested)
            start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and state.resumes else 0
            if start and start >= len(state.body):
                self.send_error(416)
                return
            self.send_response(206 if start else state.status)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
            self.send_header("Content-Length", str(len(state.body) - start))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(state.body[start:][: state.max_sent_bytes])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{http_server.server_address[1]}/set.tar.gz"
        yield state
        http_server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "set.tar.gz"


def list_files(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_full_download(server: Server, target: Path, capfd):
    assert cifar.download_file(server.url, MD5, target) == target
    assert target.read_bytes() == BODY
    assert list_files(target) == ["set.tar.gz"]
    assert server.requested_ranges == [None]
    assert capfd.readouterr() == ("", "")  # the progress bar is shown on terminals only
    cifar.download_file(server.url, MD5, target)
    assert len(server.requested_ranges) == 1


def test_a_partial_file_is_resumed(server: Server, target: Path):
    target.parent.mkdir()
    part = target.with_name("set.tar.gz.part")
    part.write_bytes(BODY[:400_000])
    cifar.download_file(server.url, MD5, target)
    assert target.read_bytes() == BODY
    assert server.requested_ranges == ["bytes=400000-"]


def test_without_support_of_ranges_the_download_starts_again(server: Server, target: Path):
    server.resumes = False
    target.parent.mkdir()
    target.with_name("set.tar.gz.part").write_bytes(BODY[:400_000])
    cifar.download_file(server.url, MD5, target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * 1_000_000, b"x" * 2_000_000, BODY])
def test_a_partial_file_with_other_contents_is_replaced(server: Server, target: Path, stale: bytes):
    target.parent.mkdir()
    target.with_name("set.tar.gz.part").write_bytes(stale)
    cifar.download_file(server.url, MD5, target)
    assert target.read_bytes() == BODY
    assert len(server.requested_ranges) == (1 if stale is BODY else 2)
    assert list_files(target) == ["set.tar.gz"]


def test_an_interrupted_download_is_resumed_by_the_next_call(server: Server, target: Path):
    server.max_sent_bytes = 300_000
    with pytest.raises(DataError, match=r"connection closed after 300,000 of 1,000,000 bytes; run again to resume"):
        cifar.download_file(server.url, MD5, target)
    assert list_files(target) == ["set.tar.gz.part"]
    server.max_sent_bytes = None
    cifar.download_file(server.url, MD5, target)
    assert target.read_bytes() == BODY
    assert server.requested_ranges == [None, "bytes=300000-"]


@pytest.mark.parametrize(("body", "kind"), [(b"z" * 5000, "5,000 bytes"), (b"<!DOCTYPE html>login", "an HTML page")])
def test_fault11_a_wrong_md5_is_refused_and_deleted(server: Server, target: Path, body: bytes, kind: str):
    server.body = body
    with pytest.raises(DataError, match=rf"set.tar.gz sent {kind} with MD5 \w+, expected MD5 {MD5}; deleted"):
        cifar.download_file(server.url, MD5, target)
    assert list_files(target) == []


def test_errors_of_the_server_and_of_the_network(server: Server, target: Path, monkeypatch):
    server.status = 404
    with pytest.raises(DataError, match=r"HTTP error 404 Not Found; give --data PATH, set FASTCIFAR_DATA") as caught:
        cifar.download_file(server.url, MD5, target)
    assert caught.value.exit_code == 3
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        unreachable = f"http://127.0.0.1:{closed.getsockname()[1]}/set.tar.gz"
        with pytest.raises(DataError, match=r"cannot download .*set.tar.gz: .*--data synthetic") as caught:
            cifar.download_file(unreachable, MD5, target)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot download"):
        cifar.download_file("http://no-such-host.invalid/set.tar.gz", MD5, target)
    monkeypatch.setattr(cifar, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DataError, match="timed out"):
        cifar.download_file(f"http://127.0.0.1:{silent.getsockname()[1]}/set.tar.gz", MD5, target)
    assert list_files(target) == []


def test_a_download_that_is_too_large_is_aborted(server: Server, target: Path, monkeypatch):
    monkeypatch.setattr(cifar, "_MAX_BYTES", 500_000)
    with pytest.raises(DataError, match="sent more than 500,000 bytes"):
        cifar.download_file(server.url, MD5, target)


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"cannot write .*set.tar.gz.part"):
        cifar.download_file(server.url, MD5, tmp_path / "file" / "set.tar.gz")
    assert server.requested_ranges == []


def test_concurrent_calls_download_once(server: Server, target: Path):
    threads = [threading.Thread(target=cifar.download_file, args=(server.url, MD5, target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == BODY
    assert len(server.requested_ranges) == 1


def test_load_downloads_verifies_and_caches(server: Server, tiny_cifar, tmp_path: Path, monkeypatch, pack: Callable):
    server.body = pack(tiny_cifar.python, tmp_path / "archive.tar.gz").read_bytes()
    spec = dataclasses.replace(tiny_cifar.spec, url=server.url, archive_md5=hashlib.md5(server.body).hexdigest())
    monkeypatch.setitem(cifar.DATASETS, "cifar10", spec)
    for _ in range(2):
        loaded = cifar.load_dataset(cache_dir=tmp_path / "cache")
        assert loaded.is_official
        assert loaded.source == str(tmp_path / "cache" / "cifar-10-python.tar.gz")
    assert len(server.requested_ranges) == 1


def test_the_progress_bar_on_a_terminal(server: Server, target: Path, monkeypatch):
    advances: list[float] = []
    monkeypatch.setattr(cifar.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(cifar.Progress, "advance", lambda bar, task, count: advances.append(count))
    cifar.download_file(server.url, MD5, target)
    assert sum(advances) == len(BODY)
