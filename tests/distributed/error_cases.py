"""An error in one process is raised in all of them."""

import copy

import accelerate
import torch
from calibration.pictures import processor, write
from models import pixels, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.compensation.training import distillation
from optimum_mixrank.pipeline import decompose, saving


VIT, SWIN = tiny_vit(), tiny_swin()
FAST = {"compression_ratio": 0.4, "compression_scope": "targets", "recipe": "fast"}


def images():
    return list(pixels(12).split(3))


def compress(source, model=VIT, **arguments):
    MixRankCompressor(model).compress(MixRankConfig(**FAST), source, **arguments)
    return {}


def calibrate(source, image_processor=None):
    MixRankCompressor(VIT, image_processor).calibrate(source, "kfac", batch_size=3)
    return {}


def case_broken_images(processes, folder):
    paths = sorted(write(folder / f"files-{processes.index}", 12, broken=[3, 4]).iterdir())
    return calibrate([f"{path}" for path in paths], processor())


def case_nan_in_an_image(processes, folder):
    batches = images()
    batches[1][2, 0, 0, 0] = torch.nan
    return compress(batches)


def case_images_of_two_sizes(processes, folder):
    # Swin accepts images of any size.
    MixRankCompressor(SWIN).calibrate([pixels(2), torch.zeros(2, 3, 64, 64)], "mean_input")


def case_no_images(processes, folder):
    return calibrate([])


def case_a_source_that_fails(processes, folder):
    class OddError(Exception):
        """An error that another process cannot construct."""

        def __init__(self, one, two):
            super().__init__(f"the disk {one} {two}")

    def source():
        yield from images()
        if processes.index == processes.count - 1:
            raise OddError("is", "gone")

    return calibrate(source())


def case_a_source_that_fails_at_once(processes, folder):
    class Source(torch.utils.data.IterableDataset):
        def __iter__(self):
            if processes.index == processes.count - 1:
                raise FileNotFoundError("there is no disk")
            return iter(images())

    return calibrate(Source())


def case_different_orders(processes, folder):
    generator = torch.Generator().manual_seed(processes.index)
    source = torch.utils.data.TensorDataset(pixels(12))
    return calibrate(torch.utils.data.DataLoader(source, batch_size=3, shuffle=True, generator=generator))


def case_different_lists(processes, folder):
    # One process has one image less.
    return calibrate(images() if processes.index == 0 else [*images(), *pixels(1)])


def case_a_prepared_loader(processes, folder):
    loader = torch.utils.data.DataLoader(list(pixels(8)), batch_size=2)
    return calibrate(accelerate.Accelerator().prepare(loader))


def case_different_weights(processes, folder):
    model = copy.deepcopy(VIT)
    with torch.no_grad():
        model.classifier.weight.add_(processes.index)
    return compress(images(), model)


def case_a_folder_with_files(processes, folder):
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "notes.txt").write_text("mine")
    return compress(images(), save_directory=folder / "full")


def case_a_full_disk(processes, folder):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    save = saving.save_checkpoint
    saving.save_checkpoint = fail
    try:
        return compress(images(), save_directory=folder / "new")
    finally:
        saving.save_checkpoint = save


def case_in_place(processes, folder):
    """A failure in one process leaves the model in all processes as it was."""
    model = copy.deepcopy(VIT)
    before, factored_linear = copy.deepcopy(model.state_dict()), decompose.factored_linear

    def fail(*args, **kwargs):
        if processes.index == processes.count - 1:
            raise ValueError("no luck")
        return factored_linear(*args, **kwargs)

    decompose.factored_linear = fail
    try:
        MixRankCompressor(model).compress(MixRankConfig(**FAST), images(), inplace=True)
    except ValueError as error:
        same = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        return {"error": str(error), "same": same and before.keys() == model.state_dict().keys()}
    finally:
        decompose.factored_linear = factored_linear


def case_training_that_diverges(processes, folder):
    """Only in one process; the others would wait for its gradients forever."""
    relative_loss = distillation.relative_loss

    def diverging(reference, feature, *args):
        last = processes.index == processes.count - 1
        return relative_loss(reference, feature * torch.nan if last else feature, *args)

    distillation.relative_loss = diverging
    try:
        return train()
    finally:
        distillation.relative_loss = relative_loss


def case_training_that_fails(processes, folder):
    """In the backward pass of one process."""
    run = distillation._run

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return tensor.clone()

        @staticmethod
        def backward(context, gradient):
            raise MemoryError("out of memory")

    def failing(model, pixel_values, call):
        output, hidden = run(model, pixel_values, call)
        if processes.index == processes.count - 1 and hidden.requires_grad:
            hidden = Broken.apply(hidden)
        return output, hidden

    distillation._run = failing
    try:
        return train()
    finally:
        distillation._run = run


def train():
    model = copy.deepcopy(VIT)
    config = MixRankConfig(**FAST, compensation=["distillation"], epochs=1, train_batch_size=4)
    MixRankCompressor(model).compress(config, images())
    return {}


def case_work_after_all_that(processes, folder):
    """After all these errors, the processes are still in step."""
    return {"num_images": MixRankCompressor(VIT).calibrate(images(), "kfac").num_images}


def case_work_then_an_accelerator(processes, folder):
    """Work without an Accelerator does not affect one that a program makes later."""
    accelerate.state.AcceleratorState._reset_state()  # forget those of other cases
    calibrate(images())
    accelerator = accelerate.Accelerator(mixed_precision="bf16")
    with_it = MixRankCompressor(VIT, accelerator=accelerator).calibrate(images(), "kfac").num_images
    with_state = MixRankCompressor(VIT, accelerator=accelerate.PartialState()).calibrate(images(), "kfac").num_images
    return {"precision": accelerator.mixed_precision, "num_images": [with_it, with_state]}
