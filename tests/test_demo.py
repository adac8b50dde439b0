"""The demo: its base models, commands, --resume, table and pictures; all of them small."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import demo.base
import evaluate
import hoi_r1
import teacher
from demo import run, scenes, show, toy
from demo.grounding import PAIRS_PROMPT, PROMPT, grounding_text, pair_lines
from hicodet import HOI, InputError, Sample
from tests.run_folders import instance_row
from tests.runs import metrics, same_weights, weights
from tests.test_disk_full import no_file_above

MAINS = {"hoi_r1.py": hoi_r1, "teacher.py": teacher, "evaluate.py": evaluate, "demo.toy": toy,
         "demo.base": demo.base}
SMALL = ["--train-images", "20", "--test-images", "7", "--sft-steps", "2", "--grpo-steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty drawings, all their pairs annotated, and random weights."""
    folder = tmp_path_factory.mktemp("toy")
    toy.main([str(folder), "--train", "20", "--test", "4", "--left-out", "0"])
    return folder


def in_this_process(words, processes=1, later=0):
    """In place of `demo.run.run_command`: no new Python process, and short answers."""
    words = ["9" if word == "96" else word for word in words]
    words = words[1:] if words[0] == "-m" else words
    try:
        MAINS[words[0]].main(words[1:])
    except SystemExit as end:
        assert not end.code


def run_demo(out, *flags, command=in_this_process):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_command", command)
        hoi_r1.main(["demo", "--out", str(out), *SMALL, *flags])


# base models


@pytest.mark.parametrize("boxes_only, prompt", [(False, PAIRS_PROMPT), (True, PROMPT)])
def test_base_learns_what_is_drawn(boxes_only, prompt, folder):
    examples = demo.base.base_examples(folder, boxes_only)
    line = json.loads((folder / "grounding.jsonl").read_text().splitlines()[3])
    example, scene = examples[3], scenes.make_scenes("train", 20, seed=0)[3]
    assert example.sample.file_name == line["file_name"]
    assert f"{prompt}<|im_end|>" in examples.tokenizer.decode(example.prompt.prompt_ids)
    lines = "" if boxes_only else f"\n{pair_lines(scene.hois)}"
    text = examples.tokenizer.decode(example.target_ids)
    assert text == grounding_text(scene) + lines + "<|im_end|>"


def test_interrupted_base_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.base, "SAVE_EVERY", 2)
    flags = [str(folder), "--steps", "3", "--out"]
    demo.base.main([*flags, str(tmp_path / "whole")])
    whole = weights(tmp_path / "whole")
    settings = tmp_path / "whole" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"finished": False}))
    shutil.rmtree(tmp_path / "whole" / "model")
    demo.base.main([*flags, str(tmp_path / "whole"), "--resume"])
    assert same_weights(whole, tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [1, 2, 3]


def test_base_model_of_the_repository_sees_held_out_drawings():
    """The library loads the model and decodes its boxes, labels and lines of pairs."""
    drawn, colours = scenes.make_scenes("test", 50, seed=5), np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(run.BASE_MODEL)
    processor = Qwen2VLImageProcessorPil.from_pretrained(run.BASE_MODEL)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.BASE_MODEL, dtype=torch.float32)
    images = [scenes.draw_scene(scene, colours) for scene in drawn]
    content = [{"type": "image"}, {"type": "text", "text": PAIRS_PROMPT}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    ).replace("<|image_pad|>", "<|image_pad|>" * 32)
    ids = tokenizer([text] * len(drawn), return_tensors="pt")["input_ids"]
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        **processor(images=images, return_tensors="pt"),
    )  # fmt: skip
    answers = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    lists = [answer.partition("\n]")[0] + "\n]" for answer in answers]
    right = [text == grounding_text(scene) for text, scene in zip(lists, drawn, strict=True)]
    assert sum(right) >= 40
    whole = [f"{text}\n{pair_lines(s.hois)}" for text, s in zip(lists, drawn, strict=True)]
    assert sum(map(str.__eq__, answers, whole)) >= 25


