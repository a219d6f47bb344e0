"""Builds libheedful*.so and heedful/_info with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: HEEDFUL_CUDA=auto|on|off, HEEDFUL_CUDA_ARCHS=80;90-real, CMAKE_BUILD_PARALLEL_LEVEL=n, CXX and CXXFLAGS.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

from backend import torch_directory  # noqa: E402


def tool(name: str) -> str:
    """The path of `cmake` or `ninja`: PyPI's, beside this Python or among the build requirements, else the system's."""
    places = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    if importlib.util.find_spec("cmake"):
        places.insert(0, importlib.import_module("cmake").CMAKE_BIN_DIR)
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(f"heedful: {name} not found; `pip install {name}`, or build with pip's build isolation")
    return found


class CMakeBuild(build_ext):
    """Runs CMake in build/cmake-<python>, which is kept, and installs the libraries into the package's directory."""

    def run(self) -> None:
        torch = torch_directory()
        if torch is None:
            raise SystemExit("heedful: no torch >= 2.10 with its headers found; `pip install torch` first")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        package = Path(self.get_ext_fullpath("heedful._info")).parent.resolve()
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "HEEDFUL_TORCH": torch,
            "HEEDFUL_CUDA": os.environ.get("HEEDFUL_CUDA", "auto"),
            "HEEDFUL_CUDA_ARCHS": os.environ.get("HEEDFUL_CUDA_ARCHS", "80;90-real"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = tool("cmake")
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        (package / "libheedful_cuda.so").unlink(missing_ok=True)  # of a build with nvcc, where this one has none
        subprocess.run([cmake, "--install", build, "--prefix", package], check=True)


setup(ext_modules=[Extension("heedful._info", sources=[])], cmdclass={"build_ext": CMakeBuild})
