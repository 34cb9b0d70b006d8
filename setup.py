"""Builds the extension ``vattn._core`` with CMake; everything else is in pyproject.toml."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                # The configuration starts afresh, because paths cached by an earlier build may no longer exist.
                *("cmake", "--fresh"),
                *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),  # e.g. to build for another processor
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--target", "_core"], check=True)


setup(ext_modules=[Extension("vattn._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
