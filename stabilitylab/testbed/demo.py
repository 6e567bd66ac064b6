"""``stabilitylab demo``: MEND edits, one after the other and never restored, on a small real BLIP2-OPT, until NaN.

Nothing is injected: the loop is the five lines of the README, the model and the editor are the shipped ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from stabilitylab.editors.mend import Mend
from stabilitylab.errors import RunError, StabilityLabError
from stabilitylab.record.run import Run, load
from stabilitylab.reports.console import ProgressSink, diagnosis_page
from stabilitylab.reports.html import write_report
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.mend_data import shipped
from stabilitylab.watching.attaching import attach

EDITS_PAST_NAN = 5
"""How far the demo goes on after the first NaN, to show that it stays."""


def _make_room(out: Path) -> None:
    """Remove the run of an earlier demo; raises RunError when something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = load(out).manifest.get("config", {}).get("demo") is True
    except StabilityLabError:
        ours = False
    if not ours:
        raise RunError(f"'{out}' exists and is no demo run; expected a new folder or an earlier demo's, see --out")
    shutil.rmtree(out)


def run_demo(out: Path, edits: int, seed: int, precision: str, console: Console) -> Run:
    """Run the demo into the folder `out` and print what it found; returns the finished run.

    edits: the most edits to make; it stops five edits after the first non-finite value. seed: which stream of held-out
    edits. precision: the decoder's dtype, as in `blip2_digits.load`. Raises RunError when `out` holds anything but an
    earlier demo.
    """
    _make_room(out)
    torch.manual_seed(seed)
    model, tokenizer = blip2_digits.load(precision)
    mend = shipped(Mend, model)
    console.print(
        Text(f"MEND on BLIP2-OPT, decoder in {precision}: up to {edits} sequential edits, never restored (seed {seed})")
    )
    with attach(
        model,
        sites=mend.sites,
        run=out,
        scan=True,
        editor=mend,
        canary=blip2_digits.canary(tokenizer),
        tensorboard=True,
        sinks=[ProgressSink(total=edits, console=console)],
        announce=False,  # the bar says it
        budget=None,  # an edit takes some milliseconds: nobody waits for the rest
        config={"demo": True, "precision": precision, "seed": seed, "edits": edits},
    ) as monitor:
        for record in digits.edit_stream(seed, edits):
            with monitor.edit(label=f"{record.src} → {record.alt}") as edit:
                edit.returns(mend.edit(model, record))
            first = monitor.diagnosis().first_nonfinite_edit
            if first is not None and monitor.edits >= first + EDITS_PAST_NAN:
                break
    # As they were before the first edit: so that what `scan` says of them can be set beside what became of the run.
    unedited, tokenizer = blip2_digits.load(precision)
    unedited.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    archive = mend.save(out / "editor")
    run = load(out)
    page = write_report(run, out / "report.html")
    console.print(diagnosis_page(run))
    console.print(Text(f"report       {page}\nTensorBoard  tensorboard --logdir {out.parent}"), soft_wrap=True)
    console.print(Text(f"beforehand   stabilitylab scan {out / 'model'} --editor-state {archive}"), soft_wrap=True)
    return run
