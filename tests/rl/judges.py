"""Verifiers of all kinds, good and bad, for test_rewards.py: a worker imports this file."""

import os
import pathlib
import re
import subprocess
import time


def length(prompt: str, answer: str, expected: str) -> float:
    return len(answer)


def raises(prompt: str, answer: str, expected: str) -> float:
    return 1 / (answer != "bad")


def leaves(prompt: str, answer: str, expected: str) -> float:
    if answer == "bad":
        os._exit(3)
    return 1.0


def infinite(prompt: str, answer: str, expected: str) -> float:
    return float("inf") if answer == "bad" else 1.0


def no_number(prompt: str, answer: str, expected: str):
    return None if answer == "bad" else 1.0


def sleeps(prompt: str, answer: str, expected: str) -> float:
    time.sleep(3600 if answer == "bad" else 0)
    return 1.0


def hopeless_pattern(prompt: str, answer: str, expected: str) -> float:
    """Exponential time inside of `re`, which lets no signal handler run."""
    if answer == "bad":
        re.match(r"(a+)+$", "a" * 64 + "b")
    return 1.0


def prints(prompt: str, answer: str, expected: str) -> float:
    print('[1, 5.0, ""]')
    os.write(1, b"noise\n")
    return 1.0


def beyond_float32(prompt: str, answer: str, expected: str) -> float:
    return 1e39 if answer == "bad" else 1.0


def greedy(prompt: str, answer: str, expected: str) -> float:
    """Wants as much memory as the machine has."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return len(bytearray(size)) if answer == "bad" else 1.0


def hangs_in_a_child(prompt: str, answer: str, expected: str) -> float:
    leaves_a_child(prompt, answer, expected)
    time.sleep(3600)
    return 1.0


def leaves_a_child(prompt: str, answer: str, expected: str) -> float:
    """Starts a process that nobody waits for; `prompt` is a file for its number."""
    child = subprocess.Popen(["sleep", "3600"])
    pathlib.Path(prompt).write_text(str(child.pid))
    return 1.0
