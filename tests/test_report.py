"""The page of a run: what it shows, what may be missing, and that no file's content breaks it."""

import dataclasses
import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import annotations
from engine.report import figures, records
from engine.report import page as report
from engine.report.records import read_run
from tests import run_folders
from tests.run_folders import EVIL, TRUTH, write_lines, write_prediction, write_training

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = [ident for ident, *_ in report.SECTIONS]


def page_of(*folders):
    return report.page([read_run(folder) for folder in folders])


def column(run):
    return figures.Column(run.folder.name, "red", run)


def shown(page):
    return re.findall(r'<section id="(\w+)">', page)


def test_training_and_prediction_fill_every_section(tmp_path):
    page = page_of(write_training(tmp_path), write_prediction(tmp_path))
    assert shown(page) == SECTIONS
    assert len(page) < 5e6


def test_page_needs_no_network_and_no_file(tmp_path):
    page = page_of(write_training(tmp_path), write_prediction(tmp_path))
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "@import" not in page and "url(" not in page


@pytest.mark.parametrize(
    "file, missing",
    [
        ("grpo/metrics.jsonl", {"progress", "rewards", "training", "seconds"}),
        ("grpo/rollouts.jsonl", {"group"}),
        ("test/map.json", {"table1", "classes"}),
        ("test/part-0000.jsonl", set()),
        ("test/summary.json", set()),
        ("grpo/config.json", set()),
    ],
)
def test_section_without_its_file_is_left_out(tmp_path, file, missing):
    folders = write_training(tmp_path), write_prediction(tmp_path)
    (tmp_path / file).unlink()
    assert shown(page_of(*folders)) == [name for name in SECTIONS if name not in missing]


def test_empty_folder_has_a_page_that_says_so(tmp_path):
    page = page_of(tmp_path)
    assert shown(page) == ["health"] and "Nothing to judge yet." in page


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "absent")


def test_page_without_a_run_is_an_error():
    with pytest.raises(ValueError, match="at least one run"):
        report.page([])


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "rollouts.jsonl", "predictions.jsonl", "map.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[1, 2]", b'{"step": ', b"9" * 5000]
    + [b'{"step": 1, "completions": [1, {"text": 5}], "loss": 1e999, "kl": "x"}']
    + [b'{"step": 1, "default": 1, "instances": 3, "file_name": 7}']
    + [b'{"step": 1, "default": {"ap": 1}, "known_object": [], "model": 5, "data": [], "split": 1}']
    + [b'{"step": 1, "file_name": "x.jpg", "instances": [4, {"human": [1], "verbs": 2}]}'],
)
def test_damaged_file_does_not_stop_the_page(tmp_path, name, content):
    folder = write_training(tmp_path)
    (folder / name).write_bytes(content)
    assert "health" in shown(page_of(folder))


