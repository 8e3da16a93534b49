"""Verifiers of all kinds, good and bad, for test_rewards.py: a worker imports this file."""

import os
import re
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
