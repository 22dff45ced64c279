import base64
import random
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vlmtune.errors import ImageError
from vlmtune.images import Shrunk, describe_source, examine, fingerprint, image_size, load_image

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encoded(image, format="PNG", **options):
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(size=(64, 48)):
    return Image.effect_noise(size, 100).convert("RGB")


def pixels(image):
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def error(source, **options):
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    assert len(str(caught.value)) < 400
    return str(caught.value)


RED_PNG = encoded(Image.new("RGB", (3, 2), "red"))
RED_URL = "data:image/png;base64," + base64.b64encode(RED_PNG).decode()


# ---- where a picture is


@pytest.mark.parametrize(
    "source", [RED_PNG, RED_URL, "red.png", Path("red.png"), "sub/../red.png", Image.new("RGB", (3, 2), "red")]
)
def test_a_picture_from_anywhere_is_the_same_rgb(source, tmp_path):
    (tmp_path / "red.png").write_bytes(RED_PNG)
    (tmp_path / "sub").mkdir()
    image = load_image(source, root=tmp_path)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert pixels(image) == [RED] * 6
    assert image_size(source, root=tmp_path) == (3, 2)


def test_an_absolute_path_leaves_the_root_alone(tmp_path):
    (tmp_path / "red.png").write_bytes(RED_PNG)
    assert load_image(str(tmp_path / "red.png"), root=Path("/nowhere")).size == (3, 2)


