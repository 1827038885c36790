"""What logs and answers tell of what users send."""

from tests.server.conftest import wait_until


def test_what_users_send_is_neither_logged_whole_nor_raw(server):
    long = "secret\n\x1b[31m" * 500
    body = {"prompt": "x", "max_tokens": 1, "stop": [long]}
    assert server.post("/v1/completions", body).status_code == 200
    for wrong in ({"bad_words": [long]}, {"model": long}, {long: 1}, {"temperature": long}, {"response_format": long}):
        answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1} | wrong)
        assert answer.status_code in (400, 404), answer.text
        assert len(answer.text) < 2000
    wait_until(lambda: any("stop=" in line for line in server.lines))
    assert not [line for line in server.lines if len(line) > 1000 or "\x1b" in line]
