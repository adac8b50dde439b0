"""The demo: its base model, its commands, its table and its pictures, all of them small."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

import demo.base
import demo.run
import evaluate
import hoi_r1
import teacher
from demo import sampled, show, toy
from demo.grounding import PROMPT
from engine.data.examples import Examples
from engine.model.policy import load_model
from engine.ranks import Ranks
from hicodet import HOI, InputError, Sample
from tests.runs import metrics, weights
from tests.test_disk_full import no_file_above

MAINS = {"hoi_r1.py": hoi_r1, "teacher.py": teacher, "evaluate.py": evaluate, "demo.toy": toy,
         "demo.base": demo.base, "demo.sampled": sampled}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty drawings, all their pairs annotated, and random weights."""
    folder = tmp_path_factory.mktemp("toy")
    toy.main([str(folder), "--train", "20", "--test", "4", "--complete"])
    return folder


def in_this_process(line, processes=1, **paths):
    """`demo.run.command` without the seconds that a new Python takes, and with short answers."""
    line = line.replace("--max-new-tokens 96", "--max-new-tokens 9")
    words = [word.format(**paths) for word in line.split()]
    words = words[1:] if words[0] == "-m" else words
    try:
        MAINS[words[0]].main(words[1:])
    except SystemExit as end:
        assert not end.code


def run_demo(out, *flags):
    sizes = ["--train-images", "20", "--test-images", "7", "--sft-steps", "2", "--grpo-steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.run, "command", in_this_process)
        hoi_r1.main(["demo", "--out", str(out), *sizes, *flags])


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# the base model


def test_the_base_is_asked_for_places_and_supervised_on_all_that_is_drawn(folder):
    examples = demo.base.grounding_examples(folder, str(folder / "model"))
    line = json.loads((folder / "grounding.jsonl").read_text().splitlines()[3])
    example = examples[3]
    assert example.sample.file_name == line["file_name"]
    assert PROMPT in examples.tokenizer.decode(example.prompt.prompt_ids)
    assert examples.tokenizer.decode(example.target_ids) == line["think"] + "<|im_end|>"


@pytest.mark.slow
def test_the_base_is_the_same_on_two_processes(folder, tmp_path):
    """The real command, under torchrun as the demo runs it."""
    flags = f"-m demo.base {folder} --steps 2 --seed 3 --out {tmp_path}"
    demo.run.command(f"{flags}/two", 2)
    in_this_process(f"{flags}/one")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert difference(one, two) < 1e-5
    assert difference(one, weights(folder)) > 1e-5


def test_a_base_that_was_cut_short_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.base, "SAVE_EVERY", 2)
    flags = [str(folder), "--steps", "3", "--out"]
    demo.base.main([*flags, str(tmp_path / "whole")])
    whole = weights(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "model")
    demo.base.main([*flags, str(tmp_path / "whole"), "--resume"])
    assert difference(whole, weights(tmp_path / "whole")) == 0
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [1, 2, 3]


def test_a_folder_without_grounding_is_refused(tmp_path):
    with pytest.raises(InputError, match="grounding.jsonl: no such file"):
        demo.base.grounding_examples(tmp_path, str(tmp_path / "model"))


# sampled answers


@pytest.mark.slow
def test_a_sampled_reward_for_each_image_of_the_share(folder, monkeypatch):
    """The mean over two ranks' shares is that over all images: seeds go with the image."""
    monkeypatch.setattr(sampled, "text_reward", lambda text, hois: {"total": len(text)})
    model = str(folder / "model")
    examples = Examples(model, sampled.annotations.load_split(folder / "data", "test"))
    policy = load_model(model, torch.device("cpu"))

    def rewards(rank, world, seed=0):
        ranks = Ranks(rank, world, torch.device("cpu"))
        return sampled.sampled_rewards(policy, examples, ranks, max_new_tokens=9, seed=seed)

    alone = sorted(rewards(0, 1))
    assert len(alone) == 4 and sorted(rewards(0, 3) + rewards(1, 3) + rewards(2, 3)) == alone
    assert sorted(rewards(0, 1, seed=1)) != alone


def test_data_or_a_model_that_is_none_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "start_ranks", lambda: Ranks(0, 1, torch.device("cpu")))
    for model, data, said in (
        (folder / "model", tmp_path, f"error: {tmp_path}/anno_bbox.mat is missing"),
        (tmp_path, folder / "data", f"error: --model {tmp_path}: no "),
    ):
        with pytest.raises(SystemExit) as ended:
            sampled.main([str(model), "--data", str(data), "--out", str(tmp_path / "sampled.json")])
        assert ended.value.code.startswith(said)


