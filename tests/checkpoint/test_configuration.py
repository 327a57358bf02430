import copy
import dataclasses
import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_mixrank import MixRankConfig
from optimum_mixrank.checkpoint.rank_map import MIXED_VERSION, FactoredLayer
from optimum_mixrank.runtime.formatting import quote


FULL = {
    "compression_ratio": 0.6,
    "compression_scope": "targets",
    "recipe": "paper",
    "metric": "svd",
    "allocation": "uniform",
    "layout": "factors",
    "structures": ["rank"],
    "probed_images": 7,
    "closed_form_images": 48,
    "compensation": [],
    "held_out_ratio": 0.2,
    "fisher_samples": 3,
    "target_modules": ["query", "attention.output.dense"],
    "exclude_modules": r".*\.11\..*",
    "rank_pattern": {"query": 12},
    "ratio_pattern": {r"layer\.\d\.output\.dense": 0.25, "key": 0},
    "rank_multiple": 8,
    "min_rank": 8,
    "min_rank_ratio": 0.2,
    "max_rank_ratio": 0.9,
    "cost": "flops",
    "mirror": False,
    "epochs": 4,
    "learning_rate": 1e-4,
    "train_batch_size": 8,
    "view_scale": 1.5,
    "output_names": ["predicted_depth"],
    "interpolate_pos_encoding": True,
    "include": ["heads"],
    "dataset": "path/to/images",
    "num_samples": 64,
    "seed": 7,
    "rank_map": {"encoder.layer.0.output.dense": {"rank": 16, "bias": True}},
}


LATENCY = {"cost": "latency", "latency_table": "latencies.json", "target_latency": 0.7}
"""Fields that contradict some of the others."""

SIZES = [{"target_parameters": 22_000_000}, {"like": "facebook/deit-small-patch16-224"}]


@pytest.fixture(params=[{}, FULL, LATENCY, *SIZES], ids=["default", "full", "latency", "size", "like"])
def config(request):
    return MixRankConfig(**copy.deepcopy(request.param))


def test_a_checkpoint_by_the_name_that_meant_the_second_moment_opens_as_it_was_made(warnings):
    stored = {**FULL, "metric": "second_moment", "fisher_samples": 1, "compensation": ["residual"]}
    config = MixRankConfig.from_dict(copy.deepcopy(stored))
    assert (config.recipe, config.metric) == ("paper", "second_moment")
    assert not warnings.records


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Messages of the library's logger, which does not propagate by default."""
    monkeypatch.setattr(logging.getLogger("optimum_mixrank"), "propagate", True)
    return caplog


def test_full_really_is_full():
    provided = {"quant_method", "layout_version", "library_version"}
    assert {field.name for field in dataclasses.fields(MixRankConfig)} == FULL.keys() | LATENCY.keys() | {
        *SIZES[0],
        *SIZES[1],
    } | provided
    for name, value in FULL.items():
        assert value != getattr(MixRankConfig(), name)


def test_round_trip_through_a_dict(config):
    assert MixRankConfig.from_dict(config.to_dict()) == config


def test_settings_of_steps_that_are_not_used_are_not_stored():
    stored = MixRankConfig(recipe="fast").to_dict()
    training = {"epochs", "learning_rate", "train_batch_size", "view_scale", "mirror", "held_out_ratio"}
    assert not stored.keys() & (training | {"fisher_samples", "probed_images", "rank_pattern", "target_modules"})
    assert {"compression_ratio", "metric", "allocation", "layout", "compensation", "rank_map", "seed"} <= stored.keys()
    # What somebody has set is kept, also where it makes no difference.
    assert MixRankConfig(recipe="fast", epochs=3).to_dict()["epochs"] == 3
    assert training <= MixRankConfig(recipe="distilled").to_dict().keys()


def test_round_trip_through_json(config):
    for text in (config.to_json_string(use_diff=False), json.dumps(config.to_dict())):
        assert MixRankConfig.from_dict(json.loads(text)) == config


def test_round_trip_through_a_file(config, tmp_path):
    config.to_json_file(tmp_path / "config.json")
    assert MixRankConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_round_trip_through_the_config_of_a_model(config, tmp_path):
    from transformers import AutoConfig, ViTConfig

    model_config = ViTConfig()
    model_config.quantization_config = config
    model_config.save_pretrained(tmp_path)
    stored = AutoConfig.from_pretrained(tmp_path).quantization_config
    assert stored["quant_method"] == "mixrank"
    assert MixRankConfig.from_dict(stored) == config


