"""What may be given as the editor: an object, a module, a dict of its state; anything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.editors.mend import Mend
from stabilitylab.errors import UsageError


def test_a_dict_of_what_a_loop_keeps_in_variables_is_read_as_it_is_at_each_edit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    P, cache_c = torch.stack([torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0]))]), torch.zeros(1, 4, 4)
    state: dict[str, Any] = {"P": P, "cache_c": cache_c}
    with sl.attach(model, "0", tmp_path / "run", editor=state, announce=False) as monitor:
        with monitor.edit():
            cache_c += torch.eye(4)  # in place
        with monitor.edit():
            state["cache_c"] = cache_c * 3  # bound anew
    run = sl.load(tmp_path / "run")
    (place,) = run.sites_of("editor.cache_energy")
    energy = run.series("editor.cache_energy", place)
    assert energy[0] == 0
    assert energy[2] == pytest.approx(3 * energy[1])
    assert run.sites_of("editor.null_space_share")
    assert run.manifest["editor_class"] == "dict of P, cache_c"
    assert state.keys() == {"P", "cache_c"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("MEND", "editor='MEND' is a str"),
        (Mend, "is the class Mend"),
        (3, "editor='3' is a int"),
        ([torch.eye(2)], "is a list"),
        ({1: torch.eye(2)}, "is a dict"),
        (torch.eye(2), "is a Tensor"),
    ],
)
def test_what_can_t_keep_state_is_refused_in_one_short_line(tmp_path: Path, given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("'", ".")) as caught:
        sl.attach(nn.Sequential(nn.Linear(2, 2)), "0", tmp_path / "run", editor=given)
    assert "a dict of it" in str(caught.value)
    assert len(str(caught.value)) < 250
    assert not (tmp_path / "run").exists()
