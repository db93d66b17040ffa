"""Writes the model of a bundle as an ONNX graph, or as a model for Triton: docs/other-formats.md.

Inputs are encoded rows: `dense` float32 [B, num_inputs], and of each feature `ids_NAME` int32 [B, L], L 1 where cells
have one value, else filled up with -1; `weights_NAME` float32 [B, L] where values have weights. Outputs are
`probability`, float32 [B, 1], and `probability_LABEL` of each label but the first. Memory: a block of rows where
constants lie beside the file, else twice its size.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from torchdlrm import __version__
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import SCALE_BIAS_BYTES, TABLE_PRECISIONS
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.write import complete_folder
from torchdlrm.errors import BundleError
from torchdlrm.features.encode import encode
from torchdlrm.features.tables import FeatureTable, table_name
from torchdlrm.files import replacing_durably
from torchdlrm.model import projection_weight, table_weight
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.graph import BOOL, Graph
from torchdlrm.model.heads import HEADS
from torchdlrm.model.pooling import pooled_features, pooling_of

OPSET, IR_VERSION, MAX_BATCH_ROWS, _OUTPUT = 18, 9, 8192, "probability"
MAX_FILE_BYTES = 2**31 - 2**24  # protobuf reads 2 GiB
_BLOCK_BYTES, _MIN_BESIDE_BYTES, _ALIGNMENT_BYTES = 32 * 2**20, 1024, 4096
_LARGEST_DIFFERENCE = 1e-5
_TYPES = {np.float32: 1, np.uint8: 2, np.int32: 6, np.int64: 7, np.float16: 10, np.uint32: 12}  # TensorProto.DataType
_Inputs = dict[str, tuple[type[Any], int]]  # numpy's type, and the numbers of a row; -1 where a request says how many


def write_onnx(bundle: Bundle, out: Path) -> None:
    """Write a bundle's model as a graph in float32; constants lie in `out`.data beside it where they are too large.

    Raises:
        BundleError: the model has no graph, or onnxruntime predicts something else of the bundle's sample.
    """
    graph, inputs = _graph_of(bundle)
    if sum(array.nbytes for array in graph.constants.values()) <= MAX_FILE_BYTES:
        model = _model(bundle, graph, inputs)
    else:
        with replacing_durably(out.with_name(f"{out.name}.data")) as beside, beside.open("wb") as data:
            model = _model(bundle, graph, inputs, f"{out.name}.data", data)
    with replacing_durably(out) as file:
        file.write_bytes(model)
        _check(bundle, file)


def write_triton(bundle: Bundle, out: Path) -> None:
    """Write a model's folder of a Triton model repository, as `write_onnx`; the model has the name of the folder."""
    kinds = {np.float32: "TYPE_FP32", np.int32: "TYPE_INT32"}
    made = _graph_of(bundle)[1].items()
    given = (f'input {{ name: "{name}" data_type: {kinds[kind]} dims: [ {size} ] }}' for name, (kind, size) in made)
    names = bundle.schema.label_columns(_OUTPUT)
    found = (f'output {{ name: "{name}" data_type: TYPE_FP32 dims: [ 1 ] }}' for name in names)
    lines = ('backend: "onnxruntime"', f"max_batch_size: {MAX_BATCH_ROWS}", *given, *found, "dynamic_batching { }\n")
    with complete_folder(out, ("config.pbtxt", "1")) as folder:
        (folder / "1").mkdir()
        write_onnx(bundle, folder / "1" / "model.onnx")
        (folder / "config.pbtxt").write_text("\n".join(lines), encoding="utf-8")


