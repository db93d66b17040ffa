"""A server follows a symbolic link: it applies deltas to its bundle in memory, or loads what the link leads to."""

import asyncio
import gc
import hashlib
import json
import shutil
import time
import weakref
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton_grpc

from helpers.crafted import change_manifest, copy, seal
from helpers.live_bundles import NUM_PERIODS, rows_of, write_periods
from torchdlrm.bundle.apply import write_delta
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.errors import TorchDLRMError
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.bundles import Bundles, Swap

KEY = "correct horse battery staple"
ROWS = rows_of(60)


@pytest.fixture(scope="module")
def periods(tmp_path_factory):
    """A folder with the bundles of ten periods and the deltas between them; not to be changed."""
    folder = tmp_path_factory.mktemp("periods")
    write_periods(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(periods):
    """What each period's whole bundle predicts for `ROWS`, by its version."""
    found = {}
    for period in range(1, NUM_PERIODS + 1):
        predictor = Predictor.open(periods / f"{period:04}")
        found[predictor.version] = period, predictor.predict(ROWS)
    predictions = np.array([predicted for _, predicted in found.values()])
    assert np.abs(np.diff(predictions, axis=0)).max(axis=1).min() > 0.01, "they must differ for a test to say anything"
    return found


@pytest.fixture
def live(periods, tmp_path):
    """A folder with links to the files of the ten periods, and `current`, which leads to the first."""
    shutil.copytree(periods, tmp_path / "live", copy_function=copy_link)
    move(tmp_path / "live", 1)
    return tmp_path / "live"


def copy_link(source, target):
    Path(target).hardlink_to(source)


def move(live, target):
    """As a publisher does: a link beside, which is then renamed."""
    name = f"{target:04}" if isinstance(target, int) else target
    (live / "new").symlink_to(name)
    (live / "new").replace(live / "current")


def open_bundles(live, **options):
    return Bundles(live / "current", ServeOptions(**options), lambda *_: None)


def follow(bundles):
    """What comes of a look at the link."""

    async def look():
        return await bundles.follow()

    return asyncio.run(look())


def assert_serves(bundles, wanted, period):
    assert bundles.current.bundle.period == period
    of_period, predictions = wanted[bundles.current.version]
    assert of_period == period
    assert np.array_equal(bundles.current.predict(ROWS), predictions), "bit for bit"
    assert bundles.current.bundle.version == bundles.current.version


def test_each_delta_is_applied_in_memory_and_all_of_them_need_one_copy_of_the_changed_rows(live, wanted):
    bundles = open_bundles(live)
    for period in range(2, NUM_PERIODS + 1):
        move(live, period)
        before = weakref.ref(bundles.current.bundle)
        swap = follow(bundles)
        assert (swap.outcome, swap.num_deltas, swap.refused) == ("swapped", 1, None)
        assert_serves(bundles, wanted, period)
        gc.collect()
        assert before() is None or period == 2, "no patched bundle outlives the next one"
        assert follow(bundles) is None, "once"
    bundle = bundles.current.bundle
    assert isinstance(bundle, PatchedBundle)
    assert 200 < bundle.weights.num_rows < 430, "rows that changed several times are there once"
    assert len(live_mappings()) == 1
    bundles.close()


def live_mappings():
    """Places where this process has mapped the weights of the first period."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "/live/" in line and line.endswith("weights.safetensors")}


def test_several_deltas_in_a_row_lead_to_a_later_period(live, wanted):
    bundles = open_bundles(live)
    move(live, 5)
    assert follow(bundles).num_deltas == 4
    assert_serves(bundles, wanted, 5)
    shutil.rmtree(live / "0008")
    move(live, 8)  # of which there is the delta alone
    assert follow(bundles).num_deltas == 3
    assert_serves(bundles, wanted, 8)
    bundles.close()


def test_where_no_deltas_lead_the_whole_bundle_is_loaded(live, wanted):
    move(live, 4)
    bundles = open_bundles(live)
    for period in (2, 3, 1):
        move(live, period)
        swap = follow(bundles)
        assert (swap.outcome, swap.num_deltas, swap.refused) == ("swapped", int(period == 3), None)
        assert_serves(bundles, wanted, period)
    move(live, "/")
    with pytest.raises(TorchDLRMError, match=r"has no bundle\.json"):
        follow(bundles)
    assert_serves(bundles, wanted, 1)
    bundles.close()


def test_a_link_to_a_delta_is_followed(live, wanted):
    shutil.move(live / "0002.delta", live / "tuesday")
    bundles = open_bundles(live)
    move(live, "tuesday")
    assert follow(bundles).num_deltas == 1
    assert_serves(bundles, wanted, 2)
    move(live, "0003.delta")
    assert follow(bundles).num_deltas == 1
    assert_serves(bundles, wanted, 3)
    again = open_bundles(live)  # of a server that starts now: with a bundle that is there, and the deltas since
    assert_serves(again, wanted, 3)
    again.close()
    move(live, 3)
    assert asyncio.run(bundles.reload()).outcome == "swapped", "who asks for it has the whole bundle"
    assert not isinstance(bundles.current.bundle, PatchedBundle)
    assert_serves(bundles, wanted, 3)
    bundles.close()


@pytest.mark.parametrize("verify", ["full", "lazy"])
def test_files_of_the_base_may_be_removed_while_deltas_are_applied_to_them(live, wanted, verify):
    bundles = open_bundles(live, verify=verify)
    shutil.rmtree(live / "0001")
    for period in (2, 3):
        shutil.rmtree(live / f"{period:04}")
        move(live, period)
        assert follow(bundles).num_deltas == 1
        shutil.rmtree(live / f"{period:04}.delta")
        assert_serves(bundles, wanted, period)
    bundles.close()


def test_deltas_that_take_much_memory_give_way_to_the_mapped_bundle(live, wanted, monkeypatch):
    monkeypatch.setattr("torchdlrm.serving.service.bundles._MOST_PATCHED", 0.0)
    bundles = open_bundles(live)
    move(live, 2)
    assert follow(bundles) == Swap("swapped")
    assert_serves(bundles, wanted, 2)
    bundles.close()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def repeat_values(delta):
    """Write each row of a vocabulary a thousand times, the checksums right: one value would take long to look up."""
    path = delta / "files" / "cat_0.parquet"
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(pa.concat_tables([table] * 1000), path, use_dictionary=False, write_page_checksum=True)
    data = path.read_bytes()

    def change(content):
        file = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content["files"]["cat_0.parquet"]["file"] = file

    change_manifest(delta, change, "delta.json")


BROKEN = {
    "values that stand there many times": repeat_values,
    "a bit of its rows": lambda delta: flip(delta / "weights.delta"),
    "a bit of its vocabulary": lambda delta: flip(delta / "files" / "cat_0.parquet"),
    "a bit of what it says": lambda delta: flip(delta / "delta.json"),
    "no rows": lambda delta: (delta / "weights.delta").unlink(),
    "no bundle.json": lambda delta: (delta / "files" / "bundle.json").unlink(),
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_broken_delta_is_survived(live, wanted, how):
    bundles = open_bundles(live)
    good = shutil.copytree(live / "0002.delta", live / "good")
    shutil.move(live / "0002", live / "whole")
    BROKEN[how](live / "0002.delta")
    move(live, 2)
    with pytest.raises(TorchDLRMError, match="delta"):
        follow(bundles)
    assert_serves(bundles, wanted, 1)
    assert follow(bundles) is None, "the same is not tried again and again"
    shutil.move(live / "whole", live / "0002")
    swap = follow(bundles)
    assert (swap.outcome, swap.num_deltas) == ("swapped", 0)
    assert "delta" in swap.refused
    assert_serves(bundles, wanted, 2)
    shutil.rmtree(live / "0002.delta")
    shutil.move(good, live / "0002.delta")
    assert follow(bundles) is None
    move(live, 3)
    assert follow(bundles).num_deltas == 1
    assert_serves(bundles, wanted, 3)
    bundles.close()


def test_a_delta_whose_base_is_not_served_is_survived(live, wanted, monkeypatch):
    bundles = open_bundles(live)
    shutil.rmtree(live / "0003")
    delta = shutil.move(live / "0002.delta", live / "elsewhere")
    move(live, 3)
    with pytest.raises(TorchDLRMError, match="no whole bundle, and no deltas that lead there from the version"):
        follow(bundles)
    assert_serves(bundles, wanted, 1)
    assert follow(bundles) is None
    with monkeypatch.context() as patch:
        patch.setattr("torchdlrm.serving.service.bundles._RETRY_S", 0.0)
        with pytest.raises(TorchDLRMError, match="no whole bundle"):
            follow(bundles)
    shutil.move(delta, live / "0002.delta")
    move(live, "0003.delta")
    assert follow(bundles).num_deltas == 2
    assert_serves(bundles, wanted, 3)
    bundles.close()


def test_a_delta_whose_result_fails_its_sample_is_survived(live, wanted, tmp_path):
    """Sealed as it should be, and made by somebody who wrote another sample into the bundle."""
    bundles = open_bundles(live)
    odd = copy(live / "0002", tmp_path / "odd")
    shutil.copyfile(live / "0003" / "sample.parquet", tmp_path / "sample")
    (odd / "sample.parquet").unlink()
    shutil.move(tmp_path / "sample", odd / "sample.parquet")
    seal(odd)
    shutil.rmtree(live / "0002.delta")
    (live / "0002.delta").mkdir()
    write_delta(live / "0001", odd, live / "0002.delta")
    move(live, "0002.delta")
    with pytest.raises(TorchDLRMError, match="on its own sample of 20 rows a prediction is off"):
        follow(bundles)
    assert_serves(bundles, wanted, 1)
    bundles.close()


def asked(start):
    """A request for two rows, and which."""
    body = json.dumps(ROWS[start : start + 2]).encode()
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def answer_to(reader, writer, request):
    """A plain client: httpx would take most of the time of this test."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    content = await reader.readexactly(length)
    assert int(head[9:12]) == 200, content
    return json.loads(content)


def test_ten_periods_in_a_row_while_64_clients_ask(serve, live, wanted):
    server = serve(live / "current", "--follow-s", 0.05, "--log-level", "warning", "--grpc-port", 0)
    assert server.period == 1
    host, port = server.url.removeprefix("http://").split(":")
    requests = [asked(start) for start in range(len(ROWS) - 1)]
    seen, answers = {1}, []

    async def ask(client):
        reader, writer = await asyncio.open_connection(host, int(port))
        number, told = client, {"period": 1}
        while told["period"] < NUM_PERIODS:
            number = (number + 7) % len(requests)
            told = await answer_to(reader, writer, requests[number])
            answers.append((number, told))
            seen.add(told["period"])
            await asyncio.sleep(0.05)
        writer.close()

    async def publish():
        for period in range(2, NUM_PERIODS + 1):
            while period - 1 not in seen:
                await asyncio.sleep(0.005)
            move(live, period)

    async def main():
        await asyncio.wait_for(asyncio.gather(publish(), *map(ask, range(64))), 60)

    asyncio.run(main())
    assert seen == set(range(1, NUM_PERIODS + 1))
    for start, told in answers:
        period, predictions = wanted[told["version"]]
        assert told["period"] == period
        assert told["predictions"] == pytest.approx(predictions[start : start + 2], abs=1e-6)
    version = told["version"]
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/schema").json()["period"] == NUM_PERIODS
        for model in ("/v2/models/random", f"/v2/models/random/versions/{version}", "/v2/models/random/ready"):
            assert client.get(model).json()["period"] == NUM_PERIODS
        asked_for = {"inputs": [{"name": "cat_0", "datatype": "BYTES", "shape": [1], "data": [""]}]}
        answer = client.post("/v2/models/random/infer", json=asked_for).json()
        assert (answer["model_version"], answer["parameters"]) == (version, {"period": NUM_PERIODS})
        metrics = client.get("/metrics").text
    assert 'dlrm_bundle_period{model="random"} 10.0' in metrics
    assert 'dlrm_bundle_swaps_total{outcome="swapped"} 9.0' in metrics
    assert 'outcome="failed"' not in metrics
    value = triton_grpc.InferInput("cat_0", [1], "BYTES")
    value.set_data_from_numpy(np.array([b""], object))
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer("random", [value]).get_response()
    assert answer.parameters["period"].int64_param == NUM_PERIODS
    code, log = server.stop()
    assert code == 0
    swaps = [line for line in log if line["event"] == "bundle swapped"]
    assert [(line["period"], line["deltas"]) for line in swaps] == [(n, 1) for n in range(2, NUM_PERIODS + 1)]
    assert swaps[-1]["patched_values"] > 0
    assert f'dlrm_bundle_patched_bytes{{model="random"}} {swaps[-1]["patched_bytes"]:.1f}' in metrics


@pytest.mark.slow
def test_each_of_several_processes_follows(serve, live, wanted):
    shutil.rmtree(live / "0002")
    move(live, "0002.delta")
    server = serve(live / "current", "--workers", 2, "--follow-s", 0.05, "--log-level", "warning")
    versions = {period: version for version, (period, _) in wanted.items()}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for period in (3, 5):
            move(live, period)
            line = f'dlrm_bundle_workers{{model="random",version="{versions[period]}"}} 2.0'
            deadline_s = time.monotonic() + 30
            while line not in (metrics := client.get("/metrics").text):
                assert time.monotonic() < deadline_s, metrics
                time.sleep(0.05)
            assert f'dlrm_bundle_period{{model="random"}} {period}.0' in metrics
    code, log = server.stop()
    assert code == 0
    swaps = [line for line in log if line["event"] == "bundle swapped"]
    assert sorted((line["period"], line["deltas"]) for line in swaps) == [(3, 1), (3, 1), (5, 2), (5, 2)]


def test_without_following_a_moved_link_waits_for_a_signal(serve, live, wanted):
    server = serve(live / "current", "--follow-s", 0, DLRM_API_KEY=KEY)
    with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=30) as client:
        move(live, 2)
        assert client.post("/predict", json=[]).json()["period"] == 1
        told = client.post("/admin/reload").json()
        assert told == {"outcome": "swapped", "model": "random", "version": told["version"], "period": 2}
        assert wanted[told["version"]][0] == 2
    assert server.stop()[0] == 0
