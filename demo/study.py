"""The paper's tables on the toy, over several seeds: docs/study.md.

    # train and score the models of a section without a row in demo/study.jsonl
    python -m demo.study run --sections demo
    # write the tables and verdicts of docs/study.md from demo/study.jsonl
    python -m demo.study write

A row holds the scores of one model on 1,000 held-out drawings; a model takes minutes. Models of one
seed share the models that they start from. Commands with different seeds may run at the same time.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from demo import run
from demo.show import figures
from engine.configs import DemoConfig
from engine.files import json_lines, naming, remove, replace_file
from engine.options import Config, option, parse_config, required
from engine.signals import one_line

RESULTS, PAGE = run.ROOT / "demo" / "study.jsonl", run.ROOT / "docs" / "study.md"
SIZES = DemoConfig()
BOXES_STEPS = 1000  # training of a base that learns only boxes
COLUMNS = {  # where a row has the value, its factor, its decimals
    "Full": (("default", "full"), 100, 1), "Rare": (("default", "rare"), 100, 1),
    "Non-Rare": (("default", "non_rare"), 100, 1), "reward": (("reward",), 1, 2),
    "T = 1": (("reward_sampled",), 1, 2), "prec.": (("pairs", "precision"), 100, 1),
    "rec.": (("pairs", "recall"), 100, 1), "F1": (("pairs", "f1"), 100, 1),
    "right verb": (("right_verb",), 100, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """How a model is trained and scored. A row of a table is its mean over seeds."""

    label: str
    base: str = "boxes"  # trained on boxes only, from random weights; "pairs": demo/base_model
    left_out: float = run.LEFT_OUT  # as in demo.toy
    sft: int = 1500  # steps of SFT; 0: the base
    grpo: str | None = None  # options of GRPO, added to the demo's; None: no GRPO
    scores: str = "rank"  # of predict
    sft_flags: str = ""  # options of SFT, added to the demo's; older rows lack this key

    @property
    def settings(self) -> dict:
        """All but the label, as a row of the results has it."""
        return {name: value for name, value in asdict(self).items() if name != "label"}

    @property
    def folder(self) -> str:
        """The name of its run."""
        options = "" if self.grpo is None else f"_grpo{self.grpo}"
        return f"{self.base}_sft{self.sft}{self.sft_flags}{options}".replace(" ", "")

    def rows(self, results: list[dict]) -> dict[int, dict]:
        """Its rows of the results, by seed."""
        rows = ({"sft_flags": ""} | row for row in results)
        return {row["seed"]: row for row in rows if self.settings.items() <= row.items()}


@dataclass(frozen=True)
class Claim:
    """A claim: `column` is higher for one model than for another, on the same seeds."""

    text: str
    higher: Model
    lower: Model
    column: str = "Full"


def before_and_after(label: str, **settings) -> tuple[Model, Model]:
    """A model after SFT, and the same model after GRPO."""
    sft = Model(label, **settings)
    return sft, replace(sft, label=f"{label}, then GRPO", grpo="")


DEMO = before_and_after(f"SFT, {SIZES.sft_steps} steps", sft=SIZES.sft_steps, base="pairs")
LORA = replace(DEMO[1], label="SFT, then GRPO with LoRA", grpo="--lora-rank 8 --learning-rate 2e-3")
TEXT_FIRST = before_and_after("text first: SFT", sft=SIZES.sft_steps, base="pairs",
                              sft_flags="--text-first")  # fmt: skip
LENGTHS = [before_and_after(f"SFT, {n:,} steps", sft=n) for n in (400, 1000, 1200, 1500)]
RATES = [before_and_after(f"{100 * rate:g} % left out: SFT", left_out=rate)
         for rate in (0.0, 0.4, 0.55, 0.6, 0.7)]  # fmt: skip
MORE = Model("70 % left out: SFT, then GRPO with G = 16", grpo="--group-size 16", left_out=0.7)
FULL = Model("full reward", grpo="")
NO_LABEL = Model("without label reward", grpo="--without label")
NO_IOU = Model("without IoU reward", grpo="--without iou")
MATCHED = Model("labels on matched pairs", grpo="--label-reward matched")
READINGS = [Model(f"`{flags}`", grpo=flags) for flags in (
    "--kl-coef 0", "--kl-coef 0.001", "--group-size 8", "--group-size 16",
    "--duplicate-rule pair", "--duplicates-earn nothing", "--ratio sequence")]  # fmt: skip
SCORES = [Model(f"`--scores {rule}`", grpo="", scores=rule) for rule in ("ones", "likelihood")]
MODELS = {  # by section: the number of seeds that `run` trains, and the rows of the table
    "demo": (5, [replace(DEMO[0], label="base", sft=0), *DEMO]),
    "lora": (3, [*DEMO, LORA]),
    "text-first": (3, [*DEMO, *TEXT_FIRST]),
    "1": (3, [Model("base", sft=0), *(model for both in zip(*LENGTHS) for model in both)]),
    "2": (3, [FULL, NO_LABEL, NO_IOU]),
    "3": (2, [*(model for both in RATES for model in both), MORE]),
    "4": (3, [replace(FULL, label="labels of the whole image (printed)"), MATCHED]),
    "5": (3, [*READINGS, *SCORES]),
}
CLAIMS = {
    "demo": [
        Claim("GRPO raises mAP (16.77 to 18.33 in the paper)", *DEMO[::-1]),
        Claim("GRPO raises the reward of greedy answers", *DEMO[::-1], "reward"),
        Claim("GRPO raises mAP on rare classes", *DEMO[::-1], "Rare"),
    ],
    "lora": [
        Claim("GRPO with LoRA raises mAP", LORA, DEMO[0]),
        Claim("all weights are better than LoRA", DEMO[1], LORA),
    ],
    "text-first": [
        Claim("GRPO raises mAP with the text first", *TEXT_FIRST[::-1]),
        Claim("the image first is better after SFT", DEMO[0], TEXT_FIRST[0]),
        Claim("the image first is better after GRPO", DEMO[1], TEXT_FIRST[1]),
    ],
    "1": [Claim("1,500 steps of SFT are better than 1,000", LENGTHS[3][0], LENGTHS[1][0])]
    + [Claim(f"GRPO raises mAP after {sft.sft:,} steps of SFT", grpo, sft) for sft, grpo in LENGTHS]
    + [Claim("1,000 steps of SFT, then GRPO, beat 1,500 of SFT", LENGTHS[1][1], LENGTHS[3][0])],
    "2": [
        Claim("the label reward helps (0.76 in the paper)", FULL, NO_LABEL),
        Claim("the IoU reward helps (3.62 in the paper)", FULL, NO_IOU),
        Claim("the IoU reward helps more than the label reward", NO_LABEL, NO_IOU),
    ],
    "3": [Claim(f"GRPO raises mAP with {100 * sft.left_out:g} % left out", grpo, sft)
          for sft, grpo in RATES]
    + [Claim("GRPO with G = 16 raises mAP with 70 % left out", MORE, RATES[-1][0])],
    "4": [
        Claim("labels on matched pairs raise mAP", MATCHED, FULL),
        Claim("labels on matched pairs make more verbs right", MATCHED, FULL, "right verb"),
    ],
}  # fmt: skip


def column_value(row: dict, column: str) -> float | None:
    """The value of a row of the results in a column; None if it has none."""
    keys, factor, _ = COLUMNS[column]
    for key in keys:
        row = row.get(key)
    return None if row is None else factor * row


def mean_and_spread(values: list[float | None], decimals: int) -> str:
    """Mean and standard deviation over seeds; "-" where no seed has a value."""
    values = [value for value in values if value is not None]
    spread = f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{mean(values):.{decimals}f}{spread}" if values else "-"


def gains(claim: Claim, results: list[dict]) -> list[float]:
    """The difference in the claim's column, for each seed that both models have."""
    higher, lower = claim.higher.rows(results), claim.lower.rows(results)
    pairs = [(higher[seed], lower[seed]) for seed in sorted(higher.keys() & lower.keys())]
    return [column_value(a, claim.column) - column_value(b, claim.column) for a, b in pairs]


