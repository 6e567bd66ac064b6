"""What is said of a normaliser's statistics: nothing before their first row, and then what they were made from."""

from __future__ import annotations

import math

import pytest

from stabilitylab.analysis import Analyzer, Diagnosis, Finding
from stabilitylab.analysis.words import listed
from stabilitylab.record.readings import EditRow, Note
from stabilitylab.record.serving import SERVES, read_serving, serving_says
from tests.synthetic_runs import METRICS, diagnose, row

U, V, WHOLE = "editor.net.(4, 8).u", "editor.net.(4, 8).v", "editor.lifelong"
Reading = dict[tuple[str, str], float | list[float]]
UNSEEN: Reading = {("editor.seen_rows", site): 0.0 for site in (U, V)}


def statistics(site: str, std: float = 0.2, **others: float | list[float]) -> Reading:
    known = {"std_min": std, "std_zeros": 0.0, "nonfinite": 0.0, "no_spread": 0.0} | others
    return {(f"editor.{name}", site): value for name, value in known.items()}


def both(std: float, rows: float | None = None) -> Reading:
    counted: dict[str, float | list[float]] = {} if rows is None else {"seen_rows": rows}
    return statistics(U, std, **counted) | statistics(V, std / 10, **counted)


def made(edits: tuple[Reading, ...]) -> list[EditRow]:
    return [row(edit, readings) for edit, readings in enumerate(edits)]  # type: ignore[arg-type]


def run(*edits: Reading) -> Diagnosis:
    return diagnose(made(edits))


def found(*edits: Reading) -> dict[str, Finding]:
    return {finding.rule: finding for finding in reversed(run(*edits).findings)}


# -- nothing yet ------------------------------------------------------------------------------------------------------


def test_statistics_that_begin_are_no_news() -> None:
    diagnosis = run(UNSEEN, UNSEEN, both(0.2, 40.0))
    assert (diagnosis.verdict, diagnosis.findings, diagnosis.cause) == ("stable", (), "unknown")


@pytest.mark.parametrize("counted", [True, False])
def test_they_run_from_the_edit_on_that_changes_them(counted: bool) -> None:
    edits = [both(0.2 * 1.1**edit, 40.0 * (edit + 1) if counted else None) for edit in range(4)]
    assert set(found(UNSEEN, *edits[:1])) == set()
    moved = found(UNSEEN, *edits)["statistics-moved"]
    assert (moved.edit, moved.verdict) == (2, "stable")
    assert "running at edit 2" in moved.says
    assert ("from 40 rows and are now from 80" if counted else "was 0.2 and is 0.22") in moved.says


def test_statistics_of_an_editor_that_is_built_anew_are_not_called_running() -> None:
    analyzer = Analyzer(METRICS)
    for edit in made((UNSEEN, both(0.2, 40.0), both(0.3, 40.0))):
        if edit.edit == 2:
            analyzer.observe_note(Note(2, "editor-rebuilt", "EditorExecutor was built anew"))
        analyzer.observe(edit)
    moved, _ = [finding for finding in analyzer.diagnosis().findings if finding.rule == "statistics-moved"]
    assert "were made anew by edit 2" in moved.says


def test_a_dead_unit_does_not_hide_that_they_run() -> None:
    dead = [statistics(U, 0.0, std_zeros=1.0, seen_rows=rows) for rows in (40.0, 80.0)]
    assert set(found(*dead)) == {"zero-std", "statistics-moved"}
    assert set(found(dead[0], dead[0], dead[0])) == {"zero-std"}


# -- begun anew -------------------------------------------------------------------------------------------------------


def test_a_count_that_falls_is_a_new_beginning_at_any_one_site() -> None:
    one = [statistics(WHOLE, 0.2, seen_rows=rows) for rows in (1_000.0, 1_008.0, 1_016.0, 8.0, 16.0)]
    restarted = found(*one)["statistics-restarted"]
    assert (restarted.edit, restarted.metric, restarted.threshold, restarted.value) == (3, "editor.seen_rows", 1016, 8)
    assert "1,016 rows" in restarted.says
    diagnosis = run(*one)
    assert diagnosis.cause == "statistics-restarted"
    assert "had seen 1,016 rows, and have now seen 8" in diagnosis.cause_says
    assert "statistics-restarted" in found(*one[:2], UNSEEN | {("editor.seen_rows", WHOLE): 0.0})


def test_rows_of_an_edit_that_was_taken_back_may_go_with_it() -> None:
    rows = (1_000.0, 1_012.0, 1_024.0, 1_018.0, 1_030.0)
    assert "statistics-restarted" not in found(*(statistics(WHOLE, 0.2, seen_rows=count) for count in rows))


