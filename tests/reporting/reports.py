"""Reports of compressions that never took place."""

from dataclasses import replace

from optimum_mixrank.reporting import CompressionReport, LayerReport


LINEARS = {
    "attention.attention.query": (1, 1),
    "attention.attention.key": (1, 1),
    "attention.attention.value": (1, 1),
    "attention.output.dense": (1, 1),
    "intermediate.dense": (4, 1),
    "output.dense": (1, 4),
}

EVALUATION = {
    "num_images": 1000,
    "top1": 0.83,
    "reference_top1": 0.874,
    "top5": 0.97,
    "reference_top5": 0.98,
    "agreement": 0.905,
    "kl": 0.1912,
    "feature_error": None,
}


def layer(name, shape, rank, targeted=True):
    m, n = shape
    after = m * n if rank is None else rank * (m + n)
    return LayerReport(name, shape, rank, None if rank is None else 0.9, targeted, m * n, after)


def block(prefix, width, share, **special):
    for name, (m, n) in LINEARS.items():
        shape = (m * width, n * width)
        rank = max(1, int(share * shape[0] * shape[1] / sum(shape)))
        yield layer(f"{prefix}.{name}", shape, rank, **special)


def vit_report(depth=12, width=768, **changes):
    layers = []
    for index in range(depth):
        layers += block(f"encoder.layer.{index}", width, 0.3 + 0.5 * index / depth)
    layers[2] = layer(layers[2].name, layers[2].shape, None)
    layers[-1] = layer(layers[-1].name, layers[-1].shape, None, targeted=False)
    return report(layers, **changes)


def mixed_report(layout="pivoted", width=64, **changes):
    """Two blocks whose MLPs keep 200 and 100 of 256 units.

    In the first, query, key and value share a factor; in the second, the second layer of the MLP is dense.
    """
    made = []
    for index, units in enumerate((200, 100)):
        prefix = f"encoder.layer.{index}"
        names = [f"{prefix}.{name}" for name in LINEARS]
        members = tuple(names[:3]) if index == 0 else ()
        for name in names[:4]:
            shared = members if name in members else ()
            rank = 40 if shared else 20
            made.append(replace(layer(name, (width, width), rank), members=shared))
        made.append(replace(layer(names[4], (4 * width, width), 30), shape_after=(units, width)))
        made.append(
            replace(layer(names[5], (width, 4 * width), 10 if index == 0 else None), shape_after=(width, units))
        )
    return report(made, settings={"layout": layout}, **changes)


def swin_report(depths=(2, 2, 6, 2), width=96, **changes):
    layers = []
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers += block(f"encoder.layers.{stage}.blocks.{index}", width * 2**stage, 0.5)
        if stage < len(depths) - 1:
            size = width * 2**stage
            layers.append(layer(f"encoder.layers.{stage}.downsample.reduction", (2 * size, 4 * size), size // 2))
    return report(layers, **changes)


def report(layers, **changes):
    before, after = (sum(getattr(each, f"parameters_{when}") for each in layers) for when in ("before", "after"))
    fields = {
        "layers": layers,
        "settings": {},
        "environment": {},
        "model_parameters_before": before + 1000,
        "model_parameters_after": after + 1000,
    }
    return CompressionReport(**{**fields, **changes})
