"""A page to draw a digit on, classified by a network that runs in the browser."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from mnist_lightning.model import MLP


def page(mlp: MLP, trained_on: str) -> str:
    """Put a network of any width, in float32, and a plain text that says what it was trained on, into `demo.html`.

    The HTML is to be written as UTF-8. It needs no other file, and its content-security policy lets it ask for none.
    """
    template = Path(__file__).with_name("demo.html").read_text(encoding="utf-8")
    weights = {name: tensor.float().numpy().astype("<f4").tobytes() for name, tensor in mlp.state_dict().items()}
    values = {
        "policy": _policy(template),
        "trained_on": html.escape(trained_on),
        "network": json.dumps({name: base64.b64encode(content).decode() for name, content in weights.items()}),
    }
    return re.sub(r"{{ (\w+) }}", lambda match: values[match[1]], template)


def _policy(template: str) -> str:
    """Allow the style and the script that the template has, and nothing else: no request, and no other code."""
    sources = "; ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", template, re.DOTALL)
    )
    return f"default-src 'none'; {sources}; img-src data:; base-uri 'none'; form-action 'none'"
