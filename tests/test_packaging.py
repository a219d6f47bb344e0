"""The installed package: versions, what its libraries need, and the build backend's choice of torch."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import heedful
import heedful._info

PACKAGE = Path(heedful.__file__).parent
BACKEND = Path(__file__).parents[1] / "tools" / "backend.py"


def binutil(name: str, *arguments: object) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def dynamic_section(library: Path) -> dict[str, list[str]]:
    """Tag -> values of a library's dynamic section, as {"NEEDED": ["libc.so.6", ...]}."""
    found: dict[str, list[str]] = {}
    for tag, value in re.findall(r"\((\w+)\) .*\[(.*)\]", binutil("readelf", "-d", "-W", library)):
        found.setdefault(tag, []).append(value)
    return found


def test_one_version() -> None:
    assert heedful.__version__ == importlib.metadata.version("heedful") == heedful._info.build_info()["version"]


def test_operators_are_free_of_python_and_find_the_torch_that_is_loaded() -> None:
    section = dynamic_section(PACKAGE / "libheedful.so")
    assert "libtorch_cpu.so" in section["NEEDED"]
    others = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    assert [name for name in section["NEEDED"] if name not in others and not name.startswith("ld-linux")] == []
    assert "RPATH" not in section and "RUNPATH" not in section


def test_info_finds_the_operators_beside_it() -> None:
    section = dynamic_section(Path(heedful._info.__file__))
    assert "libheedful.so" in section["NEEDED"]
    assert section["RUNPATH"] == ["$ORIGIN"]


def test_only_the_stable_abi_is_used() -> None:
    symbols = binutil("nm", "-D", "-C", "--undefined-only", PACKAGE / "libheedful.so")
    assert "aoti_torch_" in symbols
    assert re.findall(r".*\b(?:at|c10|torch)::.*", symbols) == []


def test_numpy_is_not_needed() -> None:
    code = "import sys; sys.modules['numpy'] = None; import heedful; heedful._info.build_info()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd="/")


@pytest.fixture
def backend() -> ModuleType:
    if not BACKEND.exists():
        pytest.skip("tested from outside the source tree, which holds the backend")
    pytest.importorskip("setuptools.build_meta", reason="setuptools is not installed")
    spec = importlib.util.spec_from_file_location("backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(root: Path, version: str) -> Path:
    torch = root / "torch"
    header = torch / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    major, minor = version.split(".")
    header.write_text(f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n")
    library = torch / "lib/libtorch_cpu.so"
    library.parent.mkdir()
    library.touch()
    return torch


@pytest.mark.parametrize(("version", "usable"), [("2.9", False), ("2.10", True), ("2.15", True), ("3.0", True)])
def test_backend_asks_for_torch_where_none_is_usable(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, usable: bool
) -> None:
    torch = fake_torch(tmp_path, version)
    monkeypatch.setattr(backend.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: ["wheel"])
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_editable", lambda settings: [])
    assert backend.torch_directory() == (torch if usable else None)
    assert backend.get_requires_for_build_wheel() == ["wheel"] + ([] if usable else ["torch>=2.10"])
    assert backend.get_requires_for_build_editable() == ([] if usable else ["torch>=2.10"])
