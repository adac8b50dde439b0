"""Greedy prediction for a split of HICO-DET (Sec. 4.1), or for any photographs.

`predict` and `predict_photographs` take PredictConfig of hoi_r1.py and unpack it; what they call
takes plain arguments.
"""

import codecs
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hicodet
from engine.data import annotations
from engine.data.examples import Example, Examples, describe, read_ahead
from engine.files import aside, write_json
from engine.model.policy import Ranks, load_model, start_ranks, weights_fingerprint
from engine.report.pictures import answer_text, draw_photograph, photographs, picture_paths
from engine.report.run_view import update_page
from engine.runs.run_folder import open_run
from engine.sampling.sampler import Sampler
from engine.sampling.slots import slots_that_fit
from engine.scoring.predictions import (
    part_file,
    predicted_instances,
    prediction_line,
    rank_scores,
    stored_rows,
    write_predictions,
    write_rows,
)
from rewards import total_reward


def predict(config) -> None:
    """Write predictions.jsonl and summary.json for a split. config: hoi_r1.PredictConfig."""
    ranks = start_ranks()
    samples = annotations.load_split(config.data, config.split)[: config.limit or None]
    annotations.require_images(samples)
    examples = Examples(config.model, samples, **prompt_options(config))
    if config.dry_run:
        return ranks.print(describe(examples, text_reward))
    settings = dataclasses.asdict(config) | {"examples": examples.fingerprint()}
    settings |= {"box_frame": examples.box_frame, "weights": weights_fingerprint(config.model)}
    settings |= {"stage": "predict", "command": sys.argv}
    run = open_run(config.out, settings, resume=config.resume, ranks=ranks)
    stored, number = stored_rows(run.folder)
    ranks.print(f"{len(stored)} of {len(samples)} images are predicted already")
    dist.barrier()  # every rank has listed the parts before one is added
    todo = [index for index in range(len(samples)) if index not in stored]
    slots = slots_that_fit(examples, ranks, config.slots, len(todo), config.max_new_tokens)
    model, started = load_model(config.model, ranks.device), time.perf_counter()
    rows = predict_rows(model, examples, todo, ranks, slots=slots, **row_options(config))
    mine = write_rows(part_file(run.folder, number + ranks.rank), rows)
    stored |= {row["index"]: row for row in ranks.gather(mine)}
    summary = summarise([stored[index] for index in range(len(samples))])
    if unread := [row["unread"] for row in stored.values() if "unread" in row]:
        summary |= {"unread": len(unread)}
    if len(unread) == len(samples):
        raise hicodet.InputError(f"none of {len(unread)} images can be used, as {unread[0]}")
    if todo:
        seconds = time.perf_counter() - started
        tokens = sum(stored[index]["length"] for index in todo)
        summary |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
    if ranks.rank == 0 and (todo or not (run.folder / "predictions.jsonl").exists()):
        write_json(run.folder / "summary.json", summary)
        lines = (stored[index]["line"] for index in range(len(samples)))
        write_predictions(run.folder / "predictions.jsonl", lines)
    if ranks.rank == 0:
        update_page(run.folder)
    ranks.print(json.dumps(summary, indent=2))
    run.finish(complete=not unread)  # an image that could not be read may be mended


def predict_photographs(config) -> None:
    """Print what the model says of photographs, and draw it. config: hoi_r1.PredictConfig."""
    ranks = start_ranks()
    samples, paths = photographs(config.image), picture_paths(config.image, config.out)
    examples = Examples(config.model, samples, upright=True, **prompt_options(config))
    if config.dry_run:
        return ranks.print(describe(examples))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    slots = slots_that_fit(examples, ranks, config.slots, len(samples), config.max_new_tokens)
    model, indices = load_model(config.model, ranks.device), list(range(len(samples)))
    rows = predict_rows(model, examples, indices, ranks, slots=slots, **row_options(config))
    mine = []
    with closing(rows):
        for row in rows:  # drawn as it comes: a crash leaves the pictures before it
            with aside(paths[row["index"]]) as new:
                draw_photograph(samples[row["index"]], row["line"]).save(new, format="PNG")
            mine.append(row)
    rows = sorted(ranks.gather(mine), key=lambda row: row["index"])
    for sample, path, row in zip(samples, paths, rows, strict=True):
        cut = "" if row["finished"] else "The answer was cut at --max-new-tokens.\n"
        ranks.print(f"\n{answer_text(sample, row['line'])}\n{cut}picture: {path}")


def prompt_options(config) -> dict:
    """How Examples are asked: the ablations of Table 2, and the frame of boxes."""
    prompt_text = partial(hicodet.prompt_text, task_description=config.task_description)
    return {
        "thinking": config.thinking,
        "prompt_text": prompt_text,
        "box_frame": config.box_frame,
    }


def row_options(config) -> dict:
    """What `predict_rows` takes of a config as it is."""
    names = ("max_new_tokens", "workers", "scores", "repetition_penalty")
    return {name: getattr(config, name) for name in names}


def text_reward(text: str, hois: tuple[hicodet.HOI, ...], **options) -> dict[str, float]:
    """The rewards of a completion's text (Eqs. 6-23). options: of `rewards.total_reward`."""
    return total_reward(hicodet.parse_completion(text), hois, **options)


