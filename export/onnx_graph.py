"""Write an ONNX graph node by node, its weights tensor by tensor into one external data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OnnxGraph"]

OPSET = 17  # LayerNormalization is in; ONNX Runtime and the parser of TensorRT 10 both read it
IR_VERSION = 8  # the one of opset 17
ALIGNMENT = 4096  # bytes: readers may map a tensor of the data file directly


class OnnxGraph:
    """Context manager over the data file `<path>.data`; `save` writes the nodes to `path`.

    Every value has the name of the node that makes it. Weights go to the data file when they are
    added and are not kept; small constants stay in the graph.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.data_path = self.path.with_name(self.path.name + ".data")
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []

    def __enter__(self) -> OnnxGraph:
        self._data = self.data_path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._data.close()

    def node(self, op_type: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns that output's name, which is `name`."""
        return self.nodes(op_type, name, *inputs, outputs=[name], **attributes)[0]

    def nodes(
        self, op_type: str, name: str, *inputs: str, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; returns their names."""
        from onnx import helper

        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=name, **attributes))
        return list(outputs)

    def constant(self, name: str, value: Any, dtype: type[np.generic] = np.float32) -> str:
        """Add a small constant to the graph itself; returns `name`."""
        from onnx import numpy_helper

        self._initializers.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Write `array` in its own dtype (bfloat16, float16, float32) to the data file.

        Returns `name`. Needs the memory of `array` once more when it is not contiguous.
        """
        from onnx import TensorProto

        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        raw = np.ascontiguousarray(array.view(f"u{array.itemsize}"))  # numpy copies these faster
        self._data.write(raw.reshape(-1).view(np.uint8).data)
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=TensorProto.DataType.Value(_ONNX_TYPES[array.dtype.name]),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self.data_path.name),
            ("offset", str(offset)),
            ("length", str(array.nbytes)),
        ):
            tensor.external_data.add(key=key, value=value)
        self._initializers.append(tensor)
        return name

    def save(
        self,
        name: str,
        *,
        inputs: Mapping[str, tuple[str, Sequence[int | str]]],
        outputs: Mapping[str, tuple[str, Sequence[int | str]]],
        metadata: Mapping[str, str],
    ) -> None:
        """Write the graph: inputs and outputs are value name -> (ONNX type name, shape)."""
        import onnx
        from onnx import TensorProto, helper

        def values(described: Mapping[str, tuple[str, Sequence[int | str]]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(value, TensorProto.DataType.Value(kind), shape)
                for value, (kind, shape) in described.items()
            ]

        graph = helper.make_graph(
            self._nodes, name, values(inputs), values(outputs), self._initializers
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="internvl-triton",
        )
        helper.set_model_props(model, dict(metadata))
        self._data.flush()
        self.path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(self.path))


_ONNX_TYPES = {"bfloat16": "BFLOAT16", "float16": "FLOAT16", "float32": "FLOAT"}
