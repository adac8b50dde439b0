"""hoi_r1.py predict --image: photographs are read upright, described, drawn, and never lost."""

import numpy as np
import pytest
from PIL import Image

import hoi_r1
from engine import configs
from engine.data.images import read_image
from engine.report import drawing
from engine.report.pictures import answer_text, draw_photograph, photographs, picture_paths, show
from hicodet import HOI, InputError, format_completion
from tests.annotation_files import own_line, write_own
from tests.run_folders import instance_row
from tests.runs import refusal, run
from tests.test_disk_full import no_file_above

RIDE = HOI((10.0, 20.0, 50.0, 180.0), (40.0, 100.0, 90.0, 190.0), "bicycle", ("ride", "sit on"))
# how a camera stores an upright picture, by its note in the EXIF data
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def store(image, path, orientation, noted=True):
    """Write an image as a camera stores it, and return the size of what is stored."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(STORED[orientation]) if orientation > 1 else image
    stored.save(path, quality=95, exif=exif if noted else b"")
    return stored.size


@pytest.fixture
def sideways(tmp_path):
    """A photograph of 100 x 200 pixels that a phone stored turned."""
    assert store(Image.new("RGB", (100, 200)), tmp_path / "phone.jpg", 6) == (200, 100)
    return tmp_path / "phone.jpg"


def config_of(folder, *images, out, **changes):
    options = {"task_description": False, "max_new_tokens": 4, "workers": 0} | changes
    options |= {"model": str(folder / "model"), "image": tuple(map(str, images))}
    return configs.PredictConfig(out=str(out), **options)


def test_photograph_is_read_and_drawn_upright(sideways):
    (sample,) = photographs([str(sideways)])
    assert (sample.width, sample.height) == (100, 200) and sample.hois == ()
    assert read_image(sample, upright=True).size == (100, 200)
    picture = draw_photograph(sample, {"instances": [instance_row(RIDE)]})
    assert picture.size == (640, 1280)
    colour = tuple(bytes.fromhex(drawing.COLOURS[0][1:]))
    assert picture.getpixel((64, 600)) == picture.getpixel((576, 900)) == colour  # sides of boxes


def test_real_photograph_in_eight_orientations(folder, photo, tmp_path, capsys):
    """All are read upright and drawn alike, except for JPEG's noise in turned pixels."""
    paths, upright = [tmp_path / f"{number}.jpg" for number in range(1, 9)], Image.open(photo)
    sizes = [store(upright, path, number) for number, path in enumerate(paths, start=1)]
    assert sizes == [(640, 425)] * 4 + [(425, 640)] * 4
    run(config_of(folder, *paths, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert all(f"{path}, 640 x 425" in printed for path in paths)
    pictures = [Image.open(tmp_path / "out" / f"{path.stem}_hois.png") for path in paths]
    first, *others = (np.asarray(picture, float) for picture in pictures)
    assert max(abs(first - other).mean() for other in others) < 2 < abs(first - first[::-1]).mean()


def test_data_set_is_read_and_drawn_as_it_is_stored(photo, tmp_path):
    """With any EXIF data, boxes are in stored pixels."""
    (tmp_path / "images").mkdir()
    lines, pairs = [], [((10, 20, 50, 180), (40, 100, 90, 190), 151)]
    for number in range(1, 9):
        for noted in (True, False):
            name = f"{number}{noted}.jpg"
            width, height = store(Image.open(photo), tmp_path / "images" / name, number, noted)
            lines.append(own_line(name, "test", pairs) | {"width": width, "height": height})
    write_own(tmp_path, *lines)
    list(show(data=str(tmp_path), images=16, out=str(tmp_path / "out")))
    for number in range(1, 9):
        one, other = (Image.open(tmp_path / "out" / f"{number}{n}.png") for n in (True, False))
        assert one.size == other.size and one.tobytes() == other.tobytes()


def test_answer_is_reasoning_and_a_table(sideways):
    (sample,) = photographs([str(sideways)])
    text = format_completion([RIDE], "One \x1b[31mrider.")
    line = {"text": text, "instances": [instance_row(RIDE) | {"scores": [1.0, 0.5]}]}
    head, reasoning, empty, titles, *rows = answer_text(sample, line).splitlines()
    assert head == f"{sideways}, 100 x 200" and reasoning == "One  [31mrider." and not empty
    boxes = "10 20 50 180          40 100 90 190"
    assert rows[0].split(maxsplit=3) == ["ride", "bicycle", "1.000", boxes]
    assert rows[1].startswith("sit on ") and rows[1].endswith(f"0.500  {boxes}")


def test_unreadable_answer_is_shown_in_fifteen_lines(sideways):
    (sample,) = photographs([str(sideways)])
    line = {"text": "<think> ride, straddleride, " + "word " * 2000, "instances": []}
    _, *rows, more, empty, unread = answer_text(sample, line).splitlines()
    assert len(rows) == 15 and rows[0].startswith("ride, straddleride, word")
    assert more == "..." and unread.startswith("No interaction can be read")


def test_untrained_model_answers_without_a_data_set(folder, sideways, tmp_path, capsys):
    picture = tmp_path / "out" / "phone_hois.png"
    config = config_of(folder, sideways, out=picture.parent)
    with no_file_above(100):
        assert refusal(config).endswith(f"File too large: '{picture}.tmp'")
    assert not list(picture.parent.iterdir())
    run(config)
    assert "The answer was cut at --max-new-tokens." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["phone_hois.png"]


def test_finished_pictures_survive_crash(folder, sideways, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # its picture has more than a megabyte
    with no_file_above(500_000):
        refusal(config_of(folder, sideways, tmp_path / "noise.png", out=tmp_path / "out", slots=1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["phone_hois.png"]


def test_dry_run_shows_the_prompt_alone(folder, sideways, tmp_path, capsys):
    run(config_of(folder, sideways, out=tmp_path / "out", dry_run=True))
    printed = capsys.readouterr().out
    assert "100 x 200 pixels" in printed and "reward" not in printed
    assert not (tmp_path / "out").exists()


def test_picture_replaces_neither_a_photograph_nor_another_picture(tmp_path):
    paths = picture_paths([str(tmp_path / "a.png")], str(tmp_path))
    assert paths == [tmp_path / "a_hois.png"]
    with pytest.raises(InputError, match="two photographs have one name"):
        picture_paths(["a.png", "x/a.jpg"], "out")


@pytest.mark.parametrize("name, words", [
    ("absent.jpg", "No such file"),
    ("folder", "Is a directory"),
    ("damaged.jpg", "cannot be read as an image .bad operand"),
    ("long.png", "more than 200 times"),
])  # fmt: skip
def test_unusable_photograph_is_one_line(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (402, 2)).save(tmp_path / "long.png")
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # turned; dots per inch, a fraction that becomes a text
    Image.new("RGB", (9, 9)).save(tmp_path / "damaged.jpg", exif=exif)
    stored = (tmp_path / "damaged.jpg").read_bytes()
    (tmp_path / "damaged.jpg").write_bytes(stored.replace(b"\x01\x1a\0\x05", b"\x01\x1a\0\x02"))
    with pytest.raises(InputError, match=words) as refused:
        photographs([str(tmp_path / name)])
    assert name in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("flags, words", [
    ("", "--data, --image: give one of them"),
    ("--data d --image a.jpg b.jpg", "--data, --image: give one of them"),
    ("--image a.jpg --split train", "--split: only with --data"),
    ("--image a.jpg --resume", "--resume: only with --data"),
])  # fmt: skip
def test_data_set_or_photographs(flags, words, capsys):
    with pytest.raises(SystemExit):
        hoi_r1.parse_config(["predict", "--model", "m", "--out", "o", *flags.split()])
    assert words in capsys.readouterr().err
