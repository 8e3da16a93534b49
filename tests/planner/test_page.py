"""The page of a plan: one file that needs no other, drawings that are XML, no text of a plan taken for HTML."""

import copy
import html.parser
import re
import xml.dom.minidom

import pytest

from t5x_like.planner.page import page

GIB = 2**30
BAD = "<script>alert('x')</script>&\""
MOMENTS = [
    {"at": 0.25, "bytes": 3 * GIB, "parts": {"parameters": 3 * GIB}, "region": "embedding", "pass": "forward"},
    {
        "at": 1.0,
        "bytes": 12 * GIB,
        "parts": {"parameters": 3 * GIB, "saved activations": 9 * GIB},
        "region": "mlp",
        "pass": "backward",
    },
]
MEMORY = {
    "total_bytes": 12 * GIB,
    "parts": {"parameters": 3 * GIB, "saved activations": 9 * GIB},
    "largest": [
        {
            "bytes": 9 * GIB,
            "shape": "bf16[9,9]",
            "part": "saved activations",
            "operation": BAD,
            "region": "mlp",
            "pass": "forward",
        }
    ],
    "timeline": MOMENTS,
}
COLLECTIVES = [
    {"kind": "all-gather", "axes": ["fsdp"], "group_size": 4, "count": 8, "bytes": GIB, "network": "ici"},
    {"kind": "all-reduce", "axes": ["slice"], "group_size": 2, "count": 1, "bytes": GIB, "network": "dcn"},
]
PLAN = {
    "program": "train",
    "topology": "v5e:2x2",
    "slices": 2,
    "chips": 8,
    "mesh": {"slice": 2, "fsdp": 4, "tensor": 1},
    "hbm_bytes": 16 * GIB,
    "memory": MEMORY,
    "cycles": 1000,
    "collectives": COLLECTIVES,
    "kernels": [{"name": "splash", "count": 32}],
    "versions": {"jax": "0.10.2"},
}
TIMED = {
    "regions": [
        {"region": "mlp", "pass": "forward", "cycles": 600, "seconds": 0.6},
        {"region": "attention", "pass": "backward", "cycles": 400, "seconds": 0.4},
    ],
    "kernels": [{"name": "splash", "count": 32, "seconds": 0.1}],
    "collectives": [item | {"seconds": 0.5, "exposed_seconds": 0.25} for item in COLLECTIVES],
    "estimate": {
        "step_seconds": 1.25,
        "mfu": 0.5,
        "mfu_full_attention": 0.55,
        "model_flops": 1e15,
        "hardware_flops": 1.3e15,
        "tokens_per_second": 1e5,
        "run_seconds": 86400.0,
        "chip_hours": 1536.0,
        "cost": 6451.2,
        "currency": "USD",
        "bound_by": "products",
        "parts": {"products": 1.0, "exposed": 0.25},
    },
}


