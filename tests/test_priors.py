import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Cauchy, Distribution, Laplace, LogNormal, Normal, StudentT

from adaptvit.methods.priors import PRIORS, QUASI, SKEW, halting_prior, log_density, mixture, released_target

DEPTHS = torch.arange(1, 13, dtype=torch.float64)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("depth", [1, 4, 12, 24])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.01, 0.2, 1.0, 5.0])
def test_a_prior_is_a_distribution_that_peaks_at_its_target(name: str, depth: int, share: float, scale: float) -> None:
    target = round(1 + share * (depth - 1))
    prior = halting_prior(name, depth, target, scale)
    assert prior.shape == (depth,)
    assert prior.sum().item() == pytest.approx(1.0)
    assert prior.argmax().item() == target - 1


@pytest.mark.parametrize("name", PRIORS)
def test_a_narrow_prior_between_two_blocks_falls_on_them(name: str) -> None:
    prior = halting_prior(name, 12, 6.5, scale=0.001)
    assert prior.isfinite().all()
    assert prior[5:7].sum().item() > (0.8 if name == "cauchy" else 0.9999)


def written_by_torch(name: str, target: float, scale: float) -> Distribution:
    at, width = (torch.tensor(value, dtype=torch.float64) for value in (target, scale))
    sigma = width / at
    return {
        "gaussian": Normal(at, width),
        "laplace": Laplace(at, width),
        "quasi_laplace": Laplace(at, QUASI * width),
        "student_t": StudentT(30.0, at, width),
        "cauchy": Cauchy(at, width),
        "log_normal": LogNormal(at.log() + sigma**2, sigma),
    }[name]


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "skew_normal"])
@pytest.mark.parametrize(("target", "scale"), [(9.0, 1.0), (2.5, 0.3), (6.0, 4.0)])
def test_densities_are_those_of_torch(name: str, target: float, scale: float) -> None:
    expected = written_by_torch(name, target, scale).log_prob(DEPTHS)
    torch.testing.assert_close(log_density(name, 12, target, scale), expected, atol=1e-12, rtol=1e-12)


def skew_normal(x: Tensor, location: Tensor) -> Tensor:
    """The textbook's: a normal density times twice a normal distribution."""
    standard = Normal(x.new_zeros(()), 1.0)
    return 2 * standard.log_prob(x - location).exp() * standard.cdf(SKEW * (x - location))


def test_a_skew_normal_is_a_skew_normal_around_its_peak() -> None:
    location = torch.tensor(8.0, dtype=torch.float64)
    fine = torch.linspace(1, 12, 1_100_001, dtype=torch.float64)
    peak = fine[skew_normal(fine, location).argmax()].item()
    ours = log_density("skew_normal", 12, peak, 1.0).exp()
    torch.testing.assert_close(ours, skew_normal(DEPTHS, location), atol=1e-4, rtol=0)
    prior = halting_prior("skew_normal", 12, 8.0, 2.0)
    assert prior[:7].sum() > 2 * prior[8:].sum()


@pytest.mark.parametrize(("name", "ratio"), [("gaussian", math.exp(-0.5)), ("laplace", math.exp(-1)), ("cauchy", 0.5)])
def test_a_prior_falls_by_its_scale(name: str, ratio: float) -> None:
    prior = halting_prior(name, 12, 6, scale=2.0)
    assert (prior[7] / prior[5]).item() == pytest.approx(ratio)


def test_a_quasi_laplace_falls_to_the_power_of_its_diversity() -> None:
    prior = halting_prior("quasi_laplace", 12, 6)
    assert (prior[6] / prior[5]).item() == pytest.approx(3 ** -math.sqrt(1 / (2 * math.log(3))))


def test_a_log_normal_is_as_curved_as_a_normal_where_it_peaks() -> None:
    at = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(PRIORS["log_normal"](at, 9.0, 2.0), at, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, at)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)
    assert curvature.item() == pytest.approx(-1 / 2.0**2)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3)])
def test_a_mixture_has_its_parts_by_their_shares(weights: tuple[float, float]) -> None:
    early, late = halting_prior("gaussian", 12, 2), halting_prior("cauchy", 12, 10)
    mixed = mixture([early, late], weights)
    assert mixed.tolist() == pytest.approx(
        [0.7 * a + 0.3 * b for a, b in zip(early.tolist(), late.tolist(), strict=True)]
    )
    assert mixed.sum().item() == pytest.approx(1.0)


def test_a_mixture_of_one_is_that_one() -> None:
    prior = halting_prior("laplace", 7, 3)
    assert torch.equal(mixture([prior], (1.0,)), prior)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cubic", 12, 6), "one of gaussian, laplace, .*cauchy, got 'cubic'"),
        (("gaussian", 12, 13), r"1\.\.12, the blocks of this ViT, got 13"),
        (("gaussian", 12, 0.5), r"1\.\.12"),
        (("log_normal", 12, float("nan")), r"1\.\.12, the blocks of this ViT, got nan"),
        (("gaussian", 12, 6, 0.0), "scale must be positive, got 0.0"),
    ],
    ids=str,
)
def test_impossible_priors_are_refused(arguments: tuple, said: str) -> None:
    for make in (halting_prior, released_target):
        with pytest.raises(ValueError, match=said):
            make(*arguments)


def test_a_released_target_needs_a_block_before_its_peak() -> None:
    with pytest.raises(ValueError, match="2 or more, got 1"):
        released_target("gaussian", 12, 1)
    assert released_target("gaussian", 12, 1, buffer=None)[0].item() == pytest.approx(1 / math.sqrt(2 * math.pi))


@pytest.mark.parametrize(
    ("weights", "said"), [((0.7, -0.3), r"positive and finite, got \(0.7, -0.3\)"), ((1.0,), "one weight for each")]
)
def test_impossible_mixtures_are_refused(weights: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mixture([halting_prior("gaussian", 12, 2), halting_prior("gaussian", 12, 10)], weights)
