"""`dlrm report` on a run that was really trained."""

import json
import re


def test_a_trained_run_becomes_one_page(dlrm, small_run, tmp_path):
    out = tmp_path / "report.html"
    done = dlrm("report", small_run, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert json.loads(done.stdout) == {"run": str(small_run), "report": str(out), "bytes": len(page.encode())}
    last = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["split"] == "val"
    assert f"<b>{last['auc']:.4f}</b><span>val AUC, last</span>" in page
    plan = json.loads((small_run / "plan.json").read_text())
    assert set(plan["tables"]) <= set(re.findall(r'<td class="l">([^<]+)</td>', page))


def test_what_is_no_run_and_where_no_file_can_be_are_told(dlrm, small_run, tmp_path):
    for run, out, told in [(tmp_path, tmp_path / "a.html", "is no run"), (small_run, tmp_path / "no" / "b", "--out")]:
        done = dlrm("report", run, "--out", out)
        assert done.returncode == 2
        assert told in done.stderr
        assert not out.exists()
