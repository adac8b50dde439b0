"""The page of a run: what it shows, what may be missing, and that no text of a file breaks it."""

import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest

from engine.report.page import SECTIONS, TABLE_1, page, write_page
from engine.report.records import read_run
from hicodet import InputError
from tests import run_folders
from tests.run_folders import group_row, write_lines, write_prediction, write_sft, write_training

ROOT = Path(__file__).resolve().parents[1]
WHOLE = {"classes": "all", "num_images": 9658}  # results on HICO-DET's test set


def page_of(*folders):
    return page([read_run(folder) for folder in folders])


def section(text, name):
    """The HTML of one section; "" if the page leaves it out."""
    return text.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def sections(text):
    return set(re.findall(r'<section id="(\w+)">', text))


def charts(text):
    """Of every chart the title, and (name, colour, dashed) of each line."""
    found = []
    for figure in re.findall("<figure>.*?</figure>", text):
        title = re.search("<span>(.*?) <small>", figure)[1]
        lines = re.findall(r'<g><title>(.*?)</title><path class="[^"]*" stroke="(.*?)"( s)?', figure)
        found.append((title, [(name, colour, bool(dashed)) for name, colour, dashed in lines]))
    return found


def test_training_and_prediction_fill_every_section(tmp_path):
    folders = [write_training(tmp_path), write_prediction(tmp_path)]
    folders.append(write_prediction(tmp_path / "whole"))
    (folders[-1] / "map.json").write_text(json.dumps(run_folders.result(**WHOLE)))
    text = page_of(*folders)
    assert sections(text) == {name for name, *_ in SECTIONS} and len(text) < 1e6
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)  # no network and no file is needed
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in text and "url(" not in text


@pytest.mark.parametrize(
    "file, missing",
    [
        ("grpo/metrics.jsonl", {"progress", "rewards", "training"}),
        ("grpo/rollouts.jsonl", {"group"}),
        ("test/map.json", {"map", "classes"}),
        ("test/part-0000.jsonl", {"examples"}),
        ("test/summary.json", set()),
    ],
)
def test_section_without_its_file_is_left_out(tmp_path, file, missing):
    folders = write_training(tmp_path), write_prediction(tmp_path)
    whole = sections(page_of(*folders))
    (tmp_path / file).unlink()
    assert sections(page_of(*folders)) == whole - missing
    # a run that has just started
    run_folders.write_config(tmp_path / "new", stage="grpo", model="m", data="d")
    assert sections(page_of(tmp_path / "new")) == {"health", "options"}


def test_older_run_has_a_page_without_what_it_did_not_write(tmp_path):
    folder = write_training(tmp_path, parts={})
    old = {"text": "a", "format": 0.2, "total": 0.2}
    row = {"step": 1, "file_name": "a.jpg", "completions": [old, old]}
    write_lines(folder / "rollouts.jsonl", [row])
    text = page_of(folder)
    assert "group" not in sections(text)
    assert [title for title, _ in charts(section(text, "rewards"))] == ["Total"]


@pytest.mark.parametrize("name", ["absent", "empty", "model"])
def test_folder_that_is_no_run_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    run_folders.write_config(tmp_path / "model", hidden_size=8)  # an exported model
    with pytest.raises(InputError, match=f"{name} is not a run: ") as refused:
        write_page([write_training(tmp_path), tmp_path / name])
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("report.html"))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "rollouts.jsonl"])
def test_damaged_file_is_named_in_one_line(tmp_path, name):
    folder = write_training(tmp_path)
    (folder / name).write_text('{"step": 1, \n{}\n')
    with pytest.raises(InputError, match=name) as refused:
        read_run(folder)
    assert "\n" not in str(refused.value)