def test_half_a_last_line_and_nulls_are_left_out(tmp_path):
    folder = write_training(tmp_path, steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": null, "kl": NaN}\n{"step": 5, "lo')
    run = read_run(folder)
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    steps, losses = figures.logged(run, "loss")
    assert steps == [1, 2, 3, 4] and np.isnan(losses[3])
    assert not [svg for svg in re.findall("<svg.*?</svg>", report.page([run])) if "nan" in svg]


def test_text_of_a_model_is_escaped(tmp_path):
    page = page_of(write_training(tmp_path), write_prediction(tmp_path))
    assert "<script>window.hacked" not in page and "<img src=x" not in page
    assert page.count(escape(EVIL)) >= 3


def test_names_of_files_and_folders_are_escaped(tmp_path):
    folder = write_training(tmp_path / "<b>run")
    row = run_folders.group_row(3, 1.0, 2.0) | {"file_name": "<i>.jpg"}
    write_lines(folder / "rollouts.jsonl", [row])
    config = json.loads((folder / "config.json").read_text()) | {"<u>": "<s>"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not re.search(r"<(b>run|i>\.jpg|u>|s>)", page_of(folder))


def test_table1_has_the_papers_row_and_ours(tmp_path):
    page = page_of(write_prediction(tmp_path))
    cells = re.findall(r'<tr class="ours">(.*?)</tr>', page)[0]
    assert re.findall(r'<td class="n">(.*?)</td>', cells) == ["12.34", "–", "20.00"] * 2
    numbers = "18.33 16.03 19.02 19.83 16.25 20.90".split()
    assert "".join(f'<td class="n">{n}</td>' for n in numbers) in page
    assert "over the 599 classes with true pairs in 3 images, not to be compared" in page


def test_full_of_the_paper_is_the_mean_of_rare_and_non_rare():
    for *_, full, rare, other, known, known_rare, known_other in (
        row for rows in report.TABLE_1.values() for row in rows
    ):  # 138 and 462 of 600 classes; Rare and Non-Rare are rounded to 0.005
        assert full == pytest.approx((138 * rare + 462 * other) / 600, abs=0.011)
        assert known == pytest.approx((138 * known_rare + 462 * known_other) / 600, abs=0.011)


def test_result_of_the_whole_test_set_is_compared(tmp_path):
    folder = write_prediction(tmp_path)
    whole = run_folders.result(classes="all", num_images=9658)
    (folder / "map.json").write_text(json.dumps(whole))
    assert "not to be compared" not in page_of(folder)


def test_result_of_other_scores_than_the_papers_says_so(tmp_path):
    run = read_run(write_prediction(tmp_path))
    whole = dataclasses.replace(run, result=run_folders.result(classes="all", num_images=9658))
    for scores, words in (("rank", 0), ("ones", 1), ("likelihood", 1)):
        scored = dataclasses.replace(whole, config=run.config | {"scores": scores})
        note = f"test: scored by --scores {scores}; the paper&#x27;s by rank."
        assert report.page([scored]).count(note) == words


def figures_of_classes(page):
    """The table of classes, a list a row, its heads first."""
    table = page.partition('<table class="sortable">')[2].partition("</table>")[0]
    return [re.findall(r">([^<>]+)<", row) for row in re.findall(r"<tr.*?</tr>", table)]


def test_table_of_classes_has_600_rows_and_no_value_without_true_pairs(tmp_path):
    heads, *rows = figures_of_classes(page_of(write_prediction(tmp_path)))
    assert len(rows) == 600
    assert rows[12] == ["13", "inspect", "bicycle", "7", "1.20", "1.20", "50.00"]
    assert rows[-1][3:] == ["0", "–", "–", "–"]


def test_an_ap_is_blank_by_the_true_pairs_of_its_own_run(tmp_path):
    """The first run was evaluated on images without class 13."""
    folders = write_prediction(tmp_path / "a"), write_prediction(tmp_path / "b")
    fewer = run_folders.result(true_pairs=[7] * 12 + [0] + [7] * 586 + [0])
    (folders[0] / "map.json").write_text(json.dumps(fewer))
    page = figures_of_classes(page_of(*folders))
    assert page[0][3::4] == ["a/test: True pairs", "b/test: True pairs"]
    blank = ["0", "–", "–", "–"]
    assert page[13] == ["13", "inspect", "bicycle", *blank, "7", "1.20", "1.20", "50.00"]
    assert page[600][3:] == blank + blank
    (folders[0] / "map.json").write_text(json.dumps(run_folders.result()))
    page = page_of(*folders)
    assert figures_of_classes(page)[0][3] == "True pairs" and page.count('<tr class="none">') == 1


def test_advantages_by_hand():
    # mean 2, sample standard deviation sqrt(2): 1 / (1.41421 + 0.0001)
    assert figures.advantages([1.0, 3.0]) == pytest.approx([-0.707057, 0.707057], abs=1e-6)
    assert figures.advantages([2.0, 2.0]) == [0.0, 0.0]
    assert figures.advantages([2.0]) == [0.0]


def test_group_is_the_last_one_whose_rewards_differ(tmp_path):
    folder = write_training(tmp_path)
    rows = [run_folders.group_row(step, 1.0, 1.0 + (step < 3)) for step in (1, 2, 3, 4)]
    write_lines(folder / "rollouts.jsonl", rows)
    assert read_run(folder).group.step == 2
    write_lines(folder / "rollouts.jsonl", rows[2:])
    assert read_run(folder).group.step == 4


def test_group_shows_the_best_completion_first(tmp_path):
    page = page_of(write_training(tmp_path))
    assert re.findall(r"Completion \d, advantage (.\d\.\d\d)", page) == ["+0.71", "−0.71"]


def test_boxes_of_a_completion_are_brought_into_the_image(tmp_path):
    # 100 x 100 pixels are seen as 112 x 112, four patches of 28: by 100 / 112
    folder = write_training(tmp_path)
    run_folders.write_image(tmp_path / "data/images/train2015/a.jpg", (100, 100))
    (hoi,) = read_run(folder).group.answers[0].hois
    assert hoi.human == pytest.approx([side * 100 / 112 for side in TRUTH.human])
    assert hoi.verbs == TRUTH.verbs


@pytest.mark.parametrize("kept", [{"min_pixels": 784, "max_pixels": 12544}, {}, None])
def test_model_size_is_that_of_the_image_processor(tmp_path, kept):
    from transformers import Qwen2VLImageProcessorPil

    newer = kept == {}
    if newer:  # the layout of newer files
        kept = {"size": {"shortest_edge": 50_000, "longest_edge": 200_000}}
    if kept:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    options = kept or {"min_pixels": 56**2, "max_pixels": 28**2 * 16384}
    processor = Qwen2VLImageProcessorPil(**options)
    for width, height in ((640, 480), (427, 640), (28, 28), (30, 500), (333, 501), (1500, 900)):
        grid = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0]
        found = records.model_size((width, height), {"model": str(tmp_path)})
        assert found == (14 * grid[2], 14 * grid[1]), (width, height)


def test_box_frame_original_needs_no_resize():
    assert records.model_size((640, 427), {"box_frame": "original"}) == (640, 427)


def test_seconds_leave_out_the_first_step_and_name_the_rest(tmp_path):
    rows = [run_folders.metrics_row(step) for step in (1, 2, 3)]
    rows[0]["seconds"] = rows[0]["seconds_update"] = 900.0
    folder = write_training(tmp_path)
    write_lines(folder / "metrics.jsonl", rows)
    found = figures.phase_seconds(read_run(folder))
    expected = {"sample": 3.0, "reward": 0.5, "update": 4.0, "waiting": 0.5, "rest": 1.0}
    assert found == pytest.approx(expected)


def test_curve_of_rl_goes_on_where_sft_ended(tmp_path):
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "config.json").write_text('{"traces": "t.jsonl", "max_steps": 50}')
    rows = [{"step": step, "eval_map": 1.0} for step in (25, 50)]
    write_lines(sft / "metrics.jsonl", rows)
    grpo = write_training(tmp_path, before=sft)
    run = read_run(grpo)
    assert [(r.folder.name, done) for r, done in figures.chain(run)] == [("sft", 0), ("grpo", 50)]
    page = report.page([run])
    assert "<title>sft, 25: 1</title>" in page and "<title>grpo, 55: 5</title>" in page
    assert ">RL</text>" in page and "before: sft" in page
    assert "before: sft" not in page_of(sft, grpo)


