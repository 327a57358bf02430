"""Mixed precision applies to the model, never to the statistics accumulated over it."""

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from compensation.cases import config, images
from models import tiny_vit
from torch.overrides import TorchFunctionMode

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.calibration.moments import MomentAccumulator, PairAccumulator
from optimum_mixrank.runtime.distributed import find_processes
from optimum_mixrank.runtime.precision import tf32_statistics


STEPS = ["sequential", "blocks", "distillation"]


@pytest.fixture
def accelerator(request):
    """An `Accelerator` of this mixed precision; Accelerate keeps the first one's for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def batches(count=64):
    return list(images(count).split(16))


class OutputDtypes:
    """Records the dtype of the output of a layer in the first block in every forward pass."""

    def __init__(self, model):
        self.dtypes = set()
        layer = next(m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "0" in n)
        self._handle = layer.register_forward_hook(self._note)

    def _note(self, module, args, output):
        # A single image is the black one, on which targets are found.
        if len(output) > 1:
            self.dtypes.add(output.dtype)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


@pytest.mark.parametrize("accelerator", ["bf16", "fp16"], indirect=True)
def test_statistics_of_mixed_precision(accelerator):
    # What rounding does to bfloat16's gradients of such a small model; float16 has three bits more.
    tolerance = {"bf16": 0.1, "fp16": 0.02}[accelerator.mixed_precision]
    model = tiny_vit()
    metrics = ["kfac", "mean_input", "diagonal"]
    expected = MixRankCompressor(model).calibrate(batches(), metrics)
    with OutputDtypes(model) as watch:
        found = MixRankCompressor(model, accelerator=accelerator).calibrate(batches(), metrics)
    assert watch.dtypes == {torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16}
    for name, statistics in expected.layers.items():
        for what, tensor in vars(statistics).items():
            if isinstance(tensor, torch.Tensor):
                mixed = getattr(found.layers[name], what)
                assert mixed.dtype == torch.float64
                assert (mixed - tensor).norm() < tolerance * tensor.norm(), (name, what)


@pytest.mark.parametrize("accelerator", ["bf16", "fp16"], indirect=True)
def test_compression_in_mixed_precision(accelerator):
    # Small differences may change the structure that is chosen, and with it everything else.
    settings = config(compensation=STEPS, epochs=2, learning_rate=1e-3, train_batch_size=16, structures=["rank"])
    expected = MixRankCompressor(tiny_vit())
    expected.compress(settings, batches(128))
    compressor = MixRankCompressor(tiny_vit(), accelerator=accelerator)
    model = compressor.compress(settings, batches(128))
    assert model.dtype == torch.float32
    assert compressor.report.environment["mixed_precision"] == accelerator.mixed_precision
    ranks = [[layer.rank or 0 for layer in each.report.layers] for each in (compressor, expected)]
    assert all(abs(mixed - plain) <= 1 for mixed, plain in zip(*ranks, strict=True))
    for mixed, plain in zip(compressor.report.compensation, expected.report.compensation, strict=True):
        assert mixed["error_after"] == pytest.approx(plain["error_after"], rel=0.1)


@pytest.mark.parametrize("accelerator", ["no"], indirect=True)
def test_without_mixed_precision_nothing_changes(accelerator):
    settings = config(compensation=["distillation"], epochs=1, train_batch_size=16)
    model = tiny_vit()
    expected = MixRankCompressor(model).compress(settings, batches())
    with OutputDtypes(model) as watch:
        found = MixRankCompressor(model, accelerator=accelerator).compress(settings, batches())
    assert watch.dtypes == {torch.float32}
    for mixed, plain in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(mixed, plain)


def test_accelerate_launch_sets_the_precision_of_a_single_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert find_processes().is_single and find_processes().mixed_precision == "bf16"
    model = tiny_vit()
    with OutputDtypes(model) as watch:
        MixRankCompressor(model).calibrate(batches(16), "kfac")
    assert watch.dtypes == {torch.bfloat16}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision='fp8' is not supported; choose 'no', 'bf16' or 'fp16'"):
        MixRankCompressor(model).calibrate(batches(16), "kfac")


class Products(TorchFunctionMode):
    """Records the precision in which PyTorch would multiply float32 on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.seen.add(setting())
        return function(*args, **(kwargs or {}))


def setting():
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "float32"


def legacy():
    torch.set_float32_matmul_precision("medium")


def newer():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def wider():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture(params=[legacy, newer, wider], ids=lambda function: function.__name__)
def tf32(request):
    """PyTorch is set to TF32, by one of its interfaces."""
    has_newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    if request.param is not legacy and not has_newer:
        pytest.skip("this PyTorch has one interface")
    request.param()
    yield request.param
    if has_newer:
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if has_newer:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_moments_are_not_multiplied_in_tf32(tf32):
    def accumulate():
        with Products() as products:
            MomentAccumulator().update(torch.ones(4, 3))
            PairAccumulator().update(torch.ones(4, 3), torch.ones(4, 2))
        return products.seen

    assert setting() == "tf32"
    assert accumulate() == {"float32"} and setting() == "tf32"
    with tf32_statistics():
        assert accumulate() == {"tf32"}
    assert accumulate() == {"float32"} and setting() == "tf32"
    if tf32 is legacy:
        assert torch.get_float32_matmul_precision() == "medium"
    if tf32 is wider:
        # The setting is followed as before.
        torch.backends.fp32_precision = "ieee"
        assert setting() == "float32"


@pytest.mark.parametrize(("allowed", "expected"), [(False, "float32"), (True, "tf32")])
def test_tf32_on_request(allowed, expected, tf32):
    compressor = MixRankCompressor.from_pretrained(tiny_vit(), allow_tf32=allowed)
    seen = set()
    update = MomentAccumulator.update

    def watched(self, vectors):
        with Products() as products:
            update(self, vectors)
        seen.update(products.seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MomentAccumulator, "update", watched)
        compressor.calibrate(batches(16), "kfac")
    assert seen == {expected}
