"""Tiny models with layers that share a factor and MLPs with fewer units, made without images."""

import torch
from models import tiny_vit

from optimum_mixrank import MixRankConfig
from optimum_mixrank.checkpoint.factorize import factored_linear, insert_layer, rank_map_of
from optimum_mixrank.checkpoint.names import Target, canonical_names, joint_target
from optimum_mixrank.checkpoint.narrowing import selected_columns, selected_rows
from optimum_mixrank.checkpoint.quantizer import MixRankHfQuantizer, attach
from optimum_mixrank.checkpoint.rank_map import layout_version


RANK = 8
UNITS = 40


def mixed_model(layout="factors", factored=True, shared=True, model=None, chunks=1):
    """A model of width 32 in which each block shares the factor of query, key and value, and keeps 40 of 64 units.

    Args:
        layout: Of the factored layers.
        factored: Whether the second layer of each MLP is factored besides.
        shared: Whether query, key and value are compressed.
        model: The dense model; default: `tiny_vit()`.
        chunks: Number of stacked parts of the first layer of each MLP.
    """
    model = tiny_vit() if model is None else model
    # The head of DINOv2 and the patch merging of Swin have as many inputs as MLPs have units.
    others = ("classifier", "reduction")
    names = {name: canonical for name, canonical in canonical_names(model).items() if not name.endswith(others)}
    targets = [Target(name, canonical, model.get_submodule(name)) for name, canonical in names.items()]
    for target in targets:
        if target.module.in_features == 64:
            narrow = selected_columns(target.module, torch.arange(UNITS))
            insert_layer(model, target, factored_layer(narrow, layout) if factored else narrow)
        elif target.module.out_features == 64 * chunks:
            rows = torch.cat([torch.arange(UNITS) + 64 * chunk for chunk in range(chunks)])
            insert_layer(model, target, selected_rows(target.module, rows), chunks)
    for members in groups(targets) if shared else []:
        joint = joint_target(members)
        insert_layer(model, joint, factored_layer(joint.module, layout))
    entries = rank_map_of(model, targets)
    stored = {name: entry.to_dict() for name, entry in entries.items()}
    config = MixRankConfig(rank_map=stored, layout_version=layout_version(entries.values()))
    attach(model, MixRankHfQuantizer(config, pre_quantized=True))
    return model.eval(), targets


def groups(targets):
    """Query, key and value of every block."""
    parts = {}
    for target in targets:
        parent, _, last = target.canonical_name.rpartition(".")
        if last in ("query", "key", "value"):
            parts.setdefault(parent, []).append(target)
    return list(parts.values())


def factored_layer(dense, layout):
    U, S, V = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
    return factored_linear(dense, V[:RANK], U[:, :RANK] * S[:RANK], layout)
