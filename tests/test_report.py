"""The page of a run: what it shows, what may be missing, and that no text of a file breaks it."""

import json
import re
from html import escape

import pytest

from engine.report.page import SECTIONS, TABLE_1, page, write_page
from engine.report.records import read_run
from hicodet import InputError
from tests import run_folders
from tests.run_folders import group_row, write_lines, write_prediction, write_sft, write_training


def page_of(*folders):
    return page([read_run(folder) for folder in folders])


def section(text, name):
    """The HTML of one section; "" if the page leaves it out."""
    return text.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def sections(text):
    return set(re.findall(r'<section id="(\w+)">', text))


def charts(text):
    """The title of every chart, with (name, colour) of each line."""
    figures = re.findall("<figure>.*?</figure>", section(text, "curves"))
    titles = [re.search("<span>(.*?) <small>", figure)[1] for figure in figures]
    line = r'<g><title>(.*?)</title><path class="[^"]*" stroke="(.*?)"'
    return [(title, re.findall(line, figure)) for title, figure in zip(titles, figures)]


def test_training_and_prediction_fill_every_section(tmp_path):
    text = page_of(write_training(tmp_path), write_prediction(tmp_path))
    assert sections(text) == {name for name, *_ in SECTIONS} and len(text) < 1e6
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)  # no network and no file is needed
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in text and "url(" not in text


@pytest.mark.parametrize("stage", ["sft", "grpo", "predict"])
def test_page_of_a_run_that_has_just_started(tmp_path, stage):
    run_folders.write_config(tmp_path, stage=stage, model="m", data="d")
    assert sections(page_of(tmp_path)) == {"health", "options"}


def test_page_of_a_prediction_that_is_not_finished(tmp_path):
    folder = write_prediction(tmp_path)
    for name in ("summary.json", "map.json"):
        (folder / name).unlink()
    assert sections(page_of(folder)) == {"health", "examples", "options"}


@pytest.mark.parametrize("name", ["absent", "model"])
def test_folder_that_is_no_run_is_refused_in_one_line(tmp_path, name):
    run_folders.write_config(tmp_path / "model", hidden_size=8)  # an exported model
    with pytest.raises(InputError, match=f"{name} is not a run: ") as refused:
        write_page([write_training(tmp_path), tmp_path / name])
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("report.html"))


def test_page_does_not_replace_a_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    with pytest.raises(IsADirectoryError, match="mine"):
        write_page([write_training(tmp_path)], tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "kept"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "rollouts.jsonl"])
def test_damaged_file_is_named_in_one_line(tmp_path, name):
    folder = write_training(tmp_path)
    (folder / name).write_text('{"step": 1, \n{}\n')
    with pytest.raises(InputError, match=name) as refused:
        read_run(folder)
    assert "\n" not in str(refused.value)