def test_repr_shows_what_differs_from_the_recipe():
    assert repr(MixRankConfig()) == "MixRankConfig(compression_ratio=0.5, recipe='best')"
    config = MixRankConfig(recipe="fast", compression_ratio=0.6, seed=7, rank_map=copy.deepcopy(FULL["rank_map"]))
    assert repr(config) == ("MixRankConfig(compression_ratio=0.6, recipe='fast', seed=7, rank_map=<1 layers>)")


def test_json_shows_what_is_stored(config):
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies(config, copied):
    assert copied(config) == config
    assert copied(config) is not config


def test_deepcopy_shares_nothing():
    config = MixRankConfig()
    copy.deepcopy(config).rank_map["query"] = {"rank": 1, "bias": True}
    assert config.rank_map == MixRankConfig().rank_map == {}


def test_replace_changes_and_validates(config):
    assert dataclasses.replace(config, held_out_ratio=0.25).held_out_ratio == 0.25
    with pytest.raises(ValueError, match="compression_ratio=2"):
        dataclasses.replace(config, compression_ratio=2)
    with pytest.raises(TypeError, match="has no argument `ratio`"):
        dataclasses.replace(config, ratio=0.25)


def test_factored_layers():
    assert MixRankConfig(**FULL).factored_layers == {"encoder.layer.0.output.dense": FactoredLayer(16, True)}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("compresion_ratio", "did you mean `compression_ratio`?"),
        ("target_module", "did you mean `target_modules`?"),
        ("rank_patern", "did you mean `rank_pattern`?"),
        ("banana", "known are: quant_method, compression_ratio"),
    ],
)
def test_unknown_argument_is_refused_with_a_hint(name, hint):
    with pytest.raises(TypeError) as error:
        MixRankConfig(**{name: 1})
    assert f"MixRankConfig has no argument `{name}`" in str(error.value)
    assert hint in str(error.value)


def test_arguments_are_named():
    with pytest.raises(TypeError):
        MixRankConfig(0.5)


def test_the_signature_shows_every_field_with_its_default():
    parameters = inspect.signature(MixRankConfig).parameters
    fields = {field.name: field for field in dataclasses.fields(MixRankConfig)}
    assert list(parameters) == list(fields)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
    for name, parameter in parameters.items():
        if fields[name].default_factory is dataclasses.MISSING:
            assert parameter.default == fields[name].default
        else:
            assert not fields[name].default_factory()


USER_CODE = """\
from optimum_mixrank import MixRankConfig
MixRankConfig()
MixRankConfig(metric="kfac", allocation="global", layout="pivoted", recipe="fast", compensation=["blocks"])
MixRankConfig(metric="my_own_metric", allocation="my_own_allocator", target_modules="query", max_rank_ratio=0.9)
MixRankConfig(recipe="bset")  # wrong
MixRankConfig(compression_scope="encoder")  # wrong
MixRankConfig(rank_multiple="8")  # wrong
"""


