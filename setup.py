"""Metadata is in pyproject.toml. Here: build the CUDA ops ahead of time where a compiler and torch are at hand.

Under pip's build isolation torch is absent, so nothing is built and the package builds at first use on a GPU instead;
`pip install --no-build-isolation .` puts the library into the wheel.
"""

import importlib.util
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithOps(build_py):
    def run(self) -> None:
        super().run()
        if shutil.which("nvcc") and importlib.util.find_spec("torch"):
            spec = importlib.util.spec_from_file_location("build_ops", "sglang_lora_moe/ops/build.py")
            builder = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(builder)
            builder.build_ahead_of_time(self.build_lib)


setup(cmdclass={"build_py": BuildWithOps}, packages=[*find_packages(include=["sglang_lora_moe*"]), "sglang_lora_moe.csrc"])