# drawings


def test_full_disk_while_drawing_is_one_line(tmp_path, capsys):
    with no_file_above(100), pytest.raises(SystemExit):
        toy.main([str(tmp_path), "--train", "1", "--test", "1"])
    assert f"error: [Errno 27] File too large: '{tmp_path}'" in capsys.readouterr().err


# all commands


def test_small_demo_from_a_base_of_its_own(tmp_path, capsys):
    """Every command, the page, the table and the pictures."""
    out = tmp_path / "demo"
    run_demo(out, "--train-base", "--steps-scale", "0.001")
    printed = capsys.readouterr().out
    rows = printed[printed.index("mAP (Default)") :].splitlines()[2:5]
    assert [row.split()[0] for row in rows] == ["base", "sft", "grpo"]
    assert all(len(row.split()) == 9 for row in rows)
    assert "time left: " in printed and f"{out}/pictures/HICO_train2015_00000001.png" in printed
    assert len(list((out / "pictures").glob("HICO_test*.png"))) == 6
    assert (out / "pictures" / "best_and_worst.png").is_file()
    page = (out / "report.html").read_text()
    for name in ("base", "sft", "grpo"):
        assert re.search(rf"test_{name} <small>{name}/model; \d+ classes", page)
        assert json.loads((out / f"test_{name}" / "map.json").read_text())["num_images"] == 7
    assert len(metrics(out / "base")) == 3
    settings = json.loads((out / "grpo" / "config.json").read_text())
    assert (settings["batch_size"], settings["group_size"], settings["kl_coef"]) == (16, 4, 0.04)


def stages_of(out, *flags):
    """The commands of a demo by their titles."""
    config = hoi_r1.parse_config(["demo", *flags])
    return {stage.title: " ".join(stage.words) for stage in run.demo_stages(config, out)}


def test_options_reach_the_commands(folder, tmp_path):
    flags = ["--base", str(folder / "model"), "--complete", "--steps-scale", "0.5", "--seed", "4"]
    stages = stages_of(tmp_path, *flags)
    drawings = f"-m demo.toy {tmp_path} --train 5000 --test 1000 --left-out 0 --seed 4"
    assert stages["drawings"] == drawings
    assert f"hoi_r1.py sft --model {folder}/model " in stages["SFT"]
    assert "--max-steps 400 --seed 4" in stages["SFT"]
    assert f"hoi_r1.py grpo --model {tmp_path}/sft/model " in stages["GRPO"]
    assert "--max-steps 20 --seed 4" in stages["GRPO"]
    assert not any("demo.base" in line for line in stages.values())


def test_demo_starts_from_the_base_in_the_repository(tmp_path):
    assert f"sft --model {run.BASE_MODEL} " in stages_of(tmp_path)["SFT"]
    stages = stages_of(tmp_path, "--train-base")
    assert "--train 20000" in stages["drawings for the base"] and "--steps 3000" in stages["base"]
    assert f"sft --model {tmp_path}/base/model " in stages["SFT"]


def test_interrupted_demo_goes_on_after_its_last_finished_command(tmp_path, capsys):
    """After Ctrl-C in SFT, the files of this SFT are removed before it starts again."""
    out, ran = tmp_path / "demo", []

    def command(words, processes=1, later=0):
        stage = next(word for word in words if word in ("sft", "grpo") or "." in word)
        ran.append(words[1] if words[0] == "hoi_r1.py" else stage)
        if ran.count("sft") == 1 and ran[-1] == "sft":
            (out / "sft").mkdir()
            raise KeyboardInterrupt
        assert ran[-1] != "sft" or not (out / "sft").exists()

    with pytest.raises(SystemExit) as ended:
        run_demo(out, command=command)
    assert ended.value.code == 130 and "interrupted; to continue" in capsys.readouterr().err
    before = list(ran)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "results_table", lambda *_: "")
        patch.setattr(run, "draw_answers", lambda *_, **__: None)
        run_demo(out, "--resume", command=command)
    assert ran[len(before)] == "sft" and ran.count("demo.toy") == 1 and ran[-1] == "report"


