import json

import pytest

from scalevit.data.faults import Fault, FaultLog
from scalevit.errors import UserError


def fault(number, shard="a.tar"):
    return Fault(shard, f"n{number}", 512 * number, "is broken")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_listed_and_counted_once(tmp_path):
    path = tmp_path / "run" / "data_faults.jsonl"
    log = FaultLog(path, limit=10)
    assert log.add([]) == []
    assert not path.exists()
    assert log.add([fault(1), fault(2), fault(1)], step=3) == [fault(1), fault(2)]
    assert log.add([fault(2), fault(2, "b.tar")], step=4) == [fault(2, "b.tar")]
    assert log.count == 3
    # A stream knows no offsets.
    assert len(log.add([Fault("c.tar", key, 0, "is broken") for key in "xyx"], step=5)) == 2
    expected = {"shard": "a.tar", "key": "n1", "offset": 512, "reason": "is broken", "step": 3}
    assert [lines(path)[0], len(lines(path))] == [expected, 5]


def test_a_resumed_run_goes_on_with_the_list(tmp_path):
    path = tmp_path / "data_faults.jsonl"
    FaultLog(path, limit=10).add([fault(1), fault(2)])
    path.write_bytes(path.read_bytes()[:-5])  # killed while it wrote
    log = FaultLog(path, limit=10)
    assert log.count == 1
    log.add([fault(1), fault(2), fault(3)])
    assert [line["key"] for line in lines(path)] == ["n1", "n2", "n3"]


def test_the_limit_stops_the_run_after_listing(tmp_path):
    path = tmp_path / "data_faults.jsonl"
    log = FaultLog(path, limit=2)
    log.add([fault(1), fault(2)])
    with pytest.raises(UserError, match=r"^3 bad samples, more than data.max_faults = 2; the newest: .*'n3'") as caught:
        log.add([fault(3)])
    assert "\n" not in str(caught.value)
    assert len(lines(path)) == 3
    silent = FaultLog(path, limit=2, writes=False)
    assert silent.add([fault(3)]) == []  # known before
    with pytest.raises(UserError):
        silent.add([fault(4)])
    assert len(lines(path)) == 3
