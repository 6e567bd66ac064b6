from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.analysis.analyzer import NOTHING_MOVED
from stabilitylab.errors import UsageError
from stabilitylab.record.readings import Note
from stabilitylab.reports import SINKS, sink_class
from stabilitylab.reports.manifest import environment, reproduce
from stabilitylab.reports.noted import folded
from stabilitylab.reports.text import clean, number, percent, sentence, short_names, shorten, with_short_names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "NaN"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
        (0.0, "0"),
        (300.0, "300"),
        (98_304.0, "98,304"),
        (-12.345, "−12.3"),
        (0.0324, "0.0324"),
        (3.21e-7, "3.21e−7"),
        (3.2e7, "3.2e7"),
        (1234.5, "1,234"),
        (1e308, "1e308"),
    ],
)
def test_numbers_have_few_digits_and_names_for_what_is_none(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("unit 117 fired", "Unit 117 fired"), ("fc2 grows", "fc2 grows"), ("a.b grows", "a.b grows"), ("", "")],
)
def test_a_sentence_begins_with_a_capital_but_a_name_stays(text: str, said: str) -> None:
    assert sentence(text) == said


@given(st.text(), st.integers(1, 60))
def test_clean_text_is_short_and_has_nothing_hidden(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    hidden = {char for char in cleaned if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}}
    assert hidden <= {"\u200c", "\u200d"}


def test_clean_spells_out_what_would_reorder_or_steer() -> None:
    assert clean("a\u202eb\x1b[31mc\ud800") == r"a\u202eb\x1b[31mc\ud800"
    assert clean("two\r\nlines\u2028three") == "two lines three"
    assert clean("x" * 1_000_000, 20) == "x" * 19 + "…"


def test_both_ends_of_a_long_name_stay() -> None:
    name = shorten("language_model.model.decoder.layers.11.fc2", 20)
    assert name.startswith("langua")
    assert name.endswith("layers.11.fc2")
    assert len(name) == 20
    assert len(shorten("mega" * 250_000, 30)) == 30


@pytest.mark.parametrize(
    ("sites", "short"),
    [
        (("m.layers.1.fc1", "m.layers.1.fc2", "m.layers.2.fc1"), ("1.fc1", "1.fc2", "2.fc1")),
        (("m.layers.1.fc1", "m.layers.1"), ("1.fc1", "1")),
        (
            ("h.1.mlp.c_fc", "h.1.mlp.c_proj", "h.1.mlp.c_proj.bias"),
            ("1.mlp.c_fc", "1.mlp.c_proj", "1.mlp.c_proj.bias"),
        ),
        (("only.one",), ("only.one",)),
        (("m.layers.1.fc1",), ("1.fc1",)),
        (("editor.mend.0",), ("editor.mend.0",)),
        (("editor.t.4x2.u", "editor.t.4x2.v", "m.h.1.fc1", "m.h.2.fc1"), ("u", "v", "1.fc1", "2.fc1")),
        (("editor.t.u", "editor.t.v", "h.u", "h.w"), ("editor.t.u", "editor.t.v", "h.u", "h.w")),
        (("a", "b"), ("a", "b")),
        ((), ()),
    ],
)
def test_names_lose_the_prefix_that_all_share(sites: tuple[str, ...], short: tuple[str, ...]) -> None:
    assert tuple(short_names(sites).values()) == short


def test_a_sentence_has_short_names_for_sites_and_for_their_parts_only() -> None:
    places = {"m.h.1.fc": "1.fc", "model": "the model"}
    told = "in m.h.1.fc, m.h.1.fc.bias, m.h.1.fcx, xm.h.1.fc, model.h: the model."
    assert with_short_names(told, places) == "in 1.fc, 1.fc.bias, m.h.1.fcx, xm.h.1.fc, model.h: the model."


def test_shares_of_time() -> None:
    assert percent(0.0213) == "2.1 %"
    assert percent(None) == "–"


def test_environment_shows_every_entry_and_cuts_what_is_long() -> None:
    shown = dict(environment({"closed": True, "own": "x" * 5_000, "dtypes": {"float16": 4}, "git": None}))
    assert shown["closed by the monitor"] == "yes"
    assert shown["parameters by dtype"] == "float16 4"
    assert shown["git"] == "–"
    assert len(shown["own"]) == 600


def test_reproduction_is_quoted_for_the_shell() -> None:
    git = {"commit": "abc", "dirty": True}
    lines = reproduce({"command": ["edit it.py", "; rm -rf ~"], "git": git, "cwd": "/home/ann/my work"})
    assert lines[0] == "cd ~/'my work'"
    assert lines[1].startswith("git checkout abc")
    assert lines[2] == "python 'edit it.py' '; rm -rf ~'"
    assert reproduce({}) == []


@pytest.mark.parametrize(
    ("recorded", "typed"),
    [
        (["/opt/env/lib/stabilitylab/__main__.py", "demo"], "python -m stabilitylab demo"),
        (["/home/ann/.venv/bin/stabilitylab", "demo"], "stabilitylab demo"),
        (["/home/ann/loops/mend.py", "--seed", "1"], "python ~/loops/mend.py --seed 1"),
        ([""], None),
    ],
)
def test_the_line_that_makes_a_run_again_is_the_one_that_was_typed(recorded: list[str], typed: str | None) -> None:
    lines = reproduce({"command": recorded, "cwd": "/work", "git": {"commit": "abc"}})
    assert (lines or [None])[-1] == typed
    of_a_script = typed is not None and typed.startswith("python ~")
    assert any(line.startswith(("cd ", "git ")) for line in lines) == of_a_script


def test_versions_are_such_as_an_index_has() -> None:
    (line,) = reproduce({"versions": {"stabilitylab": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6"}})
    assert line == "pip install torch==2.13.0 numpy==2.4.6"


def test_sinks_are_found_by_name() -> None:
    assert {sink_class(name).__name__ for name in SINKS} == {"TensorBoardSink", "ProgressSink", "AlarmSink"}
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        sink_class("tensorbord")


def test_what_each_edit_notes_anew_is_said_once() -> None:
    still = [Note(edit, NOTHING_MOVED, f"edit {edit} moved no parameter of the model") for edit in (1, 2, 60)]
    other = Note(3, NOTHING_MOVED, "edit 3 moved no parameter of the model and brought 2 new, which are looked at")
    kept = Note(0, "logits-lag", "no canary")
    assert folded([kept, still[0], other, *still[1:]]) == [
        kept,
        Note(1, NOTHING_MOVED, "3 edits (the first 1, the last 60) moved no parameter of the model"),
        other,
    ]
    assert folded([kept, still[0]]) == [kept, still[0]]
