"""Text that must stay text wherever it is shown, by what it tries: page, tab, SVG, console and CSV are tested with it.

Each would, where it got through, set `OWNED` as the page's title or a global of that name, ask `ELSEWHERE` for
something, steer a terminal, turn round what is read, or compute something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from stabilitylab.record.readings import EditRow, Metric, Note
from stabilitylab.record.store import RunWriter

OWNED: Final = "stabilitylab_owned"
ELSEWHERE: Final = "example.org"

INJECTIONS: Final = {
    "script": f"<script>window.{OWNED}=1;document.title='{OWNED}'</script>",
    "closing script": f"</script><script>window.{OWNED}=1</script>",
    "comment and script": f"<!--<script>window.{OWNED}=1</script>-->",
    "attribute": f"\"' onmouseover='window.{OWNED}=1' autofocus onfocus=window.{OWNED}=1 x=\"",
    "image": f"<img src=x onerror=window.{OWNED}=1>",
    "svg": f"<svg onload=window.{OWNED}=1><animate onbegin=window.{OWNED}=1>",
    "frame": f"<iframe srcdoc='<script>parent.{OWNED}=1</script>'></iframe>",
    "link": f'<a href="javascript:window.{OWNED}=1">x</a> javascript:window.{OWNED}=1',
    "style": f"</style><style>body{{display:none}} @import url(https://{ELSEWHERE}/x.css);",
    "css": f"red;background:url(https://{ELSEWHERE}/x.png);}} body{{display:none}}",
    "load": f"<link rel=stylesheet href=//{ELSEWHERE}/x.css><img src=//{ELSEWHERE}/x.png>",
    "base and refresh": f"<base href=//{ELSEWHERE}/><meta http-equiv=refresh content='0;url=//{ELSEWHERE}'>",
    "template": "{{7*7}} {% raw %} ${7*7} #{7*7} <%= 7*7 %> {{config.items()}}",
    "vega expression": f"datum['constructor']['constructor']('window.{OWNED}=1')()",
    "vega signal": '{"signal": "warn(1)"} {"expr": "1+1"}',
    "prototype": "__proto__",
    "constructor": "constructor",
    "entities": "&lt;b&gt; &amp;quot; &#60;script&#62; &#x3c;",
    "textarea": "</textarea></title></noscript></option></select><b>",
    "path": "../../etc/passwd\\..\\x",
    "hash": "#edit=1&site=x&metric=y",
    "query": "a=b&c=d;e?f%00%2e%2e",
    "bidi": "abc\u202edcba\u2066\u200f\u061c bidi",
    "control": "nul\x00 bell\x07 escape\x1b[31mred\x1b]0;title\x07 \x9b31m",
    "separators": "line\r\nbreak\ttab\u2028separator\u2029end",
    "surrogate": "lone \ud800 surrogate",
    "combining": "Z" + "\u0351" * 300,
    "zero width": "a\u200bb\ufeffc\u2060d",
    "formula": f'=HYPERLINK("https://{ELSEWHERE}","x")',
    "command": "@SUM(1+1)*cmd|' /C calc'!A0",
    "markup": "[bold red]markup[/bold red] [/] [link=https://example.org]x[/link]",
    "mathtext": "$\\frac{1}{0}$ $unclosed",
    "markdown": f"![x](https://{ELSEWHERE}/x.png) [y](javascript:alert(1))",
    "empty": "",
    "blank": "   ",
    "mega": "mega" * 250_000,
}
"""By what each tries. The last is a megabyte."""


def hostile_run(folder: Path, edits: int = 12) -> Path:
    """Write the run `folder`: every injection is a layer, a metric's name and meaning, a label, an error and a note."""
    texts = [text for name, text in INJECTIONS.items() if name not in {"empty", "blank"}]
    sites = [f"layers.{place}.{text}" for place, text in enumerate(texts)]
    known = ("update.norm", "activation.max_abs", "canary.agreement")
    metrics = [Metric(name, texts[0], "log", "after", texts[1], texts[2], texts[3]) for name in known]
    metrics += [Metric(text, text, "linear", "after", text, text, text) for text in texts]
    manifest = {
        "closed": False,
        "sites": sites,
        "cwd": texts[0],
        "command": texts[:6],
        "config": {text: text for text in texts},
    }
    writer = RunWriter(folder, manifest, metrics)
    for text in texts:
        writer.note(Note(0, text[:200], text))
    for edit in range(edits + 1):
        value = np.inf if edit > edits - 3 else 1.0 + edit
        readings = {(metric.name, site): np.array([value]) for metric in metrics[:2] for site in sites}
        readings |= {(metric.name, sites[0]): np.array([value + 0.5]) for metric in metrics[3:]}
        readings["canary.agreement", "model"] = np.array([1.0 / (1.0 + edit)])
        text = texts[edit % len(texts)]
        failed = edit % 4 == 2
        writer.append(
            EditRow(
                edit, text, "failed" if failed else "applied" if edit else "start", 0.0, 1.0, 0.01, 0.0,
                error=text if failed else None, readings=readings,
            )
        )  # fmt: skip
    writer.close()
    return folder
