"""The class that a checkpoint is opened with."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import pixels, tiny_vit
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTModel, ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto import modeling_auto

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint.architecture import import_class, load_named, named_class, read_config


class TwoHeads(ViTPreTrainedModel):
    """A class that Transformers does not know."""

    def __init__(self, config):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.first, self.second = nn.Linear(config.hidden_size, 3), nn.Linear(config.hidden_size, 4)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        token = self.vit(pixel_values).last_hidden_state[:, 0]
        return ImageClassifierOutput(logits=torch.cat([self.first(token), self.second(token)], dim=-1))


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_heads")
    TwoHeads(tiny_vit().config).save_pretrained(folder)
    return folder


def saved(folder, **changes):
    tiny_vit().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_an_unknown_class_is_refused(two_heads):
    with pytest.raises(ValueError, match=r"'TwoHeads' is not a model class of Transformers .*`auto_class=…`"):
        MixRankCompressor.from_pretrained(two_heads)


def test_a_class_that_is_passed_keeps_its_heads(two_heads, tmp_path):
    compressor = MixRankCompressor.from_pretrained(two_heads, auto_class=TwoHeads)
    config = MixRankConfig(compression_ratio=0.3, compression_scope="targets", recipe="fast")
    model = compressor.compress(config, [pixels(16)], save_directory=tmp_path)
    assert torch.equal(TwoHeads.from_pretrained(tmp_path).eval()(pixels()).logits, model.eval()(pixels()).logits)


def test_a_registered_class_keeps_its_heads(two_heads, monkeypatch):
    for auto_class in (AutoModel, AutoModelForImageClassification):
        monkeypatch.setitem(auto_class._model_mapping._extra_content, ViTConfig, TwoHeads)
        assert type(MixRankCompressor.from_pretrained(two_heads).model) is TwoHeads
        monkeypatch.undo()


def test_every_registry_of_transformers_is_asked():
    config = tiny_vit().config
    names = {
        auto._model_mapping.get(ViTConfig, None).__name__
        for auto in vars(modeling_auto).values()
        if getattr(auto, "_model_mapping", None) is not None and ViTConfig in auto._model_mapping
    }
    assert "ViTForImageClassification" in names
    for name in names:
        config.architectures = [name]
        assert named_class(config, "model").__name__ == name


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (["pipeline"], "'pipeline' is not a model class"),
        (["logging"], "'logging' is not a model class"),
        (["AutoModel"], "'AutoModel' is not a model class"),
        (["ViTPreTrainedModel"], "'ViTPreTrainedModel' is not a model class"),
        (["SwinModel"], "SwinModel is not a class for a ViTConfig"),
        ([5], "not a list of class names"),
        (5, "not a list of class names"),
        ({"a": 1}, "not a list of class names"),
        ("ViTModel", "not a list of class names"),
        (None, r"would be lost.*auto_class"),
        ([], r"classifier\.bias, classifier\.weight would be lost"),
    ],
    ids=repr,
)
def test_names_that_are_not_model_classes(architectures, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MixRankCompressor.from_pretrained(saved(tmp_path, architectures=architectures))


@given(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(),
        st.dictionaries(st.text(), st.none(), max_size=2),
        st.lists(st.one_of(st.text(), st.none(), st.sampled_from(["ViTModel", "Trainer", "os.system"])), max_size=3),
    )
)
def test_any_architectures(architectures):
    config = tiny_vit().config
    config.architectures = architectures
    try:
        assert not architectures or issubclass(named_class(config, "model"), ViTPreTrainedModel)
    except (ValueError, TypeError) as error:
        assert isinstance(error, ValueError) or not architectures
        assert len(str(error)) < 1000


def test_a_bare_encoder_needs_no_name(tmp_path):
    tiny_vit(ViTModel).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": None}))
    assert type(MixRankCompressor.from_pretrained(tmp_path).model) is ViTModel


def test_a_random_pooler_is_refused(two_heads):
    config = read_config(two_heads, {})
    with pytest.raises(ValueError, match=r"lacks pooler\.dense\.bias, pooler\.dense\.weight, which ViTModel has"):
        load_named(two_heads, config, AutoModel, complete=True)
    assert type(load_named(two_heads, config, TwoHeads, complete=True)) is TwoHeads


@pytest.mark.parametrize("value", [[1], "mixrank", 5, True], ids=repr)
def test_a_quantization_config_that_is_not_an_object(value, tmp_path):
    with pytest.raises(ValueError, match=r"quantization_config=.* is not an object"):
        MixRankCompressor.from_pretrained(saved(tmp_path, quantization_config=value))


def test_a_number_that_python_does_not_read(tmp_path):
    path = saved(tmp_path) / "config.json"
    path.write_text(path.read_text().replace('"num_channels": 3', f'"num_channels": {"1" * 5000}'))
    with pytest.raises(ValueError, match=r"config\.json of .* cannot be read: Exceeds the limit"):
        MixRankCompressor.from_pretrained(tmp_path)


def test_classes_by_name():
    assert import_class("AutoModelForImageClassification") is AutoModelForImageClassification
    assert import_class("transformers.ViTModel") is ViTModel


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipeline", "is not a class with `from_pretrained`"),
        ("NoSuchClass", "is not a class with `from_pretrained`"),
        ("no_such_package.Model", "'no_such_package' cannot be imported"),
        (".Model", "is not a class with `from_pretrained`"),
        ("..Model", "cannot be imported"),
        ("", "is not a class with `from_pretrained`"),
    ],
)
def test_names_that_are_not_classes(name, message):
    with pytest.raises(ValueError, match=message):
        import_class(name)
