import json

import pytest

from moeray.serve.responses import PromptTokensDetails, Usage, _Answer


class Said(_Answer):
    text: str
    more: str = ""


@pytest.mark.parametrize(
    "text", ["a\u2028b\u2029", "\x85", "é\u0085\u0301", "日本 \u2028", "\\u2028", "a\nb\r\x0b\x1c"]
)
def test_an_answer_is_one_line_for_every_reader(text):
    data = Said(text=text).encode()
    assert len(data.decode().splitlines()) == 1
    assert json.loads(data) == {"text": text}


def test_what_was_not_given_is_not_sent():
    details = PromptTokensDetails(cached_tokens=0)
    usage = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3, prompt_tokens_details=details)
    assert json.loads(usage.encode())["prompt_tokens_details"] == {"cached_tokens": 0}
    assert "more" not in json.loads(Said(text="a").encode())
