"""Which regular expressions of a config are run. What is refused is never matched here: it would not come back."""

from __future__ import annotations

import re
import time

import pytest

from lorafx.name_patterns import STEPS_LIMIT, count_steps

# As found in adapters that people have published.
VISION = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2)))"
)
PUBLISHED = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    r"model\.layers\.1[0-9]\.mlp\.(?:gate|up)_proj",
    r".*language_model.*\.(q_proj|v_proj)",
    r"^(?!.*vision).*(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj$",
    r".*\.(self_attn|mlp)\.\w+",
    r"^model\.decoder\.layers\.\d+\.encoder_attn\.k_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(?:model\.)?layers\.(?:[0-9]|1[0-5])\..*_proj",
    r"(?=.*attn).*[qkv]_proj",
    VISION,
]


@pytest.mark.parametrize("pattern", PUBLISHED, ids=range(len(PUBLISHED)))
@pytest.mark.parametrize("template", ["{}", r"(.*\.)?({})$"], ids=["alone", "in PEFT's"])
def test_published_patterns_are_taken(pattern, template):
    if pattern is VISION and template != "{}":
        pytest.skip("names of modules, not of ranks")
    pattern = template.replace("{}", pattern)
    re.compile(pattern)
    assert 0 < count_steps(pattern) <= STEPS_LIMIT


REFUSED = {
    "a star in a star": ("(a+)+b", "repeats a group"),
    "a star in a lazy star": ("(?:a*)*?b", "repeats a group"),
    "choices that overlap, in a star": ("(a|aa)*b", "repeats a group"),
    "a group, many times": ("(ab){1000}", "repeats a group"),
    "a repeat beyond any name": ("(?:a{0,1000}){0,1000}", "repeats a group"),
    "five stars": (".*.*.*.*.*x", "steps for each layer"),
    "five stars in groups": ("(.*)(.*)(.*)(.*)(.*)x", "steps for each layer"),
    "five long repeats": (".{0,60}.{0,60}.{0,60}.{0,60}.{0,60}x", "steps for each layer"),
    "optional letters": ("a?" * 30, "steps for each layer"),
    "optional groups": ("(?:ab|.)?" * 30, "steps for each layer"),
    "choices that overlap": ("(?:.|m)" * 30, "steps for each layer"),
    "choices that begin alike": ("(?:aa|a)" * 30, "steps for each layer"),
    "choices of three": ("(?:a|ab|abc)" * 20, "steps for each layer"),
    "the same choice twice": ("(?:ab|ab|ba)" * 30, "steps for each layer"),
    "choices that differ in case": ("(?i)" + "(?:ma?|M)" * 30, "steps for each layer"),
    "the empty choice": ("(?:|.)" * 30, "steps for each layer"),
    "in a look-ahead": ("(?=.*.*.*.*.*x)y", "steps for each layer"),
    "many slow look-aheads": ("(?!.*.*.*.*x)" * 9, "steps for each layer"),
    "a long list behind stars": (".*.*.*(?:" + "|".join(f"{i}x" for i in range(900)) + ")", "steps for each layer"),
    "a reference back": (r"(a*)\1", "refers back"),
    "a reference by name": (r"(?P<x>a*)(?P=x)", "refers back"),
    "a condition": ("(a)?(?(1)b|c)", "refers back"),
    "a class of all letters": ("(?i)[\u0100-\U0010ffff]", "beyond ASCII"),
    "a class of all letters, escaped": (r"(?i)[^\u0100-\U0010ffff]*", "beyond ASCII"),
    "deep": ("(" * 60 + "a" + ")" * 60, "nested"),
    "deeper than Python goes": ("(" * 5000 + "a" + ")" * 5000, "regular expression|nested"),
    "long": ("a" * 20_000, "20,000 characters"),
    "no pattern": ("(a", "no regular expression"),
    "no repeat": ("a{5,2}", "no regular expression"),
    "a flag in the middle": ("a(?i)b", "no regular expression"),
    "too many times": ("a{0,99999999999}", "no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_patterns_that_may_take_for_ever_are_refused(case):
    pattern, text = case
    started = time.perf_counter()
    with pytest.raises(ValueError, match=text):
        count_steps(pattern)
    assert time.perf_counter() - started < 1


SLOWEST = [
    ".*.*.*.*X",
    "(?=.*.*.*.*X)a",
    ".*.*.*(?:.X|..|X)[a-z]",
    "(?:[a-z.]*[a-z.]*[a-z.]*X|a)",
    VISION + "X",
    "a*" * 4 + "b",
]


@pytest.mark.parametrize("pattern", SLOWEST, ids=range(len(SLOWEST)))
def test_the_slowest_patterns_that_are_taken_take_milliseconds(pattern):
    assert count_steps(pattern) <= STEPS_LIMIT
    for name in ("a" * 64, "model.language_model.layers.11.self_attn.experts.3.q_proj.text.mlp"):
        started = time.perf_counter()
        re.fullmatch(pattern, name)
        assert time.perf_counter() - started < 1


def test_steps_are_counted_from_above():
    """Against the ways that there are, counted by hand."""
    assert count_steps("abc") == 2
    assert count_steps("[ab][ab][ab]") == 4
    assert count_steps("(?:x|y)" * 3) < 10  # x and y exclude each other
    assert count_steps("(?:.|y)" * 3) >= 8  # 2 * 2 * 2 ways
    assert count_steps(".*.*") >= 65 * 66 / 2  # two ends among 65 places
    assert count_steps("a?b?") >= 4
