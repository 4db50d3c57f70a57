"""The pages as text: valid HTML that needs nothing from outside. In a browser: tests/browser."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from ...pages import PAGES

EMPTY = {"meta", "img", "br", "hr", "link", "input"}
IN = {"td": "tr", "th": "tr", "figcaption": "figure", "title": "head", "style": "head"}


class Page(HTMLParser):
    """Tags that are opened, closed and nested as HTML wants them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.links: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert len(values) == len(attributes), f"an attribute of <{tag}> is given twice"
        assert tag not in IN or self.open[-1:] == [IN[tag]], f"<{tag}> in {self.open}"
        self.seen.append(tag)
        self.links += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes {self.open}"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_html_and_needs_no_network(name, tmp_path) -> None:
    text = PAGES[name](tmp_path).read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert page.open == []
    for tag in ("html", "head", "title", "body", "h1"):
        assert page.seen.count(tag) == 1, tag
    assert not {"script", "link", "iframe"} & set(page.seen)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert page.images
    for image in page.images:
        assert image["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        picture.load()
        assert min(picture.size) > 150
        # not an empty frame: lines, letters and bars in some colours
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_the_parser_finds_what_is_wrong() -> None:
    for broken in ("<p><b></p>", "<td>x</td>", "<p a=1 a=2></p>"):
        with pytest.raises(AssertionError):
            Page(broken)
