import re

import pytest

from paella_diffusers import EMOJI_MODEL, PaellaPipeline
from paella_diffusers.loaders.model_card import model_card


@pytest.fixture(scope="module")
def pipe():
    optional = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor")
    return PaellaPipeline.from_pretrained(EMOJI_MODEL, prior=None, prior_scheduler=None, **dict.fromkeys(optional))


def first_lines(card: str) -> str:
    """The code of the card down to the line that loads the base model."""
    return re.search(r"```python\n(.*?)pipe\.load_", card, re.DOTALL)[1]


@pytest.mark.parametrize("kind", [{"is_lora": True}, {"inversion_token": "<cat>"}])
def test_the_card_of_an_adapter_of_the_embedded_model_loads_that_model(pipe, kind):
    names = {}
    exec(first_lines(model_card(pipe, "my-adapter", **kind)), names)
    assert names["pipe"].config._name_or_path == EMOJI_MODEL


def test_other_bases_are_named_or_asked_for(pipe):
    assert 'from_pretrained("me/base")\n' in first_lines(model_card(pipe, "my-adapter", base_model="me/base", is_lora=True))
    card = first_lines(model_card(pipe, "my-adapter", base_model="/models/base", is_lora=True))
    assert card.endswith('from_pretrained("BASE_MODEL")  # put its Hub id or folder here\n')
