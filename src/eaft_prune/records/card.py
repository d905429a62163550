"""README.md of an exported checkpoint: its card, for people and for the hub.

It is written with the export, before anything is evaluated; the gate's verdict goes between two
comments later. All else, and a card without the comments, is left as people have edited it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaft_prune import __version__
from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import MANIFEST, MAPPING, ModelFiles
from eaft_prune.checkpoints.size import parameters
from eaft_prune.core.files import DENIED, write_atomically
from eaft_prune.core.types import KeepPlan

FILE = "README.md"
_START, _END = "<!-- verdict: written anew after every evaluation -->", "<!-- verdict: end -->"
_LICENCES = {"apache-2.0": r"Apache License Version 2\.0", "mit": r"(The )?MIT License"}
_LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")
inputs = tokenizer("The sum of two and two is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))
"""
log = logging.getLogger(__name__)


def _top_k(files: ModelFiles) -> int:
    return family_of(files.config).top_k(files.config)


def card(
    base: ModelFiles,
    made: ModelFiles,
    plan: KeepPlan,
    layout: KeepPlan,
    provenance: Mapping[str, Any],
) -> str:
    """What the checkpoint `made` is, how it is loaded and served; unknown things are left out.

    plan: what was asked for; layout: what the layers hold. provenance: `base` at least.
    """
    origin = provenance["base"]
    return f"""---
{_header(base.path, origin)}---

# {origin["label"]}, {plan.size} of {plan.n_experts} experts a layer

Made by eaft_prune {__version__} from a checkpoint with digest
`{origin["digest"]}`.
{_changes(plan, layout, provenance)}

| | base | this checkpoint |
| :-- | --: | --: |
| weights, GB | {base.weight_bytes / 1e9:.4g} | {made.weight_bytes / 1e9:.4g} |
| parameters | {parameters(base):,} | {parameters(made):,} |
| experts a layer | {plan.n_experts} | {layout.size} |
| experts a token | {_top_k(base)} | {_top_k(made)} |

## Load and serve
```python
{_LOADING}```

```
vllm serve .
python -m sglang.launch_server --model-path .
python llama.cpp/convert_hf_to_gguf.py . --outfile model.gguf
```

## What was kept
Plan `{plan.digest}`.
`{MAPPING}` maps new expert ids to the base's, `{MANIFEST}` lists the plan, the settings that
made it and the sha256 of every file;
`python -m eaft_prune task=verify verify.path=DIR verify.base=DIR` checks all of that.

## Verdict
{_START}
Not evaluated.
{_END}
"""


def tell(checkpoint: Path, verdict: str) -> None:
    """Put what the gate found, as Markdown, into a checkpoint's card.

    A card that is gone, or has no place for it any more, is left alone; so is one that cannot be
    read or written, which is said.
    """
    path = checkpoint / FILE
    if not path.is_file():
        return
    place = re.compile(f"(?<={re.escape(_START)}\n).*?(?={re.escape(_END)})", re.S)
    try:
        before = path.read_text(encoding="utf-8")
        after = place.sub(lambda _: f"{verdict.strip()}\n", before, count=1)
        if after != before:
            write_atomically(path, after)
    except UnicodeDecodeError as error:
        log.warning("%s does not tell the verdict: it is not UTF-8: %s", path, error.reason)
    except OSError as error:
        if error.errno not in DENIED:
            raise
        log.warning("%s does not tell the verdict: %s", path, error.strerror)


def _header(base: Path, origin: Mapping[str, str]) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import ModelCardData  # half a second

    data = ModelCardData(
        base_model=origin.get("hub_id"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["eaft_prune", "expert-pruning", "mixture-of-experts"],
        **_licence(base),
    )
    return f"{data.to_yaml()}\n"


def _licence(base: Path) -> dict[str, Any]:
    """What the base says of its licence: in the header of its card, else in LICENSE."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        said = (metadata_load(base / FILE) if (base / FILE).is_file() else None) or {}
    except (ValueError, yaml.YAMLError) as error:
        log.warning("%s: its licence is not read: %s", base / FILE, " ".join(str(error).split()))
        said = {}
    keys = ("license", "license_name", "license_link")
    found = {key: said[key] for key in keys if isinstance(said.get(key), str)}
    if "license" in found or not (base / "LICENSE").is_file():
        return found
    words = " ".join((base / "LICENSE").read_text(errors="replace").split())
    known = next((name for name, head in _LICENCES.items() if re.match(head, words)), None)
    return {} if known is None else {"license": known}


def _changes(plan: KeepPlan, layout: KeepPlan, provenance: Mapping[str, Any]) -> str:
    """How its bytes differ from the base's."""
    how = f" by {provenance['criterion']}" if "criterion" in provenance else ""
    changed = ""
    if "changed_tensors" in provenance:
        fitted = provenance["compensation"]
        changed = (
            f", but for the projections that `{MANIFEST}` lists as `changed_tensors`: kept experts "
            f"were refitted on {fitted['scored_tokens']:,} tokens of {fitted['pack']} by least "
            "squares, without gradients of the loss, to make up for the dropped ones"
        )
    text = (
        f"Experts were chosen{how}. The kept experts' bytes are those of the base{changed}; router "
        "rows were sliced with them; nothing was trained and `num_experts_per_tok` is unchanged."
    )
    if layout != plan:
        text += (
            f"\n\nLayers are filled up to {layout.size} experts with dropped ones whose router "
            f"bias is -inf, so that no token is routed to them; `{MANIFEST}` lists them as "
            "`padding`."
        )
    return text
