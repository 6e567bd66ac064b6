"""Attach to an edit loop: check what the user gave, open the run, start the monitor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from stabilitylab.acting.scanning.scan import figures
from stabilitylab.acting.schedule import Schedule, Trace, asked_for, mode_of
from stabilitylab.analysis.restoring import means_single_edits
from stabilitylab.analysis.thresholds import Thresholds, from_json, read
from stabilitylab.errors import SiteError, UsageError
from stabilitylab.probes.base import TIERS, Probe, Tier
from stabilitylab.probes.registry import probes_of
from stabilitylab.record.making import free_folder
from stabilitylab.record.readings import Metric
from stabilitylab.record.run import Run, load
from stabilitylab.record.store import FILE_NAME, RunWriter
from stabilitylab.reports.announcing import AlarmSink
from stabilitylab.reports.sinks import Sink
from stabilitylab.watching import canary as canaries
from stabilitylab.watching import manifest
from stabilitylab.watching.adapted import is_made
from stabilitylab.watching.budget import DEFAULT_SHARE, Budget, decisions_of, share_of
from stabilitylab.watching.company import Company, Unwritten, company
from stabilitylab.watching.editor_parts import as_editor
from stabilitylab.watching.instruments.references import HOMES, Home
from stabilitylab.watching.monitor import Monitor
from stabilitylab.watching.one_hook import logger
from stabilitylab.watching.redaction import Kept, Redaction
from stabilitylab.watching.sites import Patterns, Site, find_sites, locate, weight_at, why_unmeasurable
from stabilitylab.watching.spread import FLATTENED, flattened, is_spread, part_of, spread_of, why_not_parts

_SPREAD_ADAPTERS: Final = (
    "it has adapters and is spread over processes, whose parts don't make the weight that it computes with; expected"
    " the names of the adapters' own parts, such as '*.lora_A.*' and '*.lora_B.*'"
)


def attach(
    model: nn.Module,
    sites: Patterns | None = None,
    run: str | Path | None = None,
    *,
    editor: object | None = None,
    canary: canaries.Canary | canaries.Batch | None = None,
    probes: Tier | Sequence[Probe[Any]] = "default",
    tensorboard: bool = False,
    sinks: Sequence[Sink] = (),
    config: Mapping[str, Any] | None = None,
    thresholds: str | Path | Thresholds | None = None,
    announce: bool = True,
    trace: Trace = "auto",
    replay: bool = False,
    scan: bool = False,
    resume: bool = False,
    budget: float | None = DEFAULT_SHARE,
    schedule: str | Path | Run | None = None,
    references: Home = "device",
    redact: bool = False,
) -> Monitor:
    """Watch an edit loop over `model`.

    sites: patterns of layer or parameter names (``*`` crosses dots), or None to watch what the first edit is seen to
    move. run: the run's new folder; by default one under ``runs/`` named by the time. editor: the editor, if its own
    state is to be read (MEND: its normaliser); of a loop that keeps that in variables of its own, a dict of it; a
    ``torch.amp.GradScaler`` in it is known before its first step. canary: what to forward after each edit; a `Canary`
    has a cadence.
    probes: a tier by its cost, ``"light"`` (keeps no copies of the weights), ``"default"`` or ``"deep"``, or instances
    with settings of their own, such as ``Drift(every=5)``. tensorboard: also write TensorBoard events into the run's
    folder. sinks: further receivers of each row. config: plain JSON values for the manifest; of these
    ``sequential_edit: false`` says that each edit is meant for the original model. thresholds: limits of your own, by
    default those of the package: a file that ``stabilitylab calibrate`` wrote. The run keeps them. announce: say it in
    one line on stderr, once, when the run is diverging or worse. trace: whether to look at each operation's result, so
    that the first that is not finite is named, with its line: ``"auto"`` in the first three edits, and on where that
    costs less than 5% of an edit; ``"armed"`` once anything is out of the ordinary; True always; False never, unless
    the environment variable ``STABILITYLAB_TRACE`` asks for it. replay: keep a copy of what each edit may touch, model
    and editor; the first edit of a wrapped loop (`Monitor.wrap`) that leaves something that is not finite, or fails, is
    then made once more from there, traced, and in wider precisions; `Monitor.autopsy` does so when asked. scan: look at
    all of the model first, as `stabilitylab.scan` does; the report then says what was known before edit 1. resume: for
    a script that may be started again under the same `run`: where its folder is taken, the run goes on in the next free
    one, ``run-2``, which it says. That is a run of its own: drift counts from the weights as they are this time.
    budget: the share of the loop's own time that probes may take, the canary and the tracer apart: what is dear (exact
    spectra, σ₁) is measured in the first 8 edits, which shows what it costs, and from then on as often as fits, oftener
    while values move; None to measure everything at each edit. schedule: another run, or its folder, whose edits say
    which ones of this run are measured in full, in place of any budget. references: where the two copies of each weight
    are kept: ``"device"``, beside it; ``"pinned"`` or ``"host"``, in the host's memory, from where they are sent to the
    weight's accelerator and back at each edit, one weight after the other.
    redact: keep no text of yours in the run: labels, messages of exceptions and the strings in `config` are hashed, and
    folders, code lines, arguments of the command and names of user and machine are left out (SECURITY.md).

    Nothing about the model changes: weights, logits, gradients, RNG state and modes are bit-identical with and without
    the monitor. Raises SiteError for a pattern that matches nothing, RunError for a run folder that exists (unless
    resumed), UsageError for other unusable arguments; nothing is written then.
    """
    _expect(model, run, sinks, config, references)
    editor, watched = as_editor(editor), canaries.of(canary)
    chosen = _chosen(probes)
    limits = _limits(thresholds)
    found, skipped = (None, {}) if sites is None else _measurable(model, find_sites(model, sites))
    spread_over = _spread_over(model, found, watched, replay)
    together = company(run, spread_over)
    wanted = Path(run) if run is not None else Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = free_folder(wanted) if resume else wanted
    options: dict[str, Any] = {
        "patterns": [sites] if isinstance(sites, str) else None if sites is None else list(sites)
    }
    about = manifest.collect(
        model, found or (), editor, None if watched is None else watched.describe(), dict(config or {}), limits
    )
    redaction = Redaction() if redact else Kept()
    if together is not None and together.bound:
        together.meet(
            {
                "sites": [site.name for site in found or ()],
                "probes": [type(probe).__name__ for probe in chosen],
                "canary": None if watched is None else watched.every,
            }
        )
    tracing = Schedule(mode_of(trace)).to_json() | ({"asked": str(asked)} if (asked := asked_for()) else {})
    metrics = tuple(metric for probe in chosen for metric in probe.metrics)
    options |= {"trace": tracing, "replay": replay}
    scan_failure = ""
    if scan:
        batch = None if watched is not None and watched.is_replay else watched
        try:
            options["scan"] = figures(model, sites, editor=editor, canary=batch).to_json(brief=True)
        except Exception as error:  # what only looks stops no loop
            scan_failure = f"the scan before edit 1 failed: {type(error).__name__}: {error}"
    paced = _budget(budget, schedule, spread_over, chosen)
    about, options = redaction.manifest(about), redaction.manifest(options) | {"budget": paced.to_json()}
    writer, writes = _opened(folder, about, options, metrics, together)
    single = means_single_edits(config or {})
    try:
        receivers = list(sinks) if writes else []
        if announce and writes:
            receivers.append(AlarmSink(folder))
        if tensorboard and writes:
            from stabilitylab.reports.tensorboard import TensorBoardSink

            receivers.append(TensorBoardSink(folder, metrics, about | options))
        monitor = Monitor(
            model,
            found,
            writer,
            chosen,
            editor,
            watched,
            receivers,
            limits,
            single_edits=single,
            skipped=skipped,
            trace=trace,
            replay=replay,
            budget=paced,
            home=references,
            redaction=redaction,
        )
    except BaseException:  # such as a canary that can't be run, or Ctrl-C: nothing was measured yet
        writer.discard()
        raise
    if folder != wanted and writes:  # where another process writes, it may have just made the folder
        says = f"run folder '{wanted}' exists: this run is in '{folder}', and drift counts from the weights as they are"
        monitor.note("resumed", says)
        logger.warning("stabilitylab: %s", says)
    if scan_failure:
        monitor.note("scan-off", scan_failure)
    if together is not None:
        monitor.note("per-process", together.says_what_is_whose())
    return monitor


def _budget(
    share: object, schedule: str | Path | Run | None, spread_over: Sequence[int], probes: Sequence[Probe[Any]]
) -> Budget:
    """When what is dear is measured. Raises UsageError for what can't be a share, RunError for what is no run."""
    allowed = share_of(share)
    if schedule is not None:
        return Budget(None, probes, decisions_of(schedule if isinstance(schedule, Run) else load(schedule)))
    # Processes that need each other must measure the same, and each has a clock of its own.
    unlimited = spread_over or not any(probe.is_paced for probe in probes)
    return Budget(None if unlimited else allowed, probes)


