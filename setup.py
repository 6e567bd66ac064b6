"""The one part that setup.cfg can't describe: a weight's one sweep as native code, where there is a compiler."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("probes/native/weight_scan.c")
# Sums may be formed in any order, which vector instructions need; NaN and infinities keep their meaning.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]

setup(
    ext_modules=[
        Extension(
            "stabilitylab.probes._weight_scan",
            [str(SOURCE)],
            define_macros=[("SOURCE", f'"{hashlib.sha256(SOURCE.read_bytes()).hexdigest()}"')],
            extra_compile_args=[] if sys.platform == "win32" else FLAGS,
            py_limited_api=True,
            optional=True,  # without a compiler NumPy does the same
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
