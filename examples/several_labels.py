"""One model of two labels: clicks, and purchases after them, from experts that both share.

    python examples/several_labels.py DATASET RUN

The dataset has two columns of role `label`, here `click` and `purchase`. Of rows without a click it is known that
nothing was bought, so both labels are learnt over all rows.
"""

import sys

from torchdlrm import evaluate, load_config, train

SETTINGS = {
    "train.labels": "click,purchase",  # judged, and chosen, by the first
    "model.heads.kind": "mmoe",  # each label's tower reads a mixture of these experts
    "model.heads.num_experts": "4",
    "model.heads.expert_layer_sizes": "64,32",
    "model.heads.after.purchase": "click",  # p(purchase) = p(click) p(purchase | click)
}

if __name__ == "__main__":
    dataset, run = sys.argv[1:]
    train(load_config("criteo-small", SETTINGS), dataset, run)
    found = evaluate(run) or {}
    print(found["label"], found["auc"])
    for label, metrics in found["labels"].items():
        print(label, metrics["auc"], metrics["calibration"])
