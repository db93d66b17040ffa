"""Score a pandas frame with an exported bundle: the same transforms, ids and weights as the server's.

python examples/predict_from_pandas.py BUNDLE
"""

import sys

import pandas as pd

from torchdlrm import Predictor


def main(bundle: str) -> pd.DataFrame:
    """Two rows in the layout of Criteo's log; columns that are left out are missing values."""
    frame = pd.DataFrame({"int_0": [1, 12], "int_1": [None, 3], "cat_0": ["68fd1e64", None]})
    predictor = Predictor.open(bundle)
    return frame.assign(probability=predictor.predict(frame))


if __name__ == "__main__":
    print(main(sys.argv[1]))