def verdict(claim: Claim, results: list[dict]) -> str:
    """One line: reproduced if it holds for every seed, not reproduced if for none."""
    found, decimals = gains(claim, results), COLUMNS[claim.column][2]
    if not found:
        return f"- {claim.text}: **open**, not run."
    agree = sum(gain > 0 for gain in found)
    word = {len(found): "reproduced", 0: "not reproduced"}.get(agree, "too noisy to say")
    word = word if len(found) > 1 else "one seed, too few to say"
    middle, low, high = (f"{of(found):+.{decimals}f}" for of in (mean, min, max))
    what = f"{claim.column} {middle} on the mean ({low} to {high})"
    return f"- {claim.text}: **{word}**; up in {agree} of {len(found)}, {what}."


def section_text(name: str, results: list[dict]) -> str:
    """The table and the verdicts of a section."""
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for model in MODELS[name][1]:
        rows = model.rows(results).values()
        cells = [mean_and_spread([column_value(row, column) for row in rows], decimals)
                 for column, (_, _, decimals) in COLUMNS.items()]  # fmt: skip
        lines += [f"| {model.label} | {len(rows)} | {' | '.join(cells)} |"] if rows else []
    return "\n".join([*lines, "", *(verdict(claim, results) for claim in CLAIMS[name])])


