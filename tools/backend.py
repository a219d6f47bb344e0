"""The PEP 517 backend: setuptools, and torch as a build requirement only where no torch with stable headers is there.

To build, heedful needs torch's headers and the name of one of its libraries, and on the stable ABI any torch >= 2.10 is
as good as another. pip builds in an isolated environment, but `sysconfig` still names the directories of the one that
is being installed into, so a torch there serves, and pip need not download and unpack a second one.
"""

import re
import site
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

MINIMUM_TORCH = (2, 10)  # the release that TORCH_TARGET_VERSION in CMakeLists.txt names


def torch_directory() -> Path | None:
    """The package directory of a torch whose stable headers are new enough; None where there is none."""
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    importable = PathFinder.find_spec("torch")
    candidates = [Path(importable.origin).parent] if importable and importable.origin else []
    candidates += [Path(directory) / "torch" for directory in directories]
    for candidate in candidates:
        header = candidate / "include/torch/headeronly/version.h"
        if (candidate / "lib/libtorch_cpu.so").exists() and header.exists():
            found = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
            if (int(found["MAJOR"]), int(found["MINOR"])) >= MINIMUM_TORCH:
                return candidate
    return None


def _torch_requirement() -> list[str]:
    return [] if torch_directory() else [f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
