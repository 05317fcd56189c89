"""Properties of an adapter that the server knows before its weights are loaded."""

import json

from adapters.traits import Traits


def test_default_traits_are_not_described() -> None:
    assert Traits().described() == {}
    assert Traits.of({"applied": {}, "features": []}) == Traits()


def test_what_is_described_comes_back_from_the_report_as_json() -> None:
    traits = Traits(
        additive=False, mergeable=False, invocation_tokens=(5, 7), owned=("norm",), vocab_size=131, tokenizer=True
    )
    report = json.loads(json.dumps({"traits": traits.described()}))
    assert Traits.of(report) == traits
