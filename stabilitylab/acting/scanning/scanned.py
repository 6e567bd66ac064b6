"""What `stabilitylab.scan` gives: the figures of a model before its first edit, and what they warn of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabilitylab.analysis.caution import Caution, Urgency
from stabilitylab.analysis.cautions import cautions
from stabilitylab.analysis.limits import KL_COLLAPSED
from stabilitylab.record.display import scan_page
from stabilitylab.record.scanned import Scan

if TYPE_CHECKING:
    from torch import nn

    from stabilitylab.acting.scanning.scan import Progress
    from stabilitylab.watching.canary import Batch, Canary


@dataclass(frozen=True, repr=False)
class Scanned:
    """figures: what was read. cautions: what it warns of, the most urgent first."""

    figures: Scan
    cautions: tuple[Caution, ...]

    def of_urgency(self, urgency: Urgency) -> tuple[Caution, ...]:
        """The warnings of one urgency."""
        return tuple(caution for caution in self.cautions if caution.urgency == urgency)

    def save(self, out: str | Path) -> Path:
        """Write the page of the scan to `out`, and its data beside it as JSON. Raises RunError when it can't be."""
        return scan_page(self.figures, self.cautions, Path(out))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.figures.to_json(), "cautions": [caution.to_json() for caution in self.cautions]}

    def __str__(self) -> str:
        told = [f"{caution.urgency}: {caution.says} {caution.advice}" for caution in self.cautions]
        return "\n".join(told) or f"{self.figures.model}: nothing to warn of in {len(self.figures.tensors)} tensors"

    def __repr__(self) -> str:
        counts = Counter(caution.urgency for caution in self.cautions)
        words = ", ".join(f"{count} {urgency}" for urgency, count in counts.items()) or "nothing to warn of"
        return f"<Scanned {self.figures.model}, {len(self.figures.tensors)} tensors: {words}>"


def scan(
    model: nn.Module | str | Path,
    sites: str | Sequence[str] | None = None,
    *,
    editor: object | None = None,
    canary: Canary | Batch | None = None,
    hparams: str | Path | None = None,
    precision: str | Sequence[str] = (),
    apply: Callable[[Any, Any], object] | None = None,
    requests: Iterable[Any] = (),
    pickles: bool = False,
    progress: Progress | None = None,
) -> Scanned:
    """Look at a model before it is edited: what it can take, and what is wrong with it already. Nothing of it changes.

    model: a live one, or the folder or file of its weights; of a folder each tensor is read by itself, and no code of
    it is run. sites: patterns of what is going to be edited (``*`` crosses dots); those weights are decomposed too.
    editor: a live editor as `attach` takes it, or the file of its state (an archive of MEND or MALMEN, second moments
    of ROME or MEMIT); several as a list. canary: as `attach` takes it; a live model alone can answer it. hparams:
    EasyEdit's YAML or MEMIT's JSON file, in place of `sites`. precision: dtypes to try, such as ``"fp16"``: what of the
    weights and updates they would lose, and with a canary how far its answer moves. apply, requests: of a live model,
    an editing function as `Monitor.calibrate` takes it, and some requests for dry edits, each of which is put back:
    they show updates, and with a canary how far each layer can be moved along them. pickles: also read pickled tensors,
    with ``weights_only``. progress: is told how far it is.

    Raises:
        UsageError: what was given can't be read, or doesn't fit together.
        SiteError: a pattern matches nothing.
        EditError: a dry edit could not be put back.
        Whatever `apply` raises, after everything was put back.
    """
    from stabilitylab.acting.scanning.scan import figures, quiet  # which takes torch

    found = figures(
        model,
        sites,
        editor=editor,
        canary=canary,
        hparams=hparams,
        precision=precision,
        apply=apply,
        requests=requests,
        lost_nats=KL_COLLAPSED,
        pickles=pickles,
        progress=progress or quiet,
    )
    return Scanned(found, cautions(found))