def changes_text(models: list[Model], results: list[dict]) -> str:
    """The mAP of each of these models minus that of the full reward: mean (bounds)."""
    found = [(model.label, gains(Claim("", model, FULL), results)) for model in models]
    return ", ".join(f"{label} {mean(gain):+.1f} ({min(gain):+.1f} to {max(gain):+.1f})"
                     for label, gain in found if gain) + "."  # fmt: skip


def filled_page(page: str, results: list[dict]) -> str:
    """The page with the text of each section between its two comments."""
    texts = {name: section_text(name, results) for name in CLAIMS}
    texts |= {"readings": changes_text(READINGS, results), "scores": changes_text(SCORES, results)}
    for name, text in texts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def read_results(file: Path) -> list[dict]:
    """The rows of the results; [] if the file is missing."""
    return [row for _, row in json_lines(file)] if file.exists() else []


def add_row(results: Path, model: Model, seed: int, out: Path) -> None:
    """Train and score a model, unless it has a row. out: folder of models and drawings."""
    if seed in model.rows(read_results(results)):
        return
    folder, data = trained(model, seed, out), drawings(model, seed, out)
    answers = f"test_{model.folder}"
    remove(data / answers)  # of a study that was interrupted, or with other scores
    run.run_command(run.predict_command(data, answers, folder, f"--scores {model.scores}"))
    run.run_command(run.score_command(data, answers, ""))
    row = {"seed": seed} | model.settings | figures(data / answers)
    with naming(results), open(results, "a") as file:
        file.write(json.dumps(row) + "\n")


def trained(model: Model, seed: int, out: Path) -> Path:
    """The folder of a model, which is trained now if it is missing."""
    data = drawings(model, seed, out)
    folder = data / model.folder
    if model.grpo is not None:
        start = trained(replace(model, grpo=None), seed, out)
        flags = f"--max-steps {SIZES.grpo_steps} --seed {seed} {model.grpo}"
        lines = [run.train_command(data, "grpo", start, flags, folder.name)]
    elif model.sft:
        start = trained(replace(model, sft=0, sft_flags="", left_out=run.LEFT_OUT), seed, out)
        flags = f"--max-steps {model.sft} --seed {seed} {model.sft_flags}"
        lines = [run.train_command(data, "sft", start, flags, folder.name)]
    elif model.base == "pairs":
        return run.BASE_MODEL
    else:
        folder = data / "base"
        lines = run.base_commands(data, SIZES.train_images, BOXES_STEPS, seed, "--boxes-only")
    if not (folder / "model").is_dir():
        remove(folder)  # of a study that was interrupted
        for line in lines:
            run.run_command(line)
    return folder / "model"


def drawings(model: Model, seed: int, out: Path) -> Path:
    """The folder of a model's drawings and traces, which are made now if it is missing."""
    data = out / f"seed{seed}_left-out{model.left_out:g}"
    if not data.is_dir():
        draft, sizes = data.with_name(f"{data.name}.tmp"), (SIZES.train_images, SIZES.test_images)
        remove(draft)
        run.run_command(run.toy_command(draft, *sizes, model.left_out, seed))
        run.run_command(run.trace_command(draft))
        draft.rename(data)
    return data


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    """Options of the command."""

    TASK, RUN = "what to do", "models to run"
    task: Literal["run", "write"] = required(
        "run: train and score models; write: fill docs/study.md", metavar="TASK", positional=True,
        group=TASK,
    )
    sections: tuple[Literal[*MODELS], ...] = option(
        tuple(MODELS), f"sections: {', '.join(MODELS)} (default: all)", metavar="NAME", group=RUN
    )
    seeds: tuple[int, ...] = option(tuple(range(5)), "seeds (default: 0-4)", metavar="N", group=RUN)
    out: Path = option(Path("runs/study"), "folder for models", metavar="DIR", group=RUN)


def main(argv: list[str] | None = None) -> None:
    """Run models, or write the page; --help lists the options."""
    config = parse_config(StudyConfig, __doc__, argv, prog="python -m demo.study")
    with one_line("", "to continue, run the same command again"):
        if config.task == "write":
            return replace_file(PAGE, filled_page(PAGE.read_text(), read_results(RESULTS)))
        for name in config.sections:
            seeds, models = MODELS[name]
            for seed, model in product(sorted(set(config.seeds) & set(range(seeds))), models):
                add_row(RESULTS, model, seed, config.out.resolve())


if __name__ == "__main__":
    main()
