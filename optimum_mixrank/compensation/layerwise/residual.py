"""LWEC, the layer-wise error compensation of arXiv 2402.06004: a second low-rank term, trained on the output loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checkpoint.factorize import factored_linear, layer_of
from ...checkpoint.modeling import FactoredLinear
from ...decomposition import decompose_by_input, root_of_covariance
from ...runtime.precision import to_float64
from ..compensator import COMPENSATORS, CompensationTask
from .compensator import LayerwiseCompensator
from .output_loss import output_loss, output_loss_of_factors
from .places import Place


@COMPENSATORS.register
class ResidualCompensator(LayerwiseCompensator):
    """LWEC, the layer-wise error compensation of arXiv 2402.06004: adds a trained term `G Yᵀ` to every factored layer.

    Works in forward order. The inputs `x'` are those that the layer gets in the compressed model, and the target is its
    original output `y`. Of the layer's rank r, `r - q` components come from its decomposition; `G`, `[m, q]`, starts at
    zero and `Y`, `[n, q]`, at random, since two zero factors would have no gradient. Adam follows the gradient of
    `E ‖y - (B A + G Yᵀ) x' - b‖²`, which needs only the moments of inputs and outputs, so that every step takes all
    images into account. The sum is stored as factors of rank r. The paper does not specify its optimizer; steps,
    learning rate and q were chosen here on separate training images, and the last two hardly matter.

    A layer keeps its factors if the loss did not fall, and gets those of its decomposition for `x'` if training did not
    improve on them; the bias is fitted to `x'` in any case. The report counts these outcomes.

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
        target = place.target
        decomposition = decompose_by_input(to_float64(target.module.weight), root_of_covariance(input_moment))
        candidates = [decomposition.factors(place.rank)]
        q = min(max(1, round(self.share * place.rank)), place.rank - 1)
        if q > 0:
            start = decomposition.factors(place.rank - q)
            candidates.append(self._train(start, q, input_moment, target_moment, task.config.seed))
        losses = [output_loss(B @ A, input_moment, target_moment) for A, B in candidates]
        best = min(range(len(losses)), key=losses.__getitem__)
        layer = factored_linear(target.module, *candidates[best], place.layout)
        after, before = (output_loss(each.product(), input_moment, target_moment) for each in (layer, current))
        # Written so that NaN does not count as an improvement.
        if not after < before:
            self.outcomes.append("as it was")
            return current
        self.outcomes.append(("decomposed anew", "trained")[best])
        return layer

    def _train(
        self, start: tuple[Tensor, Tensor], q: int, input_moment: Tensor, target_moment: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Train `G` and `Y`, and with them `A` and `B`; return the factors of the sum, `[r, n]` and `[m, r]`, float64."""
        A, B = start
        scale = A.square().mean().sqrt()
        generator = torch.Generator().manual_seed(seed)
        Y = torch.randn(q, A.shape[1], generator=generator, dtype=torch.float64).to(A) * scale
        factors = [
            torch.cat([A, Y]).float().requires_grad_(),
            torch.cat([B, B.new_zeros(len(B), q)], dim=1).float().requires_grad_(),
        ]
        moments = input_moment.float(), target_moment.float()
        # Relative to the spread of the targets, so that one learning rate suits all layers.
        unit = moments[1].square().mean().sqrt().clamp_min(1e-30)
        optimizer = torch.optim.Adam(factors, lr=self.learning_rate * float(scale))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                (output_loss_of_factors(factors[0], factors[1], *moments) / unit).backward()
                optimizer.step()
                schedule.step()
        return factors[0].detach().double(), factors[1].detach().double()
