"""Only downloads use the network."""

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import importlib, os, pkgutil, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        os.write(2, repr((event, args)).encode())
        os._exit(9)

sys.addaudithook(refuse)
import kernels, minprefix
for package in (kernels, minprefix):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "__main__" not in module.name and ".assets" not in module.name:
            importlib.import_module(module.name)
model, tokenizer = minprefix.load("mini")
from minprefix.data.load import load_train_and_dev
train, dev = load_train_and_dev("restaurants", None, "paper", None)
print(minprefix.generate(model, tokenizer, [train[0].source], max_new_tokens=2) != [])
"""


@pytest.mark.slow
def test_importing_and_writing_a_text_need_no_network():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


@pytest.mark.parametrize("address", [("203.0.113.7", 80), ("example.org", 80)])
def test_a_test_cannot_reach_another_machine(address):
    """203.0.113.0/24 is kept free for examples (RFC 5737)."""
    with pytest.raises(pytest.fail.Exception, match="a test"):
        socket.create_connection(address, timeout=1)
    with pytest.raises(pytest.fail.Exception, match="a test"):
        urllib.request.urlopen(f"http://{address[0]}/", timeout=1)