@contextmanager
def served(status, body):
    """The URL of a server on this machine that gives one answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/red.png"
        server.shutdown()


def test_a_url_is_downloaded():
    with served(200, RED_PNG) as url:
        assert load_image(url).size == image_size(url) == (3, 2)


def test_a_url_that_answers_with_an_error_is_refused_with_that_error():
    with served(404, b"") as url:
        assert "cannot be downloaded: HTTP Error 404" in error(url)


def test_a_server_that_is_not_there_is_named():
    assert error("http://127.0.0.1:9/a.png").startswith("picture 'http://127.0.0.1:9/a.png' cannot be downloaded: ")


# ---- what a picture looks like


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), WHITE),
        ("L", 7, (7, 7, 7)),
        ("1", 1, WHITE),
        ("1", 0, BLACK),
        ("I;16", 0, BLACK),
        ("I;16", 65535, WHITE),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_every_colour_mode_becomes_rgb_and_transparency_white(mode, colour, expected):
    image = Image.new(mode, (1, 1), colour)
    assert pixels(load_image(image)) == pixels(load_image(encoded(image))) == [expected]


@pytest.mark.parametrize(("value", "expected"), [(200, (200, 200, 200)), (65535, WHITE)])
def test_wide_grey_is_scaled_only_where_it_is_wide(value, expected):
    assert pixels(load_image(Image.new("I", (1, 1), value))) == [expected]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert load_image(image).getpixel((0, 0)) == RED
    red, green, blue = load_image(encoded(image, "JPEG", quality=100)).getpixel((0, 0))
    assert red > 250
    assert green < 5
    assert blue < 5


def test_a_palette_becomes_its_colours_and_its_transparent_entry_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((1, 0), 1)
    assert pixels(load_image(encoded(image))) == [BLACK, RED]
    assert pixels(load_image(encoded(image, transparency=0))) == [WHITE, RED]


def test_grey_with_a_transparent_shade_is_laid_on_white():
    image = Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 9)
    assert pixels(load_image(encoded(image, transparency=7))) == [WHITE, (9, 9, 9)]


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert pixels(load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))) == [RED] * 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_camera_is_undone_and_the_size_agrees(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encoded(noise((20, 10)), format, exif=exif)
    assert load_image(source).size == image_size(source) == ((20, 10) if orientation < 5 else (10, 20))


def test_a_turned_picture_shows_the_right_pixels():
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), WHITE)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its left side: turn a quarter clockwise
    assert pixels(load_image(encoded(image, exif=exif))) == [RED, WHITE]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_does_not_cost_the_picture():
    source = encoded(noise((20, 10)), "JPEG", exif=b"Exif\0\0II*\0 no such thing")
    assert load_image(source).size == image_size(source) == (20, 10)


@pytest.mark.parametrize("size", [(1, 1), (10000, 3), (3, 10000)])
def test_a_picture_of_odd_proportions_is_read(size):
    source = encoded(Image.new("RGB", size, "red"))
    assert load_image(source).size == image_size(source) == size


def test_the_picture_that_was_given_stays_as_it_was():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    load_image(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (255, 0, 0, 0))
    plain = Image.new("RGB", (2, 2), "red")
    load_image(plain).putpixel((0, 0), WHITE)
    assert plain.getpixel((0, 0)) == RED


def test_the_size_is_told_without_decoding(monkeypatch):
    source = encoded(noise())[:200]  # the header is there, most of the pixels are not
    assert image_size(source) == (64, 48)
    assert "truncated" in error(source)


# ---- what cannot be read


def test_a_missing_file_is_named_with_the_place_that_was_looked_at(tmp_path):
    assert error("a.png", root=tmp_path) == f"picture 'a.png' is not there: no file '{tmp_path / 'a.png'}'."


def test_a_directory_is_no_picture(tmp_path):
    (tmp_path / "a.png").mkdir()
    assert error("a.png", root=tmp_path) == "picture 'a.png' is a directory, wanted a file."


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (b"", "picture of 0 bytes is empty (zero bytes)."),
        (b"no picture", "picture of 10 bytes is not a picture in a format that Pillow reads."),
        (encoded(noise())[:-500], "is truncated or damaged: "),
        (encoded(noise(), "JPEG")[:-500], "is truncated or damaged: image file is truncated"),
        (RED_PNG[:-16] + b"\xff" + RED_PNG[-15:], "is truncated or damaged: "),
        ("data:image/png;base64", "has no comma, wanted 'data:image/png;base64,...'."),
        ("data:image/png;base64,AAAAA", "is not valid base64: "),
        ("data:image/png;base64,", "is empty (zero bytes)."),
        ("a\0.png", "cannot be opened: embedded null"),
        ("a" * 5000, "cannot be opened: File name too long."),
        ("http://[", "cannot be downloaded: "),
        (5, "picture of type int: wanted a PIL image, path, URL, data URL or bytes."),
        (None, "picture of type NoneType: wanted a PIL image"),
    ],
)
def test_what_is_no_whole_picture_is_refused_in_one_sentence(source, sentence):
    assert sentence in error(source)


def test_a_picture_that_was_opened_but_not_decoded_is_checked_too():
    image = Image.open(BytesIO(encoded(noise(), "JPEG")[:-500]))
    assert error(image).startswith("PIL image (RGB, 64×48) is truncated or damaged: ")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    assert error("a.png", root=tmp_path) == "picture 'a.png' is empty (zero bytes)."
    with pytest.raises(ImageError, match="zero bytes"):
        image_size("a.png", root=tmp_path)


@pytest.mark.parametrize("limit", [5, 2])  # Pillow itself warns above its limit and raises above twice as much
@pytest.mark.parametrize("filter", ["ignore", "error"])
@pytest.mark.parametrize("read", [load_image, image_size])
def test_a_decompression_bomb_is_refused_with_its_pixels_and_the_limit(monkeypatch, limit, filter, read):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(filter)
        with pytest.raises(ImageError, match=f"has 6 pixels, the limit is {limit} "):
            read(RED_PNG)


def test_without_a_limit_no_picture_is_a_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(RED_PNG).size == (3, 2)


def test_nothing_of_pillow_is_changed():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    load_image(RED_PNG)
    error(RED_PNG[:-20])
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells what it finds odd
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_damaged_bytes_give_a_picture_or_an_image_error(format, data):
    source = bytearray(encoded(Image.linear_gradient("L").resize((16, 16)), format))
    for place in data.draw(st.lists(st.integers(0, len(source) - 1), max_size=4)):
        source[place] ^= data.draw(st.integers(1, 255))
    for read in (load_image, image_size):
        try:
            read(bytes(source[: data.draw(st.integers(0, len(source)))]))
        except ImageError as refused:
            assert "\n" not in str(refused)  # noqa: PT017 (a picture is as good an outcome)


NOISE = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(40 * 30 * 3))
JPEGS = {"baseline": {}, "progressive": {"progressive": True}, "grey": {}, "cmyk": {}, "restarts": {"restart_marker_rows": 1}}


def outcome(read, source):
    try:
        return read(source)
    except ImageError as refused:
        return str(refused)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([*JPEGS, "PNG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_an_examination_finds_what_loading_would_and_nothing_else(kind, data):
    mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    source = bytearray(encoded(NOISE.convert(mode), "JPEG" if kind in JPEGS else kind, **JPEGS.get(kind, {})))
    for place in data.draw(st.lists(st.integers(0, len(source) - 1), max_size=4)):
        source[place] ^= data.draw(st.integers(1, 255))
    damaged = bytes(source[: data.draw(st.one_of(st.none(), st.integers(0, len(source))))])
    found, wanted = outcome(examine, damaged), outcome(load_image, damaged)
    assert found == (wanted if isinstance(wanted, str) else (wanted.size, fingerprint(damaged)))


def test_an_examination_tells_size_and_fingerprint_and_reads_a_file_once(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((64, 48)).save(tmp_path / "turned.jpg", exif=exif)
    path, opened = tmp_path / "turned.jpg", []
    expected = (image_size(path), fingerprint(path))
    assert expected[0] == load_image(path).size == (48, 64)
    smaller = Shrunk(path, 10, 20)
    read = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **options: opened.append(args) or read(*args, **options))
    assert examine(path) == expected
    assert len(opened) == 1
    assert examine(smaller) == ((10, 20), fingerprint(smaller))


def test_a_large_jpeg_is_examined_without_all_of_its_pixels(monkeypatch):
    sizes, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda own, *args: sizes.append(own.size) or convert(own, *args))
    assert examine(encoded(noise((800, 600)), "JPEG"))[0] == (800, 600)
    assert sizes[-1] == (100, 75)


def test_what_an_examination_refuses_is_named(tmp_path):
    (tmp_path / "half.jpg").write_bytes(encoded(noise(), "JPEG")[:-500])
    for name in ("half.jpg", "gone.jpg"):
        with pytest.raises(ImageError, match=name) as caught:
            examine(tmp_path / name)
        assert str(caught.value) == error(tmp_path / name)


# ---- names for messages


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (Image.new("L", (4, 3)), "PIL image (L, 4×3)"),
        (b"12345", "picture of 5 bytes"),
        ("data:image/png;base64,AAAA", "picture in a data URL of 26 characters"),
        ("a.png", "picture 'a.png'"),
        (Path("b/a.png"), "picture 'b/a.png'"),
        ("a" * 100 + "b" * 100, f"picture '{'a' * 60}…{'b' * 40}'"),
        (None, "picture of type NoneType"),
    ],
)
def test_a_source_is_described_in_a_few_words(source, name):
    assert describe_source(source) == name


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red one.png")
    assert load_image((tmp_path / "red one.png").as_uri()).size == (3, 2)
