"""Files of a run and of a model that hold odd JSON: one line that names the file."""

import json
import shutil

import pytest
import torch

from engine.data.examples import box_frame_of
from engine.ranks import Ranks
from engine.runs.run_folder import Run, open_run
from hicodet import InputError
from tests.runs import config_of, examples_of

DEEP = "[" * 100_000
NO_OBJECT = {"list": "[]", "null": "null", "text": '"a"', "deep": DEEP, "no UTF-8": b"\xff"}
ALONE = Ranks(0, 1, torch.device("cpu"))


def write(path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("text", NO_OBJECT.values(), ids=NO_OBJECT)
def test_config_json_is_an_object(text, ranks, tmp_path):
    settings = {"model": "m", "learning_rate": 0.1}
    (tmp_path / "run.lock").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    write(tmp_path / "config.json", text)
    with pytest.raises(InputError, match=f"{tmp_path / 'config.json'} is damaged"):
        open_run(str(tmp_path), settings, resume=True, ranks=ranks)
    write(tmp_path / "config.json", json.dumps(settings | {"learning_rate": 1, "changes": 5}))
    with pytest.raises(InputError, match="config.json is damaged .changes is no list"):
        open_run(str(tmp_path), settings, resume=True, ranks=ranks)


NO_STEP = {"list": "[]", "null": "null", "none": '{"a": 1}', "text": '{"step": "1"}', "deep": DEEP}


@pytest.mark.parametrize("line", NO_STEP.values(), ids=NO_STEP)
def test_a_log_has_a_step_on_each_line(line, tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(InputError, match=f"{log}, line 2: .* remove the line"):
        Run(tmp_path, None, ALONE)._cut_logs(1)


def test_a_line_separator_of_unicode_ends_no_line(tmp_path):
    """U+2028 may stand in JSON as it is; str.splitlines would cut there."""
    log, row = tmp_path / "metrics.jsonl", {"step": 1, "text": "a\u2028b\x85c"}
    log.write_text(json.dumps(row, ensure_ascii=False) + '\n{"step": 2}\n', encoding="utf-8")
    Run(tmp_path, None, ALONE)._cut_logs(1)
    assert json.loads(log.read_text()) == row


@pytest.mark.parametrize("text", [*NO_OBJECT.values(), '{"box_frame": 5}', "{}"])
def test_the_frame_of_boxes_is_one_of_two(text, tmp_path):
    write(tmp_path / "box_frame.json", text)
    with pytest.raises(InputError, match=f"{tmp_path / 'box_frame.json'} is damaged"):
        box_frame_of(str(tmp_path), None)


def change(at, file: str, **changes) -> None:
    values = json.loads((at / file).read_text())
    (at / file).write_text(json.dumps(values | changes))


TEMPLATE, PROCESSOR = "chat_template.jinja", "preprocessor_config.json"
SPOILT = {  # how a file is spoilt, and what the line names
    "tokenizer config": (lambda m: write(m / "tokenizer_config.json", "[]"), "tokenizer"),
    "tokenizer": (lambda m: write(m / "tokenizer.json", "null"), "tokenizer"),
    "tokenizer model": (lambda m: change(m, "tokenizer.json", model=[]), "tokenizer"),
    "processor": (lambda m: write(m / PROCESSOR, "[]"), "image processor"),
    "mean": (lambda m: change(m, PROCESSOR, image_mean=[0, 0]), "image processor"),
    "patch": (lambda m: change(m, PROCESSOR, patch_size=0), "patch_size is 0"),
    "other patch": (lambda m: change(m, PROCESSOR, patch_size=7), "patch_size is 7 .* and 14"),
    "merge": (lambda m: change(m, PROCESSOR, merge_size="x"), "merge_size is 'x'"),
    "config": (lambda m: change(m, "config.json", text_config=[]), "configuration"),
    "id": (lambda m: change(m, "config.json", image_token_id="x"), "configuration"),
    "syntax": (lambda m: write(m / TEMPLATE, "{% for"), "chat template"),
    "name": (lambda m: write(m / TEMPLATE, "{{ a.b.c }}"), "chat template"),
    "division": (lambda m: write(m / TEMPLATE, "{{ 1 / 0 }}"), "chat template"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_model_folder_with_odd_files_is_one_line(spoilt, folder, tmp_path):
    spoil, named = SPOILT[spoilt]
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    spoil(model)
    with pytest.raises(InputError, match=f"--model {model}: .*{named}") as refused:
        examples_of(config_of("predict", folder, "x", model=str(model)), [])
    assert "\n" not in str(refused.value)
