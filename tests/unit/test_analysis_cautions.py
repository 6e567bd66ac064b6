"""What a scan's figures of a model warn of, at each limit."""

from __future__ import annotations

from dataclasses import replace

from stabilitylab.analysis.cautions import cautions
from stabilitylab.record.scanned import Some
from tests.caution_cases import (
    CACHE,
    FINE,
    INPUT,
    MOMENTS,
    NAME,
    OUTPUT,
    PRECISION,
    PROJECTION,
    RATES,
    STATISTICS,
    TWO,
    VECTOR,
    Case,
    check_limits,
    check_words,
    every,
    layers,
    of_rule,
    output,
    scan_of,
    tensor,
)

HALVES = [replace(FINE, name="other.weight", dtype="float16")]
CASES = (
    Case(
        "nonfinite-weight",
        "fatal",
        tensor(nonfinite=3, first_bad=(0, 5)),
        f"3 of 32 entries of {NAME} are not finite, first at (0, 5).",
        also=[tensor(nonfinite=3, masking=3), tensor(nonfinite=3, masking=2, is_buffer=True)],
        silent=[tensor(), tensor(nonfinite=3, masking=3, is_buffer=True)],
    ),
    Case(
        "masks",
        "note",
        tensor(nonfinite=3, masking=3, is_buffer=True),
        f"{NAME} holds −∞ in 3 places, as masks do.",
        also=[tensor(name="mask", nonfinite=3, masking=3), (replace(VECTOR, nonfinite=3, masking=3),)],
        silent=[tensor(nonfinite=3, masking=2, is_buffer=True), tensor(nonfinite=3, masking=3)],
    ),
    Case(
        "negative-variance",
        "fatal",
        tensor(name="bn.running_var", least=-0.1),
        "bn.running_var is negative, -0.1: the root of a variance below 0 is NaN.",
        "bn.running_var",
        silent=[
            tensor(name="bn.running_var", least=0.0),
            tensor(name="bn.running_var", least=None),
            tensor(least=-0.1),
        ],
    ),
    Case(
        "output-overflows",
        "risk",
        tensor(dtype="float16", worst_output=65_504.0),
        f"{NAME} can make 65,504 of an input of RMS 1, and float16 ends at 65,504.",
        silent=[
            tensor(dtype="float16", worst_output=65_503.0),
            tensor(dtype="float16", worst_output=7e4, nonfinite=1),
            tensor(dtype="float8_e4m3fn", worst_output=7e4),
        ],
    ),
    Case(
        "norm-overflows",
        "fatal",
        tensor(worst_output=2e19),
        f"{NAME} makes up to 2e19 of an input of RMS 1: the next normalisation squares that, and squares"
        " end at 1.84e19.",
        also=[tensor(dtype="bfloat16", worst_output=2e19)],
        silent=[tensor(worst_output=1.8e19), tensor(dtype="float64", worst_output=2e19), tensor(worst_output=None)],
    ),
    Case(
        "near-overflow",
        "risk",
        tensor(dtype="float16", greatest=4_095.0),
        f"{NAME} is 4.0 bits from overflow: its largest entry is 4,095, and float16 ends at 65,504.",
        silent=[
            tensor(dtype="float16", greatest=4_094.0),
            tensor(greatest=4_095.0),
            tensor(dtype="float8_e4m3fn", greatest=447.0),
            tensor(dtype="float16", greatest=None),
        ],
    ),
    Case(
        "float16",
        "risk",
        (*tensor(dtype="float16"), replace(FINE, dtype="float16", name="n", greatest=2.0), *output(dtype="float16")),
        "The model is float16: a weight, an update or an activation over 65,504 ends it. Of its weights n is nearest,"
        " 15.0 bits away. Of the canary's activations the output of fc1 is,",
        "",
        silent=[tensor(), tensor(dtype="float16", is_buffer=True)],
    ),
    Case(
        "float16",
        "risk",
        (*layers(1.0, 1.0, dtype="float16"), replace(FINE, name="head.weight")),
        "model.layers is float16:",
        "",
    ),
    Case("float16", "risk", (*tensor(dtype="float16"), *HALVES, VECTOR), "Part of the model is float16:", ""),
    Case(
        "bfloat16",
        "note",
        tensor(dtype="bfloat16"),
        "The model is bfloat16, which holds eight bits of a number",
        "",
        silent=[
            tensor(),
            tensor(dtype="bfloat16", is_buffer=True),
            (*tensor(dtype="bfloat16"), replace(FINE, is_site=True)),
        ],
    ),
    Case("bfloat16", "note", tensor(dtype="bfloat16", is_site=True), "What is edited is bfloat16", ""),
    Case(
        "out-of-line",
        "risk",
        layers(2.0, 20.0, 2.0, 2.0),
        f"The norm of {NAME} is 20, 10 times what it is in the other 3 layers.",
        silent=[
            layers(2.0, 19.9, 2.0, 2.0),
            layers(2.0, 20.0, 2.0),
            layers(0.0, 20.0, 0.0, 0.0),
            layers(2.0, 20.0, 2.0, 2.0, shape=(4,)),
            layers(2.0, 20.0, 2.0, 2.0, dtype="float8_e5m2"),
            layers(2.0, 20.0, 2.0, 2.0, nonfinite=1),
            (*layers(2.0, 20.0), *(replace(each, shape=(8, 4)) for each in layers(2.0, 2.0))),
        ],
    ),
    Case(
        "zero-weight",
        "risk",
        tensor(zeros=32),
        f"{NAME} is zero throughout: its layer says nothing",
        silent=[
            tensor(zeros=31),
            tensor(zeros=32, nonfinite=1),
            tensor(zeros=32, name="lora_B.weight"),
            (replace(VECTOR, zeros=4),),
        ],
    ),
    Case(
        "zero-outputs",
        "note",
        tensor(zero_rows=TWO),
        f"2 of the 4 outputs of {NAME} have weights of exactly 0: units 17 and 80.",
        silent=[
            tensor(),
            tensor(zero_rows=TWO, name="embed.weight"),
            tensor(zero_rows=TWO, zeros=32),
            tensor(zero_rows=TWO, nonfinite=1),
        ],
    ),
    Case(
        "zero-inputs",
        "note",
        tensor(zero_columns=Some(6, (1, 2, 3, 4, 5, 6))),
        f"6 of the 8 inputs of {NAME} have weights of exactly 0: units 1, 2, 3, 4 and 2 more.",
        silent=[tensor()],
    ),
    Case(
        "subnormal",
        "note",
        tensor(shape=(10, 10), subnormal=2),
        f"2% of the entries of {NAME} are below float16's smallest normal value and have lost bits already.",
        silent=[tensor(shape=(10, 10), subnormal=1), tensor(shape=(4,), subnormal=4)],
    ),
    Case(
        "subnormal",
        "note",
        (*tensor(shape=(10, 10), subnormal=20), replace(FINE, name="n", shape=(100, 10), subnormal=90)),
        "20% of the entries of",
    ),
    Case(
        "weight-singular",
        "note",
        tensor(condition=1e7),
        f"{NAME} has a condition of 1e7",
        silent=[tensor(condition=9.9e6), tensor(condition=None)],
    ),
    Case(
        "loud-output",
        "note",
        tensor(loud_rows=Some(3, (17, 4, 5), (41.2, 30.0, 20.0))),
        f"Output 17 of {NAME} has weights 41 times those of the median one, and of 2 more: a massive activation",
        silent=[tensor(), tensor(loud_rows=Some(1, (17,), (41.0,)), name="wte.weight")],
    ),
    Case(
        "loud-input",
        "note",
        tensor(loud_columns=Some(1, (17,), (41.2,))),
        f"Input 17 of {NAME} has weights 41 times those of the median one: a massive activation",
        silent=[tensor()],
    ),
    Case(
        "nonfinite-activation",
        "fatal",
        output(nonfinite=4),
        "The canary's output of fc1 is not finite in 4 entries, before any edit.",
        "fc1",
        silent=[output()],
    ),
    Case(
        "activation-near-overflow",
        "risk",
        output(dtype="float16", limit=65_504.0, largest=4_095.0),
        "On the canary, the output of fc1 reaches 4,095: 4.0 bits from 65,504, where float16 ends.",
        "fc1",
        silent=[output(dtype="float16", limit=65_504.0, largest=4_094.0), output(largest=None)],
    ),
    Case(
        "activation-near-overflow",
        "risk",
        (replace(INPUT, limit=1_600.0, largest=800.0),),
        "On the canary, the input of norm reaches 800: 1.0 bits from 1,600, where its square overflows.",
        "norm",
    ),
    Case(
        "dead-units",
        "note",
        output(units=256, dead=TWO),
        "2 of 256 units of fc1 are 0 on all of the canary: units 17 and 80.",
        "fc1",
        silent=[output(dead=None), output(dead=Some())],
    ),
    Case(
        "massive-activation",
        "note",
        output(largest=501.0, typical=0.5, token=9),
        "On the canary, unit 7 of the output of fc1 is 501 at position 2 (token 9), 1,002 times the median: a massive"
        " activation.",
        "fc1",
        silent=[
            output(largest=500.0, typical=0.5),
            output(largest=100.0, typical=0.01),
            output(largest=None),
            (replace(INPUT, largest=501.0),),
        ],
    ),
    Case(
        "massive-activation",
        "note",
        (*output(largest=501.0), *output(layer="b", largest=601.0), *output(layer="c", largest=551.0)),
        "the output of b is 601 at position 2, 1,202 times the median: a massive activation. 2 other layers"
        " have one too.",
        "b",
    ),
    Case(
        "massive-activation",
        "note",
        (*output(largest=101.0, typical=0.01), *output(layer="b", largest=90.0, typical=0.01)),
        "a massive activation.",
        "fc1",
    ),
)


