"""The sequential closed form against a float64 reference from the activations themselves."""

import torch
from compensation.layerwise.cases import activations, run

from optimum_mixrank import FactoredLinear
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.layerwise.sequential import SequentialCompensator
from optimum_mixrank.decomposition import anchored_weight, decompose_by_input, root_of_covariance


def test_a_layer_is_the_anchored_solution_for_its_own_inputs():
    original, compressed, _, pixels = run("vit", "sequential")
    layers = [target for target in encoder_linears(original) if target.name.endswith(("query", "q_proj"))]
    for target in layers:
        original_inputs, outputs = activations(original, target.name, pixels)
        inputs = activations(compressed, target.name, pixels)[0]
        layer = compressed.get_submodule(target.name)
        assert isinstance(layer, FactoredLinear)
        X = inputs - inputs.mean(0)
        moment, cross = X.T @ X / len(X), (outputs - outputs.mean(0)).T @ X / len(X)
        best = anchored_weight(target.module.weight.double(), moment, cross, SequentialCompensator().ridge)
        A, B = decompose_by_input(best, root_of_covariance(moment)).factors(layer.rank)
        error = (X @ (layer.product() - B @ A).T).square().sum() / (X @ best.T).square().sum()
        assert error < 1e-6
        # Behind the first block, the inputs differ from those in the original.
        if target is not layers[0]:
            assert not torch.allclose(original_inputs, inputs, atol=1e-3)
