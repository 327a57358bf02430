"""Checkpoints written under one release of Transformers must load under another.

    python .ci/exchange.py write FOLDER       # under one release
    python .ci/exchange.py check FOLDER …     # under another one (or the same)
    python .ci/exchange.py --all write FOLDER # with more families

There are dense models, compressed ones, and ones with layers that share a factor and narrow MLPs. `check` asks for
bit-identical logits for ViT and DeiT; for Swin, whose dense model itself differs between the releases, for a difference no
larger than the dense model's, within a factor of four. Those of mixed structure bring their code, which has to compute the
same as the package.

Beside them there are tiny models of other families, `FAMILIES` (with `--all` also `MORE_FAMILIES`), whose modules have
other names in other releases. Their outputs have to be the same up to rounding.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from families.catalogue import FAMILIES as CATALOGUE
from families.checks import settings
from models import mixed, tiny_deit, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint.entries import compressed_layers
from optimum_mixrank.runtime.inputs import ModelInputs
from optimum_mixrank.runtime.outputs import ModelCall


MODELS = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}
DTYPES = (torch.float32, torch.float16)
FAMILIES = [
    "AltCLIP",
    "BEiT",
    "CLIP",
    "CLIP, tower",
    "CLIP, tower with projection",
    "DINOv3 ViT",
    "DeepSeek-VL",
    "Florence-2",
    "LLaVA",
    "MLCD",
    "PVT",
    "RT-DETR",
    "RT-DETRv2",
    "SigLIP, classifier",
    "SigLIP, tower",
    "SigLIP2",
    "SigLIP2, classifier",
    "SigLIP2, tower",
    "YOLOS",
]
MORE_FAMILIES = [
    "BLIP",
    "DPT",
    "DeepSeek-VL, hybrid",
    "Gemma 3",
    "Hiera",
    "HuBERT",
    "InternVL",
    "Kosmos-2.5",
    "Llama 3.2, tower",
    "Llama 4",
    "Mask2Former",
    "OWL-ViT, detector",
    "SAM",
    "TrOCR",
    "Voxtral",
    "Whisper",
]
"""Tried with `--all`. Mask2Former needs SciPy."""
TOLERANCE = 1e-5
"""Largest difference of an output of a family, as a share of its largest value."""


def logits(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels.to(model.dtype)).logits.contiguous()


def write(folder: Path) -> None:
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, build in MODELS.items():
        original = build()
        config = MixRankConfig(
            compression_ratio=0.3,
            compression_scope="targets",
            rank_pattern={r"0.*(intermediate\.dense|key)": 5},
            ratio_pattern={r"1.*attention\.output\.dense": 0},
        )
        compressed = MixRankCompressor(original).compress(config, [pixels])
        for kind, model in (("dense", original), ("compressed", compressed), ("mixed", mixed(build(), "pivoted"))):
            for dtype in DTYPES:
                target = folder / f"{name}-{kind}-{str(dtype).removeprefix('torch.')}"
                code = {"self_contained": True} if kind == "mixed" else {}
                model.to(dtype).save_pretrained(target, max_shard_size="20KB", **code)
                save_file({"pixels": pixels, "logits": logits(model, pixels)}, target / "expected.tensors")
                model.to(torch.float32)
    write_families(folder)
    print(f"transformers {transformers.__version__} wrote {len(list(folder.iterdir()))} checkpoints")


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = ModelInputs(batch)
    call = ModelCall().bound(model.eval(), inputs[:1])
    with torch.no_grad():
        found = call(model, inputs)
    return {f"output {index}": tensor.contiguous().clone() for index, tensor in enumerate(found.tensors)}


def write_families(folder: Path) -> None:
    config = settings(metric="second_moment", recipe="fast", structures=["rank"], compensation=[])
    for name in FAMILIES:
        family = CATALOGUE[name]
        target = folder / f"{name.replace('-', '_')}-family-float32"
        batch = family.batches(1, 2)[0]
        compressed = MixRankCompressor(family.make()).compress(config, [batch], save_directory=target)
        expected = outputs(compressed, batch)
        save_file(
            {**{f"input {key}": each.contiguous() for key, each in batch.items()}, **expected},
            target / "expected.tensors",
        )


def check_family(target: Path) -> None:
    # AutoConfig of 4.57 does not know MLCD's own name.
    architecture = json.loads((target / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(target)
    stored = load_file(target / "expected.tensors")
    batch = {key.removeprefix("input "): each for key, each in stored.items() if key.startswith("input ")}
    differences = [
        float((found - stored[key]).abs().max() / stored[key].abs().max())
        for key, found in outputs(model, batch).items()
    ]
    print(f"transformers {transformers.__version__}: {target.name:28} largest difference {max(differences):.2e}")
    if not compressed_layers(model) or not max(differences) <= TOLERANCE:
        sys.exit(f"{target.name}: outputs differ by {max(differences):.2e}, allowed are {TOLERANCE:.0e}")


def opened_with_its_code(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    auto_class = transformers.AutoModelForImageClassification
    return auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=True)


def check(folder: Path) -> None:
    differences = {}
    for target in sorted(folder.iterdir()):
        name, kind, dtype = target.name.split("-")
        if kind == "family":
            check_family(target)
            continue
        architecture = transformers.AutoConfig.from_pretrained(target).architectures[0]
        model = getattr(transformers, architecture).from_pretrained(target, dtype=getattr(torch, dtype))
        if bool(compressed_layers(model)) != (kind != "dense"):
            sys.exit(f"{target.name}: compressed layers are there when they should not be, or the other way round")
        expected = load_file(target / "expected.tensors")
        if kind == "mixed" and not torch.equal(
            logits(opened_with_its_code(target, model.dtype), expected["pixels"]), logits(model, expected["pixels"])
        ):
            sys.exit(f"{target.name}: the code in the checkpoint computes something else than the package")
        difference = (logits(model, expected["pixels"]) - expected["logits"]).abs().max().item()
        differences[name, kind, dtype] = difference
        print(f"transformers {transformers.__version__}: {target.name:28} largest difference {difference:.2e}")
    for (name, kind, dtype), difference in differences.items():
        allowed = 4 * differences[name, "dense", dtype] if name == "swin" else 0.0
        if kind != "dense" and difference > allowed:
            sys.exit(
                f"{name} in {dtype}: logits of the {kind} model differ by {difference:.2e}, allowed are {allowed:.2e}"
            )


if __name__ == "__main__":
    arguments = [each for each in sys.argv[1:] if each != "--all"]
    if "--all" in sys.argv:
        FAMILIES += MORE_FAMILIES
    for each in arguments[1:]:
        {"write": write, "check": check}[arguments[0]](Path(each))
