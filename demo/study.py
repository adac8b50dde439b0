"""The paper's tables on the toy, over several seeds, and two tables on the real annotations.

    # hours: every cell that has no JSON file yet; then demo/STUDY.md
    python -m demo.study run
    python -m demo.study write
    # what the rewards do not see, and what the rules of --scores are worth
    python -m demo.study blind --data hico_20160224_det
    python -m demo.study scores --data hico_20160224_det

A cell is one model, trained as in the demo but for what its name says, and what it answers on 1,000
held-out drawings. Its figures go to demo/study/NAME.json; models and drawings to --out. Cells of a
seed share its base model and, where they only differ in GRPO, the model after SFT. A run that was
cut short goes on with the cell it was at. Seeds may run beside each other, each in one process.
"""

import dataclasses
import json
import shutil
import typing
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import demo.run
from demo.blind import blind_table
from demo.score_rules import rules_table
from demo.show import figures
from demo.tables import MORE_ANSWERS, OPEN_FLAGS, RATES, rates_picture, study_page
from engine.configs import DemoConfig
from engine.files import replace_file, write_json
from engine.options import Config, option, parse_stage, required
from engine.signals import one_line

FIGURES = Path(__file__).parent / "study"
PAGE = Path(__file__).parent / "STUDY.md"
PICTURE = Path(__file__).parents[1] / "assets" / "left_out.svg"
SIZES = DemoConfig()
SFT_STEPS = 1500  # of most cells; the demo, which has its minutes to keep, takes fewer


@dataclass(frozen=True)
class Cell:
    """One model of the study."""

    seed: int
    left_out: float = demo.run.LEFT_OUT  # as in demo.toy
    sft: int = SFT_STEPS  # steps of SFT; 0: the base
    grpo: str | None = None  # options of GRPO beside the demo's; None: no GRPO
    scores: str = "rank"  # of predict

    @property
    def name(self) -> str:
        """Of the JSON file and the run's folder."""
        parts = [f"seed{self.seed}", f"left-out{self.left_out:g}", f"sft{self.sft}"]
        parts += [] if self.grpo is None else ["grpo", *self.grpo.replace("--", "").split()]
        return "_".join(parts + ([] if self.scores == "rank" else [self.scores]))

    @property
    def start(self) -> "Cell":
        """The cell that GRPO starts from."""
        return dataclasses.replace(self, grpo=None, scores="rank")


# What each section compares; a cell may stand in several. The first has the demo itself.
SECTIONS = {
    "demo": (range(5), [{"sft": 0}] + [{"sft": steps, **more}
                     for steps in (SIZES.sft_steps, SFT_STEPS) for more in ({}, {"grpo": ""})]),
    "1": (range(3), [{"sft": steps, **more} for steps in (400, 1000)
                     for more in ({}, {"grpo": ""})]),
    "2": (range(3), [{"grpo": "--without label"}, {"grpo": "--without iou"}]),
    "3": (range(2), [{"left_out": rate, **more} for rate in RATES
                     for more in ({}, {"grpo": ""})]
        + [{"left_out": RATES[-1], "grpo": MORE_ANSWERS}]),
    "4": (range(3), [{"grpo": "--label-reward matched"}]),
    "5": (range(3), [{"grpo": flags} for flags in OPEN_FLAGS]
        + [{"grpo": "", "scores": rule} for rule in ("ones", "likelihood")]),
}  # fmt: skip


def cells_of(sections, seeds) -> list[Cell]:
    """The cells of the sections in their order, seed by seed."""
    wanted = [(name, seed) for name, seed in product(sections, seeds) if seed in SECTIONS[name][0]]
    return [Cell(seed, **more) for name, seed in wanted for more in SECTIONS[name][1]]


