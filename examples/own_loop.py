"""Your own training loop: torchdlrm reads the data, the model and the metrics are there, the rest is plain PyTorch.

    python examples/own_loop.py DATASET

In one process, with TorchRec's unsharded tables and torch's optimizers. `torchdlrm.train` does the same with sharded
tables, fused optimizers, checkpoints and validation; write your own loop to see and change every line.
"""

import sys

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm import DLRM, BinaryMetrics, Dataset, Loader, binary_metrics

EMBEDDING_DIM = 16


def main(path: str) -> BinaryMetrics:
    """Train one epoch on the dataset at `path`; the metrics of its val split."""
    torch.manual_seed(1)
    dataset = Dataset.open(path)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=rows, embedding_dim=EMBEDDING_DIM, feature_names=[name])
        for name, rows in dataset.num_embeddings.items()
    ]
    model = DLRM(
        EmbeddingBagCollection(tables=tables),
        dense_in_features=len(dataset.dense_names),
        dense_arch_layer_sizes=[64, EMBEDDING_DIM],
        over_arch_layer_sizes=[64, 1],
    )
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    for batch in Loader(dataset, "train", batch_size_global=256):
        logits_B = model(batch.dense_features, batch.sparse_features).squeeze(1)
        loss = binary_cross_entropy_with_logits(logits_B, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    labels, logits = [], []
    with torch.no_grad():
        for batch in Loader(dataset, "val", batch_size_global=1024):
            labels.append(batch.labels)
            logits.append(model(batch.dense_features, batch.sparse_features).squeeze(1))
    return binary_metrics(torch.cat(labels).numpy(), torch.cat(logits).numpy())


if __name__ == "__main__":
    print(main(sys.argv[1]))
