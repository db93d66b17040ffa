"""Builds an ONNX graph, to which the parts of a model add nodes; `torchdlrm.exporting.onnx_file` writes it.

A value of the graph is known by its name.  Constants stay the arrays that were given: tables are mapped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FLOAT, BOOL = 1, 9  # TensorProto.DataType


@dataclass
class Graph:
    """Nodes (`onnx.NodeProto`) and constants; `weight` gives the float32 weight of a name in the model's state dict."""

    weight: Callable[[str], Tensor]
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)

    def node(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add an operator; the name of what it gives."""
        from onnx import helper  # noqa: PLC0415 - an optional package

        name = out or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, values: Any, dtype: Any = np.int64, name: str = "") -> str:
        """Add a constant, unless the same memory is one; its name."""
        array = np.asarray(values, dtype)
        same = (of for of, known in self.constants.items() if known.__array_interface__ == array.__array_interface__)
        name = name or next(same, f"constant_{len(self.constants)}")
        self.constants[name] = array
        return name

    def linear(self, x: str, weight: str, bias: str = "", *, relu: bool = False) -> str:
        """A layer with the weight [O, I] and the bias of these names in the state dict: maps [B, I] to [B, O]."""
        given = [self.constant(self.weight(name).numpy(), np.float32, name) for name in (weight, bias) if name]
        out = self.node("Gemm", x, *given, transB=1)
        return self.node("Relu", out) if relu else out

    def layers(self, x: str, mlp: str, num_layers: int) -> str:
        """TorchRec's `MLP` of this name in the state dict: maps [B, I] to [B, O]."""
        for name in (f"{mlp}._mlp.{number}._linear." for number in range(num_layers)):
            x = self.linear(x, f"{name}weight", f"{name}bias", relu=True)
        return x
