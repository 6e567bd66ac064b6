"""What the rules of causes may look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stabilitylab.analysis.findings import Finding, Verdict, severity
from stabilitylab.analysis.landing import Landing
from stabilitylab.analysis.restoring import Forgotten
from stabilitylab.analysis.steadiness import State
from stabilitylab.record.operations import Operation
from stabilitylab.record.readings import MODEL_SITE


@dataclass(frozen=True)
class EditorInput:
    """The largest normalised input of one site at one edit, with the unit it was at and the std it was divided by.

    state: whether the statistics there hold still, as far as it is known. spreadless: whether no unit had a spread.
    """

    edit: int
    site: str
    largest: float
    unit: int | None
    std: float | None
    state: State
    spreadless: bool


@dataclass(frozen=True)
class Growth:
    """How the editor's input and its update grew together over some edits. Factors are end over start."""

    first_edit: int
    last_edit: int
    input_factor: float
    update_factor: float

    @property
    def least(self) -> float:
        """The weaker of the two."""
        return min(self.input_factor, self.update_factor)


@dataclass(frozen=True)
class Place:
    """Where something is: a reading's metric and site, at an edit. value: the reading, where no finding has it."""

    edit: int
    metric: str
    site: str
    value: float | None = None


@dataclass(frozen=True)
class Step:
    """One applied edit: the largest update as a share of its weight, and the furthest weight from its original as a
    share of that one's norm.

    Of the run up to this edit: number: how many edits moved a weight. large: how many of them moved one by at least
    half of its original norm. largest: the largest `update_ratio`.

    rate: the largest learning rate that an optimizer stepped with, None where none is known. rate_factor,
    update_factor: that rate and the largest ‖ΔW‖, over their medians in the first edits that had one; 1 in these.
    """

    edit: int
    update_ratio: float
    update_site: str
    drift_ratio: float
    drift_site: str
    number: int
    large: int
    largest: float
    rate: float | None = None
    rate_factor: float = 1.0
    update_factor: float = 1.0


@dataclass(frozen=True)
class Way:
    """The updates of one layer, one after the other: all that were added up, and where that led.

    edits: that moved it. added: Σ‖ΔW‖. largest: of these. drift: ‖W − W₀‖ now. first, last: ‖ΔW‖. first_rate,
    last_rate: the same over the gradient's norm in that edit; 0 where it was 0, or not read. stepped: how many of the
    edits had an optimizer step with the weight, or with what it is made of. original, norm: ‖W₀‖, and ‖W‖ now; 0 where
    either was not read.
    """

    site: str
    edits: int
    added: float
    largest: float
    drift: float
    first: float
    last: float
    first_rate: float
    last_rate: float
    stepped: int
    original: float = 0.0
    norm: float = 0.0

    @property
    def inwards(self) -> float:
        """The share of the distance from the original weight by which it became shorter: 1 where it was only scaled
        down, near 0 or below it where it went elsewhere.
        """
        return (self.original - self.norm) / self.drift if self.drift > 0 and self.original > 0 else 0.0

    @property
    def outwards(self) -> float:
        """The cosine between the distance from the original weight and that weight: 1 where it was only scaled up. Not
        the share by which it became longer: what goes far in any direction does.
        """
        far = 2.0 * self.drift * self.original
        squares = self.norm * self.norm - self.original * self.original - self.drift * self.drift
        return squares / far if far > 0 and self.norm > 0 else 0.0

    @property
    def aligned(self) -> float:
        """Near 1 where all updates point the same way; 1/√edits where each points in its own. 0 where one of them is
        half of their sum: that is its way, not that of many.
        """
        return self.drift / self.added if self.added > 2.0 * self.largest else 0.0


@dataclass(frozen=True)
class Learning:
    """Whether edits reach what they ask for. tried: edits that looked at their gradient more than once. reached: those
    whose last gradient was next to nothing beside their first, at the median layer.
    """

    tried: int
    reached: int


@dataclass(frozen=True)
class Ascent:
    """Whether edits step up the model's own loss. known: edits in which a backward came to it. up: those that weighed
    it with less than 0, or whose optimizer maximises. first_edit, first_loss, last_edit, last_loss: of these, as the
    edit found it. maximised: where an optimizer of the last of these does so, the layer that it steps.
    """

    known: int
    up: int
    first_edit: int
    first_loss: float
    last_edit: int
    last_loss: float
    maximised: str | None = None


