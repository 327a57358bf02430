"""Compressed checkpoints go through `optimum-cli export onnx` and run in ONNX Runtime.

    python .ci/export_onnx.py FOLDER

needs optimum-onnx and a release of Transformers that it supports.
"""

import subprocess
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForImageClassification


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from models import compressed, mixed, pixels, tiny_deit, tiny_swin, tiny_vit

from optimum_mixrank.checkpoint.rank_map import LAYOUT_NAMES


MODELS = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}
CLI = (sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()")


def main(folder: Path) -> None:
    for name, build in MODELS.items():
        models = {layout: compressed(build(), layout) for layout in LAYOUT_NAMES}
        models["mixed structure"] = mixed(build(), "pivoted")
        for layout, model in models.items():
            model.eval()
            source, target = folder / f"{name}-{layout}", folder / f"{name}-{layout}-onnx"
            model.save_pretrained(source)
            options = ("--model", source, "--task", "image-classification", target)
            subprocess.run([*CLI, "export", "onnx", *map(str, options)], check=True, capture_output=True)
            exported = ORTModelForImageClassification.from_pretrained(target)
            for count in (1, 5):
                with torch.no_grad():
                    expected = model(pixel_values=pixels(count)).logits
                difference = (exported(pixel_values=pixels(count)).logits - expected).abs().max().item()
                print(f"{name}, {layout}, {count} images: largest difference {difference:.2e}")
                if not difference < 1e-4:
                    sys.exit("ONNX Runtime gives other logits than PyTorch.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
