"""Do learned matrices stay in their group, and get where the loss is least?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.rotations import Group, Key, contains, sample
from qpass.search.orthogonal import Learner, project

# what the plans of a run need of matrices that are still being learned
ORTHOGONAL = 1e-6


def error(matrices: torch.Tensor) -> float:
    wide = matrices.double()
    return float((wide @ wide.mT - torch.eye(wide.shape[-1]).double()).abs().max())


@given(
    heads=st.integers(1, 3),
    width=st.integers(2, 40),
    rate=st.floats(1e-3, 1.0),
    lifted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=25)
def test_learned_matrices_stay_in_their_group(
    heads: int, width: int, rate: float, lifted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    learner = Learner([(heads, width)], [lifted])
    for _ in range(20):
        G = torch.randn(heads, width, width, generator=generator)
        learner.step((learner.matrices[0] * G).sum(), rate)
    (found,) = learner.values()
    assert error(found) <= ORTHOGONAL
    if lifted:
        assert (found.sum(-2) - 1).abs().max() <= 10 * ORTHOGONAL
    exact = project(found)
    assert all(contains(Group.ORTHOGONAL, each) for each in exact)
    assert (exact - found.double()).abs().max() <= ORTHOGONAL


@pytest.mark.parametrize("lifted", [False, True])
def test_a_known_rotation_is_found(lifted: bool) -> None:
    # a turn by less than a quarter: another component of the group is out of reach
    skew = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    if lifted:
        # what moves nothing along the all-ones vector
        skew = skew - skew.mean(0) - skew.mean(1, keepdim=True) + skew.mean()
    wanted = torch.matrix_exp(0.2 * (skew - skew.mT)).float()
    learner = Learner([(1, 6)], [lifted])
    for at in range(200):
        loss = (learner.matrices[0][0] - wanted).square().sum()
        learner.step(loss, 0.1 * (1 - at / 200))
    assert (learner.matrices[0][0] - wanted).abs().max() <= 1e-2


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    learner = Learner([(1, 4)], [False])
    learner.step((learner.matrices[0] * float("inf")).sum(), 0.1)
    assert torch.equal(learner.values()[0], torch.eye(4)[None])


def test_what_is_not_read_stays() -> None:
    learner = Learner([(1, 4), (2, 3)], [False, False])
    learner.step(learner.matrices[0].tril().sum(), 0.1)
    assert not torch.equal(learner.values()[0], torch.eye(4)[None])
    assert torch.equal(learner.values()[1], torch.eye(3).repeat(2, 1, 1))


def test_projection_is_the_nearest() -> None:
    R = sample(Group.ORTHOGONAL, 9, Key("near", 0))
    noise = 1e-4 * torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
    found = project(R + noise)
    assert contains(Group.ORTHOGONAL, found)
    assert (found - R).norm() <= 2 * noise.norm()
