"""One stream of edits under one editor, watched, and scored against what the unedited model answered."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.attaching import attach
from stabilitylab.editors.base import Editor, Prepared, Progress, quiet
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.registry import make
from stabilitylab.errors import StabilityLabError
from stabilitylab.probes.base import Tier
from stabilitylab.reports.sinks import Sink
from stabilitylab.run import Run, load
from stabilitylab.testbed.bed import SCORES, Testbed
from stabilitylab.testbed.cache import cache_folder

PREPARE_SEED = 0
"""Of what an editor learns before its first edit; the streams' seeds don't reach it."""


@dataclass(frozen=True)
class Row:
    """What became of one run; shares are from 0 to 1. None: not asked, not measured, or never.

    efficacy, rephrase, image_rephrase: share of the edits that the model answered as wanted right after their own edit.
    locality: share of the unrelated questions of all edits (texts and images alike) that the model answers, after the
    last edit, as the unedited model did. retention: share of all edits that it then answers as wanted. drift_ratio: the
    greatest ‖W − W₀‖_F / ‖W₀‖_F of an edited weight after the last edit. edits_per_s: by the time inside the editor,
    with the probes' hooks, without the evaluation. perplexity: of a fixed text after the last edit, and
    perplexity_before of the unedited model. failed: edits at which the editor raised an error; they count as wrong.
    """

    editor: str
    seed: int
    edits: int
    verdict: str
    onset_edit: int | None
    first_nonfinite_edit: int | None
    efficacy: float | None
    rephrase: float | None
    image_rephrase: float | None
    locality: float | None
    retention: float | None
    drift_ratio: float | None
    edits_per_s: float | None
    model: str
    perplexity: float | None
    perplexity_before: float | None
    failed: int
    run: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: a number that is NaN or infinite is null."""
        return {name: _finite(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


def run_lab(
    bed: Testbed,
    editor: str,
    *,
    edits: int,
    seed: int,
    run: Path,
    probes: Tier = "default",
    tensorboard: bool = False,
    sinks: Sequence[Sink] = (),
    progress: Progress = quiet,
) -> Row:
    """Make `edits` edits of the stream `seed` with the editor called `editor`, never restored, into the folder `run`.

    An editor's error at an edit is recorded there and counted, and the stream goes on.

    Args:
        bed: the model and its requests.
        editor: a name such as ``mend+ball``, see `stabilitylab.editors.registry`.
        edits: how many.
        seed: which stream.
        run: the run's new folder.
        probes: the tier that watches.
        tensorboard: whether to write events too.
        sinks: further receivers of each row.
        progress: of what the editor must learn before its first edit.

    Raises:
        UsageError: no such editor, or not that many requests.
        SiteError: the model lacks a layer that the editor needs.
        RunError: `run` exists.
    """
    model = bed.load()
    requests = bed.stream(seed, edits)
    chosen = make(editor, model, bed)
    prepare(chosen, model, bed, progress)
    originals = bed.originals(model, requests)
    perplexity_before = bed.perplexity(model)
    torch.manual_seed(seed)
    at_edit: list[Tensor] = []
    seconds, failed = 0.0, 0
    with attach(
        model,
        sites=chosen.sites,
        run=run,
        editor=chosen,
        canary=bed.canary(),
        probes=probes,
        tensorboard=tensorboard,
        sinks=sinks,
        config={"lab": True, **bed.describe(), "editor": editor, "seed": seed, "edits": edits},
    ) as monitor:
        for place, request in enumerate(requests):
            start = time.perf_counter()
            try:
                with monitor.edit(label=bed.label(request)) as edit:
                    start = time.perf_counter()
                    edited = chosen.edit(model, request)
                    seconds += time.perf_counter() - start
                    model = edit.returns(edited)
            except StabilityLabError:
                raise
            except (ArithmeticError, RuntimeError, ValueError):  # such as a solve of NaN: a method's own end
                seconds += time.perf_counter() - start
                failed += 1
            at_edit.append(originals.outcomes(model, [place])[0])
    at_end = originals.outcomes(model, range(edits))
    after = {"perplexity": bed.perplexity(model), "perplexity_before": perplexity_before}
    stored = load(run)
    diagnosis = stored.diagnosis()
    score = {name: _share(column) for name, column in zip(SCORES, _columns(at_edit), strict=True)}
    kept = at_end[:, [SCORES.index("text_locality"), SCORES.index("image_locality")]]
    return Row(
        editor=editor,
        seed=seed,
        edits=edits,
        verdict=diagnosis.verdict,
        onset_edit=diagnosis.onset_edit,
        first_nonfinite_edit=diagnosis.first_nonfinite_edit,
        efficacy=score["efficacy"],
        rephrase=score["rephrase"],
        image_rephrase=score["image_rephrase"],
        locality=_share(kept),
        retention=_share(at_end[:, SCORES.index("efficacy")]),
        drift_ratio=drift_ratio(stored),
        edits_per_s=edits / seconds if seconds > 0 else None,
        model=bed.name,
        failed=failed,
        run=str(run),
        **after,
    )


def prepare(editor: Editor, model: nn.Module, bed: Testbed, progress: Progress = quiet) -> Path | None:
    """Give an editor what it must know: the state that ships with the testbed, one in the cache, or learn it now.

    What is learned is kept in the user's cache, under a name made of the testbed and the very weights to be edited.

    Returns:
        The file of the state; None for an editor that needs none.
    """
    if not isinstance(editor, Prepared):
        return None
    for folder in (bed.shipped, _state_folder(editor, model, bed)):
        if folder is not None and (folder / editor.file).is_file():
            editor.restore(folder)
            return folder / editor.file
    editor.prepare(model, bed, seed=PREPARE_SEED, progress=progress)
    return editor.save(_state_folder(editor, model, bed))


def _state_folder(editor: Editor, model: nn.Module, bed: Testbed) -> Path:
    digest = hashlib.sha256(json.dumps(bed.describe(), sort_keys=True).encode())
    for layer in edited_layers(model, editor.sites):
        weight = layer.parameter.detach().cpu().contiguous()
        digest.update(f"{layer.name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.uint8).numpy().tobytes())
    name = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in Path(bed.name).name)
    return cache_folder() / "editors" / f"{name}-{digest.hexdigest()[:16]}"


def drift_ratio(run: Run) -> float | None:
    """The greatest ``drift.ratio`` of any site when it was last read; NaN when one is, None where none was measured."""
    read = [(run.series("drift.ratio", site), run.present("drift.ratio", site)) for site in run.sites_of("drift.ratio")]
    last = [float(series[present][-1]) for series, present in read]
    if not last:
        return None
    return float("nan") if any(math.isnan(value) for value in last) else max(last)


def _columns(outcomes: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.stack(list(outcomes)).T) if outcomes else [torch.zeros(0)] * len(SCORES)


def _share(outcomes: Tensor) -> float | None:
    """The mean of what was asked."""
    asked = outcomes[~outcomes.isnan()]
    return float(asked.mean()) if asked.numel() else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
