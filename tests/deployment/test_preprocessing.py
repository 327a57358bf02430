import pytest
from transformers import ViTImageProcessor

from optimum_mixrank.deployment.preprocessing import preprocessing_problems


SETTINGS = {"size": {"height": 32, "width": 32}, "image_mean": (0.5, 0.5, 0.5)}


@pytest.fixture
def processor():
    return ViTImageProcessor(**SETTINGS)


def test_the_same_processor_and_none_are_no_problem(processor, tmp_path):
    assert preprocessing_problems(processor, tmp_path) == ()
    processor.save_pretrained(tmp_path)
    for exported in (tmp_path, tmp_path / "model.onnx"):
        assert preprocessing_problems(processor, exported) == ()
        assert preprocessing_problems(None, exported) == ()


def test_every_setting_that_differs_is_named(processor, tmp_path):
    ViTImageProcessor(**{**SETTINGS, "image_mean": [0.0, 0.5, 0.5], "do_rescale": False}).save_pretrained(tmp_path)
    rescale, mean = preprocessing_problems(processor, tmp_path)
    assert (
        rescale
        == "preprocessor_config.json beside the exported model has do_rescale=False, that of the checkpoint True"
    )
    assert "image_mean=[0.0, 0.5, 0.5], that of the checkpoint [0.5, 0.5, 0.5]" in mean
