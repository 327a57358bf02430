"""Batches of named inputs behave like batches of images."""

import pytest
import torch

from optimum_mixrank.runtime.inputs import ModelInputs, concatenated


def packed(counts=(4, 8, 2)):
    """Images of several numbers of patches; a patch holds the number of its image."""
    patches = torch.cat([torch.full((count, 3), float(index)) for index, count in enumerate(counts)])
    return ModelInputs({"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, n // 2] for n in counts])})


def side_by_side(counts=(4, 8, 2)):
    """The same with all patches in one entry, two columns wide each, as MiniCPM-V takes them."""
    columns = torch.cat([torch.full((1, 3, 2, 2 * count), float(index)) for index, count in enumerate(counts)], dim=-1)
    return ModelInputs({"pixel_values": columns, "target_sizes": torch.tensor([[2, n // 2] for n in counts])})


def padded(patches=5):
    mask = torch.ones(3, patches, dtype=torch.int64)
    return ModelInputs({"pixel_values": torch.randn(3, patches, 6), "pixel_attention_mask": mask})


def test_a_tensor_is_pixels():
    inputs = ModelInputs.of(torch.zeros(2, 3, 8, 8))
    assert list(inputs) == ["pixel_values"] and len(inputs) == 2 and inputs.is_images
    assert ModelInputs.of(inputs) is inputs


@pytest.mark.parametrize(
    ("key", "images"),
    [(slice(1, 3), [1, 2]), (torch.tensor([True, False, True]), [0, 2]), ([2, 0], [2, 0]), (torch.tensor([1]), [1])],
    ids=["slice", "mask", "list", "numbers"],
)
@pytest.mark.parametrize("make", [packed, padded, side_by_side])
def test_images_are_chosen_with_all_that_belongs_to_them(make, key, images):
    inputs = make()
    found = inputs[key]
    assert len(found) == len(images)
    for position, image in enumerate(images):
        for name, tensor in found[position : position + 1].items():
            assert torch.equal(tensor, inputs[image : image + 1][name])


def test_patches_follow_their_grid():
    assert packed()[[2, 0]]["pixel_values"][:, 0].tolist() == [2.0] * 2 + [0.0] * 4


def test_columns_follow_their_sizes():
    inputs = side_by_side()
    assert len(inputs) == 3 and inputs.columns("pixel_values") == 2 and not inputs.columns("target_sizes")
    assert inputs[[2, 0]]["pixel_values"][0, 0, 0].tolist() == [2.0] * 4 + [0.0] * 8
    assert inputs[:1].entry_shapes["pixel_values"] == inputs[1:].entry_shapes["pixel_values"] == (3, 2)


def test_sizes_of_images_that_are_not_side_by_side():
    """Processors of detectors name the sizes of the images before they were resized in the same way."""
    inputs = ModelInputs({"pixel_values": torch.zeros(2, 3, 8, 8), "target_sizes": torch.full((2, 2), 64)})
    assert len(inputs[:1]["pixel_values"]) == len(inputs[:1]["target_sizes"]) == 1


@pytest.mark.parametrize("make", [packed, side_by_side])
def test_no_image_is_chosen(make):
    found = make()[torch.zeros(3, dtype=torch.bool)]
    assert len(found) == 0 and found.main.numel() == 0


@pytest.mark.parametrize("make", [packed, side_by_side])
def test_parts_make_the_whole(make):
    inputs = make()
    parts = inputs.split(2)
    assert [len(part) for part in parts] == [2, 1]
    whole = concatenated(parts)
    assert all(torch.equal(whole[name], inputs[name]) for name in inputs)


def test_entries_of_different_sizes_are_padded_with_zeros():
    whole = concatenated([padded(5), padded(7)])
    assert whole["pixel_values"].shape == (6, 7, 6)
    assert whole["pixel_attention_mask"].sum(1).tolist() == [5, 5, 5, 7, 7, 7]


def test_only_floating_point_numbers_change_their_dtype():
    moved = padded().to(dtype=torch.float16)
    assert moved["pixel_values"].dtype == torch.float16 and moved["pixel_attention_mask"].dtype == torch.int64
    leaf = padded().requiring_gradients()
    assert leaf["pixel_values"].requires_grad and not leaf["pixel_attention_mask"].requires_grad


def test_text_can_be_left_out():
    inputs = ModelInputs({"pixel_values": torch.zeros(2, 3, 4, 4), "input_ids": torch.zeros(2, 5)})
    assert list(inputs.without_text()) == ["pixel_values"] and not inputs.is_images


def test_inputs_for_different_numbers_of_images():
    with pytest.raises(ValueError, match="`mask` has 3 entries where `pixel_values` is for 2 images"):
        ModelInputs({"pixel_values": torch.zeros(2, 3, 4, 4), "mask": torch.zeros(3)})
    with pytest.raises(ValueError, match="There are no inputs"):
        ModelInputs({})


def test_means_over_what_belongs_to_an_image():
    frames = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, 2.0])
    assert padded().image_means(frames).tolist() == [2.0, 6.0, 2.0]
    # Two patches are merged into each of the tokens.
    tokens = torch.tensor([1.0, 3.0, 4.0, 4.0, 4.0, 8.0, 9.0])
    for inputs in (packed(), side_by_side()):
        assert inputs.image_means(tokens).tolist() == [2.0, 5.0, 9.0]
        for unchanged in (tokens[:3], tokens[:5]):
            assert torch.equal(inputs.image_means(unchanged), unchanged)
