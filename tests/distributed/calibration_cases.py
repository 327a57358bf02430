"""Statistics of the same images in any number of processes."""

import copy
import hashlib

import datasets
import torch
from calibration.pictures import processor, write
from models import pixels, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.images import collating


VIT, SWIN = tiny_vit(), tiny_swin()
METRICS = ["kfac", "diagonal", "mean_input", "second_moment"]


def calibrate(name, processes, folder, source, model=VIT, image_processor=None, **changes):
    decoded = []
    decode = collating.decode_image

    def spy(item, *args):
        decoded.append(str(item).rpartition("/")[2])
        return decode(item, *args)

    collating.decode_image = spy
    try:
        compressor = MixRankCompressor(model, image_processor)
        calibration = compressor.calibrate(source, METRICS, **{"batch_size": 4, **changes})
    finally:
        collating.decode_image = decode
    path = calibration.save(folder / f"{name}-{processes.index}.safetensors")
    layers = {name: (each.num_tokens, each.num_images) for name, each in calibration.layers.items()}
    return {
        "num_images": calibration.num_images,
        "broken": [name.rpartition("/")[2] for name in calibration.broken],
        "fingerprints": [calibration.model_fingerprint, calibration.data_fingerprint],
        "layers": layers,
        "tensors": hashlib.sha256(b"".join(tensor_bytes(calibration))).hexdigest(),
        "file": str(path),
        "decoded": decoded,
    }


def tensor_bytes(calibration):
    for statistics in calibration.layers.values():
        for value in vars(statistics).values():
            if isinstance(value, torch.Tensor):
                yield value.numpy().tobytes()


def case_uneven_batches(processes, folder):
    return calibrate("uneven_batches", processes, folder, list(pixels(17).split([5, 5, 5, 2])))


def case_uneven_batches_in_float64(processes, folder):
    batches = list(pixels(17).double().split([5, 5, 5, 2]))
    return calibrate("uneven_batches_in_float64", processes, folder, batches, model=copy.deepcopy(VIT).double())


def case_more_processes_than_batches(processes, folder):
    return calibrate("more_processes_than_batches", processes, folder, [pixels(3)])


def case_single_images_from_a_generator(processes, folder):
    return calibrate("single_images_from_a_generator", processes, folder, (image for image in pixels(9)))


def case_swin(processes, folder):
    return calibrate("swin", processes, folder, list(pixels(10).split(2)), model=SWIN, fisher_samples=2)


def case_paths_of_which_one_is_broken(processes, folder):
    paths = sorted(write(folder / f"files-{processes.index}", 13, broken=[5]).iterdir())
    return calibrate(
        "paths_of_which_one_is_broken", processes, folder, paths, image_processor=processor(), max_broken_share=0.1
    )


def case_the_first_batch_is_broken(processes, folder):
    paths = sorted(write(folder / f"more-files-{processes.index}", 8, broken=[0, 1, 2]).iterdir())
    source = list(map(str, paths))
    return calibrate(
        "the_first_batch_is_broken",
        processes,
        folder,
        source,
        image_processor=processor(),
        max_broken_share=0.5,
        batch_size=2,
    )


def case_a_dataset_with_a_transform(processes, folder):
    read = []
    data = datasets.Dataset.from_dict({"number": list(range(11))})

    def transform(rows):
        read.extend(rows["number"])
        return {"pixel_values": [pixels(1, seed=number)[0] for number in rows["number"]]}

    data.set_transform(transform)
    return {**calibrate("a_dataset_with_a_transform", processes, folder, data), "read": read}


def case_a_loader(processes, folder):
    # Shuffled with the same seed in every process.
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(list(pixels(7)), batch_size=3, shuffle=True, generator=generator)
    return calibrate("a_loader", processes, folder, loader)
