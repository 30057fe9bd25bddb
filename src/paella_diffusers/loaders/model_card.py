"""The model card that is uploaded with a model, and whether someone has edited it since."""

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .. import EMOJI_MODEL
from ..about import pip_install

CARD = """---
{{ card_data }}
---

# {{ name }}

{{ what }} for [Paella](https://huggingface.co/papers/2211.07292), text to image by renoising discrete tokens, in
[diffusers](https://github.com/huggingface/diffusers) with `paella-diffusers`.

```bash
{{ install }}
```

```python
{{ usage }}
```
{% if training %}
## Training

| setting | value |
|---|---|
{% for name, value in training.items() %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if samples %}
## Samples

{% for sample in samples %}![{{ sample.prompt }}]({{ sample.path }}) “{{ sample.prompt }}”, seed {{ sample.seed }}

{% endfor %}{% endif %}"""
MARK = "\n<!-- made by paella-diffusers ({}): once edited, this card is kept as it is -->\n"


def model_card(
    thing: Any,
    repo_id: str,
    base_model: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    training: dict[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
    is_lora: bool = False,
    inversion_token: str | None = None,
    call: str = '"a prompt"',
) -> str:
    """
    The model card of a pipeline, model, scheduler or adapter.

    Args:
        base_model (`str`, *optional*): The Hub id that it was finetuned from; where a pipeline was loaded from unless given.
        license (`str`, *optional*): A licence's identifier on the Hub, such as `"mit"`.
        tags (`list[str]`, *optional*): Beside `paella` and `text-to-image`.
        training (`dict`, *optional*): Settings of the training, for a table.
        samples (`list[dict]`, *optional*): `image` (PIL), `prompt` and `seed` of pictures to show.
        is_lora (`bool`, defaults to `False`): Whether it is an adapter for `thing`.
        inversion_token (`str`, *optional*): The token whose vectors it is, for `thing`.
        call (`str`): The arguments of the call by which an adapter is used, as code.
    """
    class_name = type(thing).__name__
    origin = base_model or getattr(thing.config, "_name_or_path", "") or ""
    origin = "" if origin == repo_id else origin
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(origin)) and not Path(origin).exists()
    what = f"A `{class_name}`"
    usage = f'from paella_diffusers import {class_name}\n\n{class_name}.from_pretrained("{repo_id}")'
    if origin and Path(origin).resolve() == Path(EMOJI_MODEL).resolve():
        imports, base = "EMOJI_MODEL, PaellaPipeline", "EMOJI_MODEL)"
    else:
        imports, base = "PaellaPipeline", f'"{origin}")' if is_hub_id else '"BASE_MODEL")  # put its Hub id or folder here'
    load_base = f"from paella_diffusers import {imports}\n\npipe = PaellaPipeline.from_pretrained({base}\n"
    kind = []
    if is_lora:
        what, kind = "A LoRA adapter", ["lora"]
        usage = f'{load_base}pipe.load_lora_weights("{repo_id}")\nimage = pipe({call}).images[0]'
    elif inversion_token is not None:
        what, kind = f"Textual inversion's vectors of the token `{inversion_token}`", ["textual_inversion"]
        usage = (
            f'{load_base}pipe.load_textual_inversion("{repo_id}")\nimage = pipe("a photo of {inversion_token}").images[0]'
        )
    elif "Pipeline" in class_name:
        usage = f'from paella_diffusers import {class_name}\n\npipe = {class_name}.from_pretrained("{repo_id}")'
    samples = samples or []
    data = ModelCardData(
        base_model=origin if is_hub_id else None,
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["paella", "paella-diffusers", "text-to-image", *kind, *(tags or [])],
        widget=[{"text": sample["prompt"], "output": {"url": sample["path"]}} for sample in samples] or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        name=repo_id.split("/")[-1],
        what=what,
        install=pip_install(),
        usage=usage,
        training=training,
        samples=samples,
    )
    text = str(card)
    return text + MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def is_unedited(card: str) -> bool:
    text, _, rest = card.partition(MARK.split("{}")[0])
    return bool(rest) and rest.strip() == (_digest(text) + MARK.split("{}")[1]).strip()


def earlier_details(card: str | None) -> dict[str, Any]:
    """What the card said that does not follow from what is pushed."""
    data = ModelCard(card).data.to_dict() if card else {}
    return {name: data[name] for name in ("base_model", "license") if data.get(name)}


def save_samples(samples: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    saved = []
    for number, sample in enumerate(samples):
        (folder / "samples").mkdir(exist_ok=True)
        sample["image"].save(folder / "samples" / f"{number}.png")
        saved.append({"path": f"samples/{number}.png", "prompt": sample["prompt"], "seed": sample["seed"]})
    return saved
