"""The plugin: which addresses it answers, and with what. Everything it sends was found under the logdir.

=====================  =============================================================================================
address                answer
=====================  =============================================================================================
``/index.js``, …       the page: ES modules and a style sheet from `static/`
``/runs``              the runs found, each with its verdict, or why it can't be read
``/run?run=ID``        a run without its readings, and its ``version``; while it is judged, how far that has come
``/values?…&metric=N`` one metric at all sites, ``&version=`` that of ``/run``; bytes as in `payload.packed`
``/site?…&site=N``     all readings at one site, likewise
=====================  =============================================================================================

The ``Host`` of a request is not looked at, since TensorBoard (2.21) does not for its own pages either: whoever can
reach them under another name reads the logdir's data there, and a check of ours alone would break proxied tabs
(Jupyter, ssh, VS Code) and protect nothing. Nothing can be written, and no path is made from a request.

A run that isn't there is 404, a version that is no longer kept 409: ask ``/run`` again.
"""

# mypy: disable-error-code="import-untyped, misc"
# TensorBoard ships no type information.

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Final

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from tensorboard.util import tb_logging
from werkzeug import Request, Response

from stabilitylab.record.run import Run
from stabilitylab.reports.tensorboard_plugin import payload
from stabilitylab.reports.tensorboard_plugin.shelf import PATIENCE_SECONDS, Shelf, local_folder

NAME: Final = "stability"
_TYPES: Final = {".js": "text/javascript", ".css": "text/css"}

App = Callable[[Any, Any], Any]


class _Refused(Exception):
    """An answer other than 200, in one line."""

    def __init__(self, code: int, says: str) -> None:
        super().__init__(says)
        self.code = code


class StabilityPlugin(base_plugin.TBPlugin):
    """The tab "Stability". It is there while a run file lies under a logdir on this machine."""

    plugin_name = NAME

    def __init__(self, context: Any) -> None:
        """context: TensorBoard's; of it the logdir alone is read. Begins to look for runs, and does not wait."""
        root = local_folder(context.logdir)
        if root is None:  # also with --logdir_spec, which leaves the logdir empty
            self._shelf: Shelf | None = None
            tb_logging.get_logger().info("stabilitylab: the Stability tab needs --logdir with a folder of this machine")
        else:
            self._shelf = Shelf(root)
            self._shelf.start()

    def is_active(self) -> bool:
        """Whether a run file was seen at the last look. Does not wait."""
        return self._shelf is not None and len(self._shelf) > 0

    def frontend_metadata(self) -> Any:
        """Where TensorBoard finds the page."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Stability")

    def get_plugin_apps(self) -> dict[str, App]:
        """WSGI applications by address."""
        apps = {f"/{name}": _static(content, kind) for name, (content, kind) in _page().items()}
        for address, answer in (
            ("/runs", self._runs),
            ("/run", self._run),
            ("/values", self._values),
            ("/site", self._site),
        ):
            apps[address] = _answering(answer)
        return apps

    def _open(self) -> Shelf:
        if self._shelf is None:
            raise _Refused(404, "no folder of this machine is watched")
        return self._shelf

    def _runs(self, request: Request) -> Response:
        return _json(request, self._open().listing())

    def _run(self, request: Request) -> Response:
        name = request.args.get("run", "")
        try:
            copy = self._open().ask(name, PATIENCE_SECONDS)
        except KeyError:
            raise _Refused(404, "no such run under the logdir") from None
        if copy is None:
            return _json(request, {"id": name, "state": "judging", **self._open().progress(name)})
        state = "unreadable" if copy.reason else "read"
        return _json(
            request, {**copy.about, "id": name, "version": copy.version, "state": state, "reason": copy.reason}
        )

    def _kept(self, request: Request) -> Run:
        """The run that a request for readings is about, at the version that it names."""
        try:
            copy = self._open().copy(request.args.get("run", ""), request.args.get("version", ""))
        except KeyError:
            raise _Refused(404, "no such run under the logdir") from None
        if copy is None or copy.run is None:
            raise _Refused(409, "this version of the run is no longer kept; ask for /run again")
        return copy.run

    def _values(self, request: Request) -> Response:
        run = self._kept(request)
        metrics = payload.measured(run)
        return _bytes(request, payload.metric_block(run, metrics[_place(request, "metric", len(metrics))]))

    def _site(self, request: Request) -> Response:
        run = self._kept(request)
        return _bytes(request, payload.site_block(run, run.sites[_place(request, "site", len(run.sites))]))


def _place(request: Request, name: str, count: int) -> int:
    """A number from 0 up to `count`. Raises _Refused for anything else."""
    given = request.args.get(name, "")
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise _Refused(400, f"expected {name}=N, a whole number below {count}")
    if int(given) >= count:
        raise _Refused(404, f"expected {name}=N, a whole number below {count}")
    return int(given)


def _page() -> dict[str, tuple[bytes, str]]:
    """(content, type) of each file of the page by name."""
    folder = files("stabilitylab.reports.tensorboard_plugin").joinpath("static")
    endings = {file: "." + file.name.rpartition(".")[2] for file in folder.iterdir()}
    return {file.name: (file.read_bytes(), _TYPES[end]) for file, end in endings.items() if end in _TYPES}


def _answering(answer: Callable[[Request], Response]) -> App:
    def app(request: Request) -> Response:
        if request.method not in {"GET", "HEAD"}:
            return _json(request, {"error": "expected GET"}, 405)
        try:
            return answer(request)
        except _Refused as refused:
            return _json(request, {"error": str(refused)}, refused.code)

    wrapped: App = Request.application(app)
    return wrapped


def _static(content: bytes, kind: str) -> App:
    return _answering(lambda request: _respond(request, content, kind))


def _json(request: Request, content: Mapping[str, Any], code: int = 200) -> Response:
    return _respond(request, json.dumps(content, allow_nan=False), "application/json", code)


def _bytes(request: Request, content: bytes) -> Response:
    return _respond(request, content, "application/octet-stream")


def _respond(request: Request, content: bytes | str, kind: str, code: int = 200) -> Response:
    """With TensorBoard's headers, among them ``X-Content-Type-Options: nosniff``; compressed where that helps."""
    response: Response = http_util.Respond(request, content, kind, code=code)
    return response
