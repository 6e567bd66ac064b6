"""What the report that this project began with asked for: a stream of edits that does not end in NaN."""

from __future__ import annotations

import pytest
import torch

from stabilitylab.editors.registry import make
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.lab import prepare


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["malmen", "mend+ball"])
def test_a_remedy_stays_finite_for_a_hundred_edits_where_mend_does_not(name: str, seed: int) -> None:
    bed = DigitsBed("fp16")
    canary = bed.canary()
    real = canary["attention_mask"].bool()

    def first_nonfinite(name: str) -> int | None:
        model = bed.load()
        editor = make(name, model, bed)
        prepare(editor, model, bed)
        for number, request in enumerate(bed.stream(seed, 100), 1):
            model = editor.edit(model, request)
            values = [model.get_submodule(site).weight for site in editor.sites]
            with torch.no_grad():
                values.append(model(**canary).logits[real])  # type: ignore[arg-type]
            if not all(bool(value.isfinite().all()) for value in values):  # type: ignore[union-attr]
                return number
        return None

    assert first_nonfinite(name) is None
    if name == "mend+ball":
        assert first_nonfinite("mend") is not None