def predict_rows(
    model,
    examples: Examples,
    indices: list[int],
    ranks: Ranks,
    *,
    max_new_tokens: int,
    slots: int = 64,
    workers: int = 0,
    scores: str = "rank",
    repetition_penalty: float = 1.0,
) -> Iterator[dict]:
    """Greedy predictions of this rank's share of the images, in the order in which they end.

    A row holds the image's index, its line of predictions.jsonl, its rewards (None without ground
    truth), its length in tokens and whether it ended by itself; of an image that cannot be used the
    line is empty, and "unread" says why.
    """
    mine, under_way, unread = indices[ranks.rank :: ranks.world], {}, {}
    limits = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    sampler = greedy_sampler(model, examples, slots=min(slots, max(len(mine), 1)), **limits)

    def arriving():
        numbers = itertools.count()
        for index, example in zip(mine, read_ahead(examples, mine, workers), strict=True):
            if isinstance(example, hicodet.InputError):
                unread[index] = example
                tqdm.write(f"warning: {example}; nothing is predicted", file=sys.stderr)
                continue
            under_way[next(numbers)] = index, example
            yield example.prompt, None

    with tqdm(total=len(mine), desc="predict", unit="image", disable=ranks.rank > 0) as bar:
        for number, rollout in sampler.run(arriving()):
            ids, finished = rollout.completion_ids[0], bool(rollout.finished[0])
            logprobs = rollout.logprobs[0]
            index, example = under_way.pop(number)
            row = prediction(examples, example, ids, logprobs, scores)
            yield {"index": index, "length": len(ids), "finished": finished, **row}
            bar.update()
        for index, error in unread.items():
            yield unread_row(index, examples.samples[index], str(error))
            bar.update()


def unread_row(index: int, sample: hicodet.Sample, reason: str) -> dict:
    """The row of an image that cannot be used, for which nothing is predicted."""
    line = prediction_line(sample.file_name, "", [])
    reward = text_reward("", sample.hois) if sample.hois else None
    row = {"index": index, "length": 0, "finished": True, "line": line, "reward": reward}
    return row | {"unread": reason}


def greedy_sampler(
    model, examples: Examples, *, slots: int, max_new_tokens: int, repetition_penalty: float
) -> Sampler:
    """What writes the likeliest completion of each example, `slots` at a time."""
    return Sampler(
        model,
        slots=slots,
        group_size=1,
        prompt_room=examples.longest_prompt(),
        max_new_tokens=max_new_tokens,
        end_id=examples.end_id,
        temperature=0,
        repetition_penalty=repetition_penalty,
        banned=examples.banned(model.config.text_config.vocab_size).to(model.device),
    )


def prediction(
    examples: Examples, example: Example, ids: Tensor, logprobs: Tensor, scores: str
) -> dict:
    """The line of predictions.jsonl and the rewards of one completion. ids, logprobs: (C,)."""
    text = examples.decode(ids)
    completion = hicodet.parse_completion(text)
    given = None
    if scores == "rank":
        given = rank_scores(completion)
    elif scores == "likelihood":
        given = instance_scores(examples.tokenizer, completion, ids, logprobs)
    size = (example.sample.width, example.sample.height)
    instances = predicted_instances(completion, size, example.text_size, given)
    line = prediction_line(example.sample.file_name, text, instances)
    reward = total_reward(completion, example.text_hois) if example.text_hois else None
    return {"line": line, "reward": reward}


def instance_scores(tokenizer, completion, ids: Tensor, logprobs: Tensor) -> list[float]:
    """The probability that the model gave to the tokens of each instance.

    A byte-level token has a symbol for each byte, so its place in the text is known without
    encoding the text anew, which might cut it otherwise than the model wrote it. The bytes are
    decoded as the tokenizer does: those that are no UTF-8 become a character too.
    """
    special, symbols = set(tokenizer.all_special_ids), tokenizer.convert_ids_to_tokens(ids)
    byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    decoder, ends = codecs.getincrementaldecoder("utf-8")(errors="replace"), [0]
    for i, token in zip(ids.tolist(), symbols):
        written = b"" if i in special else bytes(byte_of[symbol] for symbol in token)
        ends.append(ends[-1] + len(decoder.decode(written)))
    starts, ends = np.array(ends[:-1]), np.array(ends[1:])
    spans = [instance.span for instance in completion.instances]
    inside = [torch.from_numpy((ends > start) & (starts < stop)) for start, stop in spans]
    return [math.exp(logprobs[tokens].sum().item()) for tokens in inside]


def summarise(rows: list[dict]) -> dict:
    """Means over predicted images; rewards over those that have ground truth."""
    scored = [row["reward"] for row in rows if row["reward"]]
    names = scored[0] if scored else ()
    return {
        "images": len(rows),
        "reward": {name: float(np.mean([reward[name] for reward in scored])) for name in names},
        "completion_length": float(np.mean([row["length"] for row in rows])),
        "truncated": 1 - float(np.mean([row["finished"] for row in rows])),
    }
