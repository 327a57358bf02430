"""Recover accuracy after a strong compression: distil the original into the compressed model with `Trainer`.

    python examples/recover_accuracy.py                        # no labels
    python examples/recover_accuracy.py --label-weight 0.5     # labels too

By default the small model of this repository is compressed by 85 % and then trained on 1,000 images, which takes less than
a minute. The same script trains another compressed checkpoint on other images:

    python examples/recover_accuracy.py --model vit-base-80 --original google/vit-base-patch16-224 \
        --data path/to/images --test-data path/to/labelled/images --epochs 20 --bf16 --gradient-checkpointing
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from image_data import model_inputs
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer, TrainingArguments, set_seed

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset


SHIPPED = Path(__file__).parent / "fashion_mnist"


class DistillationTrainer(Trainer):
    """Trains a model to predict what its teacher predicts, and the labels if they have a weight.

    Args:
        teacher: The original model.
        label_weight: Weight of the cross entropy with labels in the loss, in [0, 1]; 0 needs no labels.
        temperature: Temperature of both softmaxes.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, label_weight: float, temperature: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.label_weight, self.temperature = label_weight, temperature
        # The loss below is a mean over the batch, so that `Trainer` has to divide it by the steps of gradient accumulation.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the KL from the teacher's predictions in nats, mixed with the cross entropy."""
        labels = inputs.pop("labels", None)
        output = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        student, teacher = (
            (each.float() / self.temperature).log_softmax(dim=-1) for each in (output.logits, teacher_logits)
        )
        loss = self.temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        if self.label_weight:
            loss = (1 - self.label_weight) * loss + self.label_weight * F.cross_entropy(output.logits.float(), labels)
        return (loss, output) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", default=str(SHIPPED / "model"), help="the teacher: local folder or Hub id")
    parser.add_argument("--model", help="compressed checkpoint; default: the original is compressed first")
    parser.add_argument("--ratio", type=float, default=0.85, help="fraction of parameters to remove in that case")
    parser.add_argument("--data", default=str(SHIPPED / "data"), help="images to train on: local folder or Hub id")
    parser.add_argument("--split", help="default: train, or the only one")
    parser.add_argument("--test-data", default=str(SHIPPED / "data"), help="labelled images: local folder or Hub id")
    parser.add_argument("--test-split", help="default: validation, test, or the only one")
    parser.add_argument("--num-samples", type=int, help="images to draw for training; default: all")
    parser.add_argument("--test-samples", type=int, help="images to draw for evaluation; default: all")
    parser.add_argument("--label-weight", type=float, default=0.0, help="weight of the labels in the loss; default 0")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images ahead")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--output", type=Path, default=Path("recovered"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.data == str(SHIPPED / "data"):
        args.split = args.split or "calibration"
    set_seed(args.seed)

    compressor = MixRankCompressor.from_pretrained(args.original)
    original = compressor.model
    dataset = load_image_dataset(args.data, split=args.split, num_samples=args.num_samples, seed=args.seed)
    train_dataset = model_inputs(
        dataset, compressor.image_processor, original.config.id2label if args.label_weight else None, mirror=True
    )
    if args.model is None:
        images = compressor.get_calibration_dataset(dataset, num_samples=min(512, len(dataset)), seed=args.seed)
        model = compressor.compress(MixRankConfig(compression_ratio=args.ratio, seed=args.seed), images)
    else:
        model = AutoModelForImageClassification.from_pretrained(args.model)
    test = {"dataset": args.test_data, "split": args.test_split, "num_samples": args.test_samples, "seed": args.seed}
    before = compressor.evaluate(model, **test)

    if args.gradient_checkpointing:
        # Transformers 5 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    trainer = DistillationTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_num_workers=args.workers,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=train_dataset,
        teacher=original,
        label_weight=args.label_weight,
        temperature=args.temperature,
    )
    trainer.train()
    model.save_pretrained(args.output)
    compressor.image_processor.save_pretrained(args.output)

    # From here on, plain Transformers, as any user of the checkpoint would.
    reloaded = AutoModelForImageClassification.from_pretrained(args.output)
    after = compressor.evaluate(reloaded, **test)
    print(f"{'':12}{'top-1':>8}{'agreement':>12}{'KL in nats':>12}")
    print(f"{'original':12}{before.reference_top1:>8.2%}")
    for name, result in (("compressed", before), ("trained", after)):
        print(f"{name:12}{result.top1:>8.2%}{result.agreement:>12.2%}{result.kl:>12.4f}")
    print(f"{sum(each.numel() for each in reloaded.parameters()):,} parameters: {args.output}/")


if __name__ == "__main__":
    main()
