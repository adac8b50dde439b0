"""The study: which models are trained, and the page that is written from the results."""

import json

import pytest

from demo import run, study
from demo.study import LENGTHS, MODELS, Claim, Model

SCORES = {"pair_scores": {"micro": dict.fromkeys(("precision", "recall", "f1"), 0.5)},
          "breakdown": {"why": [None] * 4, "missed": 2, "kinds": {"wrong verb": {"pairs": 1}}},
          "num_images": 1000,
          **dict.fromkeys(("default", "known_object"), dict.fromkeys(("full", "non_rare"), 0.5)
                          | {"rare": None})}  # fmt: skip
SFT, GRPO = LENGTHS[3]


@pytest.fixture
def commands(monkeypatch):
    """Every command of the study; each leaves the folders that it would write."""
    lines = []

    def command(words, processes=1):
        lines.append(" ".join(words))
        out = run.Path(words[words.index("--out") + 1] if "--out" in words else words[2])
        if words[0] == "evaluate.py":
            out = run.Path(words[1]).parent
            (out / "map.json").write_text(json.dumps(SCORES))
            (out / "summary.json").write_text('{"reward": {"total": 2.0}}')
        elif words[0] != "teacher.py":
            (out / "model").mkdir(parents=True)

    monkeypatch.setattr(run, "run_command", command)
    return lines


def count(lines, word):
    return sum(word in line for line in lines)


def measured(tmp_path, *models, seed=0):
    """The rows of the results after these models."""
    results = tmp_path / "study.jsonl"
    for model in models:
        study.add_row(results, model, seed, tmp_path / "runs")
    return study.read_results(results)


def test_models_that_differ_have_folders_that_differ():
    models = {model for _, models in MODELS.values() for model in models}
    settings = {(model.folder, model.left_out, model.scores) for model in models}
    assert len(settings) == len({tuple(model.settings.values()) for model in models})


def test_models_share_what_they_start_from(tmp_path, commands):
    models = Model("", grpo=""), Model("", grpo="--without iou"), Model("", left_out=0.0)
    measured(tmp_path, *models)
    assert count(commands, "-m demo.base") == 1 and count(commands, "--boxes-only") == 1
    assert count(commands, "hoi_r1.py sft") == 2  # one for each rate
    assert count(commands, "hoi_r1.py grpo") == 2 and count(commands, "--without iou") == 1
    measured(tmp_path, *study.DEMO, *study.TEXT_FIRST)
    assert count(commands, "-m demo.base") == 1
    assert count(commands, f"hoi_r1.py sft --model {run.BASE_MODEL} ") == 2
    assert count(commands, " --text-first") == 1


def test_model_with_a_row_is_not_run_again(tmp_path, commands):
    rows = measured(tmp_path, SFT, seed=1)
    assert rows == study.read_results(tmp_path / "study.jsonl")
    assert rows[0]["seed"] == 1 and SFT.settings.items() <= rows[0].items()
    assert rows[0]["right_verb"] == 2 / 3  # two found, and one with another verb
    before = len(commands)
    assert measured(tmp_path, SFT, seed=1) == rows and len(commands) == before


def test_interrupted_training_and_drawings_start_again(tmp_path, commands):
    data = study.drawings(SFT, 0, tmp_path / "runs")
    for name in ("boxes_sft1500", "base"):
        (data / name).mkdir()  # without a model
    (tmp_path / "runs" / "seed3_left-out0.55.tmp").mkdir()  # drawings that were interrupted
    measured(tmp_path, SFT)
    measured(tmp_path, Model("", sft=0), seed=3)
    assert count(commands, "-m demo.base") == 2 and count(commands, "hoi_r1.py sft") == 1


def row(model, seed, full):
    """A row of the results."""
    scores = {"default": {"full": full, "rare": None, "non_rare": full}, "reward": 2.0}
    pairs = {"pairs": dict.fromkeys(("precision", "recall", "f1"), 0.5), "right_verb": 1.0}
    return {"seed": seed} | model.settings | scores | pairs


@pytest.mark.parametrize("after, said", [
    ((0.31, 0.44), "**reproduced**; up in 2 of 2, Full +2.5 on the mean (+1.0 to +4.0)."),
    ((0.29, 0.44), "**too noisy to say**; up in 1 of 2"),
    ((0.29, 0.40), "**not reproduced**; up in 0 of 2"),
    ((0.40,), "**one seed, too few to say**"),
    ((), "**open**, not run."),
])  # fmt: skip
def test_claim_is_judged_on_the_seeds_that_both_have(after, said):
    rows = [row(SFT, seed, full) for seed, full in enumerate((0.3, 0.4, 0.9))]
    rows += [row(GRPO, seed, full) for seed, full in enumerate(after)]
    assert said in study.verdict(Claim("GRPO helps", GRPO, SFT), rows)


def test_page_is_written_from_the_results():
    page, results = study.PAGE.read_text(), study.read_results(study.RESULTS)
    assert study.filled_page(page, results) == page
    settings = [{"seed": row["seed"]} | {name: row.get(name) for name in SFT.settings}
                for row in results]  # fmt: skip
    assert len(settings) == len(set(map(str, settings)))
    assert all(any(model.rows(results) for model in models) for _, models in MODELS.values())