def _expect(model: object, run: object, sinks: Sequence[object], config: object, references: object) -> None:
    """Raises UsageError for what can't be a model, a run's path, a sink, a config or a place for the copies, SiteError
    for a model that has no layer whose weight is whole.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    piece = flattened(model)
    if piece is not None:
        raise SiteError(f"'{piece}': {FLATTENED}")
    if references not in HOMES:
        raise UsageError(f"references={references!r} is unknown; expected one of {', '.join(map(repr, HOMES))}")
    if not isinstance(run, str | Path | None):
        raise UsageError(f"run is a {type(run).__name__}; expected the path of a new folder")
    if not isinstance(config, Mapping | None):
        raise UsageError(f"config is a {type(config).__name__}; expected a dict of plain JSON values")
    for sink in sinks:
        if not (callable(getattr(sink, "on_row", None)) and callable(getattr(sink, "close", None))):
            raise UsageError(
                f"sinks holds a {type(sink).__name__}; expected objects with on_row(row, diagnosis) and close()"
            )


def _opened(
    folder: Path,
    about: Mapping[str, Any],
    options: Mapping[str, Any],
    metrics: Sequence[Metric],
    together: Company | None,
) -> tuple[RunWriter | Unwritten, bool]:
    """What the run is written by, and whether by this process. Raises RunError."""
    entries = dict(about) | dict(options)
    if together is None:
        return RunWriter(folder, entries, metrics), True
    if not together.writes():
        return Unwritten(together.opened() / FILE_NAME), False
    entries["process"] = {"rank": together.rank, "of": list(together.ranks), "spread": together.bound}
    with together.opening(folder):
        return RunWriter(folder, entries, metrics), True


def _spread_over(
    model: nn.Module, sites: Sequence[Site] | None, canary: canaries.Canary | None, replay: bool
) -> tuple[int, ...]:
    """The processes that hold parts of the watched weights, which are spread; none where none is.

    Raises SiteError without sites, and UsageError for what processes that need each other can't do.
    """
    if sites is None:
        spread = next((name for name, each in model.named_parameters() if is_spread(each)), None)
        if spread is not None:
            raise SiteError(f"'{spread}' is spread over processes (a DTensor); expected sites=, to say what to watch")
        return ()
    located = [locate(model, site) for site in sites]
    ranks = {rank for at in located if at is not None and (over := spread_of(at[1])) for rank in over.ranks}
    if len(ranks) > 1 and canary is not None and canary.budget is not None:
        raise UsageError(
            "Canary(budget=...): weights are spread over processes, which must all forward it at the same edits, and "
            "each has a clock of its own; expected every="
        )
    if len(ranks) > 1 and replay:
        raise UsageError("replay=True: weights are spread over processes, and no one can make an edit once more alone")
    return tuple(sorted(ranks)) if len(ranks) > 1 else ()


def _limits(given: str | Path | Thresholds | None) -> Thresholds | None:
    """The thresholds that a path or an object means. Raises UsageError where it holds none."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        return read(Path(given))
    if not isinstance(given, Thresholds):
        raise UsageError(f"thresholds is a {type(given).__name__}; expected a file that `stabilitylab calibrate` wrote")
    return from_json(given.to_json(), "thresholds=")


