"""The model card of a compressed checkpoint, with `huggingface_hub`'s card classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from ..checkpoint.replacing import CARD_MARK
from ..checkpoint.self_contained import Needs, auto_class_of
from ..evaluation.measures import MEASURES, Measure
from ..runtime.files import is_local_path
from ..runtime.logging import get_logger
from ..runtime.version import __version__
from .data import ReportData
from .reach import left_out_text, targeted_text
from .structure import describe_encoder
from .table import format_table


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

_TASKS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
}


def model_card(model: PreTrainedModel, report: ReportData, needs: Needs = "plugin") -> ModelCard:
    """Return a card that says what a model derives from, how it was compressed, what was lost and how to load it.

    The licence and the data sets come from the original's card if it can be read.

    Args:
        model: The compressed model; its `name_or_path` names the original.
        report: The report of the compression, with the evaluation if there was one.
        needs: What opens the checkpoint.
    """
    original = str(model.name_or_path)
    name = type(model).__name__
    task = next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), "image-feature-extraction")
    inherited = _card_data(original)
    terms: dict[str, Any] = {
        key: inherited.get(key) for key in ("license", "license_name", "license_link", "datasets")
    }
    base_model = original if original and not is_local_path(original) else None
    shown = report.model_name or name
    auto_class = "AutoModelForImageClassification" if name.endswith("ForImageClassification") else name
    if needs == "code":
        # Only an auto class finds the code in the checkpoint.
        auto_class = auto_class_of(model)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=base_model and "quantized",
        library_name="transformers",
        **terms,
        pipeline_tag=task,
        tags=["mixrank", "low-rank", "compressed"],
        model_name=f"{shown} ({report.removed_of_model:.0%} smaller)",
        eval_results=_results(report, task),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(shown, auto_class, report, needs)}")


def _text(original: str, auto_class: str, report: ReportData, needs: Needs) -> str:
    settings = {name: value for name, value in report.settings.items() if value not in (None, {}, [])}
    lines = [
        f"# {original}, {report.removed_of_model:.0%} smaller",
        "",
        f"`{original}` {CARD_MARK} {__version__}: {describe_encoder(report.layers)}, chosen so that the model's output "
        "changes least. The method builds on [arXiv 2402.06004](https://arxiv.org/abs/2402.06004).",
        "",
        f"The targeted layers are {targeted_text(report)}.{_left_out(report)}",
        "",
        "## Use",
        "",
        *_use(auto_class, needs),
        "",
        "## What was lost, layer by layer",
        "",
        "```",
        format_table(report),
        "```",
        "",
        "## Settings and environment",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | `{value}` |" for key, value in {**settings, **report.environment}.items()),
    ]
    return "\n".join(lines) + "\n"


def _left_out(report: ReportData) -> str:
    text = left_out_text(report)
    return f" Left out: {text}." if text else ""


def _use(auto_class: str, needs: Needs) -> list[str]:
    """Return how to open the checkpoint."""
    plugin = needs == "plugin"
    trusted = ", trust_remote_code=True" if needs == "code" else ""
    remarks = {
        "plugin": "Without the import, loading stops with an error about mismatched sizes. `optimum-cli mixrank merge` "
        "makes a dense checkpoint that needs no plugin, `optimum-cli mixrank merge --self-contained` one that brings its "
        "code.",
        "code": "The checkpoint brings the code that opens it, `modeling_mixrank.py`. With `pip install optimum-mixrank` "
        "and `import optimum_mixrank` it opens without `trust_remote_code` too; with neither, loading stops with an error "
        "about mismatched sizes.",
        "nothing": "This is an ordinary checkpoint of a narrower model, which needs nothing but Transformers.",
    }
    return [
        *(["```bash", "pip install optimum-mixrank", "```", ""] if plugin else []),
        "```python",
        *(["import optimum_mixrank"] if plugin else []),
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("path/or/id/of/this/model"{trusted})',
        "```",
        "",
        remarks[needs],
    ]


def _results(report: ReportData, task: str) -> list[EvalResult] | None:
    evaluation = report.evaluation
    if evaluation is None:
        return None
    names = {
        "top1": ("accuracy", "top-1 accuracy"),
        "top5": ("accuracy", "top-5 accuracy"),
        **{key: (key, _title(measure)) for key, measure in MEASURES.items()},
    }
    images = evaluation.get("num_images")
    return [
        EvalResult(
            task_type=task,
            dataset_type="images",
            dataset_name=f"{images:,} images",
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(evaluation[key]), 5),
        )
        for key, (kind, label) in names.items()
        if evaluation.get(key) is not None
    ] or None


def _title(measure: type[Measure]) -> str:
    return (measure.title or measure.label) + (f" ({measure.unit.strip()})" if measure.unit else "")


def _card_data(original: str) -> dict[str, Any]:
    """Return the metadata of the original's card, empty if there is none or it cannot be reached."""
    try:
        if is_local_path(original):
            file = Path(original) / "README.md"
            return ModelCard.load(file).data.to_dict() if file.is_file() else {}
        return ModelCard.load(original).data.to_dict() if original else {}
    except (OSError, EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return {}
    except Exception as error:
        # Anybody may have written the card, and hours of work must not be lost because of it.
        logger.warning(
            f"The model card of {original!r} cannot be read ({type(error).__name__}: {error}); the new one names neither "
            "licence nor data sets."
        )
        return {}
