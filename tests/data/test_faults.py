import json

import pytest

from scalevit.data.faults import Fault, FaultLog
from scalevit.errors import SettingError, UserError


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


def test_a_resumed_run_continues_the_list(tmp_path, capsys):
    path = tmp_path / "data_faults.jsonl"
    FaultLog(path, limit=10).add([fault(1), fault(2)])
    path.write_bytes(path.read_bytes()[:-5])  # killed while it wrote
    log = FaultLog(path, limit=10)
    assert log.count == 1
    assert capsys.readouterr().err == f"warning: {path}: ignoring an incomplete last line\n"
    assert FaultLog(path, limit=10, writes=False).count == 1
    assert capsys.readouterr().err == ""  # one rank reports it
    log.add([fault(1), fault(2), fault(3)])
    assert [line["key"] for line in lines(path)] == ["n1", "n2", "n3"]


def test_the_limit_stops_the_run_after_listing(tmp_path):
    path = tmp_path / "data_faults.jsonl"
    log = FaultLog(path, limit=2)
    log.add([fault(1), fault(2)])
    with pytest.raises(SettingError, match=r"^limit = 2: found 3 bad samples \(last: .*'n3'.*full list in ") as caught:
        log.add([fault(3)])
    assert "\n" not in str(caught.value)
    assert len(lines(path)) == 3
    silent = FaultLog(path, limit=2, writes=False)
    assert silent.add([fault(3)]) == []  # known before
    with pytest.raises(SettingError):
        silent.add([fault(4)])
    assert len(lines(path)) == 3


@pytest.mark.parametrize(
    "damage", [b"{", b"\0\0\0", b"[1]", b'{"shard": "a", "key": "b"}', b'{"shard": "a", "key": "b", "offset": null}']
)
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "data_faults.jsonl"
    FaultLog(path, limit=10).add([fault(1), fault(2), fault(3)])
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, third, b""]))
    with pytest.raises(UserError, match=r"data_faults\.jsonl, line 2: is not a bad sample's record") as caught:
        FaultLog(path, limit=10)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "data_faults.jsonl").mkdir()
    with pytest.raises(UserError, match=r"data_faults\.jsonl: cannot be read"):
        FaultLog(tmp_path / "data_faults.jsonl", limit=10)