def onnx_inputs(bundle: Bundle, rows: EncodedRows) -> dict[str, NDArray[Any]]:
    """The inputs of the graph of a bundle.

    Args:
        bundle: that the graph was made of.
        rows: B rows, as `Predictor.encode` has encoded them.

    Returns:
        By input: `dense` float32 [B, dense columns and numbers of vectors], and of each sparse column `ids_NAME` int32
        [B, the most values of a row], -1 where a row has fewer, and `weights_NAME` where its values have weights.
    """
    feeds: dict[str, NDArray[Any]] = {"dense": np.ascontiguousarray(rows.dense)} if rows.dense.shape[1] else {}
    for place, column in enumerate(bundle.schema.sparse):
        bags = rows.sparse[place]
        ids, offsets = bags if isinstance(bags, tuple) else (bags, np.arange(rows.num_rows + 1))
        is_value = np.arange(max(1, np.diff(offsets).max(initial=0))) < np.diff(offsets)[:, None]
        own = None if rows.weights is None else rows.weights[place]
        for kind, values, fill in (("ids", ids.astype(np.int32), -1), ("weights", own, 0)):
            if values is not None:
                feeds[f"{kind}_{column.name}"] = padded = np.full(is_value.shape, fill, values.dtype)
                padded[is_value] = values
    return feeds


def _graph_of(bundle: Bundle) -> tuple[Graph, _Inputs]:
    if bundle.manifest.model_class is not None:
        msg = f"{bundle.path}: has no graph: its model class is Python; torch.onnx.export may know how to trace it"
        raise BundleError(msg)
    if bundle.manifest.recalibrated not in {(None, None), ("platt", None)}:
        msg = f"{bundle.path}: has no graph: it is recalibrated, and a graph knows platt alone, the same for all rows"
        raise BundleError(msg)
    graph, shape, config = Graph(bundle.weights.tensor), bundle.shape, bundle.shape.config
    tables = {name: [*found] for name, found in groupby(bundle.manifest.tables, lambda table: table.feature)}
    inputs: _Inputs = {"dense": (np.float32, shape.num_inputs)} if shape.num_inputs else {}
    vectors: dict[str, str] = {}
    for column in bundle.schema.sparse:
        ids, weights = f"ids_{column.name}", ""
        inputs[ids] = (np.int32, -1 if column.is_multi_valued else 1)
        # A lookup takes a negative id for one from the end; as an unsigned number it is beyond the table.
        rows = graph.node("Cast", graph.node("Cast", ids, to=_TYPES[np.uint32]), to=_TYPES[np.int64])
        if column.is_multi_valued:
            is_value = graph.node("GreaterOrEqual", ids, graph.constant([0], np.int32))
            rows = graph.node("Where", is_value, rows, graph.constant([0]))
            weights = graph.node("Cast", is_value, to=_TYPES[np.float32])
        if column.weights_name is not None:
            inputs[f"weights_{column.name}"] = (np.float32, -1)
            weights = graph.node("Mul", weights, f"weights_{column.name}")
        vectors[column.name] = _looked_up(graph, bundle, tables[column.name], rows, weights)
    for feature, keys in pooled_features(bundle.manifest.tables).items():
        is_value = graph.node("GreaterOrEqual", f"ids_{feature}", graph.constant([0], np.int32))
        ages_BL = graph.node("CumSum", graph.node("Cast", is_value, to=_TYPES[np.int64]), graph.constant(1), reverse=1)
        name, own = f"sparse_arch.poolings.{table_name(feature)}.", vectors[feature]
        target = vectors[getattr(keys[0].pooling, "target", None) or feature]
        shares_BL = pooling_of(keys).shares(graph, name, own, ages_BL, target)
        shared = graph.node("Mul", own, graph.node("Unsqueeze", shares_BL, graph.constant([2])))
        vectors[feature] = graph.node("ReduceSum", shared, graph.constant([1]))
    dense, *content = _numbers(graph, shape)
    if not shape.num_dense:  # a 1 in every row: `torchdlrm.model.dlrm.ConstantArch`
        size = graph.node("Concat", graph.node("Shape", next(iter(inputs)), end=1), graph.constant([1]), axis=0)
        dense = graph.node("Expand", graph.constant([[1]], np.float32), size)
    dense_BD = graph.layers(dense, "dense_arch.model", len(config.dense_arch_layer_sizes))
    dense_B1D = graph.node("Unsqueeze", dense_BD, graph.constant([1]))
    vectors_BND = graph.node("Concat", dense_B1D, *vectors.values(), *content, axis=1)
    read = shape.architecture.graph_interaction(shape, graph, dense_BD, vectors_BND)
    logits = dict(zip((label.name for label in bundle.schema.learnt), _logits(graph, shape, read), strict=True))
    for label, of in bundle.manifest.recalibrations.items():  # whose one knot is at 0
        scaled = graph.node("Mul", logits[label], graph.constant([of.map.slope], np.float32))
        logits[label] = graph.node("Add", scaled, graph.constant(of.map.values, np.float32))
    for name, logit in zip(bundle.schema.label_columns(_OUTPUT), logits.values(), strict=True):
        graph.node("Sigmoid", logit, out=name)
    return graph, inputs


