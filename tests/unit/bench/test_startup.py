"""`jaxengine bench startup`, in fresh processes."""

import json

from jaxengine.bench.startup import measure_startup
from jaxengine.cli.main import main


def test_startup_in_a_fresh_process(tiny):
    (result,) = measure_startup(
        {"model": str(tiny), "max_model_len": 64, "enable_prefix_caching": False}, warm_starts=0
    )
    assert result.cache == "cold"
    assert 0 < result.first_token_s < result.exit_s
    assert (result.peak_rss_bytes or 10**9) > 10**8


def test_startup_with_dummy_weights_needs_no_tokenizer(tiny, tmp_path, capsys):
    # A shape by itself, as those that come along.
    shape = tmp_path / "shape.json"
    shape.write_text((tiny / "config.json").read_text())
    flags = ["--load-format", "dummy", "--max-model-len", "64", "--warm-starts", "0", "--json", "-"]
    assert main(["bench", "startup", "--model", str(shape), *flags]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert 0 < result["first_token_s"] < result["exit_s"]


def test_startup_tells_what_went_wrong(capsys):
    assert main(["bench", "startup", "--model", "/no/such/model"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["bench", "startup", "--warm-starts", "-1"]) == 2
    assert "warm_starts=-1" in capsys.readouterr().err
