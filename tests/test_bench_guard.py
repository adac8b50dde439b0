"""The guard names what moved by more than its limit."""

import json

import pytest

from tests import bench
from tests.bench_guard import guard, moved
from tests.bench_measure import Result


def result(ratio, memory, device="a GPU"):
    return Result(2.0, 2.0 * ratio, ratio, memory, None, "ours / theirs", {}, device)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "BENCH.json"
    assert guard({"update": result(2.0, 1000)}, write=True, file=path) == []
    return path


@pytest.mark.parametrize("ratio, memory", [(2.29, 1009), (1.71, 991)])
def test_what_is_within_its_limit_is_not_named(file, ratio, memory):
    assert guard({"update": result(ratio, memory)}, write=False, file=file) == []


def test_what_moved_is_named(file):
    found = guard({"update": result(1.6, 1020)}, write=False, file=file)
    assert found == ["update: ratio 2 -> 1.6 (-20%)", "update: peak_memory 1000 -> 1020 (+2%)"]


def test_memory_of_a_cpu_is_that_of_the_process_and_not_compared(file):
    guard({"rewards": result(0.5, 1000, "CPU")}, write=True, file=file)
    assert guard({"rewards": result(0.5, 9000, "CPU")}, write=False, file=file) == []
    assert json.loads(file.read_text()).keys() == {"a GPU", "CPU"}  # the other kind stays


def test_a_bench_on_one_side_alone_is_named():
    found = moved({"sft": {"ratio": 1.0}}, {"vision": {"ratio": 1.0}})
    assert found == ["sft: ratio only in BENCH.json", "vision: ratio only in this run"]


def test_another_machine_has_no_figures(file):
    found = guard({"update": result(2.0, 1000, "another GPU")}, write=False, file=file)
    assert found == ["BENCH.json has no figures of another GPU: guard --write makes them"]


@pytest.mark.parametrize("lines, code", [([], 0), (["sft: ratio 2 -> 1 (-50%)"], 1)])
def test_the_command_says_it_with_its_exit_code(lines, code, monkeypatch, capsys):
    monkeypatch.setattr(bench, "guarded_results", lambda device, runs: {})
    monkeypatch.setattr(bench, "guard", lambda results, write: lines)
    with pytest.raises(SystemExit) as ended:
        bench.main(["guard"])
    assert ended.value.code == code
    assert capsys.readouterr().out.strip() == ("\n".join(lines) or "nothing moved")
