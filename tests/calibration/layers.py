"""Batches, layers and reference values that tests of statistics share."""

from models import AWKWARD, pixels, tiny_deit, tiny_swin, tiny_vit

from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.decomposition import Statistic


MODELS = {
    "vit": tiny_vit,
    "awkward vit": lambda: tiny_vit(**AWKWARD),
    "vit without qkv bias": lambda: tiny_vit(qkv_bias=False),
    "deit": tiny_deit,
    "swin": tiny_swin,
}
ALL = frozenset(Statistic)


def batches(*sizes):
    return [Batch(batch) for batch in pixels(sum(sizes)).split(list(sizes))]


def required_for(model, statistics=ALL):
    return {target.name: frozenset(statistics) for target in encoder_linears(model)}


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def covariance(tensor):
    vectors = tensor.reshape(-1, tensor.shape[-1])
    centred = vectors - vectors.mean(0)
    return centred.T @ centred / len(vectors)
