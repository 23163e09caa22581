"""LoRA adapters as factors: the delta of a weight is `scale * B @ A`, formed by rows when it is needed.

Reads what PEFT writes: any rank and alpha, `rank_pattern`, `alpha_pattern`, rsLoRA, DoRA (whose delta also needs the
base's weights), embeddings, transposed (`Conv1D`) weights, and the full tensors of `modules_to_save` and `bias`. Kinds
that stand on another base than the recorded one (PiSSA and the like) are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.headers import FLOATING, TensorInfo, read_header
from graftkit.checkpoints.sources import Checkpoint, fingerprint, read_json
from graftkit.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRAPPER = "base_model.model."  # what PEFT puts before a module's path
CHANGED_MEANING = (
    "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters", "kasa_config",
)  # fmt: skip
"""Settings under which an adapter is more than `scale * B @ A` on the modules that it names."""
MUTATED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """One module's adapter: `B` [out, r], `A` [r, in]; `transposed` where the base keeps its weight as [in, out].

    With a `magnitude` [out] (DoRA) the weight is `magnitude * (W0 + scale B A) / |W0 + scale B A|`, norms over `in`.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the delta, as the base keeps the weight."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter. `factors` and `tensors` (whole tensors that it replaces) are keyed by the wrapped module's
    tensor names, such as `model.layers.0.mlp.up_proj.weight`."""

    directory: Path
    factors: Mapping[str, Factors]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    store: Checkpoint = field(repr=False)
    kind: str = "adapter"
    channels: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """What DoRA multiplies each output channel by, kept by tensor once it is known (see `execution/magnitudes.py`)."""

    @property
    def base_name(self) -> str:
        """The base that the adapter records, or an empty string."""
        return str(self.config.get("base_model_name_or_path") or "")

    def fingerprint(self) -> str:
        """A short hash of the adapter's weights and of the settings that scale them."""
        return fingerprint((self.directory / WEIGHTS, self.directory / CONFIG))

    def content(self) -> str:
        """The same: an adapter has one file."""
        return self.fingerprint()

    def load(self, name: str, dtype: Any, *, direction: bool = False, scaled: bool = True) -> LowRank:
        """The factors of one tensor in memory, the scale in B unless not `scaled`, in floating-point `dtype`.

        Their product is the delta, or with `direction` what DoRA adds before it rescales the channels.
        """
        factors = self.factors[name]
        if factors.magnitude and not direction:
            raise CheckpointError(
                f"{self.directory}: a DoRA adapter, whose delta is no product of its factors: it depends on the base"
            )
        a, b = (self._array(info, dtype) for info in (factors.a, factors.b))
        b *= b.dtype.type(factors.scale if scaled else 1)
        return LowRank(a.T.copy(), b.T.copy()) if factors.transposed else LowRank(b, a)

    def magnitude(self, name: str) -> np.ndarray:
        """The magnitudes of one tensor's output channels under DoRA, float64 [out]."""
        import numpy as np

        info = self.factors[name].magnitude
        assert info is not None
        return self._array(info, np.float64).reshape(-1)

    def _array(self, info: TensorInfo, dtype: Any) -> np.ndarray:
        import numpy as np

        from graftkit.checkpoints.storage import STORAGE, as_float

        raw = self.store.read(info, 0, info.elements, np.empty(info.nbytes, np.uint8))
        held = raw.view(dtype) if STORAGE[info.dtype] == dtype else as_float(raw, info.dtype, dtype)
        return held.reshape(info.shape)

    def close(self) -> None:
        """Closes the files."""
        self.store.close()


@dataclass(frozen=True)
class LowRank:
    """A product `left [rows, r] @ right [r, columns]`, formed by ranges of its elements."""

    left: np.ndarray
    right: np.ndarray

    @cached_property
    def finite(self) -> bool:
        """Whether neither factor holds NaN or infinity."""
        import numpy as np

        return bool(np.isfinite(self.left).all() and np.isfinite(self.right).all())

    def block(self, start: int, stop: int) -> np.ndarray:
        """Elements `[start, stop)` of the flattened product; whole rows are formed, so ranges should be long."""
        from graftkit.checkpoints.storage import product

        columns = self.right.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = product(self.left[first:last], self.right).reshape(-1)
        return rows[start - first * columns : stop - first * columns]