def _logits(graph: Graph, shape: ModelShape, read: str) -> list[str]:
    """The logit of each label [B, 1], of what the over arch reads; of several labels as `torchdlrm.model.heads`."""
    heads, names = shape.config.heads, [f"over_arch.towers.{i}" for i in range(shape.num_labels)]
    mixed, logits = [read] * shape.num_labels, []
    for number, level in enumerate(HEADS[heads.kind].levels_of(shape.num_labels, heads)):
        name, below, mixed, at_1 = f"over_arch.levels.{number}", mixed, [], graph.constant([1])
        made = [
            graph.layers(below[of], f"{name}.experts.{i}.model", len(heads.expert_layer_sizes))
            for i, of in enumerate(level.reads)
        ]
        for i, (of, experts) in enumerate(level.gates):
            shares = graph.node("Softmax", graph.linear(below[of], f"{name}.gates.{i}.weight"), axis=1)
            shares_B1E = graph.node("Unsqueeze", shares, at_1)
            experts_BEK = graph.node("Concat", *(graph.node("Unsqueeze", made[e], at_1) for e in experts), axis=1)
            mixed.append(graph.node("Squeeze", graph.node("MatMul", shares_B1E, experts_BEK), at_1))
    for name, x in zip(names if shape.num_labels > 1 else ["over_arch"], mixed, strict=True):
        last = graph.layers(x, f"{name}.model.0", len(shape.config.over_arch_layer_sizes) - 1)
        logits.append(graph.linear(last, f"{name}.model.1.weight", f"{name}.model.1.bias"))
    for label, before in heads.chain(shape.labels):
        parts = [graph.node("Neg", logits[of]) for of in (before, label)]
        terms = graph.node("Concat", *parts, graph.node("Add", *parts), axis=1)
        logits[label] = graph.node("Neg", graph.node("ReduceLogSumExp", terms, graph.constant([1])))
    return logits


def _numbers(graph: Graph, shape: ModelShape) -> Iterator[str]:
    """The dense features, and of each column of content its vector [B, 1, D] as `torchdlrm.model.dlrm.VectorArch`."""

    def part(*ends: int) -> str:
        return graph.node("Slice", "dense", *(graph.constant([at]) for at in (*ends, 1)))

    edges = [0, *accumulate((shape.num_dense, *(column.size or 0 for column in shape.content)))]
    yield part(*edges[:2]) if shape.content else "dense"
    for column, ends in zip(shape.content, pairwise(edges[1:]), strict=True):
        given, name = part(*ends), f"content_arch.v_{column.name}"
        projected = graph.linear(given, f"{name}.weight", f"{name}.bias")
        largest = graph.node("ReduceMax", graph.node("Abs", given), graph.constant([1]))
        missing = graph.constant(graph.weight(f"{name}.missing").numpy(), np.float32)
        made = graph.node("Where", graph.node("Cast", largest, to=BOOL), projected, missing)
        yield graph.node("Unsqueeze", made, graph.constant([1]))


def _looked_up(graph: Graph, bundle: Bundle, tables: Sequence[FeatureTable], ids_BL: str, weights_BL: str) -> str:
    """The vector of a feature: [B, 1, D]; without weights L is 1. Of a sequence the vectors of its values [B, L, D]."""
    vectors, is_sequence = [], tables[0].position is not None
    for table in tables[:1] if is_sequence else tables:
        rows = ids_BL
        if table.combination is not None:
            rows = graph.node("Mod" if table.is_remainder else "Div", ids_BL, graph.constant([table.num_collisions]))
        vector = _rows(graph, bundle, table, rows)
        if weights_BL:
            vector = graph.node("Mul", vector, graph.node("Unsqueeze", weights_BL, graph.constant([2])))
            vector = vector if is_sequence else graph.node("ReduceSum", vector, graph.constant([1]))
        if table.dim < table.vector_dim:
            weight = bundle.weights.tensor(projection_weight(table.table_key)).t().numpy()
            vector = graph.node("MatMul", vector, graph.constant(weight, np.float32))
        vectors.append(vector)
    return graph.node("Mul" if tables[0].combination == "mult" else "Add", *vectors) if len(vectors) > 1 else vectors[0]


