"""`jaxengine run-batch`."""

import json

import pytest

from jaxengine.cli.main import main
from jaxengine.server.batch import answered, check_batch, read_batch
from tests.server.conftest import ENGINE


def call(custom_id: object, url: str = "/v1/completions", **body: object) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny", "max_tokens": 4} | body}


CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]
LINES = [
    json.dumps(call("before", prompt="x")),
    json.dumps(call("torn", prompt="x")),
    json.dumps(call("chat", CHAT, messages=USER)),
    "",
    json.dumps(call("refused", prompt="x", temperature=-1)),
    json.dumps(call("half \ud800", prompt="x \ud800")),
    json.dumps(call("model", prompt="x", model="other")),
    json.dumps(call("url", "/v1/embeddings", prompt="x")),
    json.dumps(call("stream", prompt="x", stream=True)),
    json.dumps(call("method", prompt="x") | {"method": "GET"}),
    json.dumps(call("body", prompt="x") | {"body": []}),
    json.dumps(call(7, prompt="x")),
    "no json",
    "[]",
]


def test_a_batch_goes_on_where_it_was_cut(tiny, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(LINES))
    before = json.dumps({"id": "1", "custom_id": "before", "response": {"status_code": 200}, "error": None}) + "\n"
    output.write_text(before + '{"id": "2", "custom_id": "torn", "respo')
    command = ["run-batch", "-i", str(source), "-o", str(output), "--model", str(tiny), "--served-model-name", "tiny"]
    assert main([*command, *ENGINE]) == 0
    assert "13 lines: 2 answered, 10 errors, 1 before" in capsys.readouterr().err
    assert output.read_text().startswith(before)
    results = [json.loads(line) for line in output.read_text().splitlines()]
    by_id = {result["custom_id"]: result for result in results}
    assert len({result["id"] for result in results}) == len(results) == 13
    for name, kind in (("torn", "text_completion"), ("chat", "chat.completion")):
        response = by_id[name]["response"]
        assert (response["status_code"], response["body"]["object"]) == (200, kind)
        assert response["body"]["id"].endswith(response["request_id"])
        assert response["body"]["usage"]["completion_tokens"] <= 4
    for name, status, param in (("refused", 400, "temperature"), ("half \ud800", 400, None), ("model", 404, "model")):
        assert by_id[name]["response"]["status_code"] == status
        if param is not None:
            assert by_id[name]["response"]["body"]["error"]["param"] == param
    for name, message in (("url", "embeddings"), ("stream", "streamed"), ("method", "POST"), ("body", "object")):
        assert by_id[name]["response"] is None
        assert message in by_id[name]["error"]["message"]
    nameless = {result["error"]["line"] for result in results if result["custom_id"] is None}
    assert nameless == {12, 13, 14}
    # Everything has an answer now: nothing is loaded, nothing is written.
    whole = output.read_text()
    assert main([*command, "--max-model-len", "-5"]) == 0
    assert "all answered before" in capsys.readouterr().err
    assert output.read_text() == whole


def test_a_custom_id_that_comes_twice_is_refused(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([LINES[0], LINES[1], LINES[0]]))
    with pytest.raises(ValueError, match="'before' is on line 1 and on line 3"):
        check_batch(source)
    assert main(["run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_files(tmp_path, capsys):
    source, empty, other = (tmp_path / name for name in ("in.jsonl", "empty.jsonl", "other.jsonl"))
    source.write_text(LINES[0])
    empty.write_text("\n \n")
    other.write_text('{"some": "thing"}\n')
    for given, output, message in (
        (tmp_path / "none.jsonl", other, "No such file"),
        (empty, tmp_path / "out.jsonl", "has no line"),
        (source, source, "is the input"),
        (source, other, "no answer of a batch"),
        (source, tmp_path / "no" / "out.jsonl", "No such file"),
        (source, tmp_path, "directory"),
    ):
        assert main(["run-batch", "-i", str(given), "-o", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert other.read_text() == '{"some": "thing"}\n'


def test_a_torn_line_is_removed_and_another_is_not(tmp_path):
    output = tmp_path / "out.jsonl"
    whole = '{"custom_id": "a", "error": null}\n{"custom_id": null, "error": {"line": 3}}\n'
    output.write_bytes(whole.encode() + '{"custom_id": "ä'.encode()[:-1])
    assert answered(output) == {"a", 3}
    assert output.read_text() == whole
    assert answered(output) == {"a", 3}


@pytest.mark.parametrize(
    "line", ["[" * 3000 + "]" * 3000, '{"body": ' + '{"a":' * 3000 + "1" + "}" * 3001, "[" * 200_000]
)
def test_a_line_that_is_nested_deeply_is_that_lines_error(tmp_path, line):
    source = tmp_path / "in.jsonl"
    source.write_text(f"{line}\n{LINES[0]}\n")
    wrong, right = read_batch(source)
    assert "nested" in (wrong.error or "")
    assert right.error is None


@pytest.mark.parametrize("field", ["custom_id", "method", "url"])
def test_long_values_are_quoted_shortly(tmp_path, field):
    source = tmp_path / "in.jsonl"
    line = json.dumps(call("x", prompt="x") | {field: "\n\x1b" * 1_000_000})
    source.write_text(f"{line}\n{line}\n")
    first, _ = read_batch(source)
    if field == "custom_id":
        with pytest.raises(ValueError, match="is on line 1 and on line 2") as caught:
            check_batch(source)
        told = str(caught.value).removeprefix(str(source))
    else:
        told = first.error or ""
    assert len(told) < 400
    assert told.isprintable()