def _chosen(probes: str | Sequence[Probe[Any]]) -> tuple[Probe[Any], ...]:
    """The probes that a tier's name or a list means. Raises UsageError for anything else."""
    for tier in TIERS:
        if probes == tier:
            return probes_of(tier)
    if isinstance(probes, str):
        raise UsageError(f"probes={probes!r} is unknown; expected {', '.join(map(repr, TIERS))} or a list of probes")
    for probe in probes:
        if not isinstance(probe, Probe):
            raise UsageError(f"probes holds {probe!r}; expected instances of Probe, such as Drift(every=5)")
    names = [metric.name for probe in probes for metric in probe.metrics]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two probes emit {twice!r}; expected each metric once")
    return tuple(probes)


def _measurable(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """The sites whose values can be read, and the reason for each of the others. Raises SiteError when none can."""
    kept, skipped = [], {}
    for site in sites:
        found = locate(model, site)
        if found is not None and is_spread(found[1]):
            reason = _SPREAD_ADAPTERS if is_made(*found) else _why_not(found[1])
        else:
            weight = weight_at(model, site)
            reason = weight if isinstance(weight, str) else None
        if reason is not None:
            skipped[site.name] = reason
        else:
            kept.append(site)
    if not kept:
        name, reason = next(iter(skipped.items()))
        raise SiteError(f"none of the {len(sites)} matching sites can be measured; '{name}': {reason}")
    return kept, skipped


def _why_not(weight: Tensor) -> str | None:
    """The reason why a weight's values, or those of its parts, can't be read; None when they can."""
    if not is_spread(weight):
        return why_unmeasurable(weight)
    part = part_of(weight)
    return why_not_parts(weight) or (why_unmeasurable(part) if part.numel() else None)
