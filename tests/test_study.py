"""The study: which cells are run, the page that is written, and the two tables without a model."""

import json

import numpy as np
import pytest

import demo.run
from demo import blind, score_rules, tables
from demo.study import SECTIONS, STAGES, Cell, Study, cells_of, main
from hicodet import HOI, HOI_CLASSES, Pair, Sample

HOLD = HOI((0, 0, 10, 10), (20, 0, 30, 10), "umbrella", ("hold", "open"))
RIDE = HOI((40, 0, 50, 10), (60, 0, 70, 10), "horse", ("ride",))
FIGURES = {"map.json": {"pair_scores": {"micro": dict.fromkeys(("precision", "recall", "f1"), 0.5)},
                        "breakdown": {"why": [None] * 4, "missed": 2,
                                      "kinds": {"wrong verb": {"pairs": 1}}},
                        **dict.fromkeys(("default", "known_object"),
                                        {"full": 0.5, "rare": None, "non_rare": 0.5})},
           "summary.json": {"reward": {"total": 2.0}}}


@pytest.fixture
def commands(monkeypatch):
    """Every command of the study, which leaves the folders that it would write."""
    lines = []

    def command(line, processes=1, **paths):
        lines.append(line.format(**paths))
        if "demo.toy" in line:
            paths.get("drawings", paths.get("out")).mkdir(parents=True)
        if "demo.base" in line:
            (paths["out"] / "base" / "model").mkdir(parents=True)
        if "hoi_r1.py predict" in line:
            paths["test"].mkdir()
        elif "hoi_r1.py" in line:
            (paths["run"] / "model").mkdir(parents=True)
        if "evaluate.py" in line:
            for name, value in FIGURES.items():
                (paths["test"] / name).write_text(json.dumps(value))
        if "demo.sampled" in line:
            paths["file"].write_text('{"reward": [1.5]}')

    monkeypatch.setattr(demo.run, "command", command)
    return lines


def of(lines, *words):
    return [line for line in lines if all(word in line for word in words)]


def test_every_cell_has_a_name_of_its_own_and_says_what_it_is():
    cells = cells_of(SECTIONS, range(5))
    assert len({cell.name for cell in cells}) == len(set(cells))
    cell = Cell(2, left_out=0.4, sft=1000, grpo="--group-size 8", scores="ones")
    assert cell.name == "seed2_left-out0.4_sft1000_grpo_group-size_8_ones"


