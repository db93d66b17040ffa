"""What a batch is made of: rows of JSON and typed columns, in the order in which they were asked."""

import numpy as np

from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor


def test_rows_and_columns_in_one_batch_keep_their_places(small_bundle):
    served = Predictor.open(small_bundle)
    frame = (
        served.bundle.sample()[0]
        .head(30)
        .select(column.name for column in (*served.schema.dense, *served.schema.sparse))
    )
    rows = as_json_rows(frame, served.schema)
    requests = [rows[:2], frame[10:13], rows[5:9], rows[20:21], frame[:1], frame[25:30]]
    places = [0, 1, 10, 11, 12, 5, 6, 7, 8, 20, 0, *range(25, 30)]
    encoded, alone = served.encode_requests(requests), served.encode_requests([frame])
    assert np.array_equal(encoded.dense, alone.dense[places])
    assert np.array_equal(encoded.sparse, alone.sparse[:, places])
    assert served.parse_requests(requests).equals(frame[places])
