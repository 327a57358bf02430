"""Two and three real processes give the compressed model of one process, up to rounding.

Statistics are rounded in the float32 of the model, and each process subtracts its own mean before that. The tolerances
are for what comes of these rounding errors.
"""

import pytest
import torch
from distributed import compression_cases
from distributed.launching import COUNTS, SEVERAL, ResultsOfModule
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification


CASES = [name.removeprefix("case_") for name in vars(compression_cases) if name.startswith("case_")]
in_several = pytest.mark.parametrize("count", SEVERAL)


@pytest.fixture(scope="module")
def found(results):
    return ResultsOfModule(results, "compression_cases")


def ranks(result):
    return [layer["rank"] for layer in result["report"]["layers"]]


def energies(result):
    return [layer["kept_energy"] for layer in result["report"]["layers"] if layer["kept_energy"] is not None]


@in_several
@pytest.mark.parametrize("case", CASES)
def test_all_processes_hold_the_same_model_and_report(found, case, count):
    first = found[count][0][case]
    assert "error" not in first, first
    assert first["report"]["environment"]["processes"] == count
    for each in found[count][1:]:
        for what in ("state", "report", "saved", "requires_grad", "evaluation"):
            assert each[case][what] == first[what]


@in_several
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_one_process(found, case, count):
    [alone], together = (each[case] for each in found[1]), found[count][0][case]
    assert ranks(together) == ranks(alone)
    for what in ("settings", "calibration", "model_parameters_after"):
        assert together["report"][what] == alone["report"][what]
    assert together["requires_grad"] == alone["requires_grad"]
    assert energies(together) == pytest.approx(energies(alone), rel=1e-5)
    for step, expected in zip(together["report"]["compensation"], alone["report"]["compensation"], strict=True):
        assert step["kept"] == expected["kept"]
        for error in ("error_before", "error_after"):
            assert step[error] == pytest.approx(expected[error], rel=1e-4)
        for name, value in expected["details"].items():
            if name == "outcomes":
                # Rounding decides between candidates that are about equally good.
                assert sum(step["details"][name].values()) == sum(value.values())
            else:
                assert step["details"][name] == pytest.approx(value, rel=1e-4)
    expected = load_file(alone["file"])
    values = load_file(together["file"])
    assert {name: tensor.shape for name, tensor in values.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    torch.testing.assert_close(values["logits"], expected["logits"], rtol=1e-5, atol=5e-5)
    for name, value in alone["evaluation"].items():
        is_number = isinstance(value, float | int)
        assert together["evaluation"][name] == (pytest.approx(value, rel=1e-4, abs=1e-9) if is_number else value)


@in_several
def test_in_float64_nothing_but_the_order_of_sums_differs(found, count):
    """In float32, products about the shift of each process's first batch round differently."""
    [alone], together = (
        (each["closed_form_in_float64"] for each in found[1]),
        found[count][0]["closed_form_in_float64"],
    )
    assert energies(together) == pytest.approx(energies(alone), rel=1e-9)
    expected, values = load_file(alone["file"]), load_file(together["file"])
    torch.testing.assert_close(values["logits"], expected["logits"], rtol=1e-8, atol=1e-8)


@in_several
def test_the_checkpoint_opens_with_plain_transformers(found, count):
    file = found[count][0]["closed_form"]["file"]
    model = AutoModelForImageClassification.from_pretrained(file.removesuffix(".safetensors"))
    assert torch.equal(compression_cases.outputs(model), load_file(file)["logits"])


@pytest.mark.parametrize("count", COUNTS)
def test_only_the_main_process_prints(found, count):
    for phase in ("Decoding", "Calibrating", "Decomposing", "Factorizing", "Solving", "Distilling", "Evaluating"):
        printed = [phase in each["training"]["stderr"] for each in found[count]]
        assert printed == [True] + [False] * (count - 1), phase
