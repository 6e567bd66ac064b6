"""What several oracle tests share."""

from __future__ import annotations

import pytest

from stabilitylab.probes import native_scan
from stabilitylab.probes.native_scan import weight_pass


@pytest.fixture(params=["native", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to sweep a weight on a CPU."""
    if request.param == "numpy":
        monkeypatch.setattr(native_scan, "_BUILT", None)
    elif weight_pass() == "numpy":
        pytest.skip("no native code here: it needs a C compiler and `make`, which builds it")
    assert weight_pass() == request.param
    return str(request.param)
