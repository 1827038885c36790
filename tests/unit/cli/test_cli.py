"""The command line: its flags, what it prints, and how it fails."""

import argparse
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import time

import pytest

from jaxengine import EngineArgs, SamplingParams, __version__
from jaxengine.cli import chat, generate, serve
from jaxengine.cli.engine_flags import attribute_docs, engine_kwargs, sampling_kwargs
from jaxengine.cli.main import main, parse_args
from jaxengine.outputs import CompletionOutput, RequestOutput

NOT_FOR_A_SHELL = {
    EngineArgs: {"logits_processors"},
    SamplingParams: {
        "logits_processors",
        "output_kind",
        "logit_bias",
        "extra_args",
        "bad_words_token_ids",
        "structured_outputs",
    },
}
SMALL = ["--max-model-len", "128", "--max-num-batched-tokens", "16"]


def flags_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    {"generate": generate, "chat": chat, "serve": serve}[command].add_arguments(parser)
    return {action.dest for action in parser._actions}


@pytest.mark.parametrize(
    ("command", "cls"),
    [
        *((command, cls) for command in ("generate", "chat") for cls in (EngineArgs, SamplingParams)),
        ("serve", EngineArgs),
    ],
)
def test_every_field_has_a_flag(command, cls):
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields - flags_of(command) == NOT_FOR_A_SHELL[cls]


@pytest.mark.parametrize("cls", [EngineArgs, SamplingParams])
def test_every_flag_has_a_help_text(cls):
    documented = attribute_docs(cls)
    assert {field.name for field in dataclasses.fields(cls) if field.init} <= set(documented)
    assert all(documented.values())


def test_flags_become_fields():
    line = (
        "generate Hi --max-model-len 64 --no-enable-prefix-caching --gpu-memory-utilization 0.5 --seed 3 --stop a "
        "--stop b --max-tokens none --top-p 0.5 --ignore-eos --stop-token-ids 7 --logprobs 2"
    )
    args = parse_args(line.split())
    assert engine_kwargs(args) == {
        "max_model_len": 64,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "seed": 3,
    }
    assert sampling_kwargs(args) == {
        "seed": 3,
        "stop": ["a", "b"],
        "max_tokens": None,
        "top_p": 0.5,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "logprobs": 2,
    }


