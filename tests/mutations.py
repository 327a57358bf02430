"""Changes that damage does to safetensors files, for tests of what is read from them."""

import json

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@st.composite
def mutations(draw):
    """A function of a path that changes the file there, so that it no longer holds what was saved."""
    kind = draw(st.sampled_from(["bytes", "cut", "tensor", "swap", "missing", "metadata", "json"]))
    position, other = draw(st.integers(0, 10**6)), draw(st.integers(1, 10**6))
    text, value = draw(st.text(max_size=8)), draw(JSON_VALUES)
    change = draw(st.sampled_from(["scale", "zero", "dtype", "shape", "nan"]))

    def mutate(path):
        content = bytearray(path.read_bytes())
        if kind == "bytes":
            content[position % len(content)] ^= 1 + other % 255
            return path.write_bytes(content)
        if kind == "cut":
            return path.write_bytes(content[: position % len(content)])
        tensors, metadata = read(path)
        names = sorted(tensors)
        if kind in ("tensor", "swap", "missing") and names:
            name = names[position % len(names)]
            if kind == "tensor":
                tensors[name] = changed(tensors[name], change)
            elif kind == "missing":
                del tensors[name]
            else:
                tensors[name + text] = tensors.pop(name)
        elif kind == "metadata" or not names:
            metadata[sorted(metadata)[position % len(metadata)]] = text
        else:
            key = "values" if "values" in metadata else "calibration"
            metadata[key] = json.dumps(replaced(json.loads(metadata[key]), position, value))
        save_file(tensors, path, metadata=metadata)

    return mutate


def changed(tensor, change):
    return {
        "scale": lambda: tensor * 2 if tensor.is_floating_point() else tensor + 1,
        "zero": lambda: torch.zeros_like(tensor),
        "dtype": lambda: tensor.half(),
        "shape": lambda: tensor.reshape(1, *tensor.shape),
        "nan": lambda: torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor + 3,
    }[change]()


def replaced(content, position, value):
    """Replace a value of nested JSON, or the whole."""
    if isinstance(content, dict) and content and position % 3:
        key = sorted(content)[position % len(content)]
        return {**content, key: replaced(content[key], position // 3, value)}
    return value


def is_same(first, second):
    """Whether two files hold the same; a change may have no effect, such as zeros in place of zeros."""
    try:
        (tensors, metadata), (others, other_metadata) = read(first), read(second)
    except Exception:
        return False
    return (
        metadata == other_metadata
        and tensors.keys() == others.keys()
        and all(
            tensor.dtype == others[name].dtype and torch.equal(tensor, others[name])
            for name, tensor in tensors.items()
        )
    )
