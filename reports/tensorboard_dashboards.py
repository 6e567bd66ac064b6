"""What a run tells TensorBoard's dashboards Custom Scalars and HParams: a layout, and one session per run.

Made with TensorBoard's own messages; its helpers for the same (`custom_scalar.summary.pb`, `hparams.summary`) need
TensorFlow, so that two of them are spelled out here.
"""

# mypy: disable-error-code="import-untyped"
# TensorBoard ships no type information.

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from stabilitylab.record.readings import Metric
from stabilitylab.reports.text import clean

FINAL: Final = {
    "verdict/last_edit": "the last edit that was recorded",
    "verdict/severity": "0 stable, 1 drifting, 2 diverging, 3 collapsed, 4 non-finite",
    "verdict/onset_edit": "the edit at which values began to leave their range, in hindsight",
}
"""Tags of the scalars that HParams shows of a run, and what they mean."""

CONFIG_VALUES: Final = 40
_BRACKETS: Final = str.maketrans("()", "[]")
_FAMILIES: Final = {
    "update": "Updates",
    "drift": "Drift",
    "weight": "Weights",
    "activation": "Activations",
    "attention": "Attention",
    "gradient": "Gradients",
    "logits": "Logits",
    "canary": "Canary",
    "editor": "Editor",
    "feedback": "Feedback",
}
_VERDICT: Final = {
    "verdict": "^verdict/severity$",
    "non-finite values": "^nonfinite/",
    "seconds": "^seconds/",
}


def metric_tag(metric: str, log: bool) -> str:
    """The part of a tag that names the metric: ``update.norm log10``."""
    return f"{tag_part(metric, 80)}{' log10' if log else ''}"


def tag_part(text: str, limit: int) -> str:
    """`text` as a part of a tag: Custom Scalars draws a series blank whose tag holds a round bracket."""
    return clean(text, limit).translate(_BRACKETS)


def layout(metrics: Sequence[Metric]) -> Summary.Value:
    """Custom Scalars: the verdict, then a category per family of metrics with a chart per metric, a line per site."""
    families = list(dict.fromkeys([*_FAMILIES, *(metric.family for metric in metrics)]))
    found = layout_pb2.Layout(category=[_category("Verdict", _VERDICT.items())])
    for family in families:
        charts = [
            (clean(metric.name, 80), f"^{re.escape(metric_tag(metric.name, metric.scale == 'log'))}/")
            for metric in metrics
            if metric.family == family
        ]
        if charts:
            found.category.append(_category(_FAMILIES.get(family, clean(family, 40)), charts))
    return Summary.Value(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        tensor=TensorProto(dtype=DT_STRING, string_val=[found.SerializeToString()]),
        metadata=SummaryMetadata.FromString(layout_metadata.create_summary_metadata().SerializeToString()),
    )


def _category(title: str, charts: Iterable[tuple[str, str]]) -> Any:
    return layout_pb2.Category(
        title=title,
        chart=[
            layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=[tags]))
            for name, tags in charts
        ],
    )


def hyperparameters(about: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """What a run was made with, as HParams can show it. about: its manifest."""
    config = about.get("config")
    given = dict(config) if isinstance(config, Mapping) else {}
    sites, dtypes = about.get("sites"), about.get("dtypes")
    known: dict[str, bool | float | str] = {}
    if sites:  # not known yet where the first edit is to show them
        known["sites"] = len(sites)
    for name, field in (("editor", "editor_class"), ("model", "model_class")):
        if about.get(field):
            known[name] = clean(str(about[field]).rpartition(".")[2], 120)
    if "precision" in given:
        known["precision"] = clean(given.pop("precision"), 120)
    elif isinstance(dtypes, Mapping) and dtypes:
        known["precision"] = clean(", ".join(sorted(dtypes, key=lambda name: -dtypes[name])), 120)
    for key, value in list(given.items())[:CONFIG_VALUES]:
        name = clean(key, 80)
        plain = value if isinstance(value, bool | int | float) else clean(_words(value), 200)
        known[f"config.{name}" if name in known else name] = plain
    return known


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def session_start(logdir: Path, about: Mapping[str, Any]) -> list[Summary.Value]:
    """HParams: which columns there are, and this run's session; runs with the same settings stay apart."""
    known = hyperparameters(about)
    columns = [summary_v2.HParam(name) for name in known]
    metrics = [summary_v2.Metric(tag, display_name=tag, description=means) for tag, means in FINAL.items()]
    made = (
        summary_v2.hparams_config_pb(hparams=columns, metrics=metrics),
        summary_v2.hparams_pb(known, trial_id=clean(logdir, 400)),
    )
    return [value for each in made for value in Summary.FromString(each.SerializeToString()).value]


def session_end() -> Summary.Value:
    """HParams: the session is over."""
    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    about = hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
    return Summary.Value(
        tag=hparams_metadata.SESSION_END_INFO_TAG,
        metadata=SummaryMetadata.FromString(about.SerializeToString()),
        tensor=TensorProto.FromString(hparams_metadata.NULL_TENSOR.SerializeToString()),
    )
