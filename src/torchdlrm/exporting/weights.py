"""Makes a run of another program's weights, or the other way round: docs/migration.md.

Form `torchrec` has our names; `dlrm` is facebookresearch/dlrm's dlrm_s_pytorch.py.  D embedding dimension, N = F + 1
vectors that interact, P = N(N-1)/2 pairs.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchdlrm.config import Config, load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import RunError
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.model import table_weight
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.build import build_model
from torchdlrm.storage import mirror, places
from torchdlrm.training.checkpoint import Position, list_checkpoints
from torchdlrm.training.checkpoint_reader import MODEL, CheckpointReader
from torchdlrm.training.checkpoint_state import TakeOver, take_over
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.run import Run, fetch_run
from torchdlrm.training.sharded import build_optimizer, build_sharded_model
from torchdlrm.training.steps import Agenda

Form = Literal["torchrec", "dlrm"]
_MARKERS: Mapping[Form, str] = {"torchrec": "sparse_arch.", "dlrm": "emb_l."}
_WRAPPERS = re.compile(r"\b(module|_orig_mod)\.")  # of DistributedDataParallel and torch.compile, at any depth
_FIRST_OVER, _MAX_SHOWN = "over_arch.model.0._mlp.0._linear.weight", 20


def import_weights(
    state_dict: Mapping[str, Any] | str | Path,
    dataset: Dataset | str | Path,
    run: str | Path,
    *,
    config: Config | str | Path | None = None,
    overwrite: bool = False,
) -> Run:
    """Make a run of the weights of facebookresearch/dlrm's models or of TorchRec's DLRM, DLRM_DCN and DLRM_Projection.

    Args:
        state_dict: the model's; or a file of `torch.save` that has it, by itself or as a value of a dict, of which
            nothing is executed. Its first table is of the dataset's first sparse column, a row for each id, and so on.
        dataset: that the run is evaluated on and exported with; `dlrm import` makes one of encoded data.
        run: its folder; there is one checkpoint, of step 0, in which optimizers have done nothing yet.
        config: the settings of a training that goes on; `[model]` is not read, the weights have its sizes.
        overwrite: remove a run that is there.

    Raises:
        UserError: the file has no such weights, or more; they do not fit the dataset (names each tensor that does not);
            a model of ours cannot have these sizes; there is no dataset; or something is in the folder.
    """
    settings, path = config if isinstance(config, Config) else load_config(config), fetch_run(run)
    if list_checkpoints(path / "checkpoints") and not overwrite:
        raise RunError(f"`run`: {path} has weights already; give another folder, or `overwrite`")
    encoded = (dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)).with_labels(
        settings.train.label_names
    )
    source = _UpstreamWeights(*_opened(state_dict), encoded)
    settings = settings.model_copy(update={"model": source.shape.config})
    with join_process_group(settings.train.timeout_s, device="cpu") as ranks:
        built = build_sharded_model(settings, source.shape, dense_sample=None, ranks=ranks)
        state = built.module.state_dict()
        take_over({"model": state}, source, TakeOver())
        built.module.load_state_dict(state)
        optimizer = build_optimizer(built.module, settings.dense_optimizer)
        first = Position(0, Agenda.of(settings, max(1, encoded.splits["train"].rows)).loader_state(0))
        started = Run(path, settings).start(encoded, world_size=1, restart=overwrite)
        with closing(started), closing(Checkpointer(started.checkpoints, built.module, optimizer, ranks)) as saving:
            started.write_plan(built.solution)
            if not saving.save(first, wait=True):
                raise RunError(f"`run`: the weights could not be written to {path}, see above")
    return started


def upstream_weights(run: Run, dataset: Dataset, checkpoint: str, form: Form) -> dict[str, Tensor]:
    """The weights of a run as another program's state dict, in memory; raises RunError where it has no such model."""
    config, ours = run.config.model, [table_weight(name) for name in dataset.table_rows]
    unlike = {
        "several labels": len(dataset.schema.learnt) > 1,
        "a model class": run.model_class is not None,
        "vectors": bool(dataset.schema.content),
        "smaller tables or a pooling (model.features)": bool(config.features),
        "a cross net with gates (model.dcn.gated)": config.dcn.gated,
        "a table that columns share": form == "dlrm" and len(ours) < len(dataset.sparse_names),
        f"the interaction {config.interaction}": form == "dlrm" and config.interaction != "dot",
    }
    if has := ", ".join(what for what, is_so in unlike.items() if is_so):
        raise RunError(f"{run.path}: has {has}, which the models of the format {form} do not have")
    _, reader = open_checkpoint(run, checkpoint)
    weights = {name: reader.tensor(name) for name in reader.shapes}
    if form == "torchrec":  # the order of tables says which column is which
        return {name: weights[name] for name in dict.fromkeys((*ours, *weights))}
    names = _dlrm_names(ours, len(config.dense_arch_layer_sizes), len(config.over_arch_layer_sizes))
    weights[_FIRST_OVER] = _with_pairs(weights[_FIRST_OVER], config.embedding_dim, len(ours) + 1, to_ours=False)
    return {names[name]: weight for name, weight in weights.items()}


def _dlrm_names(tables: Sequence[str], num_dense_layers: int, num_over_layers: int) -> dict[str, str]:
    """What dlrm_s_pytorch calls our weights: between two layers it has a ReLU with a number."""
    layers = {f"dense_arch.model._mlp.{n}._linear": f"bot_l.{2 * n}" for n in range(num_dense_layers)}
    layers |= {f"over_arch.model.0._mlp.{n}._linear": f"top_l.{2 * n}" for n in range(num_over_layers - 1)}
    layers |= {"over_arch.model.1": f"top_l.{2 * (num_over_layers - 1)}"}
    names = {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in layers.items() for leaf in ("weight", "bias")}
    return {name: f"emb_l.{place}.weight" for place, name in enumerate(tables)} | names