def test_type_checkers_know_fields_and_choices(tmp_path):
    pytest.importorskip("mypy")
    # Checking PyTorch and Transformers would take minutes.
    settings = "[mypy]\nfollow_imports = silent\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings)
    (tmp_path / "user.py").write_text(USER_CODE)
    command = [sys.executable, "-m", "mypy", "user.py", "--cache-dir", tmp_path / "cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [int(line.split(":")[1]) for line in result.stdout.splitlines() if ": error:" in line]
    expected = [number for number, line in enumerate(USER_CODE.splitlines(), 1) if line.endswith("# wrong")]
    assert found == expected, result.stdout + result.stderr


def test_probes_without_gradients_are_refused_unless_stored():
    with pytest.raises(
        ValueError, match=r"fisher_samples=4 has no effect with metric='second_moment', .* metric='kfac'"
    ):
        MixRankConfig(recipe="fast", fisher_samples=4)
    stored = {**MixRankConfig(recipe="fast").to_dict(), "fisher_samples": 4}
    stored["rank_map"] = {"encoder.0.query": {"rank": 2, "bias": True}}
    assert MixRankConfig.from_dict(stored).fisher_samples == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            ("compression_ratio", value, r"is not in \(0, 1\)\. It is the fraction of parameters to remove")
            for value in (0, 1, 1.5, -0.1, "0.6", True, float("nan"))
        ),
        ("compression_scope", "encoder", "is unknown; choose one of 'model', 'targets'"),
        ("compression_scope", None, "is unknown; choose one of"),
        ("metric", "svdd", "is unknown; choose one of 'svd', 'diagonal', 'mean_input', 'second_moment', 'kfac'"),
        ("metric", ["svd"], "is unknown; choose one of"),
        ("allocation", "best", "is unknown; choose one of"),
        ("recipe", "worst", "is unknown; choose one of 'paper', 'paper_second_moment', 'fast', 'best'"),
        ("compensation", "sequential", r"is not a list; give the steps in their order, or \[\] for none"),
        ("compensation", ["blocks", "blocks"], "names 'blocks' twice; raise `epochs` to train longer"),
        ("compensation", ["sequentially"], "has an unknown step; choose among 'sequential'"),
        ("held_out_ratio", 1, r"is not in \(0, 1\). It is a share of the calibration images"),
        ("fisher_samples", 0, "is not an integer of at least 1"),
        ("seed", 2**64, "seed=18446744073709551616 is too large; the largest value is 18446744073709551615"),
        ("seed", 10**5000, "seed=<int too large to print> is too large"),
        ("epochs", 10**5000, "epochs=<int too large to print> is too large"),
        ("compression_ratio", 60, r"is not in \(0, 1\)\. Did you mean 0\.6\? It is the fraction"),
        ("compression_ratio", 10**5000, "compression_ratio=<int too large to print> is not in"),
        ("compensation", ["distillation", "sequential"], "recomputes every layer from the original"),
        ("compensation", ["residual", "sequential"], "recomputes every layer from the original"),
        ("max_rank_ratio", 0.05, r"is not in \(0\.05, 1\]\. It is a share .* above min_rank_ratio=0\.05"),
        ("max_rank_ratio", "0.5", r"is not in \(0\.05, 1\]"),
        ("cost", "watts", "is unknown; choose one of 'parameters', 'flops', 'latency'"),
        ("mirror", 1, "is neither True nor False"),
        ("epochs", 0, "is not an integer of at least 1"),
        ("learning_rate", 0, r"is not in \(0, 1\)\. The default is 5e-4"),
        ("train_batch_size", 0, "is not an integer of at least 1"),
        ("view_scale", 0.5, r"is not in \[1, 8\]"),
        ("view_scale", True, r"is not in \[1, 8\]"),
        ("output_names", [], "nor a non-empty list of names"),
        ("output_names", ["heatmaps", 3], "nor a non-empty list of names"),
        ("interpolate_pos_encoding", "yes", "is neither True nor False"),
        ("layout", "dense", "is unknown; choose one of 'factors', 'pivoted'"),
        ("rank_multiple", 0, "is not an integer of at least 1"),
        ("rank_multiple", 8.0, "is not an integer of at least 1"),
        ("min_rank", 0, "is not an integer of at least 1"),
        ("min_rank", "4", "is not an integer of at least 1"),
        ("min_rank", True, "is not an integer of at least 1"),
        ("min_rank_ratio", -0.1, r"is not in \[0, 1\]\. It is a share of the break-even rank; 0\.05 is usual"),
        ("min_rank_ratio", 1.1, r"is not in \[0, 1\]"),
        ("min_rank_ratio", float("nan"), r"is not in \[0, 1\]"),
        ("num_samples", 0, "is not an integer of at least 1"),
        ("num_samples", "all", "is not an integer of at least 1"),
        ("closed_form_images", 0, "is not an integer of at least 1"),
        ("compensation", True, "is not a list"),
        ("seed", -1, "is not an integer of at least 0"),
        ("seed", 0.5, "is not an integer of at least 0"),
        ("quant_method", "gptq", "is not 'mixrank'; leave the field out"),
        *(
            (field, value, "is neither None, a regular expression nor a non-empty list of layer names")
            for field in ("target_modules", "exclude_modules")
            for value in ([], 3, ["query", 3], {"query"})
        ),
        ("rank_pattern", ["query"], "is not a dict with layer names or regular expressions as keys"),
        ("rank_pattern", {3: 4}, "is not a dict with layer names"),
        ("ratio_pattern", None, "is not a dict with layer names"),
        ("rank_map", ["query"], None),
        ("layout_version", MIXED_VERSION + 1, "is unknown to optimum-mixrank .* which reads versions 1 and 2"),
        ("layout_version", None, "is unknown to optimum-mixrank"),
    ],
    ids=lambda value: None if isinstance(value, str) and " " in value else quote(value, 40),
)
def test_wrong_value_names_field_value_and_remedy(name, value, message):
    with pytest.raises(ValueError) as error:
        MixRankConfig(**{name: value})
    if message is None:
        assert error.match(f"{name} is a list, not a mapping")
    else:
        assert str(error.value).startswith((f"{name}={quote(value)} ", f"{name}={quote(value)}: "))
        assert error.match(message)