def test_more_rows_explain_a_jump_and_the_same_rows_do_not() -> None:
    few, more = both(0.2, 3.0), both(0.5, 6.0)
    assert "statistics-restarted" not in found(UNSEEN, few, more)
    jumped = found(few, few, both(0.5, 3.0))["statistics-restarted"]
    assert (jumped.edit, jumped.metric) == (2, "editor.std_min")
    assert "statistics-restarted" in found(both(0.2), both(0.2), both(0.5))


# -- one row ----------------------------------------------------------------------------------------------------------

NAN = {"no_spread": 1.0, "nonfinite": 16.0}
ZERO = {"no_spread": 1.0, "std_zeros": 16.0}
FIRED: Reading = {
    ("editor.input_max", WHOLE): 3e5,
    ("editor.input_unit", WHOLE): 7.0,
    ("editor.input_unit_std", WHOLE): 0.0,
    ("editor.no_spread", WHOLE): 1.0,
}


def test_one_row_whose_spread_is_nan() -> None:
    bad = statistics(WHOLE, math.nan, seen_rows=1.0, **NAN)
    diagnosis = run({("editor.seen_rows", WHOLE): 0.0}, bad)
    assert [finding.rule for finding in diagnosis.findings] == ["non-finite", "one-row"]  # the headline's comes first
    assert "made from one row by edit 1: a spread needs two" in diagnosis.findings[1].says
    assert (diagnosis.cause, diagnosis.confidence) == ("normaliser-too-few-rows", "high")
    assert [(link.cause, link.role) for link in diagnosis.causes] == [("normaliser-too-few-rows", "trigger")]
    assert (diagnosis.first_bad_edit, diagnosis.first_bad_site) == (1, WHOLE)


def test_one_row_whose_spread_is_zero_is_a_risk_and_then_a_cause() -> None:
    quiet = statistics(WHOLE, 0.0, seen_rows=1.0, **ZERO)
    assert [finding.rule for finding in run(quiet).findings] == ["one-row"]  # not: 16 units have a std of 0
    assert run(quiet, quiet).verdict == "stable"
    diagnosis = run(quiet, quiet, quiet | FIRED)
    assert (diagnosis.verdict, diagnosis.cause) == ("diverging", "normaliser-too-few-rows")
    assert "was made from one row by edit 0" in diagnosis.cause_says
    assert "3e5 at edit 2" in diagnosis.cause_says
    assert "normaliser-zero-std" not in {link.cause for link in diagnosis.causes}


def test_where_nothing_is_counted_one_row_is_a_guess() -> None:
    quiet = statistics(WHOLE, 0.0, **ZERO)
    assert "looks made from one row" in found(quiet)["spreadless"].says
    diagnosis = run(quiet, quiet | FIRED)
    assert (diagnosis.cause, diagnosis.confidence) == ("normaliser-too-few-rows", "medium")


def test_many_rows_that_were_all_alike_are_not_one() -> None:
    quiet = statistics(WHOLE, 0.0, seen_rows=9.0, **ZERO)
    assert set(found(quiet)) == {"zero-std"}
    assert run(quiet, quiet | FIRED).cause == "normaliser-zero-std"


def test_one_row_once_is_not_the_cause_of_a_unit_that_stays_constant() -> None:
    first, later = statistics(WHOLE, 0.0, seen_rows=1.0, **ZERO), statistics(WHOLE, 0.0, seen_rows=50.0, std_zeros=1.0)
    diagnosis = run(first, later, later | FIRED | {("editor.no_spread", WHOLE): 0.0})
    assert diagnosis.cause == "normaliser-zero-std"
    assert "unit 7 of the editor's running normaliser" in diagnosis.cause_says


def test_an_update_with_one_row_spoils_what_many_made() -> None:
    sound, bad = (statistics(WHOLE, 0.2, seen_rows=40.0), statistics(WHOLE, math.nan, seen_rows=41.0, **NAN))
    diagnosis = run(sound, sound, bad)
    assert "one-row-update" in found(sound, sound, bad)
    assert diagnosis.cause == "normaliser-nan"
    assert "an update with a single row" in diagnosis.cause_says
    other = statistics(WHOLE, math.nan, seen_rows=41.0, nonfinite=17.0)  # a mean is bad too: more than one row does
    assert "single row" not in run(sound, sound, other).cause_says


def test_statistics_that_are_used_before_their_first_row() -> None:
    unset = statistics(WHOLE, 0.0, seen_rows=0.0, **ZERO)
    assert (
        "used at edit 1 before it has seen any row" in found({("editor.seen_rows", WHOLE): 0.0}, unset)["no-row"].says
    )
    diagnosis = run({("editor.seen_rows", WHOLE): 0.0}, unset | FIRED)
    assert diagnosis.cause == "normaliser-too-few-rows"
    assert "before it had seen any row" in diagnosis.cause_says
    assert "statistics-moved" not in found(unset, statistics(WHOLE, 0.2, seen_rows=40.0))


