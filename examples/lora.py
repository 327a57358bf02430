"""Adapt a compressed model with LoRA: only its head and small adapters on its factors are trained.

    python examples/lora.py

This needs `pip install peft`. By default the small model of this repository is compressed by 85 % and adapted to 1,000
labelled images. The same script adapts another compressed checkpoint to other images; if their classes are not those of
the model, it gets a new head:

    python examples/lora.py --model vit-base-60 --data path/to/labelled/images --test-split test --epochs 20
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from image_data import model_inputs
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset
from optimum_mixrank.evaluation.accuracy import TopKAccuracy
from optimum_mixrank.evaluation.labels import find_label_column


SHIPPED = Path(__file__).parent / "fashion_mnist"


def load(checkpoint: str | Path, names: list[str]) -> Any:
    """Load a compressed model, with a new head if its classes are different."""
    config = AutoConfig.from_pretrained(checkpoint)
    if {name.lower() for name in names} <= {name.lower() for name in config.label2id}:
        return AutoModelForImageClassification.from_pretrained(checkpoint)
    return AutoModelForImageClassification.from_pretrained(
        checkpoint,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        # This concerns only the head: the factored layers are known, since optimum_mixrank is imported.
        ignore_mismatched_sizes=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="compressed checkpoint; default: the shipped model is compressed first")
    parser.add_argument("--data", default=str(SHIPPED / "data"), help="labelled images: local folder or Hub id")
    parser.add_argument("--split", help="default: train, or the only one")
    parser.add_argument("--test-split", help="default: validation, test, or the only one")
    parser.add_argument("--num-samples", type=int, help="images to draw for training; default: all")
    parser.add_argument("--test-samples", type=int, help="images to draw for evaluation; default: all")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--target-modules", nargs="+", default=["factor_a", "factor_b"], help="or all-linear")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("adapted"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.data == str(SHIPPED / "data"):
        args.split, args.test_split = args.split or "calibration", args.test_split or "test"
    set_seed(args.seed)

    data = load_image_dataset(args.data, split=args.split, num_samples=args.num_samples, seed=args.seed)
    test_data = load_image_dataset(
        args.data,
        split=args.test_split,
        default_splits=("validation", "test"),
        num_samples=args.test_samples,
        seed=args.seed,
    )
    label_column = find_label_column(data)
    names = getattr(data.features[label_column], "names", None) if label_column else None
    if not names:
        parser.error(f"--data {args.data!r} has no column with named classes.")
    if args.model is None:
        args.model = args.output / "compressed"
        compressor = MixRankCompressor.from_pretrained(SHIPPED / "model")
        images = compressor.get_calibration_dataset(data, num_samples=min(512, len(data)), seed=args.seed)
        compressor.compress(MixRankConfig(compression_ratio=0.85), images, args.model, overwrite=True)
    processor = AutoImageProcessor.from_pretrained(args.model)
    model = load(args.model, names)

    metric = TopKAccuracy()

    def top1(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids, k=1)

    def trainer_of(model: torch.nn.Module, id2label: dict[int, str]) -> Trainer:
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(args.output),
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                remove_unused_columns=False,
                label_names=["labels"],
                save_strategy="no",
                report_to=[],
                seed=args.seed,
            ),
            train_dataset=model_inputs(data, processor, id2label, mirror=True),
            eval_dataset=model_inputs(test_data, processor, id2label),
            compute_metrics=top1,
        )

    def accuracy(model: torch.nn.Module, id2label: dict[int, str]) -> float:
        return trainer_of(model, id2label).evaluate()["eval_top1"]

    id2label = model.config.id2label
    before = accuracy(model, id2label)
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    adapted = get_peft_model(
        model,
        LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, modules_to_save=["classifier"]),
    )
    trained, total = adapted.get_nb_trainable_parameters()
    trainer_of(adapted, id2label).train()

    # Only the adapter, for a base model that several adapters share.
    adapted.save_pretrained(args.output / "adapter")
    with_adapter = PeftModel.from_pretrained(load(args.model, names), args.output / "adapter")
    # Merged into the factors: again a compressed checkpoint of the same size.
    adapted.merge_and_unload().save_pretrained(args.output / "merged")
    processor.save_pretrained(args.output / "merged")
    merged = AutoModelForImageClassification.from_pretrained(args.output / "merged")

    print(f"{trained:,} parameters trained beside {total - trained:,} frozen ones")
    print(f"{'top-1 before':20}{before:>8.2%}")
    for name, each in (("with adapter", with_adapter), ("merged", merged)):
        print(f"{name:20}{accuracy(each, id2label):>8.2%}")
    print(f"Adapter and merged checkpoint: {args.output}/")


if __name__ == "__main__":
    main()