@pytest.mark.parametrize("value", [0, -3, 2.5, "8", None, True], ids=repr)
def test_wrong_rank_in_rank_pattern(value):
    with pytest.raises(ValueError) as error:
        MixRankConfig(rank_pattern={"key": 4, "query": value})
    assert str(error.value) == f"rank_pattern['query']={value!r} is not an integer of at least 1."


@pytest.mark.parametrize("value", [1, 1.0, -0.5, "0.5", None, True, float("nan")], ids=repr)
def test_wrong_ratio_in_ratio_pattern(value):
    with pytest.raises(ValueError) as error:
        MixRankConfig(ratio_pattern={"key": 0, "query": value})
    assert f"ratio_pattern['query']={value!r} is not in [0, 1)" in str(error.value)
    assert "0 leaves the layer dense" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", "query("),
        ("exclude_modules", "*query"),
        ("rank_pattern", {"query(": 3}),
        ("ratio_pattern", {"[query": 0.5}),
    ],
)
def test_invalid_regular_expression(name, value):
    with pytest.raises(ValueError, match=f"{name} has .* which is not a valid regular expression: "):
        MixRankConfig(**{name: value})


def test_malformed_rank_map_is_refused():
    with pytest.raises(ValueError, match="rank_map entry 'query': rank=True is not a positive integer"):
        MixRankConfig(rank_map={"query": {"rank": True, "bias": True}})


def test_validate_notices_later_assignments():
    config = MixRankConfig()
    config.compression_ratio = 7
    with pytest.raises(ValueError, match="compression_ratio=7"):
        config.validate()


def test_unknown_stored_keys_are_named_in_one_warning_and_dropped(config, warnings):
    stored = {**config.to_dict(), "later_field": 1, "another_field": {}, "library_version": "9.0"}
    loaded = MixRankConfig.from_dict(stored)
    assert loaded == dataclasses.replace(config, library_version="9.0")
    [record] = [record for record in warnings.records if record.levelno == logging.WARNING]
    message = record.getMessage()
    assert "another_field, later_field" in message
    assert "written by optimum-mixrank 9.0" in message
    assert "pip install --upgrade optimum-mixrank" in message


def test_known_stored_keys_warn_of_nothing(config, warnings):
    MixRankConfig.from_dict(config.to_dict())
    assert not warnings.records


@pytest.mark.parametrize("version", [MIXED_VERSION + 1, 0, "1", None], ids=repr)
def test_unknown_layout_version_is_refused(config, version):
    stored = {**config.to_dict(), "layout_version": version, "library_version": "9.0", "later_field": 1}
    with pytest.raises(ValueError) as error:
        MixRankConfig.from_dict(stored)
    assert f"layout_version={version!r} is unknown" in str(error.value)
    assert "written by optimum-mixrank '9.0'; upgrade with" in str(error.value)


@pytest.mark.parametrize("field", ["metric", "allocation"])
def test_an_unknown_method_of_a_stored_checkpoint_is_kept_with_a_warning(config, warnings, field):
    loaded = MixRankConfig.from_dict({**config.to_dict(), field: "better", "library_version": "9.0"})
    assert loaded.to_dict()[field] == "better"
    [record] = [record for record in warnings.records if record.levelno == logging.WARNING]
    assert f"made with {field}='better'" in record.getMessage()
    assert MixRankConfig.from_dict({**config.to_dict(), field: "better"}, seed=3).to_dict()[field] == "better"
    with pytest.raises(ValueError, match=f"{field}='better' is unknown"):
        loaded.validate()


def test_from_dict_leaves_the_dict_alone(config):
    stored = {**config.to_dict(), "later_field": 1}
    before = copy.deepcopy(stored)
    MixRankConfig.from_dict(stored)
    assert stored == before


def test_from_dict_with_overrides():
    stored = MixRankConfig().to_dict()
    assert MixRankConfig.from_dict(stored, seed=3).seed == 3
    config, unused = MixRankConfig.from_dict(stored, return_unused_kwargs=True, seed=3, other=4)
    assert config.seed == 3
    assert unused == {"other": 4}
    with pytest.raises(ValueError, match="seed=-3"):
        MixRankConfig.from_dict(stored, seed=-3)


values = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    st.sampled_from([10**400, "\x1b[31m" * 10_000, "(" * 5000, [["a"]], {"\x1b": {}}, "(a", ["x"] * 20_000]),
    st.lists(st.one_of(st.text(), st.integers()), max_size=3),
    st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(), st.text()), max_size=3),
)


