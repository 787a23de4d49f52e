"""`moetrace report`: a page of a folder, or one sentence."""

import json
import sys

import pytest

import moetrace as mt

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    trace = mt.generate_trace("tiny-olmoe", requests=2, prompt=3, output=3)
    mt.replay(trace, policies="edge-ndp", slots=48).write(folder)
    return folder


def test_writes_a_page_and_says_nothing(run, folder, tmp_path):
    page = tmp_path / "page.html"
    assert run("report", folder, "-o", page) == (0, "", "")
    assert page.read_bytes().startswith(b"<!doctype html>")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_analyses_of_the_trace_join(run, folder, tmp_path):
    trace, cache, balance = tmp_path / "t.h5", tmp_path / "cache.json", tmp_path / "balance.json"
    mt.generate(trace, "tiny-olmoe", requests=2, prompt=3, output=30)
    mt.replay(trace, policies="edge-ndp", slots=48).write(tmp_path / "result")
    other, folder = folder, tmp_path / "result"
    for file, options in ((cache, ["cache"]), (balance, ["balance"])):
        code, out, _ = run("analyze", *options, trace, "--format", "json")
        assert code == 0
        file.write_text(out)
    page = tmp_path / "page.html"
    assert run("report", folder, "-o", page, "--cache", cache, "--balance", balance)[0] == 0
    for file in ("cache", "balance"):
        code, _, err = run("report", other, "-o", page, f"--{file}", tmp_path / f"{file}.json")
        assert code == 2 and f"{file}.json is of another trace" in err
    assert b'<h2 id="cache">' in page.read_bytes() and b'<h2 id="balance">' in page.read_bytes()
    code, out, _ = run("analyze", "cache", trace, "--curve", "--format", "json")
    cache.write_text(out)
    assert run("report", folder, "-o", page, "--cache", cache)[0] == 0
    cache.write_text('[{"phase": "all"}]')
    code, _, err = run("report", folder, "-o", page, "--cache", cache)
    assert code == 1 and "not what moetrace writes" in err and err.count("\n") == 1
    cache.write_text("[]")
    assert run("report", folder, "-o", page, "--cache", cache)[0] == 1
    balance.write_text('{"trace": {"model": "other"}, "layers": [], "over_time": []}')
    code, _, err = run("report", folder, "-o", page, "--balance", balance)
    assert code == 2 and "is of another trace" in err
    facts = {"model": "tiny-olmoe", "layers": 6, "experts": 32}
    balance.write_text(json.dumps({"trace": facts, "layers": [], "over_time": []}))
    code, _, err = run("report", folder, "-o", page, "--balance", balance)
    assert code == 1 and "has no imbalance of any layer" in err
    row = {"phase": "all", "hit_rate": 0.5, "capacity_experts": 10**30}
    for rows, said in (
        ([row], "not what moetrace writes"),
        ([row | {"capacity_experts": 8, "hit_rate": None}], "no hit"),
    ):
        cache.write_text(json.dumps(rows))
        code, _, err = run("report", folder, "-o", page, "--cache", cache)
        assert code == 1 and said in err and err.count("\n") == 1


def test_inputs_are_not_replaced(run, folder, tmp_path):
    page = tmp_path / "cache.html"
    page.write_text("[]")
    code, _, err = run("report", folder, "-o", page, "--cache", page)
    assert code == 2 and "is also an input" in err
    assert page.read_text() == "[]"


def test_wrong_use_is_one_sentence(run, folder, tmp_path):
    assert run("report", folder)[0] == 2
    assert run("report", tmp_path / "nowhere", "-o", tmp_path / "page.html")[0] == 2
    assert run("report", tmp_path, "-o", tmp_path / "page.html")[0] == 2
    code, _, err = run("report", folder, "-o", tmp_path / "no" / "page.html")
    assert code == 1 and err.count("\n") == 1 and "nothing was changed" in err


def test_without_the_extra_it_says_what_to_install(run, folder, tmp_path, monkeypatch):
    for missing in ("altair", "vl_convert"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, missing, None)
            code, _, err = run("report", folder, "-o", tmp_path / "page.html")
        assert code == 1 and "pip install '.[report]'" in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
