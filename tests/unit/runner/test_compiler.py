import gc
import subprocess
import sys
import threading
import time

import pytest

from jaxengine.runner.compiler import StepCompiler, freeze_heap


def test_failure_reaches_whoever_waits():
    compiler = StepCompiler(lambda key: 1 // key, num_threads=1)
    compiler.add([1, 0])
    assert compiler.get(1) == 1
    with pytest.raises(ZeroDivisionError):
        compiler.get(0)
    compiler.close()


def test_says_when_all_is_compiled_before_those_who_wait_go_on():
    calls, go = [], threading.Event()
    compiler = StepCompiler(lambda key: go.wait(60) and 1 // key, 2, lambda: (time.sleep(0.1), calls.append(1)))
    compiler.add([1, 2, 0, 4])
    go.set()
    assert [compiler.get(key) for key in (1, 2, 4)] == [1, 0, 0]
    with pytest.raises(ZeroDivisionError):
        compiler.get(0)
    assert calls == [1]
    assert compiler.get(5) == 0
    assert calls == [1, 1]
    compiler.close()


def test_begins_nothing_less_urgent_beside_what_is_waited_for():
    begun, go = [], {key: threading.Event() for key in "abcd"}

    def compile_one(key):
        begun.append(key)
        go[key].wait(60)
        return key

    def wait_for(keys):
        for _ in range(6000):
            if begun == list(keys):
                break
            time.sleep(0.01)
        time.sleep(0.05)
        assert begun == list(keys)

    compiler = StepCompiler(compile_one, num_threads=3)
    compiler.add(["a"], -1)
    compiler.add(["b", "c"])
    wait_for("a")
    waiting = threading.Thread(target=compiler.get, args=("c",))
    waiting.start()
    wait_for("ac")
    go["a"].set()
    assert compiler.get("a") == "a"
    wait_for("ac")
    go["c"].set()
    waiting.join(60)
    wait_for("acb")
    threading.Thread(target=compiler.get, args=("b",), daemon=True).start()
    while compiler._running != {"b": compiler.URGENT}:
        time.sleep(0.01)
    compiler.add(["d"])
    wait_for("acb")  # what is waited for while it is compiled is urgent too
    go["b"].set()
    wait_for("acbd")
    go["d"].set()
    compiler.close()


def test_what_is_hidden_from_the_garbage_collector_stays_until_it_is_shown_again():
    kept = [{"key": number} for number in range(1000)]
    before = gc.get_freeze_count()
    freeze_heap()
    try:
        assert gc.get_freeze_count() > before + 1000
        assert not any(x is kept for x in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(x is kept for x in gc.get_objects())


def test_program_that_ends_early_waits_for_the_compilation_under_way():
    program = """
import threading, time
from jaxengine.runner.compiler import StepCompiler

started = threading.Event()

def compile_one(key):
    started.set()
    time.sleep(0.5)
    print("compiled", key, flush=True)

StepCompiler(compile_one, num_threads=1).add(["a", "b"])
started.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "compiled a\n"), done.stderr
