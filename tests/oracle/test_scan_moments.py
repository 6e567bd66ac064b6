"""The figures of square matrices against naive float64 ones, by loops and by a decomposition of another kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stabilitylab.acting.scanning import moments

SIZE = 24


def drawn(rank: int, seed: int) -> torch.Tensor:
    root = torch.randn(SIZE, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / rank


@pytest.mark.parametrize("rank", [5, SIZE, 4 * SIZE])
def test_moments(rank: int) -> None:
    matrix = drawn(rank, rank)
    found = moments.measure_moments("m", matrix, 100.0)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)  # of a symmetric C ≥ 0 they are its eigenvalues
    assert found.rank == sum(value > values[0] * SIZE * np.finfo(np.float64).eps for value in values) == min(rank, SIZE)
    assert found.largest == pytest.approx(values[0], rel=1e-9)
    if rank >= SIZE:
        assert found.condition == pytest.approx(values[0] / values[-1], rel=1e-6)


def test_asymmetry_and_rows_of_zeros() -> None:
    matrix = drawn(SIZE, 1)
    matrix[3], matrix[:, 3] = 0.0, 0.0
    matrix[0, 1] += 0.5
    found = moments.measure_moments("m", matrix, None)
    cells = [(row, column) for row in range(SIZE) for column in range(SIZE)]
    apart = sum(float(matrix[r, c] - matrix[c, r]) ** 2 for r, c in cells) ** 0.5
    norm = sum(float(matrix[r, c]) ** 2 for r, c in cells) ** 0.5
    assert found.asymmetry == pytest.approx(apart / norm, rel=1e-9)
    assert (found.zero_rows.count, found.zero_rows.first) == (1, (3,))


def away_of(matrix: torch.Tensor) -> float:
    held = matrix.numpy().astype(np.float64)
    square = np.array([[sum(held[r, k] * held[k, c] for k in range(SIZE)) for c in range(SIZE)] for r in range(SIZE)])
    return float(np.sqrt(((square - held) ** 2).sum() / (held**2).sum()))


def test_idempotence_of_what_is_a_projection_and_of_what_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = torch.linalg.qr(drawn(SIZE, 2)[:, :7])
    sound, unsound = kept @ kept.T, drawn(SIZE, 3)
    assert moments.measure_projection("P", sound).rank == 7
    assert moments.idempotence(sound) < 1e-12
    assert moments.idempotence(unsound) == pytest.approx(away_of(unsound), rel=1e-9)
    monkeypatch.setattr(moments, "WIDEST", SIZE - 1)  # by random vectors
    monkeypatch.setattr(moments, "PROBES", 4_000)
    assert moments.idempotence(sound) < 1e-12
    assert moments.idempotence(unsound) == pytest.approx(away_of(unsound), rel=0.1)
