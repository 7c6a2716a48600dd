import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from study.report.page import Figure, Section, Table, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"br", "img", "link", "meta"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="70" height="40"><rect width="70" height="40"/></svg>'


class Elements(HTMLParser):
    """Collects the elements of a page and checks that they are nested and closed correctly."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.open = []
        self.text = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"th", "td", "h2", "p", "figcaption"}:
            self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def elements_of(page):
    elements = Elements()
    elements.feed(page.read_text(encoding="utf-8"))
    assert not elements.open
    return elements


@pytest.fixture
def page(tmp_path):
    (tmp_path / "curve.svg").write_text(SVG)
    Image.new("L", (30, 20)).save(tmp_path / "contours.png")
    wide = pd.DataFrame({"labelled patients": ["0", "1", "1"], "method": ["box", "<b>bold</b> & co", "UNet"]})
    wide = wide.assign(**{f"column {number}": ["39.3 ± 12.8", "", None] for number in range(12)})
    sections = [
        Section("Methods", "First.\n\nSecond, with <script>.", [Table("Dice in percent", wide)]),
        Section(
            "Figures",
            figures=[
                Figure(tmp_path / "curve.svg", "Dice by number", 'a "curve"'),
                Figure(tmp_path / "contours.png", "Contours", "contours"),
            ],
        ),
    ]
    path = tmp_path / "report" / "index.html"
    write_page(path, title="A study", description="What was found.", sections=sections)
    first = path.read_bytes()
    write_page(path, title="A study", description="What was found.", sections=sections)
    assert path.read_bytes() == first
    return path


def test_the_page_holds_headings_tables_and_figures(page):
    elements = elements_of(page)
    assert elements.attributes("html") == [{"lang": "en"}]
    assert "viewport" in [meta.get("name") for meta in elements.attributes("meta")]
    assert [image["alt"] for image in elements.attributes("img")] == ['a "curve"', "contours"]
    assert elements.text.count("39.3 ± 12.8") == 12
    for text in ("Methods", "First.", "Dice in percent", "Figures", "Contours", "column 11"):
        assert text in elements.text


def test_the_contents_lead_to_the_sections(page):
    elements = elements_of(page)
    links = [link["href"] for link in elements.attributes("a")]
    assert links == [f"#{section['id']}" for section in elements.attributes("section")]
    assert len(links) == 2


def test_what_a_study_calls_its_methods_is_text_not_markup(page):
    elements = elements_of(page)
    assert not elements.attributes("script")
    assert not elements.attributes("b")
    assert "<b>bold</b> & co" in elements.text


def test_the_page_needs_no_other_file(page):
    elements = elements_of(page)
    addresses = [
        value for _, attributes in elements.found for name, value in attributes.items() if name in {"src", "href"}
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?://", text)
    svg, png = (image["src"] for image in elements.attributes("img"))
    assert base64.b64decode(svg.removeprefix("data:image/svg+xml;base64,")).decode() == SVG
    assert (
        base64.b64decode(png.removeprefix("data:image/png;base64,")) == (page.parents[1] / "contours.png").read_bytes()
    )


def test_numbers_are_aligned_as_such_and_rows_grouped_by_the_first_column(page):
    elements = elements_of(page)
    headers = [cell.get("class") for cell in elements.attributes("th")]
    assert headers == ["number", None, *["number"] * 12]
    assert [row.get("class") for row in elements.attributes("tr")] == [None, "group", "group", None]


def test_a_figure_of_another_kind_is_refused(tmp_path):
    section = Section("Figures", figures=[Figure(tmp_path / "curve.pdf", "Dice", "curve")])
    with pytest.raises(ValueError, match=r"curve.pdf: expected a figure that ends in .png or .svg"):
        write_page(tmp_path / "index.html", title="A study", description="", sections=[section])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
def test_a_browser_shows_the_images_and_scrolls_only_the_table_on_a_phone(page, tmp_path):
    script = """<script>onload = () => {
        const images = [...document.images].map(image => `${image.naturalWidth}x${image.naturalHeight}`);
        const table = document.querySelector(".scroll");
        const wide = [document.documentElement.scrollWidth > innerWidth, table.scrollWidth > table.clientWidth];
        parent.postMessage([document.querySelectorAll("tbody tr").length, ...images, ...wide].join(" "), "*");
    }</script>"""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    phone = tmp_path / "phone.html"
    listener = "<script>onmessage = message => document.body.append(`[${message.data}]`)</script>"
    phone.write_text(f'<!DOCTYPE html><body>{listener}<iframe src="probe.html" width="400"></iframe></body>')
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"),
    ]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", phone.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=35, check=True)
    assert "[3 70x40 30x20 false true]" in done.stdout