def test_half_a_last_line_and_nulls_leave_gaps(tmp_path):
    folder = write_training(tmp_path)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "loss": null, "kl": NaN}\n{"step": 22, "lo')
    assert [row["step"] for row in read_run(folder).metrics] == list(range(1, 22))
    assert ">nan<" not in page_of(folder) and "nan " not in section(page_of(folder), "curves")


def test_texts_and_names_are_escaped(tmp_path):
    parts = run_folders.PARTS | {"<p>": {"title": "<t>", "largest": 1.0}}
    folder = write_training(tmp_path / "<b>run", parts=parts)
    row = group_row(3, 1.0, 2.0, parts=parts) | {"file_name": "<i>.jpg"}
    write_lines(folder / "rollouts.jsonl", [row])
    run_folders.change_config(folder, **{"<u>": "<s>"})
    text = page_of(folder, write_prediction(tmp_path))
    assert not re.search(r"<(b>run|i>\.jpg|u>|s>|t>|p>\")", text)
    assert "<script>window.hacked" not in text and "<img src=x" not in text
    assert text.count(escape(run_folders.EVIL)) >= 3


def test_half_a_character_does_not_stop_the_page(tmp_path):
    folder = write_prediction(tmp_path)
    rows = (folder / "part-0000.jsonl").read_text().replace('"text": "', '"text": "\\ud83d')
    (folder / "part-0000.jsonl").write_text(rows)
    assert "?&lt;script" in write_page([folder]).read_text()


def test_table1_is_shown_for_the_whole_test_set_only(tmp_path):
    toy, whole = write_prediction(tmp_path / "toy"), write_prediction(tmp_path / "whole")
    result = run_folders.result(classes="all", num_images=9658)
    (whole / "map.json").write_text(json.dumps(result))
    run_folders.change_config(whole, scores="likelihood")
    text = section(page_of(whole), "map")
    paper = re.findall(r"<tr>(.*?<small>paper</small>.*?)</tr>", text)
    assert len(paper) == len(TABLE_1) and "<td>18.33</td><td>16.03</td>" in paper[-1]
    assert "grpo/model; --scores likelihood</small><" in text
    assert "<td>12.34</td><td>–</td><td>20.00</td>" in text
    text = section(page_of(toy, whole), "map")
    assert "18.33" not in text and "grpo/model; 599 classes, 3 images; --scores rank" in text


def test_class_without_true_pairs_has_no_ap(tmp_path):
    """The first of two runs was evaluated on images without class 13; no run has the last one."""
    folders = write_prediction(tmp_path / "a"), write_prediction(tmp_path / "b")
    fewer = run_folders.result(true_pairs=[7] * 12 + [0] + [7] * 586 + [0])
    (folders[0] / "map.json").write_text(json.dumps(fewer))
    _, *rows = re.findall(r"<tr>(.*?)</tr>", section(page_of(*folders), "classes"))
    assert len(rows) == 599
    cells = ["inspect bicycle ", "13", "–", "0", "1.20", "7"]
    assert re.findall(r">([^<>]+)<", rows[12]) == cells


def test_stages_have_charts_of_their_own(tmp_path):
    text = page_of(write_sft(tmp_path), write_training(tmp_path))
    losses = [[name for name, _ in lines] for title, lines in charts(text) if title == "Loss"]
    assert losses == [["sft"], ["grpo"]]
    lines = dict(charts(text))["Instances per answer"]
    assert lines == [("grpo", "var(--c1)"), ("truth", "var(--soft)")]
    text = section(text, "curves")
    assert text.index("<h3>SFT") < text.index("<h3>GRPO") and 'class="key"' not in text


def test_rewards_are_those_that_the_run_has(tmp_path):
    """The run with the first colour lacks one of three parts."""
    two = {name: part for name, part in run_folders.PARTS.items() if name != "verb"}
    folders = [write_training(tmp_path / "2", parts=two), write_training(tmp_path / "3")]
    found = {title: [colour for _, colour in lines] for title, lines in charts(page_of(*folders))}
    assert found["Reward: Format"] == found["Share in advantages: Format"]
    assert found["Reward: Format"] == ["var(--c0)", "var(--c1)"]
    assert found["Reward: Verb label"] == found["Share in advantages: Verb label"] == ["var(--c1)"]
    text = page_of(*folders)
    assert "Reward: Format <small>at most 0.8</small>" in text
    assert re.findall("reward 3.00 of ([0-9.]+)<", text) == ["1.8", "2.8"]


def test_group_is_the_last_one_whose_rewards_differ(tmp_path):
    folder = write_training(tmp_path)
    rows = [group_row(step, 1.0, 1.0 + (step < 3)) for step in (1, 2, 3, 4)]
    for some, step in ((rows, 2), (rows[2:], 4)):
        write_lines(folder / "rollouts.jsonl", some)
        assert read_run(folder).group["step"] == step


def test_group_shows_the_best_completion_first(tmp_path):
    folder = write_training(tmp_path)
    text = section(page_of(folder), "group")
    assert re.findall(r"Advantage (.\d\.\d\d)", text) == ["+1.00", "-1.00"]
    (tmp_path / "data/images/train2015/a.jpg").unlink()
    text = section(page_of(folder), "group")
    assert "<img" not in text and text.count("<p>ride, sit on bicycle</p>") == 2


@pytest.mark.parametrize("rewards, titles, names", [
    ([i / 10 for i in range(15)] + [None], ["4 best by reward", "4 worst by reward"],
     [14, 13, 12, 11, 3, 2, 1, 0]),
    ([0.0] * 9, ["8 first images"], range(8)),  # no answer is better than another
    ([None] * 3, ["3 first images"], range(3)),
])  # fmt: skip
def test_examples_are_the_best_and_the_worst(tmp_path, rewards, titles, names):
    text = section(page_of(write_prediction(tmp_path, rewards)), "examples")
    assert re.findall(r"<h3>test: the (.*?)</h3>", text) == titles
    assert re.findall(r"<span>(\d+)\.jpg</span>", text) == [str(name) for name in names]


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
