"""What TensorBoard imports at its start, for the entry point ``tensorboard_plugins``.

An error here would end TensorBoard. So this module imports TensorBoard alone; the plugin is imported in `load`, and
whatever goes wrong there costs the tab only.
"""

# mypy: disable-error-code="import-untyped, misc"
# TensorBoard ships no type information.

from __future__ import annotations

from typing import Any

from tensorboard.plugins import base_plugin
from tensorboard.util import tb_logging


class StabilityLoader(base_plugin.TBLoader):
    """Makes the plugin, or says in one line why there is none."""

    def load(self, context: Any) -> Any | None:
        """The plugin for a `TBContext`; None, with a warning in TensorBoard's log, where it can't be made."""
        try:
            from stabilitylab.reports.tensorboard_plugin.plugin import StabilityPlugin

            return StabilityPlugin(context)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            tb_logging.get_logger().warning("stabilitylab: no Stability tab (%s: %s)", type(error).__name__, why)
            return None