@dataclass(frozen=True)
class FatalRow:
    """The row with the first non-finite value.

    bad_inputs: entries that were NaN or +∞ already in what the model was called with.
    masked_rows: query rows without a real token. unmasked_before: whether none had any in the edits before.
    masks_before: whether there was an edit before whose mask was read.
    sound_forward: whether the logits of the first pass were read, and they and its outputs are finite. sound_gradients:
    whether the edit's passes had gradients, all finite, as long as its forward passes were; no_gradients: whether its
    first had some, none of them finite; gradients_unread: whether none was read at all; later_gradients: whether they
    were finite in its first pass and not in a later one; gradient_overflowed: the first layer whose accumulated
    gradient is not finite although both of its factors are; gradient_is_nan: whether that one is NaN, not infinite.
    lost_before_step: the first layer whose gradient was finite after the first backward, and not when the optimizer
    stepped with it.
    loss: the model's own; loss_weight: what the loop multiplies it with; None where they were not read. moved_before:
    whether any edit before moved a watched weight.
    weight: the first watched layer whose weight is not finite, at a tenth as many entries as the worst or more; None
    when all are. For that weight: overflowed: whether its largest entry is infinite, not NaN; headroom: the bits that
    it had left when last read before; limit: what its dtype can hold; None where nothing says it.
    """

    edit: int
    bad_inputs: float
    masked_rows: float
    unmasked_before: bool
    masks_before: bool
    sound_forward: bool
    sound_gradients: bool
    no_gradients: bool
    gradients_unread: bool
    later_gradients: bool
    gradient_overflowed: str | None
    gradient_is_nan: bool
    lost_before_step: str | None
    loss: float | None
    loss_weight: float | None
    moved_before: bool
    weight: str | None
    overflowed: bool
    headroom: float | None
    limit: float | None


@dataclass(frozen=True)
class Evidence:
    """What is known of a run by now.

    crossed: the first editor input past a limit, None when none was. divided: the same where the std is 0, or that of a
    layer's input and next to nothing. growth: of editor input and update together. largest_finite: what the live dtype
    at the site of the first bad reading can hold, where known. narrow: whether any watched tensor is in float16.
    overflowed: whether a value there became infinite, not NaN, at the first bad edit. steps: the last edits up to the
    alarm or the first hard fact, whichever holds the first bad edit. latest, learning: the last edit's step, and all
    edits, until a value is not finite. fatal: the first non-finite row. restored_until, forgotten: see
    `stabilitylab.analysis.restoring`. carried: how many edits built on those before, from the second on, where the
    configuration says that none does. stayed: the first edit whose weights stayed although they were to be put back;
    None where nothing says so. besides: whether edits write parameters that are not watched. moved: whether any watched
    weight ever moved. codebook: whether one holds keys. reported: whether the editor told of a value that it searches
    for, a denominator or a solve, or has a normaliser: it makes its updates in another way than by descending. landing:
    whether edits take effect. weights_dtype: the narrowest of the watched weights, if that is one of 16 bits.
    changes_inside: whether the gradient changed from the first to the last pass of that edit. ways: of each layer.
    ascent: None where no edit steps up. operations: that were traced.
    """

    verdict: Verdict
    findings: Sequence[Finding]
    first_bad: Finding | None
    crossed: EditorInput | None
    divided: EditorInput | None
    growth: Growth | None
    largest_finite: float | None
    narrow: bool
    overflowed: bool
    steps: Sequence[Step]
    latest: Step | None
    learning: Learning
    fatal: FatalRow | None
    restored_until: int | None
    forgotten: Forgotten | None
    carried: int
    stayed: int | None
    besides: bool
    moved: bool
    codebook: bool
    reported: bool
    landing: Landing
    weights_dtype: str | None
    changes_inside: bool
    ways: Sequence[Way]
    ascent: Ascent | None = None
    operations: Sequence[Operation] = ()

    def of(self, *rules: str) -> Finding | None:
        """The first finding by any of these rules."""
        return next((finding for finding in self.findings if finding.rule in rules), None)

    def at(self, site: str, *rules: str) -> Finding | None:
        """The first finding by any of these rules at a site."""
        return next((finding for finding in self.findings if finding.site == site and finding.rule in rules), None)

    def is_past(self, verdict: Verdict) -> bool:
        """Whether the run is worse than `verdict`."""
        return severity(self.verdict) > severity(verdict)

    @property
    def sent_back(self) -> tuple[Operation, ...]:
        """Operations that were traced in the first non-finite edit and sent what is not finite through a backward: then
        gradients were not finite, whether or not anyone read them.
        """
        if self.fatal is None:
            return ()
        edit = self.fatal.edit
        return tuple(
            each for each in self.operations if each.edit == edit and each.phase != "canary" and each.went_back
        )

    @property
    def given_to_step(self) -> bool:
        """Whether what an optimizer stepped with was not finite already in the first non-finite edit: its gradient, or
        its learning rate. Then the step's own arithmetic did nothing.
        """
        lost = self.fatal is not None and self.fatal.lost_before_step is not None
        return lost or (self.first_bad is not None and self.first_bad.metric == "gradient.learning_rate")

    @property
    def begins(self) -> int | None:
        """The edit of the first finding that is more than a note."""
        return min((finding.start for finding in self.findings if severity(finding.verdict) > 0), default=None)

    @property
    def lone_entry(self) -> bool:
        """Whether the first bad edit is one that changed a single entry of a weight, as no editor does."""
        found, bad = self.of("one-entry"), self.first_bad
        return found is not None and bad is not None and found.edit <= bad.start

    @property
    def step(self) -> Step | None:
        """The first bad edit's own."""
        bad = self.first_bad
        return None if bad is None else next((step for step in self.steps if step.edit == bad.start), None)

    @property
    def furthest(self) -> Place | None:
        """Where the first bad reading is the whole model's: the weight that was furthest from its original then."""
        bad, step = self.first_bad, self.step
        if bad is None or bad.site != MODEL_SITE or step is None or step.drift_ratio == 0:
            return None
        return Place(step.edit, "drift.ratio", step.drift_site, step.drift_ratio)
