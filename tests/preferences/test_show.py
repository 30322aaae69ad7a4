"""The page of triples: what is marked, that nothing of the data is taken for HTML, that damage is shown."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from shared import shared
from tiny import load, picture, save_tiny_llava

from povid.fault import Fault
from povid.method.distortions.diffusion import Diffusion
from povid.method.distortions.other_picture import OtherPicture
from povid.preferences.__main__ import main
from povid.preferences.differences import changes, objects, overlap, segments
from povid.preferences.formats import find
from povid.preferences.show import marked, write_page
from povid.preferences.triple import Triple, Turn
from povid.training.datamodule import PreferenceDataset


def triple(image, id="a", good="A red bus.", bad="A blue bus and a dog.") -> Triple:
    asked = Turn("user", "What <b>is</b> it?")
    return Triple(id, image, (asked, Turn("assistant", good)), (asked, Turn("assistant", bad)))


def test_marks_are_on_words_that_differ():
    assert marked("A red bus.", "A blue bus & a dog.") == (
        [("A ", ""), ("red", "good"), (" bus", ""), (".", "")],
        [("A ", ""), ("blue", "bad"), (" bus", ""), (" & a dog", "bad"), (".", "")],
    )


def test_segments_join_to_both_texts():
    first, second = "Zwei  Käfer,\nrot_weiß — 3!", "Drei Käfer; rot 💥 weiß"
    pieces = list(segments(first, second))
    assert "".join(a for a, _, _ in pieces) == first and "".join(b for _, b, _ in pieces) == second


def test_kinds_of_hallucination():
    for good, bad, kinds, added in (
        ("A red bus.", "A blue bus.", {"attribute"}, ()),
        ("A red bus.", "Two red buses.", {"count"}, ()),
        ("A bus.", "A bus and a fire hydrant.", {"object"}, ("fire hydrant",)),
        ("A cup left of a plate.", "A cup right of a plate.", {"relation"}, ()),
        ("Yes.", "No.", {"relation"}, ()),
        ("A unicorn.", "Two unicorns.", {"count"}, ()),
        ("A man holds a knife.", "A man holds a zither.", {"object"}, ()),
        ("It is good.", "It is well.", set(), ()),
    ):
        found = changes(good, bad)
        assert (set(found.kinds), found.objects) == (kinds, added), bad


def test_objects_by_their_coco_name():
    assert objects("Two men with wine glasses, puppies and a hot dog on the dining table.") == [
        "person",
        "wine glass",
        "dog",
        "hot dog",
        "dining table",
    ]


def test_overlap_counts_words_in_order():
    """Words a b c d and a x c d: 3 of 4 in common, 2 * 3 / 8 = 0.75."""
    assert overlap("a b c d", "A x, c d") == 0.75


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_shows_nothing_but_text(tmp_path):
    Image.new("RGBA", (900, 600), "red").save(tmp_path / "a.png")
    evil = "</p></main><script>alert(1)</script><img src=x onerror=alert(1)>"
    triples = [triple(tmp_path / "a.png", evil, "A.", evil), triple(b"broken", "b"), triple(tmp_path / "gone.png", "c")]
    write_page(triples, tmp_path / "page.html", title=evil, noise_steps=(500,))
    page = (tmp_path / "page.html").read_text()
    reader = Balanced()
    reader.feed(page)
    assert not reader.open
    assert "script" not in reader.seen and reader.seen.count("img") == 2 and reader.seen.count("article") == 3
    assert "an image of 6 bytes cannot be decoded" in page and "gone.png does not exist" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_several_questions_and_a_draw_by_seed(tmp_path):
    turns = [Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2")]
    triples = [
        Triple(f"id{n}", b"x", (*turns, Turn("assistant", "yes")), (*turns, Turn("assistant", "no"))) for n in range(30)
    ]
    pages = []
    for seed in (1, 1, 2):
        write_page(triples, tmp_path / "p.html", title="t", count=4, seed=seed)
        pages.append(re.findall("<b>(id[0-9]+)</b>", (tmp_path / "p.html").read_text()))
    assert pages[0] == pages[1] != pages[2] and len(pages[0]) == 4
    assert (tmp_path / "p.html").read_text().count('class="question"') == 8


def test_a_page_needs_a_record(tmp_path):
    with pytest.raises(Fault, match="no record"):
        write_page([], tmp_path / "p.html", title="t")


def test_noised_pictures_are_those_that_training_makes(tmp_path):
    """Under space=pixel a run with the same seed sees, for every record, exactly the bytes that the page shows."""
    pictures = [picture(tmp_path, f"p{n}", n, size=(40 + n, 32)) for n in range(4)]
    triples = [triple(image, str(n)) for n, image in enumerate(pictures)]
    write_page(triples, tmp_path / "p.html", title="t", count=3, seed=5, noise_steps=(500,))
    page = (tmp_path / "p.html").read_text()
    shown = re.findall(r'<b>(\d)</b>.*?noised, step 500" src="data:image/png;base64,([^"]+)"', page, re.DOTALL)
    assert len(shown) == 3 and [int(record) for record, _ in shown] != [0, 1, 2]

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="sigmoid", beta_start=1e-5, beta_end=5e-3)
    _, template = load(save_tiny_llava(tmp_path / "model"))
    data = PreferenceDataset(triples, template, Diffusion(scheduler, 500, "pixel"), seed=5)
    for record, encoded in shown:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.size == (40 + int(record), 32)
            seen = template.see(template.prompt("What is it?"), template.picture(image))[1]["pixel_values"]
        assert torch.equal(seen, data[int(record), 0].noised["pixel_values"])
        assert not torch.equal(seen, data[int(record), 1].noised["pixel_values"])


def test_the_command_on_the_real_sample(tmp_path, capsys):
    file = shared("real_sample/preferences.json")
    assert main(["show", str(file), "--out", str(tmp_path / "p.html"), "--count", "2"]) == 0
    page = (tmp_path / "p.html").read_text()
    assert page.count("noised, step 500") == 4 and page.count("<article>") == 2


def test_the_page_draws_any_option_of_conf_noise(tmp_path, capsys):
    """Under the same seed training sees the very picture that the page shows, another record's included."""
    pictures = [picture(tmp_path, f"p{n}", n, size=(40, 32)) for n in range(4)]
    records = [
        {
            "id": str(n),
            "image": image.name,
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
            "rejected_conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat."},
            ],
        }
        for n, image in enumerate(pictures)
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records))
    command = ["show", str(file), "--out", str(tmp_path / "p.html"), "--seed", "5"]
    assert main([*command, "--noise", "other_picture", "--noise", "crop", "smallest=0.3", "largest=0.5"]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "noised, step" not in page and page.count("<figcaption>crop smallest=0.3 largest=0.5<") == 4
    _, template = load(save_tiny_llava(tmp_path / "model"))
    data = PreferenceDataset(find("povid")(file, tmp_path, None), template, OtherPicture(), seed=5)
    shown = re.findall(r'<b>(\d)</b>.*?alt="other_picture" src="data:image/png;base64,([^"]+)"', page, re.DOTALL)
    assert len(shown) == 4
    for record, encoded in shown:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            seen = template.see(template.prompt("What?"), template.picture(image))[1]["pixel_values"]
        assert torch.equal(seen, data[int(record), 0].noised["pixel_values"])
    for noise, sentence in (
        (["bluer"], "--noise bluer: there is no such option; did you mean 'blur'?"),
        (["blur", "sigma=0"], "--noise blur sigma=0: sigma: found 0, needed more than 0"),
        (["crop", "smalest=0.1"], "'smalest' is not in struct"),
        (["sigmoid", "step=1000"], "step: found 1000; the scheduler has steps 0 to 999"),
    ):
        assert main([*command, "--noise", *noise]) == 2
        assert sentence in capsys.readouterr().err
