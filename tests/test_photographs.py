"""hoi_r1.py predict --image: photographs are held upright, told about, drawn, and never lost."""

import pytest
from PIL import Image

import engine.data.examples
import hoi_r1
from engine.report import photographs
from hicodet import HOI, InputError, Sample, format_completion, to_model_frame
from tests.runs import refusal, run
from tests.test_disk_full import no_file_above

RIDE = HOI((10.0, 20.0, 50.0, 180.0), (40.0, 100.0, 90.0, 190.0), "bicycle", ("ride", "sit on"))


@pytest.fixture
def sideways(tmp_path):
    """A photograph of 100 x 200 pixels, red above and blue below, that a phone stored turned."""
    upright = Image.new("RGB", (100, 200), "blue")
    upright.paste("red", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it
    path = tmp_path / "phone.jpg"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        assert stored.size == (200, 100)
    return path


def config_of(folder, *images, out, **changes):
    options = {"task_description": False, "max_new_tokens": 4, "workers": 0} | changes
    options |= {"model": str(folder / "model"), "image": tuple(map(str, images))}
    return hoi_r1.PredictConfig(out=str(out), **options)


def test_photograph_is_read_upright(sideways):
    (sample,) = photographs.photographs([str(sideways)])
    assert (sample.width, sample.height) == (100, 200) and sample.hois == ()
    image = engine.data.examples.read_image(sample, upright=True)
    assert [image.getpixel((50, y))[0] > 200 for y in (20, 180)] == [True, False]


def test_data_set_is_read_as_it_is_stored(sideways):
    sample = Sample("phone.jpg", sideways, 200, 100, (), (), frozenset())
    assert engine.data.examples.read_image(sample).size == (200, 100)


def test_prediction_of_photographs(folder, sideways, tmp_path, monkeypatch, capsys):
    """The model sees 84 x 168 or so; what it writes there is told in pixels of the photograph."""
    plain = tmp_path / "plain.png"
    Image.new("RGB", (300, 150)).save(plain)
    seen, read = [], engine.data.examples.read_image

    def read_image(sample, upright=False):
        seen.append(read(sample, upright).size)
        return read(sample, upright)

    monkeypatch.setattr(engine.data.examples, "read_image", read_image)
    monkeypatch.setattr(engine.data.examples.Examples, "decode", lambda self, ids: next(texts))
    (size,) = {e.model_size for e in engine.data.examples.Examples(
        str(folder / "model"), photographs.photographs([str(sideways)]), upright=True)}
    boxes = (to_model_frame(box, (100, 200), size) for box in (RIDE.human, RIDE.object))
    texts = iter([format_completion([HOI(*boxes, "bicycle", RIDE.verbs)], "One \x1b[31mrider."),
                  "<think> Nobody. </think>"])
    run(config_of(folder, sideways, plain, out=tmp_path / "out", slots=1))
    assert seen[-2:] == [(100, 200), (300, 150)]
    first, second = capsys.readouterr().out.strip().split("\n\n" + str(plain))
    assert "One  [31mrider." in first and "\x1b" not in first
    (ride, sit) = [row for row in first.splitlines() if "bicycle" in row]
    numbers = list(map(float, ride.split()[2:]))
    assert ride.startswith("ride ") and sit.startswith("sit on ") and numbers[0] == 1.0
    assert numbers[1:] == pytest.approx([*RIDE.human, *RIDE.object], abs=2)
    assert "Nobody." in second and "No interaction can be read" in second
    with Image.open(tmp_path / "out" / "phone_hois.png") as picture:
        assert picture.width == 640 and picture.height >= 1280
        red, blue = (picture.getpixel((620, y)) for y in (100, 1100))
        assert red[0] > 200 > blue[0]


def test_untrained_model_answers_without_a_data_set(folder, sideways, tmp_path, capsys):
    picture = tmp_path / "out" / "phone_hois.png"
    config = config_of(folder, sideways, out=picture.parent)
    with no_file_above(100):
        assert refusal(config).endswith(f"File too large: '{picture}.tmp'")
    assert not list(picture.parent.iterdir())
    run(config)
    assert "The answer was cut at --max-new-tokens." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["phone_hois.png"]


def test_pictures_of_what_was_answered_outlive_a_crash(folder, sideways, tmp_path, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "plain.png")
    texts = iter(["<think> Nobody. </think>"])  # and none for the second
    monkeypatch.setattr(engine.data.examples.Examples, "decode", lambda self, ids: next(texts))
    with pytest.raises(RuntimeError):  # StopIteration in a generator
        run(config_of(folder, sideways, tmp_path / "plain.png", out=tmp_path / "out", slots=1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["phone_hois.png"]


def test_dry_run_shows_the_prompt_alone(folder, sideways, tmp_path, capsys):
    run(config_of(folder, sideways, out=tmp_path / "out", dry_run=True))
    printed = capsys.readouterr().out
    assert "100 x 200 pixels" in printed and "reward" not in printed
    assert not (tmp_path / "out").exists()


def test_picture_never_takes_the_place_of_a_photograph(tmp_path):
    paths = photographs.picture_paths([str(tmp_path / "a.png")], str(tmp_path))
    assert paths == [tmp_path / "a_hois.png"]
    with pytest.raises(InputError, match="another one has this name"):
        photographs.picture_paths(["a.png", "x/a.jpg"], "out")


def test_what_is_no_photograph_is_one_line(tmp_path):
    (tmp_path / "notes.jpg").write_text("mine")
    Image.new("RGB", (402, 2)).save(tmp_path / "long.png")
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # turned; dots an inch, a fraction that becomes a text
    Image.new("RGB", (9, 9)).save(tmp_path / "damaged.jpg", exif=exif)
    stored = (tmp_path / "damaged.jpg").read_bytes()
    (tmp_path / "damaged.jpg").write_bytes(stored.replace(b"\x01\x1a\0\x05", b"\x01\x1a\0\x02"))
    for name, words in (("notes.jpg", "not a readable image"), ("absent.jpg", "No such file"),
                        ("damaged.jpg", "not a readable image .bad operand"),
                        ("long.png", "more than 200 times")):
        with pytest.raises(InputError, match=words) as refused:
            photographs.photographs([str(tmp_path / name)])
        assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_data_set_or_photographs(capsys):
    for flags in ("", "--data d --image a.jpg b.jpg"):
        with pytest.raises(SystemExit):
            hoi_r1.parse_config(["predict", "--model", "m", "--out", "o", *flags.split()])
        assert "--data, --image: give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--split train", "--limit 3", "--resume"])
def test_what_chooses_images_of_a_data_set_is_refused_beside_photographs(flag, capsys):
    line = f"predict --model m --out o --image a.jpg {flag}"
    with pytest.raises(SystemExit):
        hoi_r1.parse_config(line.split())
    assert f"error: {flag.split()[0]}: only with --data" in capsys.readouterr().err
