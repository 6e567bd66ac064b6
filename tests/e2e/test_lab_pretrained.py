"""The lab on SmolLM2-135M, a really pretrained model: a short stream under ROME, from the command line's own pieces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import stabilitylab as sl
from stabilitylab.testbed import smollm2
from stabilitylab.testbed.causal import CausalBed
from stabilitylab.testbed.lab import run_lab

EDITS = 3


@pytest.mark.pretrained
def test_rome_writes_facts_into_the_real_model_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = smollm2.missing()
    if reason:
        pytest.skip(f"{reason}; run with: make test-pretrained")
    converted = CausalBed.smollm2()  # before the cache is another
    monkeypatch.setenv("STABILITYLAB_CACHE", str(tmp_path / "cache"))
    row = run_lab(converted, "rome", edits=EDITS, seed=0, run=tmp_path / "run", probes="deep")
    assert (row.failed, row.first_nonfinite_edit, row.verdict) == (0, None, "stable")
    assert row.efficacy is not None
    assert row.retention is not None
    assert row.locality is not None
    assert row.efficacy >= 2 / 3
    assert row.retention >= 2 / 3
    assert row.locality >= 2 / 3
    assert row.image_rephrase is None
    assert row.perplexity is not None
    assert row.perplexity_before is not None
    assert math.isclose(row.perplexity, row.perplexity_before, rel_tol=0.1)
    run = sl.load(row.run)
    (site,) = run.manifest["sites"]
    assert run.series("drift.ratio", site)[-1] == pytest.approx(row.drift_ratio)
    assert list((tmp_path / "cache" / "editors").glob("smollm2-*/rome.safetensors"))