@pytest.mark.parametrize("stage", [[], *([name] for name in STAGES)])
def test_the_pages_of_help_fit_80_columns(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*stage, "--help"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80 and "more options" not in page


@pytest.mark.parametrize("stage", ["blind", "scores"])
def test_a_folder_without_data_is_one_line(stage, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main([stage, "--data", str(tmp_path)])
    assert ended.value.code.startswith(f"error: {tmp_path}/anno_bbox.mat is missing")


def test_cells_share_what_they_start_from(tmp_path, commands):
    study = Study(tmp_path / "runs", tmp_path / "figures")
    for cell in (Cell(0, grpo=""), Cell(0, grpo="--without iou"), Cell(0, left_out=0.0)):
        study.run(cell)
    assert len(of(commands, "-m demo.base")) == 1
    assert len(of(commands, "hoi_r1.py sft")) == 2  # one for each rate
    assert [("--without iou" in line) for line in of(commands, "hoi_r1.py grpo")] == [False, True]


def test_a_cell_that_is_there_is_not_run_again(tmp_path, commands):
    study = Study(tmp_path / "runs", tmp_path / "figures")
    study.run(Cell(1))
    row = json.loads((tmp_path / "figures" / "seed1_left-out0.55_sft1500.json").read_text())
    assert row["reward_sampled"] == 1.5 and row["seed"] == 1 and row["grpo"] is None
    assert row["right_verb"] == 2 / 3  # two found, one with another verb
    count = len(commands)
    study.run(Cell(1))
    assert len(commands) == count


def test_what_was_cut_short_is_done_again(tmp_path, commands):
    study = Study(tmp_path / "runs", tmp_path / "figures")
    data = study.data(Cell(0))
    for name in ("sft1500", "base"):
        (data / name).mkdir()  # without a model
    (tmp_path / "runs" / "seed3_left-out0.55.tmp").mkdir()  # drawings that were cut short
    study.run(Cell(0))
    study.run(Cell(3, sft=0))
    assert len(of(commands, "-m demo.base")) == 2 and len(of(commands, "hoi_r1.py sft")) == 1


def cell(seed, full, grpo=None):
    means = {"full": full, "rare": None, "non_rare": full}
    pairs = dict.fromkeys(("precision", "recall", "f1"), 0.5)
    return {"seed": seed, "left_out": 0.55, "sft": 1500, "grpo": grpo, "scores": "rank",
            "default": means, "known_object": means, "reward": 2.0, "reward_sampled": 1.0,
            "pairs": pairs, "right_verb": 1.0}


CLAIM = tables.Claim("GRPO helps", tables.GRPO, tables.SFT)


@pytest.mark.parametrize("after, said", [
    ((0.31, 0.44), "**reproduced**; up in 2 of 2, Full +2.5 on the mean (+1.0 to +4.0)."),
    ((0.29, 0.44), "**too noisy to say**; up in 1 of 2"),
    ((0.29, 0.40), "**not reproduced**; up in 0 of 2"),
])  # fmt: skip
def test_a_claim_is_judged_on_the_seeds_that_both_have(after, said):
    cells = [cell(0, 0.3), cell(1, 0.4), cell(2, 0.9)]
    cells += [cell(seed, value, grpo="") for seed, value in enumerate(after)]
    assert said in tables.verdict(CLAIM, cells)


def test_one_seed_says_neither():
    assert "one seed, too few" in tables.verdict(CLAIM, [cell(0, 0.3), cell(0, 0.4, grpo="")])


def test_a_claim_without_cells_is_open():
    assert "**open**" in tables.verdict(CLAIM, [cell(0, 0.3)])


def test_a_row_is_mean_and_spread_over_seeds():
    lines = tables.table([tables.SFT, tables.GRPO], [cell(0, 0.3), cell(1, 0.4)])
    assert len(lines) == 3  # no cell of GRPO
    assert "| SFT, 1,500 steps | 2 | 35.0 ± 7.1 | - | 35.0 ± 7.1 | 2.00 ± 0.00 |" in lines[2]
    paper = tables.table([tables.DEMO_SFT], [cell(0, 0.3) | {"sft": 1200}])
    assert paper[0].endswith("| the paper's Full |") and paper[2].endswith("| 16.77 |")


def test_the_picture_shows_the_rates_that_were_run():
    """One rate, two seeds: a point a line, at the height of its mean."""
    cells = [cell(0, 0.3), cell(1, 0.4), cell(0, 0.5, grpo=""), cell(1, 0.6, grpo="")]
    drawn = tables.rates_picture(cells)
    assert "<title>SFT, 55: 35</title>" in drawn and "<title>then GRPO, 55: 55</title>" in drawn


def test_labels_are_handed_on_from_pair_to_pair():
    first, second = blind.handed_on((HOLD, RIDE), "object_class", "verbs")
    assert (first.object_class, first.verbs, first.human) == ("horse", ("ride",), HOLD.human)
    assert (second.object_class, second.verbs) == ("umbrella", ("hold", "open"))


def test_what_the_printed_rewards_do_not_see():
    """Two pairs, labels handed on: all of the image's labels are there, no triplet is right."""
    pairs = tuple(Pair(hoi.human, hoi.object, HOI_CLASSES.index((verb, hoi.object_class)))
                  for hoi in (HOLD, RIDE) for verb in hoi.verbs)
    known = frozenset({"umbrella", "horse"})
    sample = Sample("x.jpg", None, 100, 100, (HOLD, RIDE), pairs, known)
    counts = np.full(600, 20)
    full, _, _, printed, matched = blind.blind_row([sample], counts, blind.EDITS["none"])
    assert full == pytest.approx(0.5)  # three classes of 600
    edit = blind.EDITS["labels handed on to the next instance"]
    edited, _, _, same, less = blind.blind_row([sample], counts, edit)
    assert edited == 0 and same == printed == matched
    assert less == pytest.approx(matched - 2)  # all of Eqs. 14-18, by hand: objects 1, verbs 1


def test_the_likelihood_of_a_box_is_how_often_it_is_drawn():
    """Sides with a deviation of half a pixel stay where they are with .6827 each."""
    rng, box = np.random.default_rng(3), (10, 10, 20, 20)
    drawn = [score_rules.moved(box, 0.05, rng) for _ in range(4000)]
    stayed = [likelihood for moved, likelihood in drawn if moved == box]
    assert stayed[0] == pytest.approx(0.6827**4, rel=1e-3)
    assert len(stayed) / 4000 == pytest.approx(0.6827**4, abs=0.03)


def test_a_pair_that_stands_later_is_missed_more_often():
    answerer, rng = score_rules.Answerer(0.9, 0.5, 0.0, 0.0), np.random.default_rng(0)
    found = [sum(answerer.describe(RIDE, k, rng) is not None for _ in range(2000)) / 2000
             for k in (0, 2)]
    assert found == pytest.approx([0.9, 0.225], abs=0.04)