@pytest.mark.parametrize("program, line", [
    (toy, "d"), (demo.base, "d --out o"), (sampled, "m --data d --out o")
])  # fmt: skip
def test_a_seed_below_0_is_refused(program, line, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([*line.split(), "--seed", "-1"])
    assert ended.value.code == 2
    assert "error: --seed -1: must be at least 0" in capsys.readouterr().err


def test_drawings_that_do_not_fit_are_one_line(tmp_path):
    with no_file_above(100), pytest.raises(SystemExit) as ended:
        toy.main([str(tmp_path), "--train", "1", "--test", "1"])
    assert ended.value.code == f"error: [Errno 27] File too large: '{tmp_path}'"


# all of it


def test_demo_small(tmp_path, capsys):
    """Every command, the page, the table and the pictures."""
    out = tmp_path / "demo"
    run_demo(out, "--base-steps", "2")
    printed = capsys.readouterr().out
    rows = printed[printed.index("Known Object       mean reward") :].splitlines()[2:5]
    assert [row.split()[0] for row in rows] == ["base", "sft", "grpo"]
    assert all(len(row.split()) == 12 for row in rows)
    assert len(list((out / "pictures").glob("HICO_*.png"))) == 6
    assert (out / "pictures" / "best_and_worst.png").is_file()
    page = (out / "report.html").read_text()
    assert all(re.search(rf"test_{n} <small>{n}/model; \d+ classes", page) for n in ("base", "grpo"))
    for name in ("base", "sft", "grpo"):
        assert json.loads((out / f"test_{name}" / "map.json").read_text())["num_images"] == 7
    assert len(metrics(out / "base")) == 2
    settings = json.loads((out / "grpo" / "config.json").read_text())
    assert (settings["batch_size"], settings["group_size"], settings["kl_coef"]) == (16, 4, 0.04)


def test_options_of_the_demo_reach_its_commands(folder, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(demo.run, "command", lambda line, *_, **paths: lines.append((line, paths)))
    monkeypatch.setattr(demo.run, "table", lambda *_: "")
    monkeypatch.setattr(demo.run, "draw", lambda *_, **__: None)
    flags = ["--base", str(folder / "model"), "--complete", "--steps-scale", "0.5", "--seed", "4"]
    hoi_r1.main(["demo", "--out", str(tmp_path / "demo"), *flags])
    assert lines[0][0] == "-m demo.toy {out} --train 5000 --test 1000 --left-out 0.0 --seed 4"
    assert not any("demo.base" in line for line, _ in lines)
    stages = [(line, paths) for line, paths in lines if "--max-steps" in line]
    assert "hoi_r1.py sft" in stages[0][0] and "--max-steps 600 --seed 4" in stages[0][0]
    assert "hoi_r1.py grpo" in stages[1][0] and "--max-steps 20 --seed 4" in stages[1][0]
    assert stages[0][1]["model"] == folder / "model"
    assert stages[1][1]["model"] == tmp_path / "demo" / "sft" / "model"


def test_what_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(SystemExit):
        run_demo(tmp_path)


def test_a_base_that_is_none_is_refused_before_anything_is_drawn(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_demo(tmp_path / "demo", "--base", str(tmp_path))
    assert re.search("error: --base .*: no folder of a model", capsys.readouterr().err)
    assert not (tmp_path / "demo").exists()


def test_a_command_that_fails_stops_the_demo(tmp_path):
    with pytest.raises(SystemExit, match="the demo stopped at: python teacher.py --nonsense"):
        demo.run.command("teacher.py --nonsense")


# table and pictures


def rows_of(*totals):
    return {index: {"reward": {"total": total}} for index, total in enumerate(totals)}


def test_the_extremes_are_the_largest_gain_and_the_largest_loss():
    rows = {"sft": rows_of(1.0, 3.0, 2.0, 0.0), "grpo": rows_of(1.5, 2.0, 1.5, 0.5)}
    assert show.extremes(rows) == [0, 1]  # gains 0.5, -1, -0.5, 0.5: of equals the first


def test_where_nothing_got_worse_nothing_is_shown_as_worse():
    assert show.extremes({"sft": rows_of(1.0, 3.0), "grpo": rows_of(1.0, 3.2)}) == [1]


def test_the_table_in_percent(tmp_path):
    means = {"full": 0.5, "rare": None, "non_rare": 0.25}
    pairs = {"micro": {"precision": 0.75, "recall": 0.6, "f1": 2 / 3}}
    (tmp_path / "test_sft").mkdir()
    for name, value in (
        ("test_sft/map", {"default": means, "known_object": means, "pair_scores": pairs,
                          "breakdown": {"why": [None], "missed": 0,
                                        "kinds": {"wrong verb": {"pairs": 0}}}}),
        ("test_sft/summary", {"reward": {"total": 2.5}}),
        ("sampled", {"reward": [2.25]}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    row = show.table(tmp_path, ("sft",)).splitlines()[-1]
    assert row.split() == "sft 50.0 - 25.0 50.0 - 25.0 2.500 2.250 75.0 60.0 66.7".split()


def test_answers_stand_beside_the_truth_with_their_rewards(tmp_path):
    Image.new("RGB", (120, 60)).save(tmp_path / "x.png")
    hoi = HOI((0, 0, 9, 9), (20, 20, 40, 40), "horse", ("ride",))
    sample = Sample("x.png", tmp_path / "x.png", 120, 60, (hoi,), (), frozenset())
    instance = {"human": [0, 0, 9, 9], "object": [20, 20, 40, 40], "object_class": "horse",
                "verbs": ["ride"]}
    row = {"reward": {"total": 1.0}, "line": {"instances": [instance]}}
    drawn = show.answers(sample, {"sft": row, "grpo": row | {"line": {"instances": []}}})
    assert drawn.width == 3 * 480 + 2 * 8  # with gaps
    truth, sft, grpo = (drawn.crop((x, 0, x + 480, 240)) for x in (0, 488, 976))
    assert truth.tobytes() == sft.tobytes() != grpo.tobytes()
