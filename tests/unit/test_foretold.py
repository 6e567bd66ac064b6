"""Warnings of a scan beside the causes of a run, and a scan's tensors by block."""

from __future__ import annotations

import math
from dataclasses import replace

from stabilitylab.analysis.blocks import block_of, blocks
from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.findings import UNKNOWN_CAUSE, Diagnosis, Link
from stabilitylab.analysis.foretold import foretold
from stabilitylab.record.scanned import Scan, Some
from tests.scans import dying, tensor


def caution(cause: str, place: str = "") -> Caution:
    return Caution("rule", "risk", place, "says", "advice", cause)


def link(cause: str, edit: int | None = 6, site: str | None = None) -> Link:
    return Link("trigger", cause, edit, site, None, "", "", "high")


def diagnosis(*links: Link, cause: str = UNKNOWN_CAUSE) -> Diagnosis:
    return Diagnosis(
        "non-finite", 9, 2, 5, 6, "layers.1.fc2", "weight.nonfinite", cause, "why", "do", (), "", causes=links
    )


class TestForetold:
    def test_each_warning_stands_in_its_order_with_its_link_or_none(self) -> None:
        given = (caution("a"), caution(""), caution("b"), caution("c"))
        first, third = link("c"), link("a", 4)
        pairs = foretold(given, diagnosis(first, third, cause="c"))
        assert pairs == ((given[0], third), (given[1], None), (given[2], None), (given[3], first))

    def test_a_warning_without_a_cause_never_comes_true(self) -> None:
        assert foretold([caution("")], diagnosis(link(""), cause="")) == ((caution(""), None),)

    def test_the_cause_that_is_named_counts_where_the_chain_has_it_not(self) -> None:
        ((_, found),) = foretold([caution("a")], diagnosis(cause="a"))
        assert found is not None
        assert (found.cause, found.edit, found.site) == ("a", 6, "layers.1.fc2")
        assert foretold([caution(UNKNOWN_CAUSE)], diagnosis())[0][1] is None

    def test_of_warnings_with_one_cause_that_at_the_place_came_true_and_one_elsewhere_did_not(self) -> None:
        here, part, there = (caution("a", place) for place in ("l.1", "l.1.weight", "l.10"))
        whole = caution("a")
        told = dict(foretold([here, part, there, whole], diagnosis(link("a", site="l.1"))))
        assert {each for each, found in told.items() if found} == {here, part, whole}

    def test_where_none_is_at_the_place_all_of_the_cause_count(self) -> None:
        told = foretold([caution("a", "x"), caution("a", "y")], diagnosis(link("a", site="editor.256x64.u")))
        assert all(found for _, found in told)

    def test_of_two_links_that_at_the_warnings_place_is_taken(self) -> None:
        first, second = link("a", 3, "l.0"), link("a", 8, "l.1")
        told = dict(foretold([caution("a", "l.1"), caution("a")], diagnosis(first, second)))
        assert list(told.values()) == [second, first]


class TestBlocks:
    def test_a_block_is_what_stands_before_the_first_number(self) -> None:
        assert block_of("model.layers.2.mlp.experts.7.w1.weight") == "model.layers.2"
        assert block_of("0.weight") == "0"
        assert block_of("model.fc2.weight") == "model.fc2.weight"  # no number by itself
        assert block_of("") == ""

    def test_tensors_are_gathered_in_the_order_of_the_model(self) -> None:
        names = ("lm.embed.weight", "lm.layers.0.a.weight", "lm.layers.0.b.weight", "lm.head.weight", "lm.head.bias")
        found = blocks(Scan("m", "live", tensors=tuple(tensor(name, (2, 3), "float32") for name in names)))
        assert [(block.name, len(block.tensors)) for block in found] == [
            ("lm.embed", 1),
            ("lm.layers.0", 2),
            ("lm.head", 2),
        ]

    def test_figures_of_a_block_are_those_of_its_tensors_together(self) -> None:
        held = (
            tensor("l.0.a", (2, 3), "float16", 32752.0, norm=3.0, nonfinite=2, loud_rows=Some(1)),
            tensor("l.0.b", (4,), "float32", 1.0, norm=4.0, zero_rows=Some(5), loud_columns=Some(2), is_site=True),
            replace(tensor("l.0.c", (1,), "int8"), norm=0.0, least=None, greatest=None),
        )
        (block,) = blocks(Scan("m", "live", tensors=held))
        assert block.headroom_bits == 1.0
        assert (block.norm, block.largest, block.entries) == (5.0, 32752.0, 11)
        assert (block.nonfinite, block.zero_rows, block.outliers) == (2, 5, 3)
        assert block.dtypes == ("float16", "float32", "int8")
        assert block.is_edited
        (unknown,) = blocks(Scan("m", "live", tensors=held[2:]))
        assert unknown.headroom_bits is None
        assert unknown.largest is None
        assert math.isclose(unknown.norm, 0.0)

    def test_a_block_has_the_most_urgent_of_its_warnings(self) -> None:
        scan, cautions = dying()
        urgency = {block.name.rpartition(".")[2]: block.urgency for block in blocks(scan, cautions)}
        assert urgency == {"embed_tokens": None, "0": None, "1": "note", "2": "fatal", "3": "fatal", "lm_head": None}
