"""What a sink is: something that is told of each row while the run goes on."""

from __future__ import annotations

from typing import Protocol

from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.record.readings import EditRow


class Sink(Protocol):
    """Receives each row as it is written. What it raises is logged and does not reach the edit loop."""

    def on_row(self, row: EditRow, diagnosis: Diagnosis | None) -> None:
        """One edit's row, with the diagnosis that includes it."""

    def close(self) -> None:
        """The run is over."""
