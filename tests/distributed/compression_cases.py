"""Compressions that give the same model in any number of processes."""

import copy
import functools
import hashlib

import torch
from compensation.cases import config, images
from models import tiny_swin, tiny_vit
from safetensors.torch import save_file

from optimum_mixrank import FactoredLinear, MixRankCompressor
from optimum_mixrank.compensation import COMPENSATORS, Compensator
from optimum_mixrank.compensation.compensator import ActivationStorage
from optimum_mixrank.compensation.layerwise.residual import ResidualCompensator
from optimum_mixrank.pipeline import compress as pipeline


MODELS = {"vit": tiny_vit(), "swin": tiny_swin(), "no_head": tiny_swin().swin, "float64": tiny_vit().double()}


def compress(name, processes, folder, family="vit", source=None, **changes):
    compressor = MixRankCompressor(copy.deepcopy(MODELS[family]))
    settings = config(**{"epochs": 2, "learning_rate": 1e-3, "train_batch_size": 16, **changes})
    source = list(images(72).split([16, 16, 16, 16, 8])) if source is None else source
    out = folder / name
    model = compressor.compress(settings, source, save_directory=out)
    # In every process, the files are there when the call returns.
    saved = sorted(file.name for file in out.iterdir())
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if processes.is_main:
        save_file({**state, "logits": outputs(model)}, folder / f"{name}.safetensors")
    test = [(image, index % 5) if family in ("vit", "float64") else image for index, image in enumerate(images(23, 5))]
    result = compressor.evaluate(model, test, batch_size=4)
    return {
        "report": compressor.report.to_dict(),
        "saved": saved,
        "state": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest(),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "evaluation": result.to_dict(),
        "file": str(folder / f"{name}.safetensors"),
    }


def outputs(model):
    with torch.no_grad():
        output = model.eval()(pixel_values=images(6, 3).to(model.dtype))
    return output.logits if "logits" in output else output.last_hidden_state


def case_closed_form(processes, folder):
    return compress("closed_form", processes, folder, compensation=["sequential"])


def case_closed_form_in_float64(processes, folder):
    return compress("closed_form_in_float64", processes, folder, "float64", compensation=["sequential"])


def case_closed_form_of_swin(processes, folder):
    changes = {"layout": "factors", "metric": "second_moment"}
    return compress("closed_form_of_swin", processes, folder, "swin", compensation=["sequential"], **changes)


def case_without_a_head(processes, folder):
    return compress("without_a_head", processes, folder, "no_head", compensation=["sequential"], allocation="greedy")


def case_of_one_batch(processes, folder):
    return compress("of_one_batch", processes, folder, source=[images(9)], compensation=["sequential"])


def case_residual(processes, folder):
    original = ResidualCompensator.__init__
    # Enough steps to find out whether they are the same in all processes.
    ResidualCompensator.__init__ = functools.partialmethod(original, steps=50)
    try:
        return compress("residual", processes, folder, compensation=["residual"], metric="second_moment")
    finally:
        ResidualCompensator.__init__ = original


def case_training(processes, folder):
    # A step whose gain is small may be kept by one number of processes and not by another, as the best structure may be.
    steps = ["sequential", "blocks", "distillation"]
    return compress("training", processes, folder, compensation=steps, structures=["rank"], probed_images=0)


def case_training_of_features(processes, folder):
    """With more processes than images in a batch, and a smaller last batch."""
    changes = {"metric": "second_moment", "layout": "factors", "train_batch_size": 2, "epochs": 1}
    source = list(images(23).split(5))
    return compress(
        "training_of_features",
        processes,
        folder,
        "no_head",
        source,
        compensation=["blocks", "distillation"],
        **changes,
    )


class Nudge(Compensator):
    """Knows nothing about processes: it needs all images, and does the same work in every process."""

    name = "nudge"

    def compensate(self, task):
        assert task.processes.is_single
        mean = torch.cat([batch.main for batch in task.batches]).mean()
        for module in task.model.modules():
            if isinstance(module, FactoredLinear):
                module.factor_a.weight.data.mul_(1 + 1e-3 * mean)
        return {"images": sum(map(len, task.batches)), "held_out": sum(map(len, task.held_out))}


def case_the_same_work_in_every_process(processes, folder):
    COMPENSATORS.register(Nudge)
    return compress("the_same_work_in_every_process", processes, folder, compensation=["nudge"])


def case_without_images(processes, folder):
    return compress("without_images", processes, folder, metric="svd", compensation=[], layout="factors")


def compress_with_storage(name, processes, folder, **storage):
    in_memory = pipeline.IN_MEMORY
    pipeline.IN_MEMORY = ActivationStorage(**storage)
    try:
        return compress(name, processes, folder, compensation=["sequential"])
    finally:
        pipeline.IN_MEMORY = in_memory


def case_outputs_that_are_not_cached(processes, folder):
    return compress_with_storage("outputs_that_are_not_cached", processes, folder, max_output_bytes=0)


def case_activations_on_disk(processes, folder):
    return compress_with_storage("activations_on_disk", processes, folder, on_disk=True)