# -- which units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [U, V, WHOLE])
def test_units_without_a_spread_are_listed_before_they_strike(site: str) -> None:
    zeros = statistics(site, 0.0, std_zeros=5.0, zero_units=[17.0, 80.0])
    assert f"at {site}, units 17, 80 and 3 more: a latent risk" in found(zeros)["zero-std"].says
    one = statistics(site, 0.0, std_zeros=1.0, zero_units=[117.0])
    assert f"1 unit has a standard deviation of 0 in the editor's normaliser at {site}, unit 117:" in (
        found(one)["zero-std"].says
    )


def test_lists() -> None:
    assert listed("unit", [17], 1) == "unit 17"
    assert listed("unit", [17, 80], 2) == "units 17 and 80"
    assert listed("unit", [17, 80, 1024], 3) == "units 17, 80 and 1024"
    assert listed("unit", [17, 80], 5) == "units 17, 80 and 3 more"


@pytest.mark.parametrize("site", [V, WHOLE])
@pytest.mark.parametrize(("std", "cause"), [(0.0, "normaliser-zero-std"), (1e-9, "unknown")])
def test_zero_is_zero_on_both_sides_and_next_to_zero_is_not(site: str, std: float, cause: str) -> None:
    fired: Reading = {
        ("editor.input_max", site): 3e5,
        ("editor.input_unit", site): 7.0,
        ("editor.input_unit_std", site): std,
    }
    assert run(statistics(site, std), statistics(site, std) | fired).cause == cause


# -- frozen, running, not known ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spreads", "word"),
    [((0.0,), " normaliser"), ((0.0, 0.0), " frozen normaliser"), ((0.1, 0.0), " running normaliser")],
)
def test_only_what_held_still_is_frozen(spreads: tuple[float, ...], word: str) -> None:
    edits = [statistics(WHOLE, std) for std in spreads]
    edits[-1] = edits[-1] | FIRED | {("editor.no_spread", WHOLE): 0.0}
    assert f"unit 7 of the editor's{word} at {WHOLE}" in run(*edits).cause_says
    assert "frozen" not in "".join(finding.says for finding in run(*edits).findings)


# -- which layers -----------------------------------------------------------------------------------------------------


def served(layers: list[str], site: str, *edits: Reading) -> Diagnosis:
    analyzer = Analyzer(METRICS)
    analyzer.observe_note(Note(0, SERVES, serving_says(site, layers)))
    for each in made(edits):
        analyzer.observe(each)
    return analyzer.diagnosis()


def test_the_layers_stand_beside_the_shape_in_every_sentence() -> None:
    quiet = statistics(V, 0.0, std_zeros=1.0, zero_units=[3.0])
    fired: Reading = {("editor.input_max", V): 3e5, ("editor.input_unit", V): 3.0, ("editor.input_unit_std", V): 0.0}
    layers = ["layers.2.fc2", "layers.3.fc2"]
    diagnosis = served(layers, "editor.net.(4, 8)", quiet, quiet, quiet | fired)
    named = f"{V} (serves layers.2.fc2, layers.3.fc2)"
    assert len(diagnosis.findings) == 2
    assert all(named in finding.says for finding in diagnosis.findings)
    assert named in diagnosis.cause_says
    assert named in diagnosis.says
    assert named in diagnosis.causes[0].says
    assert {finding.site for finding in diagnosis.findings} == {V}


@pytest.mark.parametrize("other", ["editor.net.(4, 8)2.u", "editor.net.(4, 8).unit", "editor.net.(8, 4).u"])
def test_another_part_has_other_layers(other: str) -> None:
    quiet = statistics(other, 0.0, std_zeros=1.0)
    diagnosis = served(["layers.2.fc2"], "editor.net.(4, 8)", quiet)
    assert len(diagnosis.findings) == 1
    assert "serves" not in diagnosis.says


def test_a_part_at_the_end_of_a_sentence() -> None:
    quiet = statistics("editor.(4, 8)", math.nan, nonfinite=3.0)
    assert "editor.(4, 8) (serves fc)" in served(["fc"], "editor.(4, 8)", quiet).cause_says


def test_a_note_of_layers_can_be_read_back() -> None:
    assert read_serving(serving_says("editor.(4, 8)", ["a", "b"])) == ("editor.(4, 8)", "a, b")
    assert read_serving(serving_says("editor.x", list("abcde"))) == ("editor.x", "a, b, c and 2 more")
    assert read_serving("another note") is None
    analyzer = Analyzer(METRICS)
    analyzer.observe_note(Note(0, SERVES, "another note"))
    analyzer.observe(row(0, {}))
    assert analyzer.diagnosis().findings == ()
