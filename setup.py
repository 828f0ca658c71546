"""Metadata is in pyproject.toml. Here: put the CUDA operators into a wheel where torch and a compiler are at hand.

Under pip's build isolation torch is absent, so nothing is compiled and the package compiles at first use on a GPU instead;
`pip wheel --no-build-isolation .` compiles now.
"""

import importlib.util
import sysconfig

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location("build_operators", "sglang_lora_moe/ops/build.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
try:
    HAS_COMPILER = bool(builder.torch_folder() and builder.find_nvcc() and builder.find_cxx())
except builder.BuildError:
    HAS_COMPILER = False


class BuildWithOperators(build_py):
    def run(self) -> None:
        super().run()
        if HAS_COMPILER and not self.editable_mode:
            builder.build_ahead_of_time(self.build_lib)


options = {"bdist_wheel": {"plat_name": sysconfig.get_platform()}} if HAS_COMPILER else {}
setup(cmdclass={"build_py": BuildWithOperators}, options=options, packages=[*find_packages(include=["sglang_lora_moe*"]), "sglang_lora_moe.csrc"])
