#!/usr/bin/env bash
# The archives that go to PyPI: built, checked, and the wheel tried alone, in an environment of its own and away from the
# repository. The first argument is a Python that the environments are made with.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${1:-python3}"
workspace="$(mktemp -d)"
trap 'rm -rf "$workspace"' EXIT

"$python" -m venv "$workspace/tools"
"$workspace/tools/bin/pip" install --quiet build twine
# The wheel is built from the source archive, as pip does where there is no wheel.
"$workspace/tools/bin/python" -m build --outdir "$workspace/dist" "$root" >"$workspace/build.log" || {
    cat "$workspace/build.log"
    exit 1
}
"$workspace/tools/bin/twine" check --strict "$workspace"/dist/*

"$python" -m venv "$workspace/alone"
"$workspace/alone/bin/pip" install --quiet -c "$root/constraints.txt" "$workspace"/dist/*.whl
"$workspace/alone/bin/pip" check
cp -r "$root/examples/fashion_mnist" "$workspace/images"
cd "$workspace"
# So that other work on the machine does not make it wait for its own threads.
export OMP_NUM_THREADS=1
PATH="$workspace/alone/bin:$PATH"
unset PYTHONPATH
python - <<'PYTHON'
import importlib.metadata
import sys
import optimum_mixrank

assert optimum_mixrank.__file__.startswith(sys.prefix), optimum_mixrank.__file__
text = importlib.metadata.metadata("optimum-mixrank").get_payload()
assert "](docs/" not in text and "/raw/main/docs/pictures/" in text, "the README has relative links"
PYTHON
optimum-cli mixrank --version
optimum-cli mixrank compress --model images/model --dataset images/data --split calibration --num-samples 64 \
    --recipe fast --ratio 0.5 --output compressed --quiet
optimum-cli mixrank evaluate --model compressed --reference images/model --dataset images/data --split test \
    --num-samples 200 --quiet
optimum-cli mixrank inspect --model compressed | tail -1
python - <<'PYTHON'
import optimum_mixrank
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("compressed")
assert type(model).__name__ == "ViTForImageClassification" and model.num_parameters() < 400_000
PYTHON
