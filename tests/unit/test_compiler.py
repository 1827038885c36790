import subprocess
import sys

import pytest

from jaxengine.runner.compiler import StepCompiler


def test_failure_reaches_whoever_waits():
    compiler = StepCompiler(lambda key: 1 // key, num_threads=1)
    compiler.add([1, 0])
    assert compiler.get(1) == 1
    with pytest.raises(ZeroDivisionError):
        compiler.get(0)
    compiler.close()


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