def test_other_options_are_not_resumed(tmp_path):
    stages = run.demo_stages(hoi_r1.parse_config(["demo", *SMALL]), tmp_path)
    (tmp_path / run.LOG).write_text("python -m demo.toy --seed 5\n")
    with pytest.raises(InputError, match="--resume: .* was made with other options"):
        run.run_stages(tmp_path, stages)


def test_existing_folder_is_not_overwritten(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_demo(tmp_path)
    assert "choose another --out, or go on with --resume" in capsys.readouterr().err


def test_base_without_a_model_is_refused_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(SystemExit):
        run_demo(tmp_path / "demo", "--base", str(tmp_path / "run"))
    said = f"no safetensors in this folder; is {tmp_path}/run/model meant?"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_progress_bars_show_the_time_of_later_stages(capfd):
    bar = "from tqdm import tqdm; list(tqdm(range(3)))"
    run.run_command(["-c", bar], later=74)
    assert "+ 1:14 for later stages" in capfd.readouterr().err


def test_failing_command_stops_the_demo():
    with pytest.raises(SystemExit, match="the demo stopped at: python teacher.py --nonsense"):
        run.run_command(["teacher.py", "--nonsense"])


# table and pictures


def rows_of(*totals):
    return {index: {"reward": {"total": total}} for index, total in enumerate(totals)}


@pytest.mark.parametrize("sft, grpo, shown", [
    ((1.0, 3.0, 2.0, 0.0), (1.5, 2.0, 1.5, 0.5), [0, 1]),  # gains 0.5, -1, -0.5, 0.5
    ((1.0, 3.0), (1.0, 3.2), [1]),  # nothing got worse
])  # fmt: skip
def test_extremes_are_the_largest_gain_and_the_largest_loss(sft, grpo, shown):
    assert show.extremes({"sft": rows_of(*sft), "grpo": rows_of(*grpo)}) == shown


def test_results_table_is_in_percent(tmp_path):
    means = {"full": 0.5, "rare": None, "non_rare": 0.25}
    pairs = {"micro": {"precision": 0.75, "recall": 0.6, "f1": 2 / 3}}
    wrong = {"why": [None], "missed": 0, "kinds": {"wrong verb": {"pairs": 0}}}
    scores = {"default": means, "known_object": means, "pair_scores": pairs, "breakdown": wrong}
    (tmp_path / "test_sft").mkdir()
    (tmp_path / "test_sft" / "map.json").write_text(json.dumps(scores | {"num_images": 7}))
    (tmp_path / "test_sft" / "summary.json").write_text('{"reward": {"total": 2.5}}')
    row = show.results_table(tmp_path, ("sft",)).splitlines()[-1]
    assert row.split() == "sft 7 50.0 - 25.0 2.500 75.0 60.0 66.7".split()


def test_answers_are_next_to_the_truth_with_their_rewards(tmp_path):
    Image.new("RGB", (120, 60)).save(tmp_path / "x.png")
    hoi = HOI((0, 0, 9, 9), (20, 20, 40, 40), "horse", ("ride",))
    sample = Sample("x.png", tmp_path / "x.png", 120, 60, (hoi,), (), frozenset())
    row = {"reward": {"total": 1.0}, "line": {"instances": [instance_row(hoi)]}}
    drawn = show.answers(sample, {"sft": row, "grpo": row | {"line": {"instances": []}}})
    assert drawn.width == 3 * 480 + 2 * 8  # with gaps
    truth, sft, grpo = (drawn.crop((x, 0, x + 480, 240)) for x in (0, 488, 976))
    assert truth.tobytes() == sft.tobytes() != grpo.tobytes()
