"""The layers that an EasyEdit configuration edits, as the model at hand names them."""

from __future__ import annotations

import re

from torch import nn

from stabilitylab.watching.sites import all_sites


def edited_layers(hparams: object, model: nn.Module) -> list[str] | None:
    """The layers that an EasyEdit configuration edits, as names in `model`; None when it does not say.

    Read from ``inner_params`` (MEND, GRACE, WISE: parameter names, some written ``h[3]``), from ``layers`` with
    ``rewrite_module_tmp`` (FT, ROME, MEMIT: ``transformer.h.{}.mlp.c_proj``), or with each of ``rewrite_module_tmps``
    (PMET).
    """
    named = [re.sub(r"\[(\d+)\]", r".\1", name) for name in getattr(hparams, "inner_params", None) or []]
    one, several = getattr(hparams, "rewrite_module_tmp", None), getattr(hparams, "rewrite_module_tmps", None)
    templates = several or [one] if several or one else []
    if not named:
        layers = getattr(hparams, "layers", None) or []
        named = [str(template).format(layer) for template in templates for layer in layers]
    offered = all_sites(model)
    parameters = {site.parameter: site.name for site in offered.values()}
    found = [parameters.get(name) or (name if name in offered else None) for name in named]
    return [name for name in found if name is not None] or None
