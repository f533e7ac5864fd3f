import pytest
import torch

from mnist_lightning.model import MLP


def test_has_the_tutorials_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in MLP().parameters()) == 784 * 200 + 200 + 200 * 10 + 10 == 159_010


@pytest.mark.parametrize("std", [0.01, 0.5])
def test_initial_weights_are_a_normal_cut_at_two_standard_deviations(std: float) -> None:
    mlp = MLP(init_std=std)
    weights = mlp.hidden.weight.detach()
    # Cutting a normal distribution at two standard deviations leaves 0.8796 of its spread; 156,800 samples.
    assert weights.std() / std == pytest.approx(0.8796, abs=0.01)
    assert 1.95 * std < weights.abs().max() <= 2 * std
    assert mlp.output.weight.abs().max() <= 2 * std
    assert not mlp.hidden.bias.any()
    assert not mlp.output.bias.any()


def test_hidden_units_are_relus_and_outputs_are_not() -> None:
    mlp = MLP(hidden_dim=64, init_std=0.5)
    x = torch.rand(50, 784)
    hidden = x @ mlp.hidden.weight.T
    torch.testing.assert_close(mlp(x), hidden.clamp(min=0) @ mlp.output.weight.T)
    assert (mlp(x) < 0).any()