def test_half_a_last_line_and_nulls_leave_gaps(tmp_path):
    folder = write_training(tmp_path, steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": null, "kl": NaN}\n{"step": 5, "lo')
    assert [row["step"] for row in read_run(folder).metrics] == [1, 2, 3, 4]
    assert not [svg for svg in re.findall("<svg.*?</svg>", page_of(folder)) if "nan" in svg]


def test_text_of_a_model_is_escaped(tmp_path):
    text = page_of(write_training(tmp_path), write_prediction(tmp_path))
    assert "<script>window.hacked" not in text and "<img src=x" not in text
    assert text.count(escape(run_folders.EVIL)) >= 3


def test_names_of_files_options_and_parts_are_escaped(tmp_path):
    parts = run_folders.PARTS | {"<p>": {"title": "<t>", "largest": 1.0}}
    folder = write_training(tmp_path / "<b>run", parts=parts)
    row = group_row(3, 1.0, 2.0, parts=parts) | {"file_name": "<i>.jpg"}
    write_lines(folder / "rollouts.jsonl", [row])
    config = json.loads((folder / "config.json").read_text()) | {"<u>": "<s>"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not re.search(r"<(b>run|i>\.jpg|u>|s>|t>|p>\")", page_of(folder))


def test_half_a_character_does_not_stop_the_page(tmp_path):
    folder = write_prediction(tmp_path)
    rows = (folder / "part-0000.jsonl").read_text().replace('"text": "', '"text": "\\ud83d')
    (folder / "part-0000.jsonl").write_text(rows)
    assert "?&lt;script" in write_page([folder]).read_text()


def test_table1_is_shown_for_the_whole_test_set_only(tmp_path):
    toy, whole = write_prediction(tmp_path / "toy"), write_prediction(tmp_path / "whole")
    (whole / "map.json").write_text(json.dumps(run_folders.result(**WHOLE)))
    text = page_of(whole)
    (row,) = re.findall(r'<tr class="ours">(.*?)</tr>', section(text, "table1"))
    assert re.findall(r"<td>([^<]*)</td>", row) == ["12.34", "–", "20.00"] * 2
    numbers = "18.33 16.03 19.02 19.83 16.25 20.90".split()
    assert "".join(f"<td>{n}</td>" for n in numbers) in text and "map" not in sections(text)
    text = page_of(toy)
    assert "table1" not in sections(text) and "18.33" not in text and 'class="ours"' not in text
    assert "grpo/model; 599 classes, 3 images" in section(text, "map")


def test_scores_that_the_paper_does_not_use_are_named(tmp_path):
    folder = write_prediction(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for scores, count in (("rank", 0), ("ones", 1), ("likelihood", 1)):
        (folder / "config.json").write_text(json.dumps(config | {"scores": scores}))
        assert section(page_of(folder), "map").count(f"--scores {scores}, while") == count


def test_full_of_the_paper_is_the_mean_of_rare_and_non_rare():
    for *_, full, rare, other, known, known_rare, known_other in (
        row for rows in TABLE_1.values() for row in rows
    ):  # 138 and 462 of 600 classes; Rare and Non-Rare are rounded to 0.005
        assert full == pytest.approx((138 * rare + 462 * other) / 600, abs=0.011)
        assert known == pytest.approx((138 * known_rare + 462 * known_other) / 600, abs=0.011)


def class_rows(text):
    """The cells of each row of the table of classes, its heads first."""
    rows = re.findall(r"<tr.*?</tr>", section(text, "classes"))
    return [re.findall(r">([^<>]+)<", row) for row in rows]


def test_class_without_true_pairs_has_no_ap(tmp_path):
    """The first of two runs was evaluated on images without class 13."""
    folders = write_prediction(tmp_path / "a"), write_prediction(tmp_path / "b")
    rows = class_rows(page_of(folders[0]))
    assert len(rows) == 1 + 599  # the last class has no true pair
    assert rows[13] == ["inspect bicycle ", "13", "7", "1.20", "1.20", "50.00"]
    fewer = run_folders.result(true_pairs=[7] * 12 + [0] + [7] * 586 + [0])
    (folders[0] / "map.json").write_text(json.dumps(fewer))
    row = class_rows(page_of(*folders))[13]
    assert row[2:] == ["0 / 7", "–", "–", "–", "1.20", "1.20", "50.00"]


def test_map_of_predictions_is_drawn_at_the_steps_of_their_models(tmp_path):
    """SFT from "base", RL from its model; predictions of "base", of both and of SFT's step 20."""
    sft = write_sft(tmp_path, steps=50, model=str(tmp_path / "base"))
    grpo = write_training(tmp_path, model=str(tmp_path / "sft" / "model"))
    tests = [
        write_prediction(tmp_path / str(i), model=f"../{model}")
        for i, model in enumerate(("base", "sft/model", "sft/model-000020", "grpo/model"))
    ]
    text = section(page_of(sft, grpo, *tests), "progress")
    assert re.findall("<title>([^<]*): 12.34</title>", text) == [
        "sft, 0", "sft, 20", "sft, 50", "grpo, 0", "grpo, 20",
    ]  # fmt: skip
    assert "<title>grpo, 5: 5</title>" in text  # eval_map, from its own first step
    assert 'class="keys"' not in text  # one run per chart


def test_stages_have_charts_of_their_own(tmp_path):
    text = page_of(write_sft(tmp_path, steps=1000), write_training(tmp_path))
    found = charts(section(text, "training"))
    assert [[name for name, *_ in lines] for title, lines in found if title == "Loss"] == [
        ["sft"], ["grpo"],
    ]  # fmt: skip
    assert section(text, "training").index("<h3>SFT") < section(text, "training").index("<h3>GRPO")


def test_ground_truth_is_dashed(tmp_path):
    found = dict(charts(section(page_of(write_training(tmp_path)), "training")))
    written, true = found["Instances per answer"]
    assert (written[0], written[2], true[0], true[2]) == ("grpo", False, "ground truth", True)


def test_titles_bounds_and_colours_of_rewards_are_those_of_the_run(tmp_path):
    """Six parts, of which a second run lacks the first."""
    six = {str(i): {"title": f"Part {i}", "largest": i / 2} for i in range(1, 7)}
    five = {name: part for name, part in six.items() if name != "1"}
    folders = [write_training(tmp_path / n, parts=p) for n, p in (("6", six), ("5", five))]
    text = page_of(*folders)
    bounds = re.findall("(Total|Part .) <small>at most ([^<]*)<", section(text, "rewards"))
    assert bounds == [("Total", "10 or 10.5")] + [(f"Part {i}", f"{i / 2:g}") for i in range(1, 7)]
    shares = [lines for title, lines in charts(section(text, "rewards")) if "Share in" in title]
    assert shares[0] == [(f"Part {i}", f"var(--p{i - 1})", False) for i in range(1, 7)]
    assert shares[1] == shares[0][1:]
    css = (ROOT / "engine/report/page.css").read_text()
    assert all(css.count(f"--p{i}: #") == 2 for i in range(8))  # in both themes
    assert section(text, "group").count("</b> of 10 <") == 2


def test_group_is_the_last_one_whose_rewards_differ(tmp_path):
    folder = write_training(tmp_path)
    rows = [group_row(step, 1.0, 1.0 + (step < 3)) for step in (1, 2, 3, 4)]
    write_lines(folder / "rollouts.jsonl", rows)
    assert read_run(folder).group["step"] == 2
    write_lines(folder / "rollouts.jsonl", rows[2:])
    assert read_run(folder).group["step"] == 4


def test_group_shows_the_best_completion_first(tmp_path):
    folder = write_training(tmp_path)
    text = section(page_of(folder), "group")
    assert re.findall(r"Completion \d, advantage (.\d\.\d\d)", text) == ["+1.00", "−1.00"]
    assert text.count("<img") == 2
    (tmp_path / "data/images/train2015/a.jpg").unlink()
    text = section(page_of(folder), "group")
    assert "<img" not in text and text.count("<p>ride, sit on bicycle</p>") == 2


@pytest.mark.parametrize(
    "rewards, titles, names",
    [
        ([i / 10 for i in range(15)] + [None], ["4 best by reward", "4 worst by reward"],
         [14, 13, 12, 11, 3, 2, 1, 0]),
        ([0.0] * 9, ["8 first images"], range(8)),  # no answer is better than another
        ([None] * 3, ["3 first images"], range(3)),
    ],
)  # fmt: skip
def test_examples_are_the_best_and_the_worst(tmp_path, rewards, titles, names):
    text = section(page_of(write_prediction(tmp_path, rewards)), "examples")
    assert re.findall(r"<h3>test: the (.*?)</h3>", text) == titles
    assert re.findall(r"<span>(\d+)\.jpg</span>", text) == [str(name) for name in names]


def test_example_is_next_to_its_ground_truth(tmp_path, folder):
    data, names = folder / "data", [f"HICO_test2015_0000000{i}.jpg" for i in (1, 2)]
    prediction = write_prediction(tmp_path, [1.0, 2.0], data=data, names=names)
    text = section(page_of(prediction), "examples")
    assert re.findall('alt="(ground truth)?', text) == ["ground truth", ""] * 2


def test_runs_of_the_same_folder_name_have_different_names(tmp_path):
    text = page_of(*(write_training(tmp_path / name) for name in "ab"), write_sft(tmp_path))
    names = [str(tmp_path / "a" / "grpo"), str(tmp_path / "b" / "grpo"), "sft"]
    assert f"<title>{', '.join(names)} · HOI-R1</title>" in text


def test_command_and_options_are_those_of_config_json(tmp_path):
    folder = write_training(tmp_path / "a b")
    text = section(page_of(folder), "options")
    assert f"--data &#x27;{tmp_path}/a b/data&#x27;</pre>" in text
    options = json.dumps(json.loads((folder / "config.json").read_text()), indent=2)
    assert f"<pre>{escape(options)}</pre>" in text


def test_written_page_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    folder, path = write_training(tmp_path), tmp_path / "grpo" / "report.html"
    path.write_text("old")
    before = {p.name for p in folder.iterdir()}
    assert write_page([folder]) == path and path.read_text().startswith("<!doctype html>")
    assert {p.name for p in folder.iterdir()} == before


def test_report_and_show_do_not_load_torch():
    code = "import sys, engine.report.page, engine.report.pictures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
