import pytest
import torch

from adaptvit.priors import PRIORS, halting_prior


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("depth", [1, 4, 12, 24])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_a_prior_is_a_distribution_that_peaks_at_its_target(name: str, depth: int, share: float, scale: float) -> None:
    target = round(1 + share * (depth - 1))
    prior = halting_prior(name, depth, target, scale)
    assert prior.shape == (depth,)
    assert prior.sum().item() == pytest.approx(1.0)
    assert prior.argmax().item() == target - 1


def test_a_gaussian_falls_by_its_scale() -> None:
    prior = halting_prior("gaussian", 12, 6, scale=2.0)
    assert (prior[7] / prior[5]).item() == pytest.approx(torch.tensor(-0.5).exp().item())


def test_a_laplace_falls_by_its_scale() -> None:
    prior = halting_prior("laplace", 12, 6, scale=2.0)
    assert (prior[7] / prior[5]).item() == pytest.approx(torch.tensor(-1.0).exp().item())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cubic", 12, 6), "one of gaussian, laplace, got 'cubic'"),
        (("gaussian", 12, 13), r"1\.\.12, the blocks of this ViT, got 13"),
        (("gaussian", 12, 0.5), r"1\.\.12"),
        (("gaussian", 12, 6, 0.0), "scale must be positive, got 0.0"),
    ],
    ids=str,
)
def test_impossible_priors_are_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        halting_prior(*arguments)
