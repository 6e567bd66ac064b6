"""Beside an editor's part that is named by a shape, such as ``editor.mend.(256, 64).u``: the layers that it serves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from stabilitylab.analysis.causes.rule import Cause
from stabilitylab.analysis.findings import Finding, Link
from stabilitylab.record.serving import read_serving


class Serving:
    """Names, in a sentence about such a part, the layers behind it."""

    def __init__(self) -> None:
        self._layers: dict[str, str] = {}
        self._named: re.Pattern[str] | None = None

    def learn(self, says: str) -> None:
        """Take in a note of the kind `stabilitylab.record.serving.SERVES`."""
        found = read_serving(says)
        if found is not None:
            self._layers[found[0]] = found[1]
            sites = "|".join(re.escape(site) for site in sorted(self._layers, key=len, reverse=True))
            # The part itself, its inputs or its gradients; not another part whose name begins like it.
            self._named = re.compile(rf"({sites})(?:\.[uv]\b)?(?!\.?\w)")

    def named(self, says: str) -> str:
        """The sentence with the layers beside the first of these parts that it names."""
        found = self._named.search(says) if self._named is not None else None
        if found is None:
            return says
        return f"{says[: found.end()]} (serves {self._layers[found[1]]}){says[found.end() :]}"

    def findings(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        """The same findings, with layers in their sentences."""
        return tuple(findings) if self._named is None else tuple(self.finding(each) for each in findings)

    def finding(self, finding: Finding) -> Finding:
        """One finding, likewise."""
        return replace(finding, says=self.named(finding.says))

    def cause(self, cause: Cause) -> Cause:
        """A cause, likewise."""
        return replace(cause, says=self.named(cause.says))

    def links(self, links: Sequence[Link]) -> tuple[Link, ...]:
        """The chain of causes, likewise."""
        return tuple(replace(link, says=self.named(link.says)) for link in links)
