"""The model card of a compressed checkpoint, with `huggingface_hub`'s card classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from ..checkpoint.replacing import CARD_MARK
from ..checkpoint.self_contained import Needs, auto_class_of
from ..evaluation.measures import MEASURES, Measure
from ..runtime.files import is_local_path
from ..runtime.formatting import counted, format_change, format_percent
from ..runtime.logging import get_logger
from ..runtime.version import __version__
from .data import ReportData
from .reach import left_out_text, targeted_text
from .structure import describe_encoder
from .table import format_table, size_text


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

_TASKS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
}


_BEGIN, _END = "<!-- mixrank: before and after -->", "<!-- mixrank: end -->"
"""Around the part of a card that a later evaluation writes again."""

_PATHS = ("dataset", "latency_table")
"""Settings that may be paths of this machine."""


def model_card(
    model: PreTrainedModel, report: ReportData, needs: Needs = "plugin", name: str | None = None
) -> ModelCard:
    """Return a card that says what a model derives from, how it was compressed, what was lost and how to load it.

    The licence and the data sets come from the original's card if it can be read.

    Args:
        model: The compressed model; its `name_or_path` names the original.
        report: The report of the compression, with the evaluation if there was one.
        needs: What opens the checkpoint.
        name: Name of the compressed model: an id on the Hub or the name of its folder; default: from the original's.
    """
    original = str(model.name_or_path)
    class_name = type(model).__name__
    task = next((task for suffix, task in _TASKS.items() if class_name.endswith(suffix)), "image-feature-extraction")
    inherited = _card_data(original)
    terms: dict[str, Any] = {
        key: inherited.get(key) for key in ("license", "license_name", "license_link", "datasets")
    }
    base_model = original if original and not is_local_path(original) else None
    title = name or f"{report.model_name or class_name}, {format_percent(report.removed_of_model, 0)} smaller"
    is_classifier = class_name.endswith("ForImageClassification")
    auto_class = "AutoModelForImageClassification" if is_classifier else class_name
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
        model_name=title.rpartition("/")[2],
        eval_results=_results(report, task),
    )
    use = _use(auto_class, name or "path/or/id/of/this/model", needs)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(title, use, report, base_model)}")


def card_with_evaluation(text: str, report: ReportData) -> str | None:
    """Return a card with what was measured since it was written, or None if its table is no longer there.

    Args:
        text: The card, as `model_card` wrote it; all else may have been changed since.
        report: The report with the evaluation.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        return None
    card = ModelCard(f"{before}{_before_and_after(report)}{after}")
    data = cast(ModelCardData, card.data)
    data.eval_results = _results(report, data.get("pipeline_tag") or "image-classification")
    return str(card)


def _text(title: str, use: list[str], report: ReportData, base_model: str | None) -> str:
    settings = {key: _shown(key, value) for key, value in report.settings.items() if value not in (None, {}, [])}
    name = report.model_name or "a model"
    original = f"[`{base_model}`](https://huggingface.co/{base_model})" if base_model else f"`{name}`"
    lines = [
        f"# {title}",
        "",
        f"{original} {CARD_MARK} {__version__}, {format_percent(report.removed_of_model, 0)} smaller:",
        "",
        _before_and_after(report),
        "",
        f"What was changed: {describe_encoder(report.layers)}, chosen so that the model's output changes least. "
        f"{_size(report)}The method builds on [arXiv 2402.06004](https://arxiv.org/abs/2402.06004).",
        "",
        f"The targeted layers are {targeted_text(report)}.{_left_out(report)}",
        "",
        "## Use",
        "",
        *use,
        "",
        "## Layer by layer",
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


def _shown(key: str, value: Any) -> Any:
    """Return a setting without the folders of this machine."""
    return Path(str(value)).name if key in _PATHS and is_local_path(str(value)) else value


def _before_and_after(report: ReportData) -> str:
    """Return the table of what the compression has changed, between marks that a later evaluation looks for."""
    rows = [("parameters", report.model_parameters_before, report.model_parameters_after)]
    if report.bytes_on_disk_before is not None and report.bytes_on_disk_after is not None:
        rows.append(("bytes on disk", report.bytes_on_disk_before, report.bytes_on_disk_after))
    if report.flops_before is not None and report.flops_after is not None:
        rows.append(("FLOPs per image", report.flops_before, report.flops_after))
    lines = ["| | original | this model | |", "| --- | --- | --- | --- |"]
    lines += [f"| {label} | {old:,} | {new:,} | {format_change(old, new)} |" for label, old, new in rows]
    evaluation, found = report.evaluation or {}, report.fidelity
    for name, label in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        new, old = evaluation.get(name), evaluation.get(f"reference_{name}")
        if new is not None:
            change = "" if old is None else f"{100 * (new - old):+.2f} points".replace("-", "−")
            before = "" if old is None else format_percent(old, 2)
            lines.append(f"| {label} | {before} | {format_percent(new, 2)} | {change} |")
    measured, images = (evaluation, "") if evaluation else (found, ", measured while compressing")
    if measured.get("agreement") is not None:
        agreement = format_percent(measured["agreement"], 2)
        lines.append(f"| same class as the original | | {agreement} | {_divergence(measured)} |")
    for name, measure in MEASURES.items():
        if name not in ("agreement", "kl") and measured.get(name) is not None:
            lines.append(f"| {measure.title or measure.label} | | {measure.text(measured[name])} | |")
    count = f"\n\nOn {counted(measured['num_images'], 'image')}{images}." if measured.get("num_images") else ""
    return "\n".join([_BEGIN, *lines]) + f"{count}\n{_END}"


def _divergence(measured: Mapping[str, Any]) -> str:
    return "" if measured.get("kl") is None else f"KL {measured['kl']:.4f} nats"


def _size(report: ReportData) -> str:
    size = size_text(report)
    return f"It was compressed to {size}. " if size else ""


def _left_out(report: ReportData) -> str:
    text = left_out_text(report)
    return f" Left out: {text}." if text else ""


def _use(auto_class: str, name: str, needs: Needs) -> list[str]:
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
        f'model = {auto_class}.from_pretrained("{name}"{trusted})',
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
            dataset_name=counted(images or 0, "image"),
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
