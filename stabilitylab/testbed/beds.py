"""The testbeds by name."""

from __future__ import annotations

from pathlib import Path

from stabilitylab.editors.base import Progress, quiet
from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.testbed.bed import Testbed
from stabilitylab.testbed.causal import CausalBed
from stabilitylab.testbed.digits_bed import NAME as DIGITS
from stabilitylab.testbed.digits_bed import DigitsBed

SMOLLM2 = "smollm2"
NAMES = (DIGITS, SMOLLM2)


def open_bed(
    model: str,
    *,
    precision: str | None = None,
    data: Path | None = None,
    text: Path | None = None,
    progress: Progress = quiet,
) -> Testbed:
    """The testbed called `model`, or that of the causal language model in the folder `model`.

    Args:
        model: one of `NAMES`, or a folder that transformers loads.
        precision: ``fp16``, ``bf16`` or ``fp32``; by default fp16 for the digit model's decoder, else fp32.
        data: a file of edit records instead of the testbed's own.
        text: a text file for second moments instead of the one that comes with the package.
        progress: of a conversion that is made once.

    Raises:
        UsageError: no such testbed or folder, or one that can't be used; `text` for the digit model.
        RecordError: `data` does not have the layout that it should have.
    """
    if model == DIGITS:
        if text is not None:
            raise UsageError(f"{DIGITS} knows no running text; --text is for language models")
        return DigitsBed(precision or "fp16", data)
    if model == SMOLLM2:
        return CausalBed.smollm2(precision or "fp32", data=data, text=text, progress=progress)
    if Path(model).is_dir():
        return CausalBed.from_folder(Path(model), precision or "fp32", data=data, text=text)
    raise UsageError(
        f"no model {model!r}; expected {', '.join(NAMES)} or the folder of a causal language model"
        f"{did_you_mean(model, NAMES)}"
    )