@every(CASES)
def test_it_is_warned_of_once_in_these_words(case: Case) -> None:
    check_words(case)


@every(CASES)
def test_it_is_warned_of_at_the_limit_and_not_short_of_it(case: Case) -> None:
    check_limits(case)


def test_a_sound_model_and_a_sound_editor_warn_of_nothing() -> None:
    sound = (FINE, VECTOR, OUTPUT, INPUT, STATISTICS, RATES, MOMENTS, PROJECTION, CACHE, PRECISION)
    assert cautions(scan_of(*sound)) == ()


def test_the_most_urgent_comes_first_and_of_one_urgency_the_nearest_to_its_end() -> None:
    near = [replace(FINE, name=name, dtype="float16", greatest=size) for name, size in (("a", 5e3), ("b", 6e4))]
    held = (*near, replace(FINE, name="c", nonfinite=1), replace(FINE, name="d", condition=1e9))
    found = [(each.urgency, each.place) for each in cautions(scan_of(*held)) if each.place]
    assert found == [("fatal", "c"), ("risk", "b"), ("risk", "a"), ("note", "d")]
    outputs = [replace(OUTPUT, layer=str(size), limit=65_504.0, largest=size) for size in (5e3, 6e4, 9e3, 8e3, 7e3)]
    assert [each.place for each in of_rule("activation-near-overflow", *outputs)] == [
        "60000.0",
        "9000.0",
        "8000.0",
        "7000.0",
    ]
