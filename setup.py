"""The one part that setup.cfg can't describe: reductions as native code, where there is a compiler."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("probes/native")
SOURCES, HEADERS = (sorted(NATIVE.glob(kind)) for kind in ("*.c", "*.h"))
# Known again by `stabilitylab.probes.native_scan`, which forms the same: what another source made is not used.
HASHED = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted([*SOURCES, *HEADERS])))
# Sums may be formed in any order, which vector instructions need; NaN and infinities keep their meaning.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]

setup(
    ext_modules=[
        Extension(
            "stabilitylab.probes._weight_scan",
            [str(path) for path in SOURCES],
            depends=[str(path) for path in HEADERS],
            define_macros=[("SOURCE", f'"{HASHED.hexdigest()}"')],
            extra_compile_args=[] if sys.platform == "win32" else FLAGS,
            py_limited_api=True,
            optional=True,  # without a compiler NumPy does the same
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
