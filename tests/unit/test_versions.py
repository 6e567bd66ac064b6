"""What is asked of the environment: said once in setup.cfg, and in one line where it is not met."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from stabilitylab.errors import UsageError
from stabilitylab.watching import OLDEST_TORCH, expect_torch

ROOT = Path(__file__).resolve().parents[2]


def requirements(section: str, option: str) -> dict[str, str]:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lines = [line.strip() for line in config[section][option].splitlines()]
    found = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", line) for line in lines if line and line[0] not in "#%")
    return {match[1]: match[2] for match in found if match is not None}


@pytest.mark.parametrize("version", ["2.3.1+cu121", "1.13.0", "2.3"])
def test_a_torch_that_is_too_old_is_said_in_one_line(version: str) -> None:
    with pytest.raises(UsageError, match=rf"torch {re.escape(version)} is too old .*; expected 2\.4 or newer"):
        expect_torch(version)


@pytest.mark.parametrize("version", ["2.4.0", "2.13.0+cpu", "2.10.0a0+git1234", "3.0.0"])
def test_a_newer_one_is_taken(version: str) -> None:
    expect_torch(version)


def test_the_floor_is_that_of_setup_cfg_and_transformers_is_no_core_dependency() -> None:
    core = requirements("options", "install_requires")
    assert core["torch"] == ".".join(map(str, OLDEST_TORCH))
    assert "transformers" not in core
    assert "transformers" in requirements("options.extras_require", "lab")