class Reader(html.parser.HTMLParser):
    """Tags that must be closed are, in order; keeps the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text: str) -> Reader:
    found = Reader()
    found.feed(text)
    assert found.open == []
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        xml.dom.minidom.parseString(drawing)
    return found


def test_a_page_needs_nothing_else_and_takes_no_text_for_markup():
    plan = copy.deepcopy(PLAN) | {"problem": BAD, "facts": [BAD], "topology": BAD}
    text = page(plan)
    found = read(text)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "a"}
    assert not re.search(r"(src|href|url)\s*[=(]", text)
    links = re.findall(r"https?://[^\"'\s<]*", text)
    assert set(links) == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert "".join(found.text).count(BAD) >= 4
    assert "<script" not in text


def test_the_drawing_of_memory_is_as_high_as_the_bytes_and_as_wide_as_the_program():
    found = read(page(PLAN))
    bars = [attrs for tag, attrs in found.tags if tag == "rect"]
    assert len(bars) == 3  # a part of a moment each
    heights = sorted(float(bar["height"]) for bar in bars)
    assert heights[2] == pytest.approx(3 * heights[0], rel=0.01)
    widths = sorted(float(bar["width"]) for bar in bars)
    assert widths[2] == pytest.approx(3 * widths[0], rel=0.01)
    assert len({bar["fill"] for bar in bars}) == 2
    text = "".join(found.text)
    for said in (
        "fits, 4.00 GiB are free",
        "saved activations",
        "9.00 GiB",
        "HBM of a device",
        "slice=2 fsdp=4",
        "DCN",
    ):
        assert said in text
    assert "Time" not in text and "by region" not in text


def test_what_a_plan_knows_of_time_is_shown():
    found = read(page(PLAN | TIMED))
    text = "".join(found.text)
    for said in (
        "1.25 s",
        "50.0%",
        "55.0%",
        "6,451.20 USD",
        "1,536",
        "products",
        "Seconds by region",
        "mlp, forward",
        "60.0%",
    ):
        assert said in text
    assert "exposed" in text and "0.25 s" in text


def test_every_program_of_an_iteration_has_its_sections_and_one_that_does_not_fit_its_reason():
    programs = [
        {"program": "rollout", "times": 4, "fits": True, "problem": "", "memory": MEMORY, "collectives": COLLECTIVES},
        {"program": "update", "times": 1, "fits": False, "problem": "the program does not fit: much"},
    ]
    plan = {key: value for key, value in PLAN.items() if key not in ("memory", "collectives", "kernels")}
    together = {"peak_bytes": 13 * GIB, "peak_program": "rollout", "collectives": COLLECTIVES}
    time = {"iteration_seconds": 12.5, "parts": {"rollout": 10.0, "update": 2.5}, "bound_by": "rollout"}
    plan |= {"program": "rl", "programs": programs, "iteration": together, "estimate": time}
    text = "".join(read(page(plan)).text)
    for said in (
        "12.5 s",
        "The most memory is that of rollout: 13.0 GiB of 16.0 GiB",
        "rollout, 4 times an iteration",
        "update, 1 times an iteration",
        "the program does not fit: much",
    ):
        assert said in text


def test_a_page_says_what_the_compiler_says_where_our_measure_is_a_little_off():
    """12 GiB by our reading: refused all the same on 16, and taken on 11.9."""
    refused = "".join(read(page(PLAN | {"fits": False, "problem": "the program does not fit"})).text)
    assert "12.0 GiB of 16.0 GiB HBM at the peak: does not fit, by the compiler." in refused
    taken = "".join(read(page(PLAN | {"fits": True, "hbm_bytes": int(11.9 * GIB)})).text)
    assert "12.0 GiB of 11.9 GiB HBM at the peak: fits, 0 B are free." in taken


def test_what_is_held_beside_a_program_decides_whether_it_fits():
    """12 GiB of 16 and 8 beside: too large, though the program alone is not."""
    program = {"program": "score", "times": 1, "fits": False, "problem": "", "memory": MEMORY, "beside_bytes": 8 * GIB}
    plan = {key: value for key, value in PLAN.items() if key not in ("memory", "collectives", "kernels")}
    together = {"peak_bytes": 20 * GIB, "peak_program": "score", "collectives": [], "fits": False}
    whole = page(plan | {"program": "rl", "programs": [program], "iteration": together})
    text = "".join(read(whole).text)
    assert "20.0 GiB of 16.0 GiB HBM at the peak: does not fit, by 4.00 GiB" in text
    assert "8.00 GiB of it is held beside the program" in text
    assert "are free" not in text
    assert whole.count('class="bad"') == 2


def test_what_has_no_time_or_may_run_less_often_is_named():
    missing = {
        "without_estimate": {"sort": 3},
        "unknown_loops": ["while.1"],
        "limited_loops": [{"name": "while.7", "turns": 6, "cycles": 60}],
        "kernels": [{"name": "odd", "count": 1, "seconds": None}],
        "pipeline": {"turns": 11, "bubble": 0.25},
    }
    text = "".join(read(page(PLAN | TIMED | missing)).text)
    assert "Not in these figures" in text and "25% is bubble" in text
    for said in ("sortx 3: the compiler", "odda kernel", "while.1a loop whose", "while.7a loop counted 6 times"):
        assert said in text
    assert "Not in these figures" not in page(PLAN | TIMED)
