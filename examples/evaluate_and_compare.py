"""Is a larger model really better? Train two, measure both on the test split, and see whether the difference is noise.

python examples/evaluate_and_compare.py DATASET FOLDER
"""

import sys
from pathlib import Path

from torchdlrm import Comparison, compare, evaluate, load_config, train


def main(dataset: str, folder: str) -> Comparison:
    """Train two runs below `folder` on the dataset, and compare them on rows that neither has seen."""
    for dim in (4, 16):
        sizes = {"model.embedding_dim": str(dim), "model.dense_arch_layer_sizes": f"[64, {dim}]"}
        run = Path(folder) / f"dim-{dim}"
        train(load_config("criteo-small", sizes), dataset, run)
        metrics = evaluate(run, split="test")
        print(f"dimension {dim:>2}: AUC {metrics['auc']:.4f}, logloss {metrics['logloss']:.4f}")
    return compare(f"dim-4={folder}/dim-4", f"dim-16={folder}/dim-16", split="test")


if __name__ == "__main__":
    print(main(*sys.argv[1:]))  # each difference with its interval, and what it says
