"""One stream of edits under one editor, watched, and scored against what the unedited model answered."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Editor, Prepared, Progress, quiet
from stabilitylab.editors.registry import make
from stabilitylab.errors import EditError, RunError, StabilityLabError, UsageError
from stabilitylab.probes.base import Tier
from stabilitylab.record.run import load
from stabilitylab.reports.sinks import Sink
from stabilitylab.testbed.bed import SCORES, Testbed
from stabilitylab.testbed.cache import VARIABLE, cache_folder
from stabilitylab.watching.attaching import attach
from stabilitylab.watching.sites import Site, find_sites, locate

PREPARE_SEED = 0
"""Of what an editor learns before its first edit; the streams' seeds don't reach it."""
STATE_VERSION = 1
"""Goes up when an editor learns in another way, so that no older state in a cache is taken for its own."""


@dataclass(frozen=True)
class Row:
    """What became of one run; shares are from 0 to 1. None: not asked, not measured, or never.

    efficacy, rephrase, image_rephrase: share of the edits that the model answered as wanted right after their own edit.
    locality: share of the unrelated questions of all edits (texts and images alike) that the model answers, after the
    last edit, as the unedited model did. retention: share of all edits that it then answers as wanted. drift_ratio: the
    greatest ‖W − W₀‖_F / ‖W₀‖_F of an edited weight after the last edit, from the lab's own copies. edits_per_s: by the
    time inside the editor, with the probes' hooks, without the evaluation. perplexity: of a fixed text after the last
    edit, and perplexity_before of the unedited model. failed: edits at which the editor raised an error; they count as
    wrong, whatever the model answers. error: what the first of them said.
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
    error: str | None
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
        EditError: the editor raised an error at every single edit.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RunError(f"run folder '{run}' exists; expected a new one")  # before minutes are spent on learning
    model = bed.load()
    requests = bed.stream(seed, edits)
    chosen = make(editor, model, bed)
    prepare(chosen, model, bed, progress)
    originals = bed.originals(model, requests)
    perplexity_before = bed.perplexity(model)
    torch.manual_seed(seed)
    sites = find_sites(model, chosen.sites)
    unedited = _weights(model, sites)
    at_edit: list[Tensor] = []
    errors: dict[int, str] = {}
    seconds = 0.0
    with attach(
        model,
        sites=chosen.sites,
        run=run,
        editor=chosen,
        canary=bed.canary(),
        probes=probes,
        tensorboard=tensorboard,
        sinks=sinks,
        announce=False,
        budget=None,  # whoever compares editors wants all readings of each edit
        config={"lab": True, **bed.describe(), "editor": editor, "seed": seed, "edits": edits},
    ) as monitor:
        for place, request in enumerate(requests):
            try:
                with monitor.edit(label=bed.label(request)) as edit:
                    start = time.perf_counter()
                    try:
                        edited = chosen.edit(model, request)
                    finally:
                        seconds += time.perf_counter() - start
                    model = edit.returns(edited)
            except (ArithmeticError, RuntimeError, ValueError, StabilityLabError) as error:
                errors[place] = f"{type(error).__name__}: {error}"  # such as a solve of NaN: a method's own end
            at_edit.append(_without(originals.outcomes(model, [place]), [0] if place in errors else [])[0])
    first_error = next(iter(errors.values()), None)
    if len(errors) == edits:
        raise EditError(f"{editor} failed at each of {edits} edits; the first: {first_error}")
    at_end = _without(originals.outcomes(model, range(edits)), list(errors))
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
        drift_ratio=drift_ratio(unedited, _weights(model, sites)),
        edits_per_s=edits / seconds if seconds > 0 else None,
        model=bed.name,
        failed=len(errors),
        error=first_error,
        run=str(run),
        **after,
    )


def prepare(editor: Editor, model: nn.Module, bed: Testbed, progress: Progress = quiet) -> Path | None:
    """Give an editor what it must know: the state that ships with the testbed, one in the cache, or learn it now.

    What is learned is kept in the user's cache, under a name made of all that it hangs on: the model's weights, what
    the testbed has to learn from, and the editor's settings.

    Returns:
        The file of the state; None for an editor that needs none.

    Raises:
        UsageError: the state that ships with the testbed is not for this model, or the cache can't be written.
    """
    if not isinstance(editor, Prepared):
        return None
    if bed.shipped is not None and (bed.shipped / editor.file).is_file():
        editor.restore(bed.shipped)
        return bed.shipped / editor.file
    folder = _state_folder(editor, model, bed)
    if (folder / editor.file).is_file():
        with suppress(UsageError):  # damaged: it can be learned again
            editor.restore(folder)
            return folder / editor.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"can't keep what {editor.file} will hold in {folder} ({error.strerror}); set {VARIABLE} to another folder"
        ) from None
    editor.prepare(model, bed, seed=PREPARE_SEED, progress=progress)
    progress(1, 1, "")
    return editor.save(folder)


def _state_folder(editor: Prepared, model: nn.Module, bed: Testbed) -> Path:
    about = {"version": STATE_VERSION, "sites": editor.sites, "with": dict(editor.learned_with), "seed": PREPARE_SEED}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    digest.update(bed.learned_from().encode())
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    name = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in Path(bed.name).name)
    return cache_folder() / "editors" / f"{name}-{digest.hexdigest()[:16]}"


def drift_ratio(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float | None:
    """The greatest ‖W − W₀‖_F / ‖W₀‖_F of any weight, in float64; NaN when one is, None without any weight."""
    found = [
        float(torch.linalg.vector_norm(after[name].double() - old.double()) / torch.linalg.vector_norm(old.double()))
        for name, old in before.items()
        if name in after
    ]
    if not found:
        return None
    return float("nan") if any(math.isnan(value) for value in found) else max(found)


def _weights(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Copies of the weights at the sites by name, wherever an adapter keeps them now."""
    found = {site.name: locate(model, site) for site in sites}
    return {name: held[1].detach().clone() for name, held in found.items() if held is not None}


def _without(outcomes: Tensor, failed: Sequence[int]) -> Tensor:
    """The outcomes, with what was asked of failed edits (rows) wrong; what should be kept is as it is."""
    wanted = outcomes[:, : SCORES.index("text_locality")]
    wanted[list(failed)] = torch.where(wanted[list(failed)].isnan(), wanted[list(failed)], 0.0)
    return outcomes


def _columns(outcomes: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.stack(list(outcomes)).T) if outcomes else [torch.zeros(0)] * len(SCORES)


def _share(outcomes: Tensor) -> float | None:
    """The mean of what was asked."""
    asked = outcomes[~outcomes.isnan()]
    return float(asked.mean()) if asked.numel() else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
