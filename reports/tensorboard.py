"""Scalars for TensorBoard: one batched summary per edit, flushed at once. Needs TensorBoard alone, no torch.

==============================  ==============================================================================
tag                             value
==============================  ==============================================================================
``update.norm log10/SITE``      log10 of a metric on a log scale; 0 has none and is left out
``weight.headroom_bits/SITE``   a metric on a linear scale, a count or a flag as it is
``…/SITE/01``, ``/02``, ``/04`` the 1st, 2nd, 4th, … value of a metric that holds several, such as a spectrum
``nonfinite/FAMILY``            how many values of that family of metrics are NaN or infinite at this edit
``nonfinite/total``             the same over all families
``verdict/severity``            0 stable, 1 drifting, 2 diverging, 3 collapsed, 4 non-finite
``verdict/last_edit``           the edit, so that HParams can show the last one of a run
``verdict/onset_edit``          the edit at which values began to leave their range, once there is one
``verdict/says``                the diagnosis as text, whenever the verdict changes
``seconds/edit``                the whole edit; ``seconds/probes`` and ``seconds/canary`` are parts of it
==============================  ==============================================================================

TensorBoard cuts a card's title at its end, so a site's tag has the end of its name first (`site_tag`):
``layers.1.fc1 of language_model.model.decoder``.

The first event holds a layout for Custom Scalars and, where the run's manifest is given, a session for HParams.

A series that ends in NaN or Inf is drawn blank by TensorBoard, so such values are never written: they are counted.
Scalars are float32 there; a linear value beyond its range counts as non-finite too. The step is the edit.
"""

# mypy: disable-error-code="import-untyped"
# TensorBoard ships no type information.

from __future__ import annotations

import math
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.scalar.metadata import create_summary_metadata as scalar_metadata
from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from stabilitylab.analysis.findings import Diagnosis, severity
from stabilitylab.record.readings import EditRow, Metric
from stabilitylab.reports import tensorboard_dashboards as dashboards
from stabilitylab.reports.text import clean

TAG_LIMIT: Final = 240
_SITE_PARTS: Final = 3
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


def site_tag(site: str) -> str:
    """The last three parts of a site's name, then the rest: the same in every run, whatever other sites it has."""
    parts = site.split(".")
    if len(parts) <= _SITE_PARTS:
        return dashboards.tag_part(site, TAG_LIMIT)
    end, rest = ".".join(parts[-_SITE_PARTS:]), ".".join(parts[:-_SITE_PARTS])
    return dashboards.tag_part(f"{end} of {rest}", TAG_LIMIT)


def _writable(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= _FLOAT32_MAX


class TensorBoardSink:
    """Writes each row into an event file in `logdir`.

    Raises OSError when the folder can't be written to; the monitor then goes on without it.
    """

    def __init__(self, logdir: Path, metrics: Sequence[Metric], about: Mapping[str, Any] | None = None) -> None:
        """metrics: descriptions of what the rows hold; a reading of any other metric is written on a linear scale.

        about: the run's manifest, for HParams; without it the run has no session there.
        """
        self._has_session = about is not None
        self._metrics = {metric.name: metric for metric in metrics}
        self._said: str | None = None
        self._described: set[str] = set()
        self._writer = EventFileWriter(str(logdir), filename_suffix=".stabilitylab")
        session = [] if about is None else dashboards.session_start(logdir, about)
        self._write(Event(wall_time=time.time(), summary=Summary(value=[dashboards.layout(metrics), *session])))

    def on_row(self, row: EditRow, diagnosis: Diagnosis | None) -> None:
        """One summary with all that there is to say of this edit; on disk when this returns."""
        values, bad = [], Counter[str]()
        for tag, family, value, meaning in self._scalars(row):
            if _writable(value):
                values.append(self._scalar(tag, value, meaning))
            else:
                bad[family] += 1
        families = dict.fromkeys(name.partition(".")[0] for name, _ in row.readings)
        values += [self._scalar(f"nonfinite/{dashboards.tag_part(name, 60)}", bad[name]) for name in families]
        values.append(self._scalar("nonfinite/total", bad.total()))
        spent = {
            "edit": row.seconds,
            "probes": row.probe_seconds,
            "canary": row.canary_seconds,
            "tracer": row.trace_seconds,
        }
        values += [self._scalar(f"seconds/{name}", seconds) for name, seconds in spent.items()]
        if diagnosis is not None:
            verdict = {"severity": severity(diagnosis.verdict), "last_edit": row.edit}
            if diagnosis.onset_edit is not None:
                verdict["onset_edit"] = diagnosis.onset_edit
            values += [
                self._scalar(f"verdict/{name}", value, dashboards.FINAL[f"verdict/{name}"])
                for name, value in verdict.items()
            ]
            if diagnosis.verdict != self._said:
                self._said = diagnosis.verdict
                values.append(self._text("verdict/says", diagnosis.says))
        self._write(Event(wall_time=row.started, step=row.edit, summary=Summary(value=values)))

    def close(self) -> None:
        """Say that the session is over, and close the event file."""
        if self._has_session:
            self._write(Event(wall_time=time.time(), summary=Summary(value=[dashboards.session_end()])))
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.add_event(event)
        self._writer.flush()

    def _scalars(self, row: EditRow) -> Iterator[tuple[str, str, float, str]]:
        """(tag, family, value, meaning). On a log scale zero is left out, and what else has no logarithm is NaN."""
        for (name, site), reading in row.readings.items():
            metric = self._metrics.get(name)
            log = metric is not None and metric.scale == "log"
            head = f"{dashboards.metric_tag(name, log)}/{site_tag(site)}"
            several = metric is not None and metric.length > 1
            for place, value in enumerate(reading.tolist(), start=1):
                if log and value == 0:
                    continue
                shown = value if not log else math.log10(value) if value > 0 else math.nan
                if several and place & (place - 1) and reading.size > 8 and _writable(shown):
                    continue
                meaning = "" if metric is None else f"{metric.meaning} Unit: {metric.unit}."
                yield f"{head}/{place:02d}" if several else head, name.partition(".")[0], shown, meaning

    def _scalar(self, tag: str, value: float, meaning: str = "") -> Summary.Value:
        """The first value of a tag carries what it means, as TensorBoard expects it."""
        if tag in self._described:
            return Summary.Value(tag=tag, simple_value=value)
        self._described.add(tag)
        about = SummaryMetadata.FromString(scalar_metadata("", meaning).SerializeToString())
        return Summary.Value(tag=tag, simple_value=value, metadata=about)

    def _text(self, tag: str, text: str) -> Summary.Value:
        """As a block of code, since names in it are no Markdown."""
        block = "\n".join(f"    {line}" for line in textwrap.wrap(clean(text, 1_000), 96))
        says = TensorProto(
            dtype=DT_STRING,
            string_val=[block.encode("utf-8")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        return Summary.Value(tag=tag, tensor=says, metadata=text_metadata("", ""))