def test_shares_are_a_line_a_part_for_each_run_that_logged_them(tmp_path):
    run = read_run(write_training(tmp_path))
    other = dataclasses.replace(run, folder=tmp_path / "<other>")
    (figure,) = re.findall("<figure>.*?</figure>", figures.reward_parts([column(run)]))[4:]
    names = re.findall("<g><title>(.*?)</title>", figure)
    assert names == ["Format", "Object label", "Verb label", "IoU"]
    assert "<title>IoU, 20: 0.7</title>" in figure and "<title>Format, 1: −0.1</title>" in figure
    both = figures.reward_parts([column(run), column(other)])
    assert both.count("Share in the advantages, &lt;other&gt;") == 1
    rows = [{name: v for name, v in row.items() if "advantage" not in name} for row in run.metrics]
    without = dataclasses.replace(run, metrics=tuple(rows))
    assert "Share in" not in figures.reward_parts([column(without)])


def test_rewards_are_shown_of_the_most_that_the_run_can_earn(tmp_path):
    """Without labels that is 0.8 + 1, of the format and the IoU."""
    run = read_run(write_training(tmp_path))
    other = dataclasses.replace(run, folder=tmp_path / "all", config=run.config | {"without": []})
    flat = tuple(row | {"reward_total": 1.0} for row in run.metrics)
    run = dataclasses.replace(run, config=run.config | {"without": ["label"]}, metrics=flat)
    page = report.page([run])
    assert re.findall("<small>at most ([^<]*)<", page) == ["1.8", "0.8", "1"]  # no labels
    assert page.count("</b> of 1.8 <") == 2  # completions of the group
    assert "Flat. Expected near 1.8 and" in page
    both = figures.reward_parts([column(run), column(other)])
    assert re.findall("<small>at most ([^<]*)<", both) == ["1.8 or 3.8", "0.8", "1", "1", "1"]


