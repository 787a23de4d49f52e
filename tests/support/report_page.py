"""The page of a report as elements, and what makes it stand alone."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import moetrace as mt

# A stranger may have written this anywhere.
HOSTILE = "</script><img src=x onerror=alert(1)>'\"&\x1b[31m"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Parsed(HTMLParser):
    """A page as elements: every start tag closed by its own end tag."""

    def __init__(self, page: bytes):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.scripts, self.text = [], [], [], []
        self.feed(page.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)


def parsed(source, tmp_path, **options):
    mt.report(source, tmp_path / "page.html", **options)
    return Parsed((tmp_path / "page.html").read_bytes())


def digest(script):
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def check_alone(page):
    """Nothing is loaded: no address in any attribute but anchors of the page itself, and a policy that forbids it."""
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert "src" not in attributes and "srcset" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert re.findall(r"script-src ([^;]*)", policy) == [f"'sha256-{digest(page.scripts[-1])}' 'unsafe-eval'"]