class Study:
    """Runs cells. out: folder of models and drawings. sizes: of the drawings and trainings."""

    def __init__(self, out: Path, figures_folder: Path, sizes: DemoConfig = SIZES):
        self.out, self.figures_folder, self.sizes = out, figures_folder, sizes

    def run(self, cell: Cell) -> None:
        """Train and measure the model of a cell, if its JSON file is not there yet."""
        file = self.figures_folder / f"{cell.name}.json"
        if file.is_file():
            return
        model, data = self.model(cell), self.data(cell)
        answers = data / f"test_{cell.name}"
        shutil.rmtree(answers, ignore_errors=True)
        demo.run.predict(data, cell.name, model, 1, f"--scores {cell.scores}")
        demo.run.sample(data, answers / "sampled.json", [model], cell.seed, 1)
        sampled = json.loads((answers / "sampled.json").read_text())["reward"][0]
        file.parent.mkdir(parents=True, exist_ok=True)
        row = dataclasses.asdict(cell) | figures(answers) | {"reward_sampled": sampled}
        write_json(file, row)

    def model(self, cell: Cell) -> Path:
        """The folder of a cell's model, which is trained now if it is not there."""
        data, sizes = self.data(cell), self.sizes
        if cell.grpo is not None:
            flags = f"--max-steps {sizes.grpo_steps} --seed {cell.seed} {cell.grpo}"
            run = data / dataclasses.replace(cell, scores="rank").name
            return self.trained(run, "grpo", cell.start, flags)
        base = Cell(cell.seed, sft=0)
        if cell.sft:
            flags = f"--max-steps {cell.sft} --seed {cell.seed}"
            return self.trained(data / f"sft{cell.sft}", "sft", base, flags)
        data = self.data(base)
        if not (data / "base" / "model").is_dir():
            for folder in ("grounding", "base"):
                shutil.rmtree(data / folder, ignore_errors=True)
            demo.run.draw_for_base(data, sizes.train_images, cell.seed)
            demo.run.make_base(data, sizes.base_steps, cell.seed, 1)
        return data / "base" / "model"

    def trained(self, run: Path, stage: str, start: Cell, flags: str) -> Path:
        """The final model of the training in folder `run`, from the model of the cell `start`."""
        if not (run / "model").is_dir():
            model = self.model(start)
            shutil.rmtree(run, ignore_errors=True)  # of a study that was cut short
            demo.run.train(run.parent, stage, model, flags, 1, run.name)
        return run / "model"

    def data(self, cell: Cell) -> Path:
        """The folder of a cell's drawings and traces, which are made now if not there."""
        data = self.out / f"seed{cell.seed}_left-out{cell.left_out:g}"
        if not data.is_dir():
            draft, sizes = data.parent / f"{data.name}.tmp", self.sizes
            shutil.rmtree(draft, ignore_errors=True)
            numbers = sizes.train_images, sizes.test_images, cell.seed
            demo.run.make_data(draft, *numbers, left_out=cell.left_out)
            draft.rename(data)
        return data


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Train and measure the cells that have no JSON file yet.

    Sections are those of demo/STUDY.md; "demo" takes five seeds, 3 takes two, the others three.

        python -m demo.study run --sections 1 2 --seeds 0
    """


    sections: tuple[typing.Literal[*SECTIONS], ...] = option(
        tuple(SECTIONS), "parts of the page (default: all)", group="what to run"
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4), "seeds (default: 0 to 4)", metavar="N", group="what to run"
    )
    out: str = option(
        "runs/study", "folder for models and drawings", metavar="DIR", group="what to run"
    )


@dataclass(frozen=True, kw_only=True)
class WriteConfig(Config):
    """Write demo/STUDY.md and its picture from the figures there are.

    What was not run is said to be open.

        python -m demo.study write
    """


@dataclass(frozen=True, kw_only=True)
class BlindConfig(Config):
    """Edit perfect answers: the cost in mAP, and in reward.

    Some minutes; no model is needed, and no image is opened.

        python -m demo.study blind --data hico_20160224_det
    """


    data: str = required(
        "folder of hico_20160224_det: anno_bbox.mat", metavar="DIR", group="what to read"
    )


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(Config):
    """Score answers like a model's by each rule of predict --scores.

    Some minutes; no model is needed, and no image is opened.

        python -m demo.study scores --data hico_20160224_det
    """


    data: str = required(
        "folder of hico_20160224_det: anno_bbox.mat", metavar="DIR", group="what to read"
    )


STAGES = {"run": RunConfig, "write": WriteConfig, "blind": BlindConfig, "scores": ScoresConfig}


def main(argv: list[str] | None = None) -> None:
    """Run cells, write the page, or print a table on the real annotations."""
    config = parse_stage(STAGES, __doc__, argv, prog="python -m demo.study")
    again = "run the same command again to go on" if isinstance(config, RunConfig) else ""
    with one_line("", again):
        run_stage(config)


def run_stage(config: Config) -> None:
    """What the first word of the command line asks for."""
    if isinstance(config, RunConfig):
        study = Study(Path(config.out).resolve(), FIGURES)
        for cell in cells_of(config.sections, config.seeds):
            study.run(cell)
    elif isinstance(config, WriteConfig):
        rows = [json.loads(file.read_text()) for file in sorted(FIGURES.glob("*.json"))]
        replace_file(PAGE, study_page(rows))
        replace_file(PICTURE, rates_picture(rows))
    else:
        print((blind_table if isinstance(config, BlindConfig) else rules_table)(config.data))


if __name__ == "__main__":
    main()
