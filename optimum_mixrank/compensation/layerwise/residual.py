"""LWEC, the layer-wise error compensation of arXiv 2402.06004: a second low-rank term, trained on the output loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checkpoint.factorize import factored_linear, layer_of
from ...checkpoint.modeling import FactoredLinear
from ...decomposition import (
    Decomposition,
    LayerStatistics,
    MeanInputMetric,
    Statistic,
    decompose_by_input,
    root_of_covariance,
)
from ...runtime.precision import to_float64
from ..compensator import COMPENSATORS, CompensationTask
from .compensator import LayerwiseCompensator
from .output_loss import output_loss, output_loss_of_factors
from .places import Place


TRAINED, UNCHANGED = "trained", "as it was"
"""Outcomes of layers that the report counts."""


@COMPENSATORS.register
class ResidualCompensator(LayerwiseCompensator):
    """LWEC, the layer-wise error compensation of arXiv 2402.06004: adds a trained term `G Yᵀ` to every factored layer.

    Works in forward order. The inputs `x'` are those that the layer gets in the compressed model, and the target is its
    original output `y`. Of the layer's rank r, `r - q` components come from its decomposition; `G`, `[m, q]`, starts at
    zero and `Y`, `[n, q]`, at random, since two zero factors would have no gradient. Adam follows the gradient of
    `E ‖y - (B A + G Yᵀ) x' - b‖²`, which needs only the moments of inputs and outputs, so that every step takes all
    images into account. The sum is stored as factors of rank r, which is what the budget counts.

    With the metric `mean_input` this is the paper's step: `B A` is the decomposition on the representative input of the
    original model and stays as it is, and only `G` and `Y` are trained. With other metrics `B A` is the decomposition for
    the covariance of `x'` and is trained as well; a layer that training does not improve gets the decomposition of rank r.

    A layer keeps its factors if its loss did not fall; its bias is fitted to `x'` in any case. The report counts these
    outcomes. The paper specifies neither its optimizer nor q; steps, learning rate and q were chosen here on separate
    training images, and the last two hardly matter. Nor does it say which inputs a layer gets while its residual is
    trained, or what becomes of its bias.

    Args:
        share: q as a share of the rank.
        steps: Number of Adam's steps.
        learning_rate: Adam's learning rate, relative to the root mean square of the factors that are kept.
    """

    name = "residual"
    description = "Training residuals"
    residual_targets = False

    def __init__(self, share: float = 0.25, steps: int = 500, learning_rate: float = 0.05) -> None:
        self.share = share
        self.steps = steps
        self.learning_rate = learning_rate

    def solve(
        self, task: CompensationTask, place: Place, input_moment: Tensor, target_moment: Tensor
    ) -> FactoredLinear | nn.Linear:
        """See `LayerwiseCompensator.solve`."""
        current = layer_of(task.model, place.target)
        if place.rank is None or isinstance(current, nn.Linear):
            return current
        candidates = self._candidates(task, place, place.rank, (input_moment, target_moment))
        losses = {name: output_loss(B @ A, input_moment, target_moment) for name, (A, B) in candidates.items()}
        layer, outcome = current, UNCHANGED
        if losses:
            best = min(losses, key=losses.__getitem__)
            found = factored_linear(place.target.module, *candidates[best], place.layout)
            after, before = (output_loss(each.product(), input_moment, target_moment) for each in (found, current))
            # Written so that NaN does not count as an improvement.
            if after < before:
                layer, outcome = found, best
        self.outcomes.append(outcome)
        return layer

    def _candidates(
        self, task: CompensationTask, place: Place, rank: int, moments: tuple[Tensor, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return factors of a rank, `[r, n]` and `[m, r]`, float64, by what the report calls them."""
        candidates: dict[str, tuple[Tensor, Tensor]] = {}
        if task.config.metric == MeanInputMetric.name:
            decomposition, train = _on_mean_input(place), self._train_term
        else:
            weight = to_float64(place.target.module.weight)
            decomposition, train = decompose_by_input(weight, root_of_covariance(moments[0])), self._train
            candidates["decomposed anew"] = decomposition.factors(rank)
        q = min(max(1, round(self.share * rank)), rank - 1)
        if q > 0:
            candidates[TRAINED] = train(decomposition.factors(rank - q), q, *moments, task.config.seed)
        return candidates

    def _train_term(
        self, start: tuple[Tensor, Tensor], q: int, input_moment: Tensor, target_moment: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Train `G` and `Y` alone; return the factors of the sum, `[r, n]` and `[m, r]`, float64."""
        A, B = start
        left = target_moment - B @ (A @ input_moment)
        Y, G = self._descend(_new_term(A, q, len(B), seed), input_moment, left, _size(A))
        return torch.cat([A, Y]), torch.cat([B, G], dim=1)

    def _train(
        self, start: tuple[Tensor, Tensor], q: int, input_moment: Tensor, target_moment: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Train `G` and `Y`, and with them `A` and `B`; return the factors of the sum, `[r, n]` and `[m, r]`, float64."""
        A, B = start
        Y, G = _new_term(A, q, len(B), seed)
        factors = torch.cat([A, Y]), torch.cat([B, G], dim=1)
        return self._descend(factors, input_moment, target_moment, _size(A))

    def _descend(
        self, factors: tuple[Tensor, Tensor], input_moment: Tensor, target_moment: Tensor, size: float
    ) -> tuple[Tensor, Tensor]:
        """Follow the gradient of the output loss from a first factor, `[r, n]`, and a second one, `[m, r]`.

        Args:
            factors: Where to start.
            input_moment: As for `solve`.
            target_moment: As for `solve`.
            size: The root mean square to which the learning rate is relative.
        """
        trained = [factor.float().requires_grad_() for factor in factors]
        moments = input_moment.float(), target_moment.float()
        # Relative to the spread of the targets, so that one learning rate suits all layers.
        unit = moments[1].square().mean().sqrt().clamp_min(1e-30)
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate * size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                (output_loss_of_factors(trained[0], trained[1], *moments) / unit).backward()
                optimizer.step()
                schedule.step()
        return trained[0].detach().double(), trained[1].detach().double()


def _on_mean_input(place: Place) -> Decomposition:
    """Decompose the original layer on the representative input of the original model."""
    weight, statistics = to_float64(place.target.module.weight), place.statistics or LayerStatistics(0)
    statistics = statistics.only({Statistic.REPRESENTATIVE_INPUT}, weight.device)
    if place.target.module.bias is None:
        statistics = statistics.about_zero(weight)
    return MeanInputMetric().decompose(weight, statistics)


def _new_term(A: Tensor, q: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `Yᵀ`, random and of the size of `A`, `[q, n]`, and `G`, zero, `[m, q]`."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(q, A.shape[1], generator=generator, dtype=torch.float64)
    return random.to(A) * _size(A), A.new_zeros(out_features, q)


def _size(A: Tensor) -> float:
    """Return the root mean square of a factor."""
    return float(A.square().mean().sqrt())
