"""Logits by llama.cpp's C API: `worker.py MODEL.gguf THREADS`, requests on stdin, one at a time.

A request is a line of JSON {"ids": [...], "keep": n, "room": n, "want": [...]}: of the n tokens
that are kept in memory the ids are put behind, and logits of the wanted places among them come
back, as a line {"rows": n} and n x vocabulary float32. `room`: tokens the sequence may come to.
The first line says what the model is. End of stdin ends it. Standard library only: it runs by path,
in an interpreter that has xllamacpp or llama-cpp-python, whose library is taken.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

_BATCH = 512  # llama.cpp's own default of a pass
_ROUND = 256
_F32, _F16 = 0, 1  # ggml_type
_UNKNOWN = "this version of llama.cpp has other context parameters than are known here"
_META = ("general.architecture", "expert_count", "expert_used_count", "context_length")


class _Parameters(ctypes.Structure):
    """More bytes than any version's parameters have: they are passed in memory, by value."""

    _fields_ = [("bytes", ctypes.c_char * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library() -> Path:
    """llama.cpp's shared library in this interpreter."""
    for package, pattern in (("xllamacpp", "xllamacpp*.so"), ("llama_cpp", "lib/libllama.*")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            for file in sorted(Path(spec.origin).parent.glob(pattern)):
                return file
    sys.exit("no xllamacpp and no llama_cpp in this interpreter: pip install xllamacpp")


def bound(path: Path) -> Any:
    """The library, with the types of what is called."""
    lib: Any = ctypes.CDLL(str(path))
    pointer, i32, u32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, ()),
        ("llama_context_default_params", _Parameters, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, _Parameters)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", i32, (pointer,)),
        ("llama_model_meta_val_str", i32, (pointer, ctypes.c_char_p, pointer, ctypes.c_size_t)),
        ("llama_init_from_model", pointer, (pointer, _Parameters)),
        ("llama_n_ctx", u32, (pointer,)),
        ("llama_free", None, (pointer,)),
        ("llama_set_n_threads", None, (pointer, i32, i32)),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_seq_rm", ctypes.c_bool, (pointer, i32, i32, i32)),
        ("llama_batch_init", _Batch, (i32, i32, i32)),
        ("llama_decode", i32, (pointer, _Batch)),
        ("llama_get_logits_ith", pointer, (pointer, i32)),
        ("llama_backend_init", None, ()),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def exact(parameters: _Parameters) -> None:
    """Attention in float32 with a float32 memory of keys and values, whatever the defaults are.

    The structure grows from version to version: flash_attn_type is the fourth of four enums that
    are -1, type_k and type_v are the two float16 behind a callback's two null pointers. Ends the
    process where a place is not found exactly once.
    """
    if struct.unpack_from("<IIII", parameters) != (512, 2048, 512, 1):
        sys.exit(_UNKNOWN)
    struct.pack_into("<i", parameters, _only(parameters, struct.pack("<4i", *[-1] * 4)) + 12, 0)
    types = bytes(16) + struct.pack("<ii", _F16, _F16)
    struct.pack_into("<ii", parameters, _only(parameters, types) + 16, _F32, _F32)


def _only(parameters: _Parameters, pattern: bytes) -> int:
    content = bytes(parameters)
    found = [at for at in range(0, 256, 4) if content[at : at + len(pattern)] == pattern]
    if len(found) != 1:
        sys.exit(_UNKNOWN)
    return found[0]


class Model:
    """A model, and a context that is made anew where a sequence needs more room."""

    def __init__(self, lib: Any, path: str, threads: int) -> None:
        self._lib, self._threads, self._room = lib, threads, 0
        self._context: Any = None
        self._model = lib.llama_model_load_from_file(
            path.encode(), lib.llama_model_default_params()
        )
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        self.vocab = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self._batch = lib.llama_batch_init(_BATCH, 0, 1)

    def meta(self) -> dict[str, str]:
        """What the file says of its model, as far as it says it."""
        kind = self._said("general.architecture")
        names = {name: name if "." in name else f"{kind}.{name}" for name in _META}
        return {name: value for name, full in names.items() if (value := self._said(full))}

    def logits(self, ids: list[int], keep: int, room: int, want: list[int]) -> list[bytes]:
        """Rows of the wanted places; raises RuntimeError where a pass fails."""
        lib, rows = self._lib, []
        self._make_room(max(room, keep + len(ids)), keep)
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), -1, keep, -1)
        wanted = set(want)
        for first in range(0, len(ids), _BATCH):
            part = ids[first : first + _BATCH]
            self._batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self._batch.token[i], self._batch.pos[i] = token, keep + first + i
                self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
                self._batch.logits[i] = first + i in wanted
            code = lib.llama_decode(self._context, self._batch)
            if code:
                raise RuntimeError(f"llama_decode ended with {code}")
            for i in range(len(part)):
                if first + i in wanted:
                    place = lib.llama_get_logits_ith(self._context, i)
                    rows.append(ctypes.string_at(place, 4 * self.vocab))
        return rows

    def _make_room(self, room: int, keep: int) -> None:
        if room <= self._room:
            return
        if keep:
            raise RuntimeError("a sequence has grown beyond the room that was asked for")
        if self._context:
            self._lib.llama_free(self._context)
        parameters = self._lib.llama_context_default_params()
        exact(parameters)
        self._room = -(-room // _ROUND) * _ROUND
        struct.pack_into("<I", parameters, 0, self._room)
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context or self._lib.llama_n_ctx(self._context) < room:
            raise RuntimeError(f"no context of {room} tokens: is there memory for it?")
        self._lib.llama_set_n_threads(self._context, self._threads, self._threads)

    def _said(self, name: str) -> str:
        text = ctypes.create_string_buffer(256)
        size = self._lib.llama_model_meta_val_str(self._model, name.encode(), text, len(text))
        return text.value.decode("utf-8", "replace") if size >= 0 else ""


def main(path: str, threads: int) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints goes to the log
    lib = bound(library())
    lib.llama_backend_init()
    model = Model(lib, path, threads)
    answers.write(json.dumps({"vocab": model.vocab, **model.meta()}).encode() + b"\n")
    answers.flush()
    for line in sys.stdin:
        try:
            rows = model.logits(**json.loads(line))
        except RuntimeError as error:
            answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
        else:
            answers.write(json.dumps({"rows": len(rows)}).encode() + b"\n")
            answers.writelines(rows)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
