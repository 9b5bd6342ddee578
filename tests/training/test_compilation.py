"""The cache of torch.compile: private to the user, and rebuilt if it is damaged."""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from pathlib import Path

import platformdirs
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastcifar.device import ExecutionPlan
from fastcifar.errors import print_warning
from fastcifar.training import compilation, fallback
from fastcifar.training.compilation import compile_function
from tests.faults import children


@pytest.mark.slow
@inductor_config.patch({"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False})  # which take longer to compile
def test_compiled_code_is_reused_from_the_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    monkeypatch.delenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, raising=False)
    assert compilation.enable_compile_cache() == tmp_path / "compiled"
    cache_hits = []
    for _ in range(2):
        torch._dynamo.reset()  # as in a new process
        counters.clear()
        compile_function(lambda x: torch.softmax(x * 3, 1))(torch.ones(5, 7))
        cache_hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert cache_hits == [0, 1]
    assert any((tmp_path / "compiled").rglob("*.so"))


# what is requested with TORCHINDUCTOR_CACHE_DIR -> the folder that is used, and why the requested one is not
COMPILE_CACHES = {
    "nothing": (lambda _: None, "user/compiled", None),
    "a private folder": (lambda tmp: tmp / "custom", "custom", None),
    "torch's default": (lambda _: Path(default_cache_dir()), "user/compiled", None),
    "below a file": (lambda tmp: tmp / "file" / "below", "temporary", "Not a directory"),
    "no file can be created": (lambda _: Path("/proc/self"), "temporary", "No such file or directory"),
    "of another user": (lambda tmp: make_folder(tmp, uid=65534), "temporary", "it belongs to another user"),
    "writable by all": (lambda tmp: make_folder(tmp, mode=0o777), "temporary", "other users can write to it"),
}


def make_folder(parent: Path, uid: int = -1, mode: int = 0o755) -> Path:
    folder = parent / "requested"
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, uid, -1)
    return folder


@pytest.mark.parametrize("name", COMPILE_CACHES)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create a folder of another user")
def test_fault34_compile_cache_is_private(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, expected, problem = COMPILE_CACHES[name]
    (tmp_path / "file").touch()
    (tmp_path / "user" / "compiled").mkdir(parents=True, mode=0o777)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "user"))
    monkeypatch.delenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, raising=False)
    if requested := request(tmp_path):
        monkeypatch.setenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, str(requested))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = compilation.enable_compile_cache()
    assert [f"={requested} is not used: {problem}" in str(warning.message) for warning in caught] == [True] * bool(
        problem
    )
    assert os.environ[compilation.INDUCTOR_CACHE_DIR_VARIABLE] == str(folder)
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o022) == (os.geteuid(), 0)
    if expected == "temporary":
        assert folder.name.startswith("fastcifar-compiled-")
        assert folder.parent == Path(tempfile.gettempdir())
    else:
        assert folder == tmp_path / expected
    if expected != "custom":
        assert folder.stat().st_mode & 0o777 == 0o700


def test_fault34_a_user_cache_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    monkeypatch.delenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(compilation.os, "geteuid", lambda: 12345)
    assert compilation.enable_compile_cache().name.startswith("fastcifar-compiled-")


def compile_in_process(output: Path, cache: Path) -> None:
    """Compile a function with the cache folder `cache`, and write stderr to `output`."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    os.environ[compilation.INDUCTOR_CACHE_DIR_VARIABLE] = str(cache)
    inductor_config.cpp_cache_precompile_headers = False
    inductor_config.cpp.vec_isa_ok = False  # otherwise torch first compiles tests of the instruction sets
    warnings.showwarning = print_warning
    compilation.configure_process(ExecutionPlan("cpu", "fp32", "tensor", True, False))
    function = compilation.compile_function(lambda x: x.cos() * 2 + 1)
    result = fallback.run_stage("compile", lambda: function(torch.ones(5, 7)), torch.device("cpu"))
    assert torch.equal(result, torch.ones(5, 7).cos() * 2 + 1)


@pytest.mark.slow
def test_fault34_a_damaged_entry_is_rebuilt_with_one_line(tmp_path: Path) -> None:
    cache, output = tmp_path / "cache", tmp_path / "stderr"

    def compile_in_new_process() -> list[str]:
        """Return the lines of stderr about the cache; there is no traceback."""
        output.unlink(missing_ok=True)
        assert children.wait_for_exit(children.start(compile_in_process, output, cache)) == 0
        errors = output.read_text()
        assert "Traceback" not in errors
        return [line for line in errors.splitlines() if "compile cache" in line]

    assert compile_in_new_process() == []
    for pattern, message in (("*.so", f"the compile cache {cache} is damaged"), ("fxgraph/*/*/*", "a damaged entry")):
        damaged = list(cache.rglob(pattern))
        for path in damaged:
            path.write_bytes(b"")
        assert damaged
        (line,) = compile_in_new_process()
        assert message in line


def test_fault34_other_failures_of_the_compiler_keep_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "entry").touch()
    monkeypatch.setenv(compilation.INDUCTOR_CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(compilation, "_cache_was_rebuilt", False)
    for error in (RuntimeError("x"), OSError(errno.ENOSPC, "No space left on device")):
        assert not compilation.rebuild_damaged_cache(error)
    assert (tmp_path / "entry").exists()
