"""Sessions of ONNX Runtime."""

import pytest
import torch


pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from optimum_mixrank.runtime.onnx_session import cpu_session


def test_files_and_their_contents_run_with_as_many_threads_as_pytorch_has(tmp_path):
    linear, inputs = torch.nn.Linear(3, 2).eval(), torch.ones(4, 3)
    file = tmp_path / "linear.onnx"
    torch.onnx.export(linear, (inputs,), file, input_names=["input"], dynamo=False)
    for model in (file, str(file), file.read_bytes()):
        session = cpu_session(model)
        assert session.get_session_options().intra_op_num_threads == torch.get_num_threads()
        assert session.get_providers() == ["CPUExecutionProvider"]
        (output,) = session.run(None, {"input": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), linear(inputs).detach())
