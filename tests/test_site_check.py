"""The check of the built site finds each kind of fault; `.ci/run` runs it on the site itself."""

import pytest
import site_check

GOOD = """<html><head><link rel="canonical" href="https://example.org/"><script src="app.js"></script></head>
<body><h1 id="top">Title</h1><p>One - two</p><pre>
- in code
</pre><a href="other/page.html#part">there</a><a href="#top">up</a><a href="https://example.org">out</a>
<img src="a.png" srcset="a.png 1x, b.png 2x"></body></html>"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/page.html").write_text("<html><body><h2 id='part'>Part</h2></body></html>")
    for name in ("app.js", "a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "index.html").write_text(GOOD)
    return tmp_path


def test_a_good_site_has_no_fault(site):
    assert site_check.faults(site) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('src="app.js"', 'src="https://example.org/app.js"', "index.html loads https://example.org/app.js"),
        ('src="app.js"', 'src="//example.org/app.js"', "index.html loads //example.org/app.js"),
        ("b.png 2x", "https://example.org/b.png 2x", "index.html loads https://example.org/b.png"),
        ("b.png 2x", "c.png 2x", "index.html links to c.png, which is not there"),
        ("other/page.html#part", "other/pages.html", "index.html links to other/pages.html, which is not there"),
        ("page.html#part", "page.html#parts", "index.html links to other/page.html#parts, which is not there"),
        ('href="#top"', 'href="#bottom"', "index.html links to #bottom, which is not there"),
        ("<p>One - two</p>", "<p>Some:\n- one\n- two</p>", "index.html: not shown as a list: - one"),
        ("<p>One - two</p>", "<p>Some:\n1. one\n2. two</p>", "index.html: not shown as a list: 1. one"),
    ],
)
def test_each_fault_is_found(site, old, new, says):
    assert GOOD.count(old) == 1
    (site / "index.html").write_text(GOOD.replace(old, new))
    assert says in site_check.faults(site)
