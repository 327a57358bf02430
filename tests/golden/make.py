"""How the files of this folder were made: with version 0.1 of the package, under Transformers 5.23.

They stand for the checkpoints and statistics that users have. They are never to be made again, only added to: if
`tests/test_golden.py` fails, the package has broken a promise. This script leaves alone what is there.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parent.parent))

from models import tiny_deit, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig


HERE = Path(__file__).parent
COLUMNAR = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
ORIGINALS = {
    "vit": lambda: tiny_vit(**COLUMNAR),
    "deit": lambda: tiny_deit(**COLUMNAR, qkv_bias=False),
    "swin": lambda: tiny_swin(image_size=16, patch_size=2, embed_dim=8, num_heads=[1, 2]),
}
SETTINGS = {
    "factors": {"recipe": "paper", "compensation": ["sequential"], "min_rank_ratio": 0.3},
    "pivoted": {"recipe": "best", "fisher_samples": 2},
}
PATTERNS = {"rank_pattern": {r"0.*(intermediate\.dense|key)": 3}, "ratio_pattern": {r"1.*attention\.output\.dense": 0}}
METRICS = {"vit": ("kfac", "mean_input", "second_moment"), "deit": ("kfac",), "swin": ("kfac",)}
FIELDS = ("num_images", "num_tokens", "fisher_samples", "model_fingerprint", "data_fingerprint")


def pixels(count, seed):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def logits(model, images):
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits.contiguous()


def digest(calibration):
    """SHA-256 over the tensors by name of the layer and of the statistic."""
    found = hashlib.sha256()
    for name, statistics in sorted(calibration.layers.items()):
        for field, value in sorted(vars(statistics).items()):
            if isinstance(value, torch.Tensor):
                found.update(f"{name} {field} {list(value.shape)} {value.dtype}".encode())
                found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def main():
    if (HERE / "expected.safetensors").exists():
        sys.exit("The golden files are there, and stay. Write what is to be added to a folder of its own.")
    expected, statistics = {"pixel_values": pixels(3, seed=1)}, {}
    for family, build in ORIGINALS.items():
        folder = HERE / family
        build().save_pretrained(folder / "original")
        compressor = MixRankCompressor.from_pretrained(folder / "original")
        expected[f"{family}/original"] = logits(compressor.model, expected["pixel_values"])
        for layout, settings in SETTINGS.items():
            config = MixRankConfig(
                compression_ratio=0.4, compression_scope="targets", layout=layout, **settings, **PATTERNS
            )
            model = compressor.compress(config, [pixels(48, seed=0)])
            compressor.save_pretrained(model, folder / layout)
            for name in ("README.md", "report.html"):
                (folder / layout / name).unlink()
            expected[f"{family}/{layout}"] = logits(model, expected["pixel_values"])
        for metric in METRICS[family]:
            calibration = compressor.calibrate([pixels(48, seed=0)], metric)
            name = f"{family}/statistics-{metric}.safetensors"
            calibration.save(HERE / name)
            compressor.compress(
                MixRankConfig(compression_ratio=0.4, compression_scope="targets", metric=metric, compensation=[]),
                calibration=calibration,
            )
            statistics[name] = {
                "digest": digest(calibration),
                "layers": len(calibration.layers),
                **{field: getattr(calibration, field) for field in FIELDS},
                "compressed": {layer.name: [layer.rank, layer.kept_energy] for layer in compressor.report.layers},
            }
    save_file(expected, HERE / "expected.safetensors")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in statistics.items())
    (HERE / "statistics.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
