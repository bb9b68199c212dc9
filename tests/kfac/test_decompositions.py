"""Eigendecompositions and inverses of factors, against the dense Kronecker product in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llm.kfac.decompositions as decompositions
from llm.kfac.decompositions import Decomposition, Eigen, Inverse, State
from llm.kfac.formulas import Formulas
from llm.kfac.packed_symmetric import fold

DIM_A, DIM_G, NUM_LAYERS, DAMPING = 5, 4, 3, 0.1


def random_factors(n: int, seed: int) -> Tensor:
    """Symmetric positive definite matrices, float64 [NUM_LAYERS, n, n]."""
    rows = torch.randn(NUM_LAYERS, 3 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.mT @ rows / (3 * n)


def empty_state(decomposition: Decomposition) -> State:
    shapes = {**decomposition.shapes("a", DIM_A), **decomposition.shapes("g", DIM_G)}
    return {name: torch.empty(NUM_LAYERS, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def gradients() -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(NUM_LAYERS, DIM_A, DIM_G, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize(
    "decomposition",
    [Eigen(Formulas(), torch.float64, 1.0), Eigen(Formulas(), torch.float64, 0.5), Inverse(Formulas(), torch.float64)],
    ids=["eigen", "eigen, power 0.5", "inverse"],
)
def test_directions_when_factors_are_given_then_are_those_of_the_dense_product(
    decomposition: Decomposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompositions, "_BATCH", 2 * DIM_A**2)  # two matrices at once, then one
    factors_a, factors_g = random_factors(DIM_A, 0), random_factors(DIM_G, 1)
    state = empty_state(decomposition)
    decomposition.initialize(state)
    decomposition.refresh(state, "a", fold(factors_a), DIM_A, DAMPING)
    decomposition.refresh(state, "g", fold(factors_g), DIM_G, DAMPING)
    directions = decomposition.precondition(state, gradients(), DAMPING)
    for a, g, gradient, direction in zip(factors_a, factors_g, gradients(), directions, strict=True):
        mean_a, mean_g = a.trace() / DIM_A, g.trace() / DIM_G
        eye_a, eye_g = torch.eye(DIM_A, dtype=a.dtype), torch.eye(DIM_G, dtype=g.dtype)
        if isinstance(decomposition, Inverse):
            curvature = torch.kron(a + DAMPING**0.5 * mean_a * eye_a, g + DAMPING**0.5 * mean_g * eye_g)
            power = 1.0
        else:
            assert isinstance(decomposition, Eigen)
            curvature = torch.kron(a, g) + DAMPING * mean_a * mean_g * torch.kron(eye_a, eye_g)
            power = decomposition.power
        values, vectors = torch.linalg.eigh(curvature)
        expected = vectors @ ((vectors.T @ gradient.flatten()) / values**power)
        torch.testing.assert_close(direction.flatten(), expected)


@pytest.mark.parametrize("name", ["eigen", "inverse"])
def test_directions_when_the_state_is_initial_then_are_those_of_identity_factors(name: str) -> None:
    eigen = name == "eigen"
    decomposition = Eigen(Formulas(), torch.float64, 1.0) if eigen else Inverse(Formulas(), torch.float64)
    state = empty_state(decomposition)
    decomposition.initialize(state)
    directions = decomposition.precondition(state, gradients(), DAMPING)
    # The damping is added to the product of the eigenvalues, but is inside the inverses from their first refresh on.
    torch.testing.assert_close(directions, gradients() / (1 + DAMPING) if eigen else gradients())


def test_inverse_when_a_factorization_fails_then_only_that_layer_keeps_its_previous_inverse() -> None:
    inverse = Inverse(Formulas(), torch.float64)
    state = empty_state(inverse)
    inverse.initialize(state)
    factors = random_factors(DIM_A, 0)
    factors[1] = -torch.eye(DIM_A, dtype=factors.dtype)
    inverse.refresh(state, "a", fold(factors), DIM_A, DAMPING)
    assert torch.equal(state["inverse_a"][1], torch.eye(DIM_A, dtype=factors.dtype))
    for index in (0, 2):
        diagonal = DAMPING**0.5 * factors[index].trace() / DIM_A * torch.eye(DIM_A, dtype=factors.dtype)
        torch.testing.assert_close(state["inverse_a"][index], torch.linalg.inv(factors[index] + diagonal))


def test_cost_when_methods_are_compared_then_the_inverse_is_cheaper() -> None:
    assert Inverse.refresh_cost < Eigen.refresh_cost
    assert (Inverse.num_products, Eigen.num_products) == (1, 2)