def _with_pairs(weight: Tensor, dim: int, num_vectors: int, *, to_ours: bool) -> Tensor:
    """The over arch's first weight, [O, D + P], with its pairs (i < j) by i and then j, or as dlrm_s_pytorch: by j."""
    first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
    order_P = second_P * (second_P - 1) // 2 + first_P
    return torch.cat([weight[:, :dim], weight[:, dim:][:, order_P if to_ours else order_P.argsort()]], dim=1)


def _opened(state_dict: Mapping[str, Any] | str | Path) -> tuple[str, Form, dict[str, Tensor]]:
    """What messages call a state dict, its form, and its tensors, which are mapped where they are in a file."""
    where, content = "`state_dict`", state_dict
    if isinstance(state_dict, str | Path):
        where = str(mirror.fetch(places.located(state_dict)))
        try:
            content = torch.load(where, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(where))
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else f"more than tensors, or damaged: {error}"
            raise RunError(
                f"{where}: {' '.join(str(why).split())[:300]}. Give what torch.save has written of tensors alone; "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes it of a distributed checkpoint"
            ) from error
    for found in (content, *content.values()) if isinstance(content, Mapping) else ():
        given = found.items() if isinstance(found, Mapping) else ()
        tensors = {_WRAPPERS.sub("", str(name)): tensor for name, tensor in given if isinstance(tensor, Tensor)}
        for form, marker in _MARKERS.items():
            for first in (name for name in tensors if marker in name):
                prefix = first.partition(marker)[0]
                return where, form, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    msg = f"{where}: no tensor's name has sparse_arch. in it, as TorchRec's DLRMs have, or emb_l., as dlrm_s_pytorch"
    raise RunError(msg)


def _model_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What weights by our names say of their model, by the names of `[model]`."""

    def sizes(start: str, end: str = ".bias") -> list[int]:
        return [len(w) for name, w in weights.items() if name.startswith(start) and name.endswith(end)]

    dense, over = sizes("dense_arch."), sizes("over_arch.")
    found = {"embedding_dim": dense[-1] if dense else 0, "dense_arch_layer_sizes": dense, "over_arch_layer_sizes": over}
    if ranks := sizes("inter_arch.crossnet.V_kernels.", ""):
        return found | {"interaction": "dcn", "dcn.num_layers": len(ranks), "dcn.low_rank_dim": ranks[0]}
    branches = {f"projection.branch{n}_layer_sizes": sizes(f"inter_arch.interaction_branch{n}.") for n in (1, 2)}
    return found | ({"interaction": "projection"} | branches if any(branches.values()) else {})


class _UpstreamWeights(CheckpointReader):
    """Weights of another program, read as a checkpoint of a model for a dataset; raises as `import_weights`."""

    def __init__(self, where: str, form: Form, given: Mapping[str, Tensor], dataset: Dataset) -> None:
        ours, problems = [table_weight(name) for name in dataset.table_rows], list[str]()
        theirs = [name for name in given if name.startswith(("sparse_arch.embedding_bag_collection.", "emb_l."))]
        if form == "dlrm":
            num_layers = (sum(name.startswith(arch) for name in given) // 2 for arch in ("bot_l.", "top_l."))
            names = _dlrm_names(ours, *num_layers)
        else:
            names = dict(zip(ours, theirs, strict=False))
            if {*theirs} == {*ours} and theirs != ours:
                problems.append(f"give the columns of the schema the order of the tables: {', '.join(theirs)}")
        of_ours = {their: our for our, their in names.items()}
        weights = {of_ours.get(name, name): tensor for name, tensor in given.items()}
        settings = {f"model.{key}": str(value) for key, value in _model_settings(weights).items()}
        config = load_config(None, settings).model
        self.path, self.shape = Path(where), ModelShape.of(config, dataset)
        expected = build_model(self.shape, torch.device("meta")).model.state_dict()
        for name in dict.fromkeys((*expected, *weights)):
            weight, wanted = weights.get(name), expected.get(name)
            is_alike = weight is not None and wanted is not None and weight.shape == wanted.shape
            if weight is None or not is_alike or not (weight.is_floating_point() and weight.sum().isfinite()):
                was, needed = ("nothing" if each is None else f"{[*each.shape]}" for each in (weight, wanted))
                problems.append(f"{names.get(name, name)}: is {was}, expected {needed}{' of finite floats' * is_alike}")
        if problems:
            more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
            sizes = ",".join(str(len(given[name])) for name in theirs)
            remedy = (
                f"import data with the table sizes {sizes}, and a dense column for each input of the first layer; "
                "vectors interact in pairs, and none with itself"
            )
            head = f"{where}: no weights of a model with interaction {config.interaction} for {dataset.path}:"
            raise RunError("\n  ".join([head, *problems[:_MAX_SHOWN], *more, remedy]))
        if form == "dlrm":
            weights[_FIRST_OVER] = _with_pairs(weights[_FIRST_OVER], config.embedding_dim, len(ours) + 1, to_ours=True)
        self._weights = {f"{MODEL}{name}": weight.detach() for name, weight in weights.items()}
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}

    def part(self, name: str, begins: Sequence[int], ends: Sequence[int]) -> Tensor:
        """As `CheckpointReader.part`."""
        return self._weights[name][tuple(map(slice, begins, ends))].float()
