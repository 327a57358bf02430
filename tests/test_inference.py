import pytest
import torch
from torch import nn

from optimum_mixrank.runtime.forward import evaluation_mode


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)), nn.BatchNorm1d(2)).train()
    model[1].training = False
    model[2].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_everything_is_in_evaluation_mode_without_gradients(model):
    with evaluation_mode(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
        assert not model(torch.ones(3, 2)).requires_grad
    assert torch.is_grad_enabled()


def test_every_module_gets_its_own_mode_back(model):
    before = modes(model)
    assert before == [True, True, False, True, True, False]
    with evaluation_mode(model):
        pass
    assert modes(model) == before


def test_also_after_an_exception(model):
    before = modes(model)
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert modes(model) == before
    assert torch.is_grad_enabled()


def test_gradients_stay_off_where_they_were_off(model):
    with torch.no_grad():
        with evaluation_mode(model):
            pass
        assert not torch.is_grad_enabled()