def test_ground_truth_is_dashed_beside_what_is_written(tmp_path):
    page = figures.training([column(read_run(write_training(tmp_path)))])
    (figure,) = (f for f in re.findall("<figure>.*?</figure>", page) if "Instances of" in f)
    written, true = re.findall("<g>.*?</g>", figure)
    assert "<title>grpo, 1: 1.2</title>" in written and "dasharray" not in written
    assert "<title>grpo, ground truth, 1: 2.3</title>" in true and "stroke-dasharray" in true


def test_examples_are_the_best_and_the_worst_by_reward(tmp_path):
    rewards = [i / 10 for i in range(15)] + [None]
    run = read_run(write_prediction(tmp_path, rewards))
    names = [example.file_name for example in run.examples]
    assert names == [f"{i}.jpg" for i in (14, 13, 12, 11, 10, 9, 5, 4, 3, 2, 1, 0)]
    page = report.page([run])
    assert "the 6 best by reward" in page and "the 6 worst by reward" in page


def test_examples_without_rewards_are_ordered_by_missed_pairs(tmp_path, folder):
    rewards = [None] * 6
    prediction = write_prediction(tmp_path, rewards, data=folder / "data")
    samples = annotations.load_split(folder / "data", "test")
    (right, hois), *others = ((sample.file_name, sample.hois) for sample in samples)
    lines = [{"file_name": name, "instances": []} for name, _ in others]
    lines.append({"file_name": right, "instances": [dataclasses.asdict(hoi) for hoi in hois]})
    write_lines(prediction / "predictions.jsonl", lines)
    run = read_run(prediction)
    assert run.examples_by == "missed pairs" and run.examples[0].file_name == right
    assert run.examples[0].truth == hois


def test_unfinished_prediction_is_read_from_its_parts(tmp_path):
    folder = write_prediction(tmp_path)
    (folder / "predictions.jsonl").unlink()
    assert len(read_run(folder).examples) == 3


def test_page_stays_small_with_many_runs(tmp_path):
    noise = np.random.default_rng(0).normal(128, 12, (480, 640, 3)).clip(0, 255)
    photograph = Image.fromarray(noise.astype(np.uint8))
    folders = []
    for i in range(8):
        folders.append(write_prediction(tmp_path / str(i), [1.0] * 12))
        for path in (tmp_path / str(i) / "data/images/test2015").iterdir():
            photograph.save(path)
    assert len(page_of(*folders)) < 5e6


def test_names_tell_runs_of_the_same_folder_name_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/grpo", "b/grpo", "a/test")]
    runs = [records.Run(folder, {}) for folder in folders]
    assert report.unique_names(runs) == ["a/grpo", "b/grpo", "test"]
    assert report.unique_names([runs[0], runs[0]]) != 2 * [report.unique_names([runs[0]])[0]]


def test_command_has_every_option_unless_it_was_kept(tmp_path):
    run = read_run(write_training(tmp_path / "a b"))
    quoted = f"--data '{tmp_path}/a b/data' --out '{tmp_path}/a b/grpo'"
    assert run.command == (
        f"python hoi_r1.py grpo --model Qwen/Qwen2.5-VL-3B-Instruct {quoted} --group-size 2 "
        "--max-steps 20 --batch-size 16 --thinking --without iou"
    )
    assert records.Run(tmp_path, {"command": ["torchrun", "x y"]}).command == "torchrun 'x y'"


def test_written_page_replaces_the_old_one_and_leaves_nothing(tmp_path):
    folder, path = write_training(tmp_path), tmp_path / "grpo" / "report.html"
    path.write_text("old")
    before = {p.name for p in folder.iterdir()}
    report.write_page([folder], path)
    assert path.read_text().startswith("<!doctype html>")
    assert {p.name for p in folder.iterdir()} == before


def test_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder, path = write_training(tmp_path), tmp_path / "grpo" / "report.html"
    path.write_text("old")

    def full_disk(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.write_page([folder], path)
    assert path.read_text() == "old" and not list(folder.glob("*.tmp"))


def test_page_is_made_without_torch():
    code = "import sys; import engine.report.page, engine.report.card; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