def test_flags_that_are_not_given_are_left_to_the_dataclasses():
    args = parse_args(["generate", "Hi"])
    assert engine_kwargs(args) == {}
    assert sampling_kwargs(args) == {}


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_answers_at_once_and_imports_little(argv):
    code = (
        "import sys\nfrom jaxengine.cli.main import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'jax', 'numpy', 'transformers', 'rich', 'tokenizers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 5  # 0.1 s on an idle machine; what must not be imported takes longer
    assert ("generate" in done.stdout) if argv == ["--help"] else (done.stdout == f"jaxengine {__version__}\n")


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "bench throughput", "bench latency", "bench startup"])
def test_help_of_commands(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert "--model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "Hi", "--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
        (["generate", "Hi", "--max-tokens", "0"], "max_tokens must be an integer at least 1"),
        (["generate", "Hi", "--model", "/no/such/model"], "model '/no/such/model' does not exist"),
        (["generate", "Hi", "--warmup", "sometimes"], "warmup='sometimes'"),
        (["generate", "Hi", "--n", "2"], "n must be 1 with greedy sampling"),
        (["generate", "--prompts-file", "/no/such/file"], "No such file"),
        (["chat", "--temperature", "-1"], "temperature must be a number at least 0"),
        (["serve", "--max-queue", "-1"], "max_queue=-1: must be at least 0"),
        (["serve", "--request-timeout", "0"], "request_timeout=0.0: must be above 0"),
        (["serve", "one", "--model", "another"], "model='another'"),
        (["serve", "--host", "203.0.113.1", "--port", "0"], "host='203.0.113.1'"),
        (["serve", "/no/such/model", "--port", "0"], "model '/no/such/model' does not exist"),
        (["bench", "throughput", "--workload", "sharegpt"], "needs --dataset"),
        (["bench", "throughput", "--lo", "9", "--hi", "8"], "hi=8: must be at least lo=9"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_server_without_its_packages_names_the_extra(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "zmq" else find_spec(name))
    assert main(["serve"]) == 2
    assert "zmq: pip install 'jaxengine[server]'" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="top_p"):
        main(["generate", "Hi", "--top-p", "0", "--debug"])


def test_no_prompt(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["generate"]) == 2
    assert "no prompt" in capsys.readouterr().err


def delta(request_id: int, index: int, text: str, finish_reason: str | None = None) -> RequestOutput:
    completion = CompletionOutput(index, text, [1] * len(text), finish_reason=finish_reason)
    return RequestOutput(str(request_id), None, [1], None, [completion], finished=finish_reason is not None)


def test_texts_are_printed_in_order_the_first_one_live():
    file = io.StringIO()
    printer = generate.TextPrinter(file, titles=True)
    for index, prompt in enumerate(["one", "two"]):
        printer.open(index, prompt, 1)
    printer.add(delta(1, 0, " b"))
    assert file.getvalue() == ""
    printer.add(delta(0, 0, " a"))
    assert file.getvalue() == "### one\n a"
    printer.add(delta(1, 0, "B", "length"))
    printer.add(delta(0, 0, "A", "length"))
    assert file.getvalue() == "### one\n aA\n\n### two\n bB\n"


def test_what_was_interrupted_is_printed_too():
    file = io.StringIO()
    printer = generate.TextPrinter(file, titles=False)
    printer.open(0, "one", 2)
    printer.add(delta(0, 1, " b", "length"))
    printer.add(delta(0, 0, " a"))
    printer.close()
    assert file.getvalue() == "[0] a\n[1] b\n"


def test_generate_json(tiny, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hello"}\n{"prompt_token_ids": [7, 8, 9]}\n')
    argv = ["generate", "First", "--prompts-file", str(file), "--model", str(tiny), "--json", "--ignore-eos"]
    assert main([*argv, "--max-tokens", "3", "--logprobs", "1", *SMALL]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["First", "Hello", None]
    for line in lines:
        (output,) = line["outputs"]
        assert len(output["token_ids"]) == len(output["logprobs"]) == 3
        assert output["finish_reason"] == "length"
    assert "13 tokens in, 9 out" in captured.err


def test_generate_text_is_what_llm_generates(tiny, capsys):
    from jaxengine import LLM

    argv = ["generate", "Hello", "--model", str(tiny), "--max-tokens", "5", "--quiet", *SMALL]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    with LLM(str(tiny), max_model_len=128, max_num_batched_tokens=16, max_num_seqs=1, warmup="lazy") as llm:
        (expected,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert captured.out == expected.outputs[0].text + "\n"


def test_ctrl_c_keeps_what_was_generated(tiny, capsys, monkeypatch):
    from jaxengine.engine.llm_engine import LLMEngine

    step, calls = LLMEngine.step, []

    def interrupted_step(self):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LLMEngine, "step", interrupted_step)
    argv = ["generate", "Hello", "--model", str(tiny), "--json", "--max-tokens", "50", "--ignore-eos", *SMALL]
    assert main(argv) == 130
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert output["finish_reason"] == "abort"
    assert 0 < len(output["token_ids"]) < 50


def test_chat_through_pipes(tiny, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("/system Be brief.\nHello\n\n/nonsense\nAgain\n/reset\nHello\n/exit\nno\n")
    )
    assert main(["chat", "--model", str(tiny), "--json", "--max-tokens", "4", *SMALL]) == 0
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert len(answers) == 3
    assert answers[0] | {"num_cached_tokens": 0} == answers[2] | {"num_cached_tokens": 0}  # /system outlives /reset
    assert answers[1]["num_prompt_tokens"] > answers[0]["num_prompt_tokens"]  # the conversation goes on
    assert answers[1]["num_cached_tokens"] > 0
    assert "there is no command /nonsense" in captured.err


def test_chat_goes_on_after_a_message_that_is_too_long(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 300 + "\nHello\n"))
    assert main(["chat", "--model", str(tiny), "--max-tokens", "4", *SMALL]) == 0
    assert "error:" in (err := capsys.readouterr().err)
    assert "4 out" in err