def open_adapter(directory: Path) -> Adapter:
    """Reads an adapter's configuration and header. Raises CheckpointError for kinds that cannot be read as factors."""
    config = read_json(directory / CONFIG)
    _refuse_kinds(directory, config)
    if not (directory / WEIGHTS).is_file():
        hint = (
            "it holds pickle weights only; save it again as safetensors" if list(directory.glob("*.bin")) else "missing"
        )
        raise CheckpointError(f"{directory / WEIGHTS}: {hint}")
    held, _ = read_header(directory / WEIGHTS)
    pairs: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for name, info in held.items():
        module, part = _parse(directory, name)
        if info.dtype not in FLOATING:
            raise CheckpointError(f"{directory}: tensor {name!r} has dtype {info.dtype}; an adapter is floating point")
        if part:
            pairs.setdefault(module, {})[part] = info
        else:
            whole[module] = info
    for module in pairs:  # beside factors, PEFT saves the embedding that they adapt: the base's own weight
        whole.pop(f"{module}.weight", None)
    factors = {f"{module}.weight": _factors(directory, module, parts, config) for module, parts in pairs.items()}
    if not factors and not whole:
        raise CheckpointError(f"{directory}: the adapter holds no tensor")
    return Adapter(directory, factors, whole, config, Checkpoint(directory, held, config))


def _refuse_kinds(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{directory}: adapter of type {kind!r}; only LORA is read (merge it into its base first)"
        )
    if config.get("lora_bias"):
        raise CheckpointError(f"{directory}: uses lora_bias, which is not supported; merge it into its base first")
    changed = [name for name in CHANGED_MEANING if config.get(name)]
    if changed:
        raise CheckpointError(f"{directory}: uses {changed[0]}, which is not supported; merge it into its base first")
    started = config.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(MUTATED_BASE):
        raise CheckpointError(
            f"{directory}: started as {started!r}, so it belongs to a changed base; "
            "convert it to plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )


_AROUND = re.compile(rf"^({re.escape(WRAPPER)}|module\.|_orig_mod\.)+")
"""What PEFT, parallel training and `torch.compile` put around a model; `torch.compile` around modules, too."""

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)


def _parse(directory: Path, name: str) -> tuple[str, str]:
    """Module path and part of a factor; tensor name and an empty part for a whole tensor."""
    inner = _AROUND.sub("", name).replace("_orig_mod.", "")
    match = _PART.fullmatch(inner)
    if match:
        return match["module"], match["part"]
    if "lora_" in inner:
        raise CheckpointError(f"{directory}: cannot read tensor {name!r} (a kind of adapter that is not supported)")
    return inner.replace(".modules_to_save.", ".").replace(".base_layer.", "."), ""


def _factors(directory: Path, module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Factors:
    embedding = "lora_embedding_A" in parts
    wanted: tuple[str, ...] = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    wanted += ("lora_magnitude_vector",) if config.get("use_dora") else ()
    if set(parts) != set(wanted):
        raise CheckpointError(
            f"{directory}: module {module!r} needs all of {', '.join(wanted)}, has {', '.join(parts)}"
        )
    a, b, magnitude = parts[wanted[0]], parts[wanted[1]], parts.get("lora_magnitude_vector")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{directory}: module {module!r} has factors {list(a.shape)} and {list(b.shape)}, which do not multiply"
        )
    if magnitude and magnitude.elements != b.shape[0]:
        raise CheckpointError(
            f"{directory}: module {module!r} has {magnitude.elements} magnitudes for {b.shape[0]} output channels"
        )
    try:
        alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", a.shape[0])))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{directory}: {CONFIG} has a lora_alpha or alpha_pattern that is no number ({error})"
        ) from error
    scale = alpha / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return Factors(a, b, float(scale), transposed, magnitude, embedding)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path, as a regular expression."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module):
            return value
    return default
