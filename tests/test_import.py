import subprocess
import sys

import pytest

import optimum_mixrank


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, optimum_mixrank; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import optimum_mixrank, transformers.quantizers.auto",
        "import transformers.quantizers.auto, optimum_mixrank",
        "import optimum_mixrank; from transformers import AutoModelForImageClassification",
        "from transformers import AutoModelForImageClassification; import optimum_mixrank",
        "from optimum_mixrank import MixRankCompressor",
        "import optimum_mixrank, importlib; importlib.reload(optimum_mixrank)",
    ],
)
def test_import_registers_with_transformers_in_any_order(imports):
    code = (
        f"{imports}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING\n"
        "print(AUTO_QUANTIZATION_CONFIG_MAPPING['mixrank'].__name__, AUTO_QUANTIZER_MAPPING['mixrank'].__name__)"
    )
    assert run(code) == "MixRankConfig MixRankHfQuantizer"


def test_public_names_exist():
    for name in optimum_mixrank.__all__:
        assert getattr(optimum_mixrank, name) is not None
        assert name in dir(optimum_mixrank)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'MixRankCompresor'"):
        _ = optimum_mixrank.MixRankCompresor