@given(st.dictionaries(st.sampled_from([*(f.name for f in dataclasses.fields(MixRankConfig)), "\x1bother"]), values))
def test_any_stored_configuration(content):
    try:
        config = MixRankConfig.from_dict(content)
    except ValueError as error:
        assert len(str(error)) < 1500 and "\x1b" not in str(error)
    else:
        json.dumps(config.to_dict())
        assert config.rank_map == content.get("rank_map", {})


def test_warnings_about_a_stored_configuration_are_short_and_harmless(warnings):
    long = "\x1b[31m" * 10_000
    MixRankConfig.from_dict({"metric": long, "library_version": long, f"{long}key": 1})
    assert len(warnings.messages) == 2
    for message in warnings.messages:
        assert "\x1b" not in message and len(message) < 1500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cost": "latency"},
            r"latency_table=None is not the path of a file, which cost='latency' needs: measure one",
        ),
        ({"cost": "latency", "latency_table": 3}, r"latency_table=3 is not the path of a file"),
        ({"target_latency": 0.6}, r"target_latency=0.6 has no effect with cost='parameters'; add cost='latency'"),
        ({"latency_table": "a", "cost": "flops"}, r"latency_table='a' has no effect with cost='flops'"),
        *(
            (
                {**LATENCY, "target_latency": value},
                r"target_latency=.* is not in \(0, 1\)\. It is the share of the dense",
            )
            for value in (0, 1, 1.5, "0.6", True, float("nan"))
        ),
        (
            {**LATENCY, "compression_ratio": 0.7},
            r"target_latency=0.7 keeps that share of the time, so that 0.3 of it is removed; compression_ratio=0.7 says "
            r"something else\. Give only one of the two",
        ),
        ({**LATENCY, "compression_scope": "targets"}, r"compression_scope='targets' contradicts"),
        ({**LATENCY, "rank_multiple": 0}, r"rank_multiple=0 is not an integer of at least 1"),
    ],
    ids=str,
)
def test_settings_of_a_budget_of_time(changes, message):
    with pytest.raises(ValueError, match=message):
        MixRankConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_parameters": 10, "compression_ratio": 0.5},
            r"compression_ratio=0.5 and target_parameters=10 both say how small .* Give only one of them",
        ),
        ({"target_parameters": 10, "like": "a/b"}, r"target_parameters=10 and like='a/b' both say"),
        ({"like": "a/b", "compression_ratio": 0.5}, r"compression_ratio=0.5 and like='a/b' both say"),
        ({**LATENCY, "target_parameters": 10}, r"target_parameters=10 and target_latency=0.7 both say"),
        (
            {"like": "a/b", "compression_scope": "targets"},
            r"like='a/b' counts .* compression_scope='targets' contradicts",
        ),
        ({"target_parameters": 10, "cost": "flops"}, r"target_parameters=10 counts .* cost='flops' contradicts"),
        ({"target_parameters": 0}, r"target_parameters=0 is not an integer of at least 1"),
        ({"target_parameters": "22M"}, r"target_parameters='22M' is not an integer; write the number out"),
        ({"target_parameters": 22e6}, r"target_parameters=22000000.0 is not an integer"),
        ({"target_parameters": True}, r"target_parameters=True is not an integer"),
        ({"target_parameters": 10**16}, r"target_parameters=10000000000000000 is too large"),
        ({"like": ""}, r"like='' is not the Hub id or the folder"),
        ({"like": 3}, r"like=3 is not the Hub id or the folder"),
    ],
    ids=str,
)
def test_a_size_excludes_what_contradicts_it(changes, message):
    with pytest.raises(ValueError, match=message):
        MixRankConfig(**changes)


def test_a_size_takes_the_place_of_the_ratio():
    config = MixRankConfig(target_parameters=22_000_000)
    assert config.compression_ratio is None
    assert repr(config) == "MixRankConfig(target_parameters=22000000, recipe='best')"
    assert MixRankConfig.from_dict(config.to_dict()) == config
    assert MixRankConfig(like=Path("a") / "b").like == "a/b"


def test_the_target_takes_the_place_of_the_ratio():
    config = MixRankConfig(**LATENCY)
    assert (config.compression_ratio, config.rank_multiple) == (0.3, None)
    assert MixRankConfig(**LATENCY, compression_ratio=0.3) == config
    assert MixRankConfig(cost="latency", latency_table="a").compression_ratio == 0.5
    assert MixRankConfig().rank_multiple == 1
