"""Score a pandas frame with an exported bundle: the same transforms, ids and weights as the server's.

    python examples/predict_from_pandas.py BUNDLE LOG

LOG is in the layout that the bundle was made from (Criteo's: label, 13 integers, 26 hexadecimal values, tab-separated).
"""

import sys

import pandas as pd

from torchdlrm import Predictor


def main(bundle: str, log: str) -> pd.DataFrame:
    """The first thousand rows of the log, each with the probability of a click."""
    predictor = Predictor.open(bundle)
    sparse = [column.name for column in predictor.schema.sparse]
    names = ["label", *(column.name for column in predictor.schema.dense), *sparse]
    frame = pd.read_csv(log, sep="\t", header=None, names=names, dtype=dict.fromkeys(sparse, str), nrows=1000)
    return frame.assign(probability=predictor.predict(frame))


if __name__ == "__main__":
    scored = main(*sys.argv[1:])
    print(scored[["label", "probability"]].head())
    print(f"mean label {scored.label.mean():.3f}, mean probability {scored.probability.mean():.3f}")
