import math

import pytest
import torch

from adaptvit.methods.gates import annealed, entropy, gate, gumbel_difference, log_odds, straight_through
from adaptvit.methods.released import adavit


def noise_of(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    return gumbel_difference(torch.zeros(count))


def test_a_gate_is_one_where_the_sigmoid_is_above_the_threshold() -> None:
    logits = torch.tensor([-9.0, -0.1, 0.0, 0.1, 0.4, 0.41, 9.0])
    assert gate(logits).tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert gate(logits, threshold=0.6).tolist() == [0, 0, 0, 0, 0, 1, 1]  # ln 1.5 is 0.405
    assert gate(logits, threshold=0.6, temperature=5.0).tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert gate(logits, noise=torch.tensor([0.0, 0.2, 1, -1, -1, 1, 0])).tolist() == [0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_the_gradient_is_that_of_the_soft_decision(threshold: float) -> None:
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    noise = torch.linspace(1, -1, 25, dtype=torch.float64)
    gate(logits, threshold, 5.0, noise).sum().backward()
    soft = torch.sigmoid((logits.detach() + noise - log_odds(threshold)) / 5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)


def test_straight_through_is_exactly_zero_or_one() -> None:
    soft = torch.sigmoid(torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    assert set(straight_through(soft > 0.5, soft).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("temperature", [0.5, 5.0])
@pytest.mark.parametrize("logit", [-1.0, 0.3, 2.0])
def test_the_temperature_does_not_change_how_often_a_gate_is_on(logit: float, temperature: float) -> None:
    noise = noise_of(40_000)
    logits, error = torch.full_like(noise, logit), 4 * 0.5 / 200  # four standard deviations at most
    expected = 1 / (1 + math.exp(-logit))
    assert gate(logits, 0.5, temperature, noise).mean().item() == pytest.approx(expected, abs=error)
    expected = 1 / (1 + 1.5 * math.exp(-logit))  # above a threshold of 0.6
    assert gate(logits, 0.6, temperature, noise).mean().item() == pytest.approx(expected, abs=error)


def test_the_released_temperature_moves_the_threshold_in_training() -> None:
    noise = noise_of(40_000)
    logits = torch.full_like(noise, 1.0)
    released = adavit.gate(logits, 0.6, 5.0, noise).mean().item()
    assert released == pytest.approx(1 / (1 + math.exp(5 * math.log(1.5) - 1)), abs=0.01)
    assert released < 0.3 < 0.6 < gate(logits, 0.6, 5.0, noise).mean().item()
    assert adavit.gate(logits, 0.6, 5.0, None).all()


def test_the_noise_is_logistic() -> None:
    drawn = noise_of(40_000).double().sort().values
    expected = torch.sigmoid(drawn)  # the logistic distribution function
    steps = torch.arange(1, 40_001, dtype=torch.float64) / 40_000
    assert (steps - expected).abs().max() < 1.63 / 200  # Kolmogorov and Smirnov at 1 %
    assert drawn.isfinite().all()


def test_entropy_is_that_of_bernoulli_variables() -> None:
    logits = torch.linspace(-8, 8, 30, dtype=torch.float64)
    torch.testing.assert_close(entropy(logits), torch.distributions.Bernoulli(logits=logits).entropy().mean())
    assert entropy(torch.tensor([-200.0, 200.0])).item() == pytest.approx(0, abs=1e-6)


def test_log_odds_undo_the_sigmoid() -> None:
    for threshold in (0.01, 0.5, 0.6, 0.99):
        assert torch.sigmoid(torch.tensor(log_odds(threshold))).item() == pytest.approx(threshold)


def test_a_temperature_falls_by_equal_factors() -> None:
    found = [annealed(5.0, 0.05, progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found[0] == 5
    assert found[2] == pytest.approx(0.5)
    assert found[4] == pytest.approx(0.05)
    assert found[1] / found[0] == pytest.approx(found[4] / found[3])