def _rows(graph: Graph, bundle: Bundle, table: FeatureTable, ids_BL: str) -> str:
    """Rows of a table, which stays in its precision: float32 [B, L, dim]."""
    record = TABLE_PRECISIONS[bundle.manifest.sparse[table.feature].precision]
    stored = bundle.weights.tensor(table_weight(table.table_key)).numpy()

    def gathered(array: NDArray[Any]) -> str:
        return graph.node("Gather", graph.constant(array, array.dtype), ids_BL)

    if not record.is_quantized:
        return graph.node("Cast", gathered(stored), to=_TYPES[np.float32]) if record.bits < 32 else gathered(stored)
    numbers = gathered(stored[:, SCALE_BIAS_BYTES:])
    if record.bits == 4:  # the low half of a byte is the first number
        low = graph.node("BitwiseAnd", numbers, graph.constant([15], np.uint8))
        high = graph.node("BitShift", numbers, graph.constant([4], np.uint8), direction="RIGHT")
        pair = [graph.node("Unsqueeze", half, graph.constant([3])) for half in (low, high)]
        numbers = graph.node("Reshape", graph.node("Concat", *pair, axis=3), graph.constant([0, 0, table.dim]))
    scale, bias = (gathered(stored[:, at : at + 2].view(np.float16)) for at in (0, 2))
    numbers, scale, bias = (graph.node("Cast", value, to=_TYPES[np.float32]) for value in (numbers, scale, bias))
    return graph.node("Add", graph.node("Mul", numbers, scale), bias)


def _model(bundle: Bundle, graph: Graph, inputs: _Inputs, data_name: str = "", data: BinaryIO | None = None) -> bytes:
    """The bytes of the file; constants that are not small are written to `data`, where it is given."""
    from onnx import TensorProto, helper  # noqa: PLC0415 - an optional package

    constants = []
    for name, array in graph.constants.items():
        tensor = TensorProto(name=name, data_type=_TYPES[array.dtype.type], dims=array.shape)
        if data is None or array.nbytes < _MIN_BESIDE_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            data.write(bytes(-data.tell() % _ALIGNMENT_BYTES))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data_name), ("offset", data.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            step = max(1, _BLOCK_BYTES // array[:1].nbytes)
            data.writelines(array[start : start + step].tobytes() for start in range(0, len(array), step))
        constants.append(tensor)
    given = [
        helper.make_tensor_value_info(name, _TYPES[kind], ["rows", size if size > 0 else name.partition("_")[2]])
        for name, (kind, size) in inputs.items()
    ]
    names = bundle.schema.label_columns(_OUTPUT)
    made = [helper.make_tensor_value_info(name, _TYPES[np.float32], ["rows", 1]) for name in names]
    described = helper.make_graph(graph.nodes, f"{bundle.name}, version {bundle.version}", given, made, constants)
    about = {"producer_name": "torchdlrm", "producer_version": __version__, "ir_version": IR_VERSION}
    return helper.make_model(described, opset_imports=[helper.make_opsetid("", OPSET)], **about).SerializeToString()


def _check(bundle: Bundle, file: Path) -> None:
    import onnxruntime  # noqa: PLC0415 - an optional package

    frame = encode(bundle.sample()[0], bundle.schema, bundle.dense, bundle.vocabularies)
    rows = EncodedRows.from_frame(frame, bundle.schema)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    expected = ServedModel(bundle, "float32").predict(rows)
    found = np.hstack(session.run(None, onnx_inputs(bundle, rows))) if rows.num_rows else expected
    difference = np.abs(found.reshape(expected.shape) - expected).max(initial=0)
    if not difference <= _LARGEST_DIFFERENCE:
        msg = f"{bundle.path}: onnxruntime predicts up to {difference:.2g} off the bundle, so no graph was written"
        raise BundleError(msg)
