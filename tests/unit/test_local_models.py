"""Folders of models from anywhere: their weights and tokenizers are read, and no code of theirs is run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stabilitylab.errors import UsageError
from stabilitylab.testbed.local_models import read_model, read_tokenizer


@pytest.mark.parametrize("read", [lambda folder: read_model(folder, torch.float32), read_tokenizer])
def test_no_code_of_a_folder_is_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    mark = tmp_path / "it ran"
    (tmp_path / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\n")
    automatic = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "theirs.C")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": automatic}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["theirs.C", "theirs.C"]}})
    )
    asked = io.StringIO("y\n" * 9)  # whoever asks is told yes
    monkeypatch.setattr("sys.stdin", asked)
    with pytest.raises(UsageError, match="can be loaded"):
        read(tmp_path)
    assert not mark.exists()
    assert asked.tell() == 0
