"""The transformers engine: the checkpoint's own model code, with our experts and attention."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eaft_prune.checkpoint import ModelFiles
from eaft_prune.config import RuntimeSettings
from eaft_prune.engines import attention
from eaft_prune.engines import experts as moe
from eaft_prune.engines.base import OnTokens
from eaft_prune.families.base import Family
from eaft_prune.harmony import HarmonyTokens, harmony_tokens
from eaft_prune.types import Blocks, KeepPlan, TokenScores, Trace, UserError

_HEAD_BYTES = 256 << 20  # of float32 logits held at once
# on CPU activations of 2048 tokens stay in cache; a GPU wants to be filled
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class TransformersTokenizer:
    """The checkpoint's tokenizer, adding nothing of its own."""

    harmony: HarmonyTokens
    eos: int
    inner: Any

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.inner(list(texts), add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class _Routing:
    """Routing at predictor positions, one list a layer, one tensor a batch."""

    experts: list[list[torch.Tensor]]
    gates: list[list[torch.Tensor]]
    norms: list[list[torch.Tensor]]
    predictors: list[torch.Tensor] = field(default_factory=list)  # of the batch in flight

    def recorder(self, layer: int) -> moe.Recorder:
        def record(ids: torch.Tensor, gates: torch.Tensor, norms: torch.Tensor) -> None:
            rows = self.predictors[0]
            self.experts[layer].append(ids[rows].to("cpu", torch.int16))
            self.gates[layer].append(gates[rows].float().cpu())
            self.norms[layer].append(norms[rows].float().cpu())

        return record


@dataclass(frozen=True)
class TransformersEngine:
    """A model resident on one device."""

    model: Any
    family: Family
    device: torch.device
    dtype: str
    batch_tokens: int
    entropy_top_k: int
    top_k: int
    n_experts: int

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {
            "engine": "transformers",
            "dtype": self.dtype,
            "top_k": self.top_k,
            "entropy_top_k": self.entropy_top_k,
        }

    def masked(self, plan: KeepPlan) -> AbstractContextManager[None]:
        return self.family.masked(self.model, plan)

    @torch.inference_mode()
    def score(self, blocks: Blocks, on_tokens: OnTokens) -> TokenScores:
        logp, entropy = [], []
        for ids, predictors, targets in self._batches(blocks):
            hidden = self._hidden(ids)
            head = self._head(hidden[predictors], targets)
            logp.append(head[0])
            entropy.append(head[1])
            on_tokens(ids.numel())
        return _token_scores(blocks, logp, entropy)

    @torch.inference_mode()
    def trace(self, blocks: Blocks, on_tokens: OnTokens) -> Trace:
        layers = self.family.experts(self.model)
        routing = _Routing([[] for _ in layers], [[] for _ in layers], [[] for _ in layers])
        logp, entropy = [], []
        with _recording(layers, routing):
            for ids, predictors, targets in self._batches(blocks):
                routing.predictors[:] = [predictors]
                head = self._head(self._hidden(ids)[predictors], targets)
                logp.append(head[0])
                entropy.append(head[1])
                on_tokens(ids.numel())
        row_T = blocks.row_BS[blocks.scored_BS]
        return Trace(
            experts_TLK=_stack(routing.experts),
            gates_TLK=_stack(routing.gates),
            norms_TLK=_stack(routing.norms),
            scores=_token_scores(blocks, logp, entropy),
            pack_T=blocks.row_packs[row_T],
            row_T=row_T,
            packs=blocks.packs,
            n_experts=self.n_experts,
        )

    def _batches(self, blocks: Blocks) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per batch: ids [b, S], flat predictor positions of its scored tokens, their ids."""
        size = max(1, self.batch_tokens // blocks.seq_len)
        for first in range(0, len(blocks), size):
            ids = torch.from_numpy(blocks.ids_BS[first : first + size]).long().to(self.device)
            scored = torch.from_numpy(blocks.scored_BS[first : first + size]).to(self.device)
            flat = scored.reshape(-1).nonzero().squeeze(1)
            yield ids, flat - 1, ids.reshape(-1)[flat]  # position 0 is never scored

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        flat: torch.Tensor = out.reshape(-1, out.shape[-1])
        return flat

    def _head(
        self, hidden: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ln p of the target and normalised top-k entropy, without holding all logits."""
        head = self.model.get_output_embeddings()
        rows = max(1, _HEAD_BYTES // (4 * head.weight.shape[0]))
        logp, entropy = [], []
        for part, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logits = head(part).float()
            logp.append(-torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            top = torch.topk(logits, self.entropy_top_k, dim=-1).values
            log_q = torch.log_softmax(top, dim=-1)
            h = -(log_q.exp() * log_q).sum(dim=-1) / math.log(self.entropy_top_k)
            entropy.append(h.clamp(0.0, 1.0))
        if not logp:
            return hidden.new_zeros(0), hidden.new_zeros(0)
        return torch.cat(logp).clamp(max=0.0).cpu(), torch.cat(entropy).cpu()


def resolve_device(runtime: RuntimeSettings) -> torch.device:
    """The device asked for; raises UserError when the machine does not have it."""
    if runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(runtime.device)
    except RuntimeError as error:
        raise UserError(f"runtime.device = {runtime.device!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"runtime.device = {runtime.device!r}: this machine has no CUDA device")
    return device


def resolve_dtype(runtime: RuntimeSettings) -> str:
    """`auto` is bfloat16 on CUDA and float32 on CPU."""
    if runtime.dtype != "auto":
        return runtime.dtype
    return "bfloat16" if resolve_device(runtime).type == "cuda" else "float32"


def load_engine(
    files: ModelFiles, family: Family, runtime: RuntimeSettings, entropy_top_k: int
) -> TransformersEngine:
    """Load a checkpoint with the model code of transformers and our experts and attention."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    vocab = files.config.get("vocab_size", 0)
    if entropy_top_k > vocab:
        raise UserError(f"eval.entropy_top_k = {entropy_top_k} exceeds the vocabulary of {vocab}")
    ALL_ATTENTION_FUNCTIONS.register(attention.NAME, attention.sink_attention)
    ALL_EXPERTS_FUNCTIONS.register(moe.NAME, moe.experts_forward)
    device, dtype = resolve_device(runtime), resolve_dtype(runtime)
    # transformers has a bar of its own: shown where loading takes long enough to want one
    with quiet(bar=runtime.progress and files.weight_bytes > 1e9):
        model = AutoModelForCausalLM.from_pretrained(
            files.path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention.NAME,
            experts_implementation=moe.NAME,
            local_files_only=True,
            **family.load_arguments(files.config),
        )
    for module in family.experts(model):
        # some versions of transformers leave dequantised experts in bfloat16, whatever was asked
        module.to(getattr(torch, dtype))
    model.eval().to(device)
    return TransformersEngine(
        model=model,
        family=family,
        device=device,
        dtype=dtype,
        batch_tokens=runtime.batch_tokens or _BATCH_TOKENS[device.type],
        entropy_top_k=entropy_top_k,
        top_k=family.top_k(files.config),
        n_experts=family.n_experts(files.config),
    )


def load_tokenizer(path: Path) -> TransformersTokenizer:
    """The checkpoint's tokenizer; raises UserError where it lacks harmony tokens or an EOS."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            inner = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no usable tokenizer: {first}") from None
    if inner.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so rows cannot be joined")
    added = {str(token): ident for ident, token in inner.added_tokens_decoder.items()}
    return TransformersTokenizer(
        harmony=harmony_tokens(added, inner.decode, str(path)),
        eos=int(inner.eos_token_id),
        inner=inner,
    )


@contextmanager
def _recording(layers: list[torch.nn.Module], routing: _Routing) -> Iterator[None]:
    try:
        for index, module in enumerate(layers):
            module.__dict__[moe.RECORDER] = routing.recorder(index)
        yield
    finally:
        for module in layers:
            module.__dict__.pop(moe.RECORDER, None)


@contextmanager
def quiet(bar: bool = False) -> Iterator[None]:
    """Loading messages are transformers' own affair; errors still raise."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = transformers_logging.is_progress_bar_enabled()
    if not bar:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _token_scores(
    blocks: Blocks, logp: list[torch.Tensor], entropy: list[torch.Tensor]
) -> TokenScores:
    block_T = np.nonzero(blocks.scored_BS)[0].astype(np.int32)
    scores = TokenScores(
        torch.cat(logp).float().numpy(), torch.cat(entropy).float().numpy(), block_T
    )
    if not np.isfinite(scores.logp_T).all():
        raise UserError(
            f"pack {blocks.pack}: the model gives NaN probabilities; its weights are damaged, or "
            "runtime.dtype is too narrow for it"
        )
    return scores


def _stack(batches: list[list[torch.Tensor]]) -> np.ndarray[Any, Any]:
    return torch.stack([torch.cat(layer) for layer in batches], dim=1).numpy()
