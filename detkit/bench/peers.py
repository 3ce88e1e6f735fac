"""Other implementations of the operators, each used where it can be imported.

None is a dependency. torchvision is taken from the folder that the environment variable DETKIT_PEER
names (`make peer` makes one), else as installed; ONNX Runtime needs onnx beside it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detkit.bench.timing import Call

NAMES = ("torchvision", "mmcv", "onnxruntime", "openvino")


def load_torchvision() -> Any:
    """torchvision, the one of DETKIT_PEER first; None where there is none that works."""
    folder = os.environ.get("DETKIT_PEER")
    try:
        if folder:
            sys.path.insert(0, folder)
            found = importlib.import_module("torchvision_cpu").load()
        else:
            found = importlib.import_module("torchvision")
        found.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch
        return None
    return found


def load_peers() -> dict[str, Any]:
    """Name to module of the peers that are here; mmcv's is ``mmcv.ops``."""
    peers = {"torchvision": load_torchvision()}
    needs = {
        "mmcv": ("mmcv.ops",),
        "onnxruntime": ("onnxruntime", "onnx"),
        "openvino": ("openvino",),
    }
    for name, modules in needs.items():
        try:
            peers[name] = [importlib.import_module(module) for module in modules][0]
        except (ImportError, OSError):
            peers[name] = None
    return {name: module for name, module in peers.items() if module is not None}


def versions(peers: Mapping[str, Any]) -> dict[str, str]:
    """Their versions."""
    modules = {n: sys.modules["mmcv"] if n == "mmcv" else m for n, m in peers.items()}
    return {name: str(getattr(module, "__version__", "?")) for name, module in modules.items()}


def onnx_call(
    node: str, feeds: Sequence[Mapping[str, Tensor]], opset: int, threads: int, **attributes: Any
) -> Call:
    """One ONNX operator in ONNX Runtime, its inputs in the order of each feed."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper = onnx.helper
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(k, kinds[v.dtype], list(v.shape)) for k, v in feeds[0].items()
    ]
    kind = kinds[torch.int64 if node == "NonMaxSuppression" else torch.float32]
    output = helper.make_tensor_value_info("output", kind, None)
    graph = helper.make_graph(
        [helper.make_node(node, list(feeds[0]), ["output"], **attributes)], node, inputs, [output]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = [{k: v.numpy() for k, v in feed.items()} for feed in feeds]
    return lambda turn: session.run(None, arrays[turn % len(arrays)])


def openvino_call(
    outputs: Sequence[Any], inputs: Sequence[Any], feeds: Sequence[Sequence[Tensor]], threads: int
) -> Call:
    """A graph of OpenVINO operators on the CPU in fp32."""
    openvino = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Model(list(outputs), list(inputs))
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    arrays = [[tensor.numpy() for tensor in feed] for feed in feeds]
    return lambda turn: request.infer(arrays[turn % len(arrays)])


def openvino_ops() -> Any:
    """OpenVINO's operators and its numpy types."""
    return importlib.import_module("openvino.opset15")
