"""What is made for tables that are cut within a host, seen on one process, which is a host of its own."""

import pytest
import torch
from torchrec.distributed import comm

from torchdlrm.config import load_config
from torchdlrm.model.architecture import ModelShape
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.sharded import build_sharded_model


@pytest.mark.parametrize("timeout_s", [7.0, 11.0])  # the second one with groups of its own
@pytest.mark.parametrize("kind", ["table_row_wise", "grid_shard"])
def test_groups_within_and_across_hosts_have_the_timeout_of_the_run(kind, timeout_s):
    config = load_config("criteo-small", {"sharding.constraints": f'["t_cat_0={kind}"]'})
    with join_process_group(timeout_s) as ranks:
        shape = ModelShape(config.model, num_dense=2, num_sparse=1)
        build_sharded_model(config, shape, num_embeddings={"cat_0": 9}, dense_sample=None, ranks=ranks)
        for group in (comm._INTRA_PG, comm._CROSS_PG):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == timeout_s
    assert comm._INTRA_PG is None
    assert comm._CROSS_PG is None
