"""A page to draw a digit on, read by a network that runs in the browser."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from torch import Tensor

from mnist_lightning.model import MLP


def page(mlp: MLP, trained_on: str) -> str:
    """Put a network into `demo.html`.

    Args:
        mlp: The network, of any width and type; the page holds it in float32.
        trained_on: What the page says that the network learned from, as plain text.

    Returns:
        HTML to be written as UTF-8. It needs no other file, and its content-security policy lets it ask for none.
    """
    template = Path(__file__).with_name("demo.html").read_text(encoding="utf-8")
    values = {
        "policy": _policy(template),
        "trained_on": html.escape(trained_on),
        "network": json.dumps({name: _encode(tensor) for name, tensor in mlp.state_dict().items()}),
    }
    return re.sub(r"{{ (\w+) }}", lambda match: values[match[1]], template)


def _policy(template: str) -> str:
    """Allow the style and the script that the template has, and nothing else: no request, and no other code."""
    sources = "; ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", template, re.DOTALL)
    )
    return f"default-src 'none'; {sources}; img-src data:; base-uri 'none'; form-action 'none'"


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.float().numpy().astype("<f4").tobytes()).decode()
