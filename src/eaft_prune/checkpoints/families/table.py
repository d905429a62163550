"""A checkpoint's tensors against a table of what they must be."""

from __future__ import annotations

import logging
from dataclasses import replace

from eaft_prune.checkpoints.families.base import Table, TensorSpec, some
from eaft_prune.checkpoints.formats.base import Format
from eaft_prune.checkpoints.read import INPUT, OUTPUT, ModelFiles
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError

log = logging.getLogger(__name__)


def checked(model_type: str, table: Table, model: ModelFiles) -> Table:
    """The table, with what is stored although loaders make it themselves.

    That is frequencies of rotary embeddings, and an output embedding that is tied to the input's.
    Raises UserError unless the checkpoint holds exactly these tensors in their shapes.
    """
    made = made_by_loaders(model, table)
    table = {**table, **made}
    missing = sorted(set(table) - set(model.tensors))
    if missing:
        raise UserError(f"{model.path}: tensors are missing: {some(missing)}")
    unknown = sorted(set(model.tensors) - set(table))
    if unknown:
        raise UserError(
            f"{model.path}: no rule for the tensors {some(unknown)} in a {model_type} model"
        )
    for name, spec in table.items():
        entry = model.tensors[name]
        if entry.shape != spec.shape:
            raise UserError(
                f"{model.path}: tensor {name} has shape {list(entry.shape)}, config.json asks for "
                f"{list(spec.shape)}"
            )
        if (spec.dtype or "float") != (entry.dtype if spec.dtype else _kind(entry.dtype)):
            raise UserError(
                f"{model.path}: tensor {name} is {entry.dtype}, expected {spec.dtype or 'a float'}"
            )
    if made:
        log.info("%s stores what loaders make, copied as it is: %s", model.path, some([*made]))
    return table


def made_by_loaders(model: ModelFiles, table: Table) -> dict[str, TensorSpec]:
    """What of a checkpoint its loaders make themselves and a table does not name."""
    made = {
        name: plain(*entry.shape)
        for name, entry in model.tensors.items()
        if name.endswith(".rotary_emb.inv_freq")
    }
    if OUTPUT in model.tensors and OUTPUT not in table and INPUT in table:
        made[OUTPUT] = table[INPUT]
    return made


def check_counts(model: ModelFiles, layers: int, experts: int) -> None:
    """Raise UserError where the table of what config.json asks for would only fill the memory.

    Every layer has tensors of its own, every expert bytes.
    """
    if layers > len(model.tensors) or layers * experts > model.weight_bytes:
        raise UserError(
            f"{model.path / 'config.json'} asks for {shortened(str(layers))} layers of "
            f"{shortened(str(experts))} experts, more than its weights hold"
        )


def without_quantisation(model: ModelFiles) -> ModelFiles:
    """The checkpoint as one of plain floats."""
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    return replace(model, config=config)


def plain(*shape: int) -> TensorSpec:
    """A tensor of any float that holds no expert."""
    return TensorSpec(None, shape)


def stored(
    projection: str, form: Format, sizes: tuple[int, int, int], layer: int
) -> dict[str, TensorSpec]:
    """The tensors that hold a projection of a layer's experts; sizes: experts, outputs, inputs."""
    return {
        name: TensorSpec(part.dtype, part.shape(*sizes), layer, axis=0)
        for name, part in zip(form.names(projection), form.parts, strict=True)
    }


def _kind(dtype: str) -> str:
    return "float" if dtype in ("BF16", "F16", "F32") else dtype
