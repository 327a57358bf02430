"""How the files in `mixed` were made: checkpoints with layers that share a factor and MLPs with fewer hidden units.

As those of `make.py`, they are never to be made again.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from make import COLUMNAR, logits, pixels
from models import mixed, tiny_swin, tiny_vit
from safetensors.torch import save_file


HERE = Path(__file__).parent / "mixed"
ORIGINALS = {
    "vit": lambda: tiny_vit(**COLUMNAR),
    "swin": lambda: tiny_swin(image_size=16, patch_size=2, embed_dim=8, num_heads=[1, 2]),
}


def main():
    if HERE.exists():
        sys.exit("The golden files are there, and stay. Write what is to be added to a folder of its own.")
    expected = {"pixel_values": pixels(3, seed=1)}
    for family, build in ORIGINALS.items():
        for layout in ("factors", "pivoted"):
            model = mixed(build(), layout)
            model.save_pretrained(HERE / family / layout)
            expected[f"mixed/{family}/{layout}"] = logits(model, expected["pixel_values"])
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
